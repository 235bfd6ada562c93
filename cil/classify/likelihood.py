"""log p(x | y): how likely a VAR finds an image's tokens under each class (VARC, 2510.12060).

Shapes: B images, n classes of a group, C classes in all, N pairs of image and class, L tokens,
K scales, S copies of an image, Z latent channels.
"""

import math
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classify.schedule import Schedule
from cil.models.class_groups import Incremental
from cil.models.dit import DiT
from cil.models.var import VAR, Cache

# Tokens of (image, class) pairs that go through the transformer at once. On a CPU the activations
# of a small model then fit its cache (of 16 to 1,024 pairs of 30 tokens, 64 were the fastest on
# two cores); a GPU is busy with so many, if its memory holds them.
CPU_TOKENS, GPU_TOKENS = 2**11, 2**18
# Logits at a time in the head, which are wider than anything else: 1 GiB in fp32.
MAX_LOGITS = 2**28

Mean = Literal["log_likelihoods", "probabilities"]


@torch.inference_mode()
def group_log_likelihoods(
    model: Incremental,
    group: int,
    tokens_BL: Tensor,
    inputs_BLZ: Tensor,
    max_tokens: int | None = None,
) -> Tensor:
    """log p(token | coarser tokens, class) for each class of one group -> (B, n, L).

    A group is always scored on its own, so that groups that arrive later cannot change even the
    rounding of an earlier one, for the same `max_tokens`: so many of its pairs' tokens go through
    the transformer at once (None: what suits the device and its free memory).
    """
    return Images(model, tokens_BL, inputs_BLZ, max_tokens).read_group(group)


def token_log_likelihoods(model: Incremental, tokens_BL: Tensor, inputs_BLZ: Tensor) -> Tensor:
    """The same for every class of every group, in label order -> (B, C, L)."""
    with torch.inference_mode():
        images = Images(model, tokens_BL, inputs_BLZ)
        return torch.cat([images.read_group(group) for group in range(len(model.groups))], 1)


