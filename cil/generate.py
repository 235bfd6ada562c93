"""Drawing images: from a VAR scale by scale (arXiv 2404.02905, section 3.3 and its public code),
from a DiT step by step (DDIM, arXiv 2010.02502).

Shapes: B images, N tokens of a scale, V vocabulary, L tokens, D width, Z channels, h = w side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cil.errors import UserError
from cil.models.class_groups import NULL_CLASS, Incremental
from cil.models.latents import Latents
from cil.models.noising import TIMES, Noising
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import Cache


@dataclass(frozen=True)
class Samples:
    tokens_BL: Tensor
    images: Tensor  # (B, channels, H, W) in [-1, 1]


@dataclass(frozen=True)
class Kept:
    """Tokens that are not drawn but given: those nearest to what coarser ones leave of an image."""

    latents_BZhw: Tensor  # of the images, as `encode` returns them
    mask_BL: Tensor  # true where a token is given


@torch.inference_mode()
def sample(
    model: Incremental,
    tokenizer: MultiScaleTokenizer,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    kept: Kept | None = None,
) -> Samples:
    """One image for each label, drawn with the seed beside it.

    Guidance grows with the scale, from nothing to `guidance`: logits (1 + t) cond - t uncond with
    t = guidance * k / (K - 1). What has no class is the first trunk's, or scratch's own one's,
    without an adapter. Of the logits the `top_k` highest are kept (0: all), and of those the fewest
    that hold a probability of `top_p`. An image's tokens depend on its own label and seed, not on
    the others of the batch. Those that `kept` marks are given (cil/edit.py); all others get the
    noise that they always get.

    Raises:
        UserError: the model does not know a label, or there is not one seed for each.
    """
    _check(model, labels, seeds)
    device = model.groups.null.device
    wanted = torch.tensor(labels, device=device)
    tokens_BL = torch.empty(len(labels), tokenizer.tokens, dtype=torch.long, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for group, rows in _by_group(model, wanted):
        of_rows = [generators[row] for row in rows.tolist()]
        drawing = _Drawing(model, tokenizer, group, wanted[rows], of_rows)
        of_group = None if kept is None else Kept(kept.latents_BZhw[rows], kept.mask_BL[rows])
        tokens_BL[rows] = drawing.run(guidance, top_k, top_p, of_group)
    return Samples(tokens_BL, tokenizer.decode(tokens_BL))


FARTHEST = 6.0  # deviations that a clean latent may lie from the mean


@torch.inference_mode()
def denoise(
    model: Incremental,
    latents: Latents,
    noising: Noising,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int = 50,
    guidance: float = 1.5,
) -> Tensor:
    """One image for each label, from noise drawn with the seed beside it -> (B, channels, H, W).

    DDIM without fresh noise; of a flow the same formula is Euler's step along its velocity.
    Classifier-free guidance: (1 + guidance) cond - guidance uncond, and what has no class is the
    first trunk's, or scratch's own one's, without an adapter. What a step takes for clean is kept
    within `FARTHEST`, as next to pure noise a small error of the prediction is a large one of that.

    Raises:
        UserError: the model does not know a label, there is not one seed for each, or steps is
            below one or above a thousand.
    """
    _check(model, labels, seeds)
    if not 1 <= steps <= TIMES:
        raise UserError(f"steps is {steps}: choose from 1 to {TIMES}.")
    device = model.groups.null.device
    wanted = torch.tensor(labels, device=device)
    noise = [torch.randn(latents.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    x_BZhw = torch.stack(noise).to(device)
    times = noising.descent(steps).to(device)
    for group, rows in _by_group(model, wanted):
        x, labels_B = x_BZhw[rows], wanted[rows]
        for now, after in pairwise(times):
            now_B, after_B = now.expand(len(x)), after.expand(len(x))
            predicted = _guided(model, x, now_B, labels_B, group, guidance)
            clean, eps = noising.parts(x, predicted, now_B)
            x = noising.noised(clean.clamp(-FARTHEST, FARTHEST), eps, after_B)
        x_BZhw[rows] = x
    return latents.decode(x_BZhw)


def _guided(
    model: Incremental, x: Tensor, times_B: Tensor, labels_B: Tensor, group: int, guidance: float
) -> Tensor:
    predicted = model.predictions(x, times_B, labels_B, group)
    if guidance == 0:
        return predicted
    null_BD = model.groups.condition(torch.full_like(labels_B, NULL_CLASS))
    plain: Tensor = model.trunk_without_class(group)(x, times_B, null_BD)
    return (1 + guidance) * predicted - guidance * plain


def _check(model: Incremental, labels: Sequence[int], seeds: Sequence[int]) -> None:
    known = model.groups.classes
    if not all(0 <= label < known for label in labels):
        raise UserError(f"labels are {list(labels)}: the model knows the classes 0 to {known - 1}.")
    if len(seeds) != len(labels):
        raise UserError(
            f"there are {len(seeds)} seeds for {len(labels)} labels: give one for each."
        )


def _by_group(model: Incremental, labels_B: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every group that some of the labels belong to, and where these stand."""
    for group in range(len(model.groups)):
        own = model.groups.labels(group)
        rows = ((labels_B >= own.start) & (labels_B < own.stop)).nonzero()[:, 0]
        if len(rows):
            yield group, rows


