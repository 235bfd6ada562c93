"""The one exception that speaks to the user."""


class UserError(Exception):
    """Bad input: one sentence saying what is wrong, where, and what to do.

    `python -m cil.run` prints the sentence without a traceback and exits with code 2.
    """
