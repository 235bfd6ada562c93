"""Reading images under classes: pairs go through the transformer in groups, and nothing twice.

Shapes: B images, n classes of a group, C classes in all, N pairs of image and class, L tokens,
K scales, D width, Z latent channels.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cil.models.class_groups import Incremental
from cil.models.dit import DiT
from cil.models.var import VAR, Cache

# Tokens of (image, class) pairs that go through the transformer at once. On a CPU the activations
# of a small model then fit its cache (of 16 to 1,024 pairs of 30 tokens, 64 were the fastest on
# two cores); a GPU is busy with so many, if its memory holds them.
CPU_TOKENS, GPU_TOKENS = 2**11, 2**18
# Logits at a time in the head, which are wider than anything else: 1 GiB in fp32.
MAX_LOGITS = 2**28


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
            size = max(
                1, self.max_tokens // first_tokens(self.trunk, cached) // len(self.tokens_BL)
            )
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


def by_scale(values: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Sum the tokens of each scale that is there: (..., tokens) -> (..., scales)."""
    sums, first = [], 0
    for p in scales:
        if first < values.shape[-1]:
            sums.append(values[..., first : first + p * p].sum(-1))
        first += p * p
    return torch.stack(sums, -1)


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


def first_tokens(trunk: VAR, scales: int) -> int:
    """How many tokens the first scales have together."""
    return trunk.tokens_of(range(scales)).stop
