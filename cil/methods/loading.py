"""How many processes load images."""

import os

from cil.config import TrainerConfig

_FEW = 10_000  # images that are read before processes to read them have started


def workers(settings: TrainerConfig, images: int) -> int:
    """Processes that load so many images: `trainer.workers`, or as many as there are cores."""
    if settings.workers is not None:
        return settings.workers
    return 0 if images < _FEW else len(os.sched_getaffinity(0))