class _Drawing:
    """Images of one class group on their way from the first scale to the last."""

    def __init__(
        self,
        model: Incremental,
        tokenizer: MultiScaleTokenizer,
        group: int,
        labels_B: Tensor,
        generators: list[torch.Generator],
    ) -> None:
        self.model, self.tokenizer, self.group = model, tokenizer, group
        self.labels_B, self.generators = labels_B, generators
        self.null_B = torch.full_like(labels_B, NULL_CLASS)
        self.with_class, self.without = Cache(), Cache()
        self.guided = False

    def run(self, guidance: float, top_k: int, top_p: float, kept: Kept | None) -> Tensor:
        """The tokens (B, L)."""
        tokenizer, drawn = self.tokenizer, []
        self.guided = guidance != 0
        latents = torch.zeros(
            len(self.labels_B), tokenizer.codebook.shape[1], *2 * tokenizer.scales[-1:]
        ).to(tokenizer.codebook)
        for k in range(len(tokenizer.scales)):
            # The first scale reads nothing but the start token.
            inputs_BNZ = tokenizer.next_input(latents, k)[:, : None if k else 0]
            share = guidance * k / max(len(tokenizer.scales) - 1, 1)
            logits_BNV = self._logits(inputs_BNZ, k, share)
            tokens_BN = self._draw(_filtered(logits_BNV, top_k, top_p))
            if kept is not None:
                given_BN = tokenizer.match(kept.latents_BZhw - latents, k)
                mask_BN = kept.mask_BL[:, self.model.trunk(self.group).tokens_of(range(k, k + 1))]
                tokens_BN = given_BN.where(mask_BN, tokens_BN)
            latents = latents + tokenizer.detail(tokens_BN, k)
            drawn.append(tokens_BN)
        return torch.cat(drawn, 1)

    def _logits(self, inputs_BNZ: Tensor, k: int, share: float) -> Tensor:
        model, group = self.model, self.group
        trunk, adapter = model.trunk(group), model.groups.adapter(group)
        scales, null_BD = range(k, k + 1), model.groups.condition(self.null_B)
        class_BD = model.groups.condition(self.labels_B)
        start_BD = null_BD if trunk.condition_from else class_BD
        x = trunk.common(inputs_BNZ, start_BD, scales, adapter, self.with_class)
        x = trunk.conditioned(x, class_BD, scales, adapter, self.with_class)
        logits = trunk.logits(x, class_BD, adapter).float()
        if not self.guided:
            return logits
        first = model.trunk_without_class(group)
        x = first.common(inputs_BNZ, null_BD, scales, cache=self.without)
        x = first.conditioned(x, null_BD, scales, cache=self.without)
        plain = first.logits(x, null_BD).float()
        return (1 + share) * logits - share * plain

    def _draw(self, logits_BNV: Tensor) -> Tensor:
        """The highest of logits plus Gumbel noise is a draw from their softmax."""
        noise = [torch.rand(logits_BNV.shape[1:], generator=g) for g in self.generators]
        uniform_BNV = torch.stack(noise).to(logits_BNV).clamp_min(1e-20)
        return (logits_BNV - (-uniform_BNV.log()).log()).argmax(-1)


def _filtered(logits_BNV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits outside the top k, or beyond the most probable share p, become -inf."""
    if 0 < top_k < logits_BNV.shape[-1]:
        least = logits_BNV.topk(top_k).values[..., -1:]
        logits_BNV = logits_BNV.masked_fill(logits_BNV < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits_BNV.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        beyond[..., 0] = False  # the most probable one stays
        logits_BNV = logits_BNV.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits_BNV
