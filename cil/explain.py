"""Which tokens spoke for a class: token-wise mutual information (TMI, arXiv 2510.12060).

Of a token r_k^ij of scale k at place ij it is log p(r_k^ij | r_<k, class) - log p(r_k^ij | r_<k),
in nats, the latter under the null class; the contrastive form has the best wrong class in its
place.

Shapes: B images, C classes, K scales, L tokens, p_k the side of scale k, H x W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.errors import UserError
from cil.models.class_groups import NULL_CLASS

PASSES = 3  # log p(x | y) evaluations an image: of its class, the best wrong one and the null class


@runtime_checkable
class Explainable(Protocol):
    """A method that reads images as tokens: what `explain` asks of it."""

    tokenizer: Any  # a `MultiScaleTokenizer`

    @property
    def classes_seen(self) -> int: ...

    def pair_log_likelihoods(self, images: Tensor, labels_BP: Tensor) -> Tensor:
        """log p of every token under an image's own classes (B, P, L)."""

    def every_class(self, images: Tensor) -> Tensor:
        """Scores (B, classes seen) of which none is left out."""


@dataclass(frozen=True)
class Explanation:
    """What each token says of its image's class and of the best wrong one.

    Both against one null class, that of the class's own group where every group has one.
    """

    labels_B: Tensor
    rivals_B: Tensor
    label_BL: Tensor  # nats
    rival_BL: Tensor
    scales: tuple[int, ...]

    def contrast(self) -> Tensor:
        """The contrastive form (B, L): the class against the best wrong one."""
        return self.label_BL - self.rival_BL

    def rows(self, which: Sequence[int] | Tensor) -> "Explanation":
        """Of some of the images."""
        return self._of_each(lambda values: values[which])

    def cpu(self) -> "Explanation":
        return self._of_each(Tensor.cpu)

    def _of_each(self, change: Callable[[Tensor], Tensor]) -> "Explanation":
        labels_B, rivals_B = change(self.labels_B), change(self.rivals_B)
        label_BL, rival_BL = change(self.label_BL), change(self.rival_BL)
        return Explanation(labels_B, rivals_B, label_BL, rival_BL, self.scales)


def explain(method: Explainable, images: Tensor, labels_B: Tensor, rivals_B: Tensor) -> Explanation:
    """Why these labels, and why not their rivals: `PASSES` likelihood evaluations an image.

    images (B, channels, H, W) in [-1, 1]; rivals are those of `best_wrong`.

    Raises:
        UserError: images of another size, or a class that was never learned.
    """
    size, known = method.tokenizer.image_size, method.classes_seen
    if images.shape[-2:] != (size, size):
        found = f"{images.shape[-1]} x {images.shape[-2]}"
        raise UserError(f"The images are {found} pixels: the model reads {size} x {size}.")
    pairs_BP = torch.stack([labels_B, rivals_B], 1)
    strange = pairs_BP[(pairs_BP < 0) | (pairs_BP >= known)].tolist()
    if strange:
        raise UserError(f"Class {strange[0]} was never learned: there are 0 to {known - 1}.")
    null_B1 = torch.full_like(labels_B, NULL_CLASS)[:, None]
    values_BPL = method.pair_log_likelihoods(
        images, torch.cat([pairs_BP, null_B1], 1).to(images.device)
    )
    label_BL, rival_BL = (values_BPL[:, :2] - values_BPL[:, 2:]).unbind(1)
    return Explanation(labels_B, rivals_B, label_BL, rival_BL, method.tokenizer.scales)


def best_wrong(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The class with the highest score but for the label (B,).

    Raises:
        UserError: there is no other class.
    """
    if scores_BC.shape[1] < 2:
        raise UserError("One class alone was learned: there is none to hold against it.")
    return scores_BC.scatter(1, labels_B[:, None].to(scores_BC.device), -torch.inf).argmax(1)


def scale_maps(values_BL: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Values of all tokens -> a map (B, p_k, p_k) for each scale."""
    parts = values_BL.split([p * p for p in scales], 1)
    return [part.unflatten(1, (p, p)) for part, p in zip(parts, scales, strict=True)]


def combined(values_BL: Tensor, scales: Sequence[int]) -> Tensor:
    """The maps of all scales as one (B, p_K, p_K), in nats a place of the finest scale.

    A scale's map is enlarged to the finest by the nearest token and weighted by (p_k / p_K)^2: a
    token keeps its weight though it covers many places.
    """
    finest = scales[-1]
    maps = [
        F.interpolate(part[:, None], size=(finest, finest), mode="nearest-exact")[:, 0]
        * (p / finest) ** 2
        for part, p in zip(scale_maps(values_BL, scales), scales, strict=True)
    ]
    return torch.stack(maps).sum(0)


def heat_map(map_Bpp: Tensor) -> Tensor:
    """A combined map for show: what speaks against is cut off, the rest stretched to [0, 1]."""
    positive = map_Bpp.clamp_min(0)
    low, high = positive.flatten(1).aminmax(dim=1)
    low, high = low[:, None, None], high[:, None, None]
    return (positive - low) / (high - low).clamp_min(torch.finfo(positive.dtype).tiny)


def to_pixels(map_Bpp: Tensor, side: int) -> Tensor:
    """A map as large as the image (B, side, side), bilinear: what lies between two tokens is in
    between.
    """
    larger = F.interpolate(map_Bpp[:, None].float(), size=(side, side), mode="bilinear")
    return larger[:, 0]
