"""The exceptions that speak to the user, and how other ends are told from a crash."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input: one sentence saying what is wrong, where, and what to do.

    `python -m cil.run` prints the sentence without a traceback and exits with code 2.
    """

    def __init__(self, sentence: str) -> None:
        # torch raises one from a loading process again, with the traceback in front of it.
        super().__init__(sentence.rpartition("cil.errors.UserError: ")[2].strip())


class DivergenceError(UserError):
    """Settings that fit, with which learning came to no numbers: a search may go on from it."""


def is_interrupt(error: BaseException) -> bool:
    """Whether it stems from Ctrl-C, also where Lightning has made an exit of it."""
    of_lightning = isinstance(error, SystemExit) and isinstance(
        error.__context__, KeyboardInterrupt
    )
    return of_lightning or isinstance(error, KeyboardInterrupt)


@contextmanager
def readers_missed() -> Iterator[None]:
    """Turn the loss of a process that reads images, which torch tells of, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            "A process that reads images was ended, as happens when memory runs out; the same line "
            "goes on from the last experience."
        ) from error