@torch.inference_mode()
def staged_scores(
    model: Incremental,
    tokens_SBL: Tensor,
    inputs_SBLZ: Tensor,
    weights_K: Tensor,
    stages: Schedule,
    mean: Mean = "log_likelihoods",
    max_tokens: int | None = None,
    reads: list[Tensor] | None = None,
    first: int = 0,
) -> Tensor:
    """Weighted log-likelihoods (B, C) of the classes left at the end; -inf for the others.

    tokens_SBL and inputs_SBLZ are those of at least as many copies of each image as a stage asks
    for, the clean one first; `mean` says of what the copies are averaged (2510.12060: its public
    code averages log-likelihoods, its text probabilities). A stage reads on where an earlier one
    stopped, with its keys, values and log-likelihoods, and scores no copy anew. `reads` takes in
    how many classes each stage read for each image (stages, B). Classes below `first`, where a
    group begins, are not read: the result is (B, C - first).
    """
    trunk, classes = model.trunk(0), model.groups.classes
    # Tokens of an image whose keys and values are kept between stages, if no margin drops a class.
    kept = [
        min(stage.keep, classes) * stage.samples * _tokens(trunk, stage.scales)
        for i, stage in enumerate(stages)
        if any(later.scales > stage.scales for later in stages[i + 1 :])
    ]
    size = max(1, suitable_cache(trunk, tokens_SBL.device) // max(kept, default=1))
    parts = zip(tokens_SBL.split(size, 1), inputs_SBLZ.split(size, 1), strict=True)
    return torch.cat(
        [_staged(model, *part, weights_K, stages, mean, max_tokens, reads, first) for part in parts]
    )


def _staged(
    model: Incremental,
    tokens_SBL: Tensor,
    inputs_SBLZ: Tensor,
    weights_K: Tensor,
    stages: Schedule,
    mean: Mean,
    max_tokens: int | None,
    reads: list[Tensor] | None,
    first: int,
) -> Tensor:
    copies, images, classes = len(tokens_SBL), tokens_SBL.shape[1], model.groups.classes
    # Copies that every stage either reads or leaves out together are read as if further images.
    ends = sorted({stage.samples for stage in stages})
    sets = [
        Images(model, tokens_SBL[a:b].flatten(0, 1), inputs_SBLZ[a:b].flatten(0, 1), max_tokens)
        for a, b in pairwise([0, *ends])
    ]
    readers: dict[tuple[int, int], Reader] = {}  # by set and group
    scores_BC = torch.full((images, classes), -torch.inf, device=weights_K.device)
    left_BC = torch.ones_like(scores_BC, dtype=torch.bool)
    left_BC[:, :first] = False
    counts = []
    for number, stage in enumerate(stages):
        later = stages[number + 1 :]
        # An image with one class left is decided. (With one class in all, it is scored once.)
        open_BC = left_BC & ((left_BC.sum(1, keepdim=True) > 1) | (number == 0))
        counts.append(open_BC.sum(1))
        values_SBC = scores_BC.new_full((copies, images, classes), -torch.inf)
        in_use = ends.index(stage.samples)
        for i, group in product(range(in_use + 1), range(len(model.groups))):
            last = not any(ends[i] <= s.samples and stage.scales < s.scales for s in later)
            known = readers.pop((i, group), None)
            fresh = sets[i].readers(group, open_BC, cached=0 if last else stage.scales)
            for reader in [known] if known else fresh:
                reader.keep(open_BC)
                values_N = reader.score(stage.scales, weights_K, last)
                copy_N, image_N, label_N = reader.rows_3N
                copy_N = copy_N + (ends[i - 1] if i else 0)
                values_SBC[copy_N, image_N, label_N] = values_N
                if i == in_use and not last:
                    # What cannot be among the best any more need not wait for the classes that
                    # are still to be read: keys and values are most of the memory.
                    means_BC = _mean(values_SBC[: stage.samples], mean)
                    near_BC = survivors(means_BC, stage.keep, stage.margin)
                    near_BC[:, reader.labels.stop :] = True
                    values_SBC.masked_fill_(~near_BC, -torch.inf)
                    for other in (reader, *readers.values()):
                        other.keep(near_BC)
                if (i, group) in readers:
                    readers[i, group].take_over(reader)
                else:
                    readers[i, group] = reader
        values_BC = _mean(values_SBC[: stage.samples], mean)
        scores_BC = values_BC.where(open_BC, scores_BC.masked_fill(~left_BC, -torch.inf))
        left_BC = survivors(scores_BC, stage.keep, stage.margin)
    if reads is not None:
        reads.append(torch.stack(counts))
    return scores_BC[:, first:]


def survivors(scores_BC: Tensor, keep: int, margin: float = math.inf) -> Tensor:
    """Which of the classes scored so far (the others are at -inf) go on: the best `keep`.

    Of these, those that lie no more than `margin` below the very best.
    """
    best = scores_BC.topk(min(keep, scores_BC.shape[1]), dim=1)
    among_BC = torch.zeros_like(scores_BC, dtype=torch.bool).scatter(1, best.indices, True)
    return among_BC & (scores_BC >= best.values[:, :1] - margin) & scores_BC.isfinite()


def _mean(scores_SN: Tensor, mean: Mean) -> Tensor:
    if mean == "log_likelihoods":
        return scores_SN.mean(0)
    return scores_SN.logsumexp(0) - math.log(len(scores_SN))


class Images:
    """Some images, or several copies of each, and what all classes share in reading them."""

    def __init__(
        self,
        model: Incremental,
        tokens_BL: Tensor,
        inputs_BLZ: Tensor,
        max_tokens: int | None = None,
    ) -> None:
        self.model, self.tokens_BL, self.inputs_BLZ = model, tokens_BL, inputs_BLZ
        self.trunk: VAR = model.trunk(0)
        self.scales: tuple[int, ...] = self.trunk.scales
        self.max_tokens = max_tokens or suitable_tokens(self.trunk, tokens_BL.device)
        self._cache = Cache()
        self._shared: dict[tuple[int, int], Tensor] = {}

    def readers(self, group: int, wanted_BC: Tensor, cached: int) -> Iterator["Reader"]:
        """Of the wanted pairs of a group.

        Where so many scales are to be `cached`, each reader takes as many classes as are read at
        once, so that what falls out at once is never cached together.
        """
        labels = self.model.groups.labels(group)
        size = len(labels)
        if cached:
            size = max(1, self.max_tokens // _tokens(self.trunk, cached) // len(self.tokens_BL))
        size = math.ceil(len(labels) / math.ceil(len(labels) / size))  # all of about one size
        for first in range(labels.start, labels.stop, size):
            block = range(first, min(first + size, labels.stop))
            if wanted_BC[:, block.start : block.stop].any():
                yield Reader(self, group, block, wanted_BC)

    def read_group(self, group: int) -> Tensor:
        """log p of every token under each class of a group (B, n, L)."""
        labels, images = self.model.groups.labels(group), len(self.tokens_BL)
        every_BC = torch.ones(images, labels.stop, dtype=torch.bool, device=self.tokens_BL.device)
        values_NL = Reader(self, group, labels, every_BC).read(len(self.scales), last=True)
        return values_NL.view(images, len(labels), -1)

    def inputs(self, scales: range) -> Tensor:
        """What the transformer reads for these scales (B, N, Z): the first token has no input."""
        tokens = self.trunk.tokens_of(scales)
        first = self.scales[0] ** 2
        return self.inputs_BLZ[:, max(tokens.start - first, 0) : tokens.stop - first]

    def shared(self, scales: range) -> Tensor:
        """The output of the blocks that see no class (B, N, D), computed once for all readers.

        Of all images, also where readers need those of a few alone.
        """
        key = scales.start, scales.stop
        if key not in self._shared:
            tokens = self.trunk.tokens_of(scales)
            size = max(1, self.max_tokens // (tokens.stop - tokens.start))
            parts, caches = [], []
            for first in range(0, len(self.tokens_BL), size):
                rows = slice(first, first + size)
                inputs, cache = self.inputs(scales)[rows], self._cache.rows(rows)
                null_BD = self.model.groups.null.expand(len(inputs), -1)
                parts.append(self.trunk.common(inputs, null_BD, scales, cache=cache))
                caches.append(cache)
            self._shared[key], self._cache = torch.cat(parts), Cache.joined(caches)
        return self._shared[key]


class Reader:
    """Scores (image, class) pairs of one group, scale by scale, and none of them twice.

    Every pair is a row for each copy of its image; `rows_3N` holds their copies, images, labels.
    """

    def __init__(self, images: Images, group: int, labels: range, wanted_BC: Tensor) -> None:
        """wanted_BC says which images are read under which classes; those of `labels` count."""
        self.images, self.labels = images, labels
        self.trunk: VAR = images.model.trunk(group)
        self.adapter = images.model.groups.adapter(group)
        self.images_a_copy = len(wanted_BC)
        image_P, class_P = wanted_BC[:, labels.start : labels.stop].nonzero(as_tuple=True)
        copies = len(images.tokens_BL) // len(wanted_BC)
        copy_N = torch.arange(copies, device=image_P.device).repeat_interleave(len(image_P))
        pairs = image_P.repeat(copies), class_P.repeat(copies) + labels.start
        self.rows_3N = torch.stack([copy_N, *pairs])
        self.done = 0  # scales
        self.values_NL = torch.empty(len(copy_N), 0, device=image_P.device)  # as far as done
        self.cache = Cache()

    def keep(self, wanted_BC: Tensor) -> None:
        """Go on with those of the pairs that are wanted."""
        _, image_N, label_N = self.rows_3N
        kept_N = wanted_BC[image_N, label_N].nonzero()[:, 0]
        if len(kept_N) < len(image_N):
            self.rows_3N, self.values_NL = self.rows_3N[:, kept_N], self.values_NL[kept_N]
            self.cache = self.cache.rows(kept_N)

    def take_over(self, other: "Reader") -> None:
        """The rows of another reader, which has read as far."""
        self.labels = range(self.labels.start, other.labels.stop)
        self.rows_3N = torch.cat([self.rows_3N, other.rows_3N], 1)
        self.values_NL = torch.cat([self.values_NL, other.values_NL])
        self.cache = Cache.joined([self.cache, other.cache])

    def score(self, scales: int, weights_K: Tensor, last: bool) -> Tensor:
        """The weighted log-likelihood of every pair over its first scales (N,)."""
        values_NK = by_scale(self.read(scales, last), self.images.scales)
        # No matrix product, which autocast would round to 16 bits.
        return (values_NK * weights_K[:scales]).sum(-1)

    def read(self, scales: int, last: bool) -> Tensor:
        """Read up to so many scales -> log p of each of their tokens (N, tokens).

        `last` says that nothing will be read after it, so that no keys and values are kept.
        """
        if self.done < scales:
            new_NL = self._read(range(self.done, scales), last)
            self.values_NL = torch.cat([self.values_NL, new_NL], 1)
            self.done = scales
        return self.values_NL[:, self.trunk.tokens_of(range(scales))]

    def _read(self, scales: range, last: bool) -> Tensor:
        tokens = self.trunk.tokens_of(scales)
        values_NL = self.values_NL.new_empty(self.rows_3N.shape[1], tokens.stop - tokens.start)
        size = max(1, self.images.max_tokens // values_NL.shape[1])
        caches = []
        for first in range(0, len(values_NL), size):
            rows = slice(first, first + size)
            cache = self.cache.rows(rows, last)
            # Reading everything at once needs no cache; later scales need that of earlier ones.
            needed = cache if scales.start or not last else None
            values_NL[rows] = self._read_rows(rows, scales, needed)
            if not last:
                caches.append(cache)
        self.cache = Cache.joined(caches) if caches else Cache()
        return values_NL

    def _read_rows(self, rows: slice, scales: range, cache: Cache | None) -> Tensor:
        images, trunk, adapter = self.images, self.trunk, self.adapter
        copy_N, image_N, label_N = self.rows_3N[:, rows]
        row_N = copy_N * self.images_a_copy + image_N
        condition_ND = images.model.groups.condition(label_N)
        if trunk.condition_from:
            x = images.shared(scales)[row_N]
        else:
            x = trunk.common(images.inputs(scales)[row_N], condition_ND, scales, adapter, cache)
        x = trunk.conditioned(x, condition_ND, scales, adapter, cache)
        tokens_NL = images.tokens_BL[:, trunk.tokens_of(scales)][row_N]
        size = max(1, MAX_LOGITS // (tokens_NL.shape[1] * trunk.head.out_features))
        parts = zip(x.split(size), condition_ND.split(size), tokens_NL.split(size), strict=True)
        return torch.cat([trunk.log_likelihoods(*part, adapter) for part in parts])


def suitable_tokens(trunk: VAR | DiT, device: torch.device) -> int:
    """How many tokens go through the transformer at once: a power of two."""
    if device.type != "cuda":
        return CPU_TOKENS
    # Keys and values of every block in 16 bits, and the activations of one.
    affordable = max(1, _free(device) // (2 * trunk.width * (4 * len(trunk.blocks) + 64)))
    return min(GPU_TOKENS, 2 ** (affordable.bit_length() - 1))


def suitable_cache(trunk: VAR, device: torch.device) -> int:
    """Of how many tokens keys and values are kept between stages."""
    if device.type != "cuda":
        return 32 * CPU_TOKENS
    return int(_free(device) // (2 * trunk.width * 4 * len(trunk.blocks)))


def _free(device: torch.device) -> int:
    """Bytes of a GPU's memory, those included that torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _tokens(trunk: VAR, scales: int) -> int:
    return trunk.tokens_of(range(scales)).stop


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
