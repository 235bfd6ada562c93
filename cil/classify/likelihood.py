"""log p(x | y): how likely a VAR finds an image's tokens under each class (VARC, 2510.12060).

Shapes: B images, n classes of a group, C classes in all, N pairs of image and class, L tokens,
K scales, S copies of an image, Z latent channels.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classify.schedule import Schedule
from cil.models.class_groups import Incremental
from cil.models.var import VAR, Cache

# Pairs of image and class at a time (one image's classes of a group stay together). The activations
# of a small model then fit a processor's cache: of 16 to 1,024 it was the fastest on two cores.
MAX_ROWS = 64
# Logits at a time in the head, which are wider than anything else: 1 GiB in fp32.
MAX_LOGITS = 2**28

Mean = Literal["log_likelihoods", "probabilities"]


@torch.inference_mode()
def group_log_likelihoods(
    model: Incremental,
    group: int,
    tokens_BL: Tensor,
    inputs_BLZ: Tensor,
    max_rows: int = MAX_ROWS,
) -> Tensor:
    """log p(token | coarser tokens, class) for each class of one group -> (B, n, L).

    A group is always scored on its own, as many images at a time as make `max_rows` pairs with its
    classes, so that groups that arrive later cannot change even the rounding of an earlier one.
    """
    classes = model.groups.sizes[group]
    chunk = max(1, max_rows // classes)
    parts = []
    for tokens, inputs in zip(tokens_BL.split(chunk), inputs_BLZ.split(chunk), strict=True):
        images = Images(model, tokens, inputs)
        every = torch.ones(len(tokens), classes, dtype=torch.bool, device=tokens.device)
        values_NL = Reader(images, group, every).read(len(images.scales), last=True)
        parts.append(values_NL.view(len(tokens), classes, -1))
    return torch.cat(parts)


def token_log_likelihoods(model: Incremental, tokens_BL: Tensor, inputs_BLZ: Tensor) -> Tensor:
    """The same for every class of every group, in label order -> (B, C, L)."""
    groups = range(len(model.groups))
    return torch.cat([group_log_likelihoods(model, g, tokens_BL, inputs_BLZ) for g in groups], 1)


@torch.inference_mode()
def staged_scores(
    model: Incremental,
    tokens_SBL: Tensor,
    inputs_SBLZ: Tensor,
    weights_K: Tensor,
    stages: Schedule,
    mean: Mean = "log_likelihoods",
    max_rows: int = MAX_ROWS,
    reads: list[Tensor] | None = None,
) -> Tensor:
    """Weighted log-likelihoods (B, C) of the classes left at the end; -inf for the others.

    tokens_SBL and inputs_SBLZ are those of at least as many copies of each image as a stage asks
    for, the clean one first; `mean` says of what the copies are averaged (2510.12060: its public
    code averages log-likelihoods, its text probabilities). A stage reads on where an earlier one
    stopped, with its keys, values and log-likelihoods, and scores no copy anew. `reads` takes in,
    for each chunk of images, how many classes each stage read for each (stages, B).
    """
    chunk = max(1, max_rows // max(model.groups.sizes))
    parts = []
    for tokens, inputs in zip(tokens_SBL.split(chunk, 1), inputs_SBLZ.split(chunk, 1), strict=True):
        copies = [Images(model, t, i) for t, i in zip(tokens, inputs, strict=True)]
        parts.append(_staged(model, copies, weights_K, stages, mean, reads))
    return torch.cat(parts)


def _staged(
    model: Incremental,
    copies: list["Images"],
    weights_K: Tensor,
    stages: Schedule,
    mean: Mean,
    reads: list[Tensor] | None,
) -> Tensor:
    images, classes, device = len(copies[0].tokens_BL), model.groups.classes, weights_K.device
    left_BC = torch.ones(images, classes, dtype=torch.bool, device=device)
    scores_BC = torch.empty(images, classes, device=device)
    readers: dict[tuple[int, int], Reader] = {}
    counts = []
    for number, stage in enumerate(stages):
        # An image with one class left is decided. (With one class in all, it is scored once.)
        open_BC = left_BC & ((left_BC.sum(1, keepdim=True) > 1) | (number == 0))
        counts.append(open_BC.sum(1))
        for group in range(len(model.groups)):
            labels = model.groups.labels(group)
            open_Bn = open_BC[:, labels.start : labels.stop]
            if not open_Bn.any():
                continue
            of_copies = []
            for c in range(stage.samples):
                last = not any(c < later.samples for later in stages[number + 1 :])
                if (c, group) not in readers:
                    readers[c, group] = Reader(copies[c], group, open_Bn)
                readers[c, group].keep(open_Bn)
                values_NL = readers[c, group].read(stage.scales, last)
                values_NK = by_scale(values_NL, copies[c].scales)
                of_copies.append(values_NK @ weights_K[: stage.scales])
            scores_BC[:, labels.start : labels.stop][open_Bn] = _mean(torch.stack(of_copies), mean)
        scores_BC.masked_fill_(~left_BC, -torch.inf)
        best = scores_BC.topk(min(stage.keep, classes), dim=1)
        near_BC = scores_BC >= best.values[:, :1] - stage.margin
        left_BC = torch.zeros_like(left_BC).scatter(1, best.indices, True) & left_BC & near_BC
    if reads is not None:
        reads.append(torch.stack(counts))
    return scores_BC


def _mean(scores_SN: Tensor, mean: Mean) -> Tensor:
    if mean == "log_likelihoods":
        return scores_SN.mean(0)
    return scores_SN.logsumexp(0) - math.log(len(scores_SN))


class Images:
    """One copy of some images, and what all classes share in reading it."""

    def __init__(self, model: Incremental, tokens_BL: Tensor, inputs_BLZ: Tensor) -> None:
        self.model, self.tokens_BL, self.inputs_BLZ = model, tokens_BL, inputs_BLZ
        self.scales: tuple[int, ...] = model.trunk(0).scales
        self._cache = Cache()
        self._shared: dict[tuple[int, int], Tensor] = {}

    def inputs(self, trunk: VAR, scales: range) -> Tensor:
        """What the transformer reads for these scales (B, N, Z): the first token has no input."""
        tokens = trunk.tokens_of(scales)
        first = self.scales[0] ** 2
        return self.inputs_BLZ[:, max(tokens.start - first, 0) : tokens.stop - first]

    def shared(self, trunk: VAR, scales: range) -> Tensor:
        """The output of the blocks that see no class (B, N, D), computed once for all readers."""
        key = scales.start, scales.stop
        if key not in self._shared:
            null_BD = self.model.groups.null.expand(len(self.tokens_BL), -1)
            inputs = self.inputs(trunk, scales)
            self._shared[key] = trunk.common(inputs, null_BD, scales, cache=self._cache)
        return self._shared[key]


class Reader:
    """Scores (image, class) pairs of one group, scale by scale, and none of them twice."""

    def __init__(self, images: Images, group: int, pairs_Bn: Tensor) -> None:
        """pairs_Bn says which images are read under which classes of the group."""
        self.images, self.group = images, group
        self.trunk: VAR = images.model.trunk(group)
        self.adapter = images.model.groups.adapter(group)
        self.done = 0  # scales
        self.values: list[Tensor] = []  # (N, tokens) of what has been read
        self.cache = Cache()
        self._take(pairs_Bn)

    def keep(self, pairs_Bn: Tensor) -> None:
        """Go on with these pairs alone; all of them were there before."""
        if int(pairs_Bn.sum()) == len(self.image_N):
            return
        kept_N = pairs_Bn[self.image_N, self.class_N].nonzero()[:, 0]
        self.cache = self.cache.rows(kept_N)
        self.values = [values[kept_N] for values in self.values]
        self._take(pairs_Bn)

    def read(self, scales: int, last: bool) -> Tensor:
        """Read up to so many scales -> log p of each of their tokens (N, tokens).

        `last` says that nothing will be read after it, so that no keys and values are kept.
        """
        if self.done < scales:
            self.values.append(self._read(range(self.done, scales), last))
            self.done = scales
        return torch.cat(self.values, 1)[:, self.trunk.tokens_of(range(scales))]

    def _read(self, scales: range, last: bool) -> Tensor:
        images, trunk = self.images, self.trunk
        # Reading everything at once needs no cache; later scales need that of earlier ones.
        cache = None if last and scales.start == 0 else self.cache
        if trunk.condition_from:
            x = images.shared(trunk, scales)[self.image_N]
        else:
            inputs = images.inputs(trunk, scales)[self.image_N]
            x = trunk.common(inputs, self.condition_ND, scales, self.adapter, cache)
        x = trunk.conditioned(x, self.condition_ND, scales, self.adapter, cache)
        targets = images.tokens_BL[:, trunk.tokens_of(scales)][self.image_N]
        rows = max(1, MAX_LOGITS // (targets.shape[1] * trunk.head.out_features))
        parts = []
        for x_rows, condition, target in zip(
            x.split(rows), self.condition_ND.split(rows), targets.split(rows), strict=True
        ):
            logits = trunk.logits(x_rows, condition, self.adapter).flatten(0, 1).float()
            losses = F.cross_entropy(logits, target.flatten(), reduction="none")
            parts.append(-losses.view(target.shape))
        return torch.cat(parts)

    def _take(self, pairs_Bn: Tensor) -> None:
        self.image_N, self.class_N = pairs_Bn.nonzero(as_tuple=True)
        labels_N = self.class_N + self.images.model.groups.labels(self.group).start
        self.condition_ND = self.images.model.groups.condition(labels_N)


def noisy_copies(latents_BZhw: Tensor, samples: int, sigma: float) -> Iterator[Tensor]:
    """The latents, then `samples` - 1 copies with Gaussian noise of standard deviation `sigma`.

    Likelihood smoothing (2510.12060) averages the log-likelihoods over them: a token that lies near
    the border of two codes no longer decides alone. The noise is the same for every image, class
    and call, so that a score depends on its image alone, and not on what else is in the batch.
    """
    yield latents_BZhw
    generator = torch.Generator().manual_seed(0)
    for _ in range(samples - 1):
        noise = torch.randn(latents_BZhw.shape[1:], generator=generator)
        yield latents_BZhw + sigma * noise.to(latents_BZhw)


def by_scale(values: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Sum the tokens of each scale that is there: (..., tokens) -> (..., scales)."""
    sums, first = [], 0
    for p in scales:
        if first < values.shape[-1]:
            sums.append(values[..., first : first + p * p].sum(-1))
        first += p * p
    return torch.stack(sums, -1)


def fit_scale_weights(values_BCK: Tensor, labels_B: Tensor, prior: float = 0.1) -> Tensor:
    """Weights (K,) of the scales in score = sum_k w_k log p_k, by cross-entropy on held-out images.

    Tokens of one scale are predicted independently of each other, so their sum is overconfident,
    and the more so the finer the scale. Only the ratio of the weights decides a class: the prior
    pulls their logarithms together, which keeps an easy (separable) first experience from driving
    them to extremes. The result is scaled to mean 1.
    """
    values_BCK = values_BCK.detach().double()
    labels_B = labels_B.to(values_BCK.device)
    logs_K = torch.zeros(values_BCK.shape[-1], dtype=torch.float64, device=values_BCK.device)
    logs_K.requires_grad_(True)
    optimiser = torch.optim.LBFGS([logs_K], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        cross_entropy = F.cross_entropy(values_BCK @ logs_K.exp(), labels_B)
        value = cross_entropy + prior * (logs_K - logs_K.mean()).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    weights_K = logs_K.detach().exp()
    return (weights_K / weights_K.mean()).float()
