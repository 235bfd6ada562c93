"""Trials of a sweep: which one this process runs, as the environment says, and where it belongs.

`wandb agent` names its sweep and the W&B run that it has made for the trial in WANDB_SWEEP_ID and
WANDB_RUN_ID, `python -m cil.sweep` in CIL_SWEEP and CIL_TRIAL. Trials differ in their settings, so
that each needs a folder of records of its own.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cil.errors import UserError

OF_AGENT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID")
OF_LOCAL = ("CIL_SWEEP", "CIL_TRIAL")


@dataclass(frozen=True)
class Trial:
    """One trial; by_agent: its name is the id of the W&B run that an agent has made for it."""

    sweep: str
    name: str
    by_agent: bool

    def folder(self, runs: str) -> Path:
        """Where its records belong, within the folder of all records."""
        return Path(runs) / "sweeps" / self.sweep / self.name


def current() -> Trial | None:
    """The trial that this process runs; None if it is no part of a sweep."""
    for names in (OF_LOCAL, OF_AGENT):
        values = [os.environ.get(name) for name in names]
        if values[0] and values[1]:
            return Trial(values[0], values[1], by_agent=names is OF_AGENT)
    return None


@contextmanager
def running(sweep: str, name: str) -> Iterator[None]:
    """Within it this process, and those that it starts, run a trial of a local sweep."""
    before = {key: os.environ.get(key) for key in OF_LOCAL}
    os.environ.update(zip(OF_LOCAL, (sweep, name), strict=True))
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def check_single(methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises UserError when a trial would be several runs: one result is what a sweep can rank."""
    if len(methods) * len(seeds) > 1:
        raise UserError(
            f"A trial of a sweep is one run, but this one would be {len(methods) * len(seeds)} (of "
            f"methods: {len(methods)}, of seeds: {len(seeds)}); make methods and seeds parameters "
            "of the sweep, one value a trial."
        )
