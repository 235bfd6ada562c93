"""Zero-shot editing: a part of an image drawn anew, the rest given; nothing is trained.

In-painting, out-painting and class-conditional editing of VAR (arXiv 2404.02905, zero-shot task
generalisation): at every scale the tokens of what is kept are given (teacher forcing) and the
others are drawn.

A token is drawn if the region covers more than `cover` of what it is pooled from. With 0, for a
change of class, any touch is enough, so that the 1 x 1 token is always drawn: were it given, it
would tell the finer ones of the old content, and a class asked for would hardly be drawn. `HALF`,
as in VAR's public code, is for content of the same class: coarse tokens that the region covers by
half at most are given, and with them the colours around it and a trace of what was there. Of the
finest scale all that the region touches is drawn.

What drawn coarse tokens change of the kept part, the given ones of finer scales take back: they are
not those of the image as it was, which no longer add up to it, but the ones nearest to what the
scales before leave of it. With nothing drawn both are the same. A region that touches all latents
gets no token at all with a cover of 0: it is a drawing, of which kept pixels alone are the image's.

Kept pixels are put back as they were. No tokenizer gives an image back to the pixel, and to draw
one part anew is to leave the other alone; the price is that a seam may show.

Shapes: B images, H = W side, h = w side of the latents, L tokens, N tokens of a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.errors import UserError
from cil.generate import Kept, sample
from cil.models.class_groups import Incremental
from cil.models.tokenizer import MultiScaleTokenizer

HALF = 0.5


@dataclass(frozen=True)
class Edited:
    images: Tensor  # (B, channels, H, W) in [-1, 1]: the edits, kept pixels as they were
    raw: Tensor  # the same as the decoder gives them: kept pixels as the model has them
    drawn_L: Tensor  # true where a token was drawn


@torch.inference_mode()
def edit(
    model: Incremental,
    tokenizer: MultiScaleTokenizer,
    images: Tensor,
    region_HW: Tensor,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    cover: float = 0.0,
) -> Edited:
    """Draw the region (true) of each image (B, channels, H, W) anew, as of a class, from a seed.

    `cover`, a share from 0 to below 1, says which tokens are drawn. The other options are those of
    `sample`. An edit depends on its own image, label and seed alone.

    Raises:
        UserError: images or region have not the size that the model draws, nothing is to be drawn,
            the model does not know a label, cover is out of its range, or there is not one label
            and seed for each image.
    """
    drawn_L = drawn_tokens(tokenizer, region_HW, cover).to(images.device)
    _check(tokenizer, images, labels)
    kept = Kept(tokenizer.encode(images), ~drawn_L.expand(len(images), -1))
    raw = sample(
        model, tokenizer, labels, seeds, guidance=guidance, top_k=top_k, top_p=top_p, kept=kept
    ).images
    return Edited(raw.where(region_HW.to(images.device), images), raw, drawn_L)


def drawn_tokens(tokenizer: MultiScaleTokenizer, region_HW: Tensor, cover: float = 0.0) -> Tensor:
    """Which tokens (L,) an edit of this region draws."""
    if not 0 <= cover < 1:
        raise UserError(f"cover is {cover}: give a share of a token from 0 to below 1.")
    side = tokenizer.image_size
    if region_HW.shape != (side, side):
        height, width = region_HW.shape
        raise UserError(
            f"the mask has {width} x {height} pixels, but the model draws {side} x {side}."
        )
    if not region_HW.any():
        raise UserError("the mask is empty: mark at least a pixel that is to be drawn.")
    shares_11hw = F.avg_pool2d(region_HW[None, None].float(), side // tokenizer.scales[-1])
    shares = [tokenizer.next_input(shares_11hw, k).flatten() for k in range(len(tokenizer.scales))]
    *coarse, finest = shares
    return torch.cat([*(share > cover for share in coarse), finest > 0])


def _check(tokenizer: MultiScaleTokenizer, images: Tensor, labels: Sequence[int]) -> None:
    side = tokenizer.image_size
    if images.shape[-2:] != (side, side):
        height, width = images.shape[-2:]
        raise UserError(
            f"the image has {width} x {height} pixels, but the model draws {side} x {side}."
        )
    if len(labels) != len(images):
        raise UserError(
            f"there are {len(labels)} labels for {len(images)} images: give one for each."
        )
