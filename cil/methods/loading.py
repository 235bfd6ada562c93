"""How many processes read images, the same rule for everything that reads many."""

from cil import parallel
from cil.config import TrainerConfig
from cil.errors import UserError

# Starting processes takes longer than reading fewer: some seconds of decoding on one core.
FEWEST_PIXELS = 10_000 * 64 * 64


def workers(settings: TrainerConfig, images: int, side: int) -> int:
    """Processes for a DataLoader that reads `images` images, every pass over them counted.

    What `trainer.workers` says; where it says nothing, this process's share of the cores, or none
    (0: it reads them itself) for fewer than `FEWEST_PIXELS`. `side` is that of an image in pixels.

    Raises:
        UserError: `trainer.workers` is below zero.
    """
    if settings.workers is None:
        return _share(settings) if images * side * side >= FEWEST_PIXELS else 0
    if settings.workers < 0:
        raise UserError(f"trainer.workers is {settings.workers}: give 0 or more, or null.")
    return settings.workers


def _share(settings: TrainerConfig) -> int:
    """This run's share of the cores: other devices, or runs at its side, have theirs."""
    return max(1, parallel.cores() // max(settings.devices, settings.jobs))
