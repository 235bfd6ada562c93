"""Insertion and deletion: does an explanation name the pixels that a prediction rests on?

The protocol of RISE (Petsiuk et al. 2018, arXiv 1806.07421): the most important pixels go first.
Deletion turns them, step by step, into a constant; insertion puts them, step by step, back into a
blurred image. A good explanation makes the probability of the class fall early in the one (a small
area under its curve) and rise early in the other (a large area).

Shapes: B images, C classes, H x W pixels, S steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.errors import UserError

Probabilities = Callable[[Tensor], Tensor]  # images (B, channels, H, W) -> (B, C)


@dataclass(frozen=True)
class Protocol:
    """How pixels are taken away and put back."""

    step: int  # pixels that change at a time; RISE takes the image's side
    baseline: float = 0.0  # what deleted pixels become, in [-1, 1]; 0 is grey
    kernel: int = 11  # side of the Gaussian blur, in pixels
    sigma: float = 5.0  # its standard deviation, in pixels

    def check(self, side: int) -> None:
        """Raises UserError when a number is out of its range for images of this side."""
        if self.step < 1:
            raise UserError(f"step is {self.step}: change one pixel or more at a time.")
        if not -1 <= self.baseline <= 1:
            raise UserError(f"baseline is {self.baseline}: give a value from -1 to 1.")
        if self.kernel % 2 == 0 or not 0 < self.kernel < 2 * side:
            raise UserError(
                f"kernel is {self.kernel}: give an odd number below {2 * side}, twice the side."
            )
        if not 0 < self.sigma < float("inf"):
            raise UserError(f"sigma is {self.sigma}: give a number above 0.")


@dataclass(frozen=True)
class Curves:
    """The probability of each image's class after each step, the state before the first included.

    fractions_S: the share of pixels changed, from 0 to 1.
    """

    fractions_S: Tensor
    insertion_BS: Tensor
    deletion_BS: Tensor

    def insertion_auc(self) -> Tensor:
        """Area under each image's curve (B,); 1 at most."""
        return torch.trapezoid(self.insertion_BS, self.fractions_S)

    def deletion_auc(self) -> Tensor:
        return torch.trapezoid(self.deletion_BS, self.fractions_S)


def curves(
    images: Tensor,
    importance_BHW: Tensor,
    labels_B: Tensor,
    probabilities: Probabilities,
    protocol: Protocol,
    at_once: int = 256,
) -> Curves:
    """Follow the probability of each image's label while its pixels go, most important first.

    Of pixels that are equally important the upper, then the left one goes first. The channels of a
    pixel go together. About `at_once` altered images are judged at a time.

    Raises:
        UserError: importance of another shape than the images, or a number out of range.
    """
    B, _, H, W = images.shape
    protocol.check(min(H, W))
    if importance_BHW.shape != (B, H, W):
        raise UserError(
            f"The importance has the shape {tuple(importance_BHW.shape)}, but the images need "
            f"{(B, H, W)}: a number for every pixel."
        )
    counts_S = torch.tensor([*range(0, H * W, protocol.step), H * W], device=images.device)
    importance_BHW, labels_B = importance_BHW.to(images.device), labels_B.to(images.device)
    size = max(1, at_once // len(counts_S))
    insertion, deletion = [], []
    for first in range(0, B, size):
        rows = slice(first, first + size)
        part = images[rows], importance_BHW[rows], labels_B[rows]
        inserted, deleted = _followed(*part, counts_S, probabilities, protocol)
        insertion.append(inserted.float().cpu())
        deletion.append(deleted.float().cpu())
    return Curves(counts_S.cpu() / (H * W), torch.cat(insertion), torch.cat(deletion))


def _followed(
    images: Tensor,
    importance_BHW: Tensor,
    labels_B: Tensor,
    counts_S: Tensor,
    probabilities: Probabilities,
    protocol: Protocol,
) -> tuple[Tensor, Tensor]:
    """The probabilities after every step, by insertion and by deletion, (B, S) each."""
    changed = (ranks(importance_BHW)[:, None] < counts_S[:, None, None])[:, :, None]
    blurred = blur(images, protocol.kernel, protocol.sigma)
    inserted = images[:, None].where(changed, blurred[:, None])
    deleted = images[:, None].masked_fill(changed, protocol.baseline)
    labels_N1 = labels_B.repeat_interleave(len(counts_S))[:, None]
    shape = len(images), len(counts_S)
    insertion, deletion = (
        probabilities(altered.flatten(0, 1)).gather(1, labels_N1).view(shape)
        for altered in (inserted, deleted)
    )
    return insertion, deletion


def ranks(importance_BHW: Tensor) -> Tensor:
    """The place of each pixel in the order of importance, 0 for the most important (B, H, W)."""
    order = importance_BHW.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(importance_BHW.shape)


def blur(images: Tensor, kernel: int, sigma: float) -> Tensor:
    """Gaussian blur with a kernel of so many pixels a side; the border is mirrored."""
    offsets = torch.arange(kernel, device=images.device, dtype=images.dtype) - kernel // 2
    weights = (-0.5 * (offsets / sigma).square()).exp()
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, kernel)
    padded = F.pad(images, 4 * [kernel // 2], mode="reflect")
    rows = F.conv2d(padded, weights, groups=images.shape[1])
    return F.conv2d(rows, weights.mT.reshape(-1, 1, kernel, 1), groups=images.shape[1])
