"""How many processes read images, the same rule for everything that reads many."""

import os

from cil.config import TrainerConfig
from cil.errors import UserError

FEWEST = 10_000  # images: starting processes takes longer than reading fewer


def workers(settings: TrainerConfig, images: int) -> int:
    """Processes for a DataLoader that reads `images` images, every pass over them counted.

    What `trainer.workers` says; where it says nothing, all cores of this process, or none (0: this
    process reads them itself) for fewer than `FEWEST`.

    Raises:
        UserError: `trainer.workers` is below zero.
    """
    if settings.workers is None:
        return _cores() if images >= FEWEST else 0
    if settings.workers < 0:
        raise UserError(f"trainer.workers is {settings.workers}: give 0 or more, or null.")
    return settings.workers


def _cores() -> int:
    """The cores that this process may use: on a shared machine not all there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
