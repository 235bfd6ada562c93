"""Images of every class from the same seeds whenever they are drawn: what a model believes now."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cil import parallel
from cil.methods.method import Generative
from cil.methods.scoring import BATCH_SIZE
from cil.methods.training import fitting


def seed_of(label: int, copy: int) -> int:
    """The seed of a class's `copy`-th image.

    (A generator of torch reads 32 bits of its seed: 16 for the class, 16 for the copy.)
    """
    return (label << 16) + copy


def drawn(
    method: Generative,
    groups: Sequence[Sequence[int]],
    per_class: int,
    *,
    guidance: float,
    steps: int,
    title: str,
    progress: bool,
) -> Tensor:
    """So many images of every class -> (classes, per_class, channels, H, W) in [-1, 1].

    `groups` are the labels of the class groups, all from 0 on. No batch holds images of two groups,
    so that a later one cannot change even the rounding of an earlier one's images. Several devices
    share the batches, and each gets all images.

    Raises:
        UserError: the GPU's memory is too small.
    """
    batches = []
    for group in groups:
        wanted = [(label, seed_of(label, copy)) for label in group for copy in range(per_class)]
        batches += [wanted[i : i + BATCH_SIZE] for i in range(0, len(wanted), BATCH_SIZE)]
    own = []
    show = progress and parallel.is_first()
    with fitting(title, "free what other programs use of it"):
        for batch in tqdm(parallel.deal(batches), desc=title, disable=not show, leave=False):
            labels, seeds = zip(*batch, strict=True)
            own.append(method.draw(labels, seeds, guidance, steps))
    return torch.cat(parallel.collect(own)).unflatten(0, (-1, per_class))


def as_bytes(images: Tensor) -> NDArray[np.uint8]:
    """Images (..., channels, H, W) in [-1, 1] -> (..., H, W, channels) from 0 to 255."""
    values = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1)
    result: NDArray[np.uint8] = values.numpy()
    return result
