"""How many processes read images, the same rule for everything that reads many."""

from cil import parallel
from cil.config import TrainerConfig
from cil.errors import UserError

# Starting processes takes longer than reading fewer: some seconds of decoding on one core.
FEWEST_PIXELS = 10_000 * 64 * 64
MOST = 64  # processes that any machine can start; one of many cores four times as many as these


def check_workers(settings: TrainerConfig) -> None:
    """Raises UserError for a `trainer.workers` that no machine like this one can start."""
    most = max(MOST, 4 * parallel.cores())
    if settings.workers is not None and not 0 <= settings.workers <= most:
        raise UserError(
            f"trainer.workers is {settings.workers}: give 0 to {most} processes, or null."
        )


def workers(settings: TrainerConfig, images: int, side: int) -> int:
    """Processes for a DataLoader that reads `images` images, every pass over them counted.

    What `trainer.workers` says; where it says nothing, this process's share of the cores, or none
    (0: it reads them itself) for fewer than `FEWEST_PIXELS`. `side` is that of an image in pixels.

    Raises:
        UserError: what `check_workers` refuses.
    """
    check_workers(settings)
    if settings.workers is None:
        return _share(settings) if images * side * side >= FEWEST_PIXELS else 0
    return settings.workers


def _share(settings: TrainerConfig) -> int:
    """This run's share of the cores: other devices, or runs at its side, have theirs."""
    return max(1, parallel.cores() // max(settings.devices, settings.jobs))
