"""VAR: a transformer that predicts all tokens of one scale from the coarser ones (2404.02905).

Shapes: B images, L tokens, D width, Z latent channels, V vocabulary, K scales.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.models.attention import Sight
from cil.models.class_groups import Adapter
from cil.models.compiling import any_batch, compiled
from cil.models.transformer import Block, BlockCache, at, linear, modulate


@dataclass
class Cache:
    """The keys and values of the scales read so far, by block.

    Attention is causal by scale, so that what a scale has computed never changes afterwards.
    """

    blocks: dict[int, BlockCache] = field(default_factory=dict)

    def of(self, block: int) -> BlockCache:
        return self.blocks.setdefault(block, BlockCache())

    def rows(self, which: Tensor | slice, last: bool = False) -> "Cache":
        """The cache of some of the rows, in that order; `last`: for reading a last time."""
        return Cache({i: block.rows(which, last) for i, block in self.blocks.items()})

    @staticmethod
    def joined(parts: Sequence["Cache"]) -> "Cache":
        """The rows of all parts, which have read the same scales."""
        if len(parts) == 1:
            return parts[0]
        whole = Cache()
        for i in parts[0].blocks:
            keys, values = zip(*((p.of(i).keys, p.of(i).values) for p in parts), strict=True)
            whole.blocks[i] = BlockCache(torch.cat(keys), torch.cat(values))
        return whole


class VAR(nn.Module):
    """The trunk: everything but the class embeddings, which `ClassGroups` holds.

    The published sizes are width = 64 depth and heads = depth; d36 shares one AdaLN projection
    among its blocks (`shared_adaln`).

    With `condition_from` = m > 0 the start token and the first m blocks see the null class alone:
    they run once an image, and only the other blocks and the head once a class.

    With `compiled` set, blocks and head go through torch.compile: worth its tens of seconds on a
    GPU, where it fuses what lies between the matrix products.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        latent_channels: int,
        scales: Sequence[int],
        depth: int,
        width: int,
        heads: int,
        drop_path: float = 0.0,
        shared_adaln: bool = False,
        condition_from: int = 0,
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.width = width
        self.condition_from = condition_from
        self.compiled = False
        # On the CPU also where the parameters are built without memory (official.py).
        level_L = torch.cat([torch.full((p * p,), k, device="cpu") for k, p in enumerate(scales)])
        self.level_L: Tensor
        self.register_buffer("level_L", level_L, persistent=False)
        # True where attention is allowed: a token sees its own scale and every coarser one.
        self.mask_LL: Tensor
        mask_LL = level_L[:, None] >= level_L[None, :]
        self.register_buffer("mask_LL", mask_LL, persistent=False)
        self.limits_L: Tensor
        self.register_buffer("limits_L", mask_LL.sum(1, dtype=torch.int32), persistent=False)
        self.embed = nn.Linear(latent_channels, width)
        self.start = nn.Parameter(torch.empty(scales[0] ** 2, width))
        self.position = nn.Parameter(torch.empty(len(level_L), width))
        self.level = nn.Embedding(len(scales), width)
        # Stochastic depth grows linearly with the block, as in the official code.
        drops = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.shared_adaln = nn.Linear(width, 6 * width) if shared_adaln else None
        self.blocks = nn.ModuleList(
            Block(width, heads, drop, depth, shared_adaln) for drop in drops
        )
        self.head_adaln = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, vocabulary)
        self._initialise(width)

    def forward(
        self,
        inputs_BLZ: Tensor,
        condition_BD: Tensor,
        adapter: Adapter | None = None,
        null_D: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits (B, L, V).

        inputs_BLZ (B, L - p_1^2, Z) comes from `MultiScaleTokenizer.var_input`; condition_BD are
        class embeddings; `adapter` is that of the class group all of them belong to; null_D is the
        embedding of no class, read if condition_from > 0.
        """
        x = self.features(inputs_BLZ, condition_BD, adapter, null_D)
        return self.logits(x, condition_BD, adapter)

    def features(
        self,
        inputs_BLZ: Tensor,
        condition_BD: Tensor,
        adapter: Adapter | None = None,
        null_D: Tensor | None = None,
    ) -> Tensor:
        """The last block's output (B, L, D)."""
        every, common_BD = range(len(self.scales)), condition_BD
        if self.condition_from:
            assert null_D is not None
            common_BD = null_D.expand_as(condition_BD)
        x = self.common(inputs_BLZ, common_BD, every, adapter)
        return self.conditioned(x, condition_BD, every, adapter)

    def common(
        self,
        inputs_BNZ: Tensor,
        condition_BD: Tensor,
        scales: range,
        adapter: Adapter | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Embed the tokens of some scales and run the first `condition_from` blocks (B, N, D).

        `cache` holds the scales before them and takes in these. `inputs_BNZ` has no tokens of the
        first scale, which starts from `condition_BD`: the null class if condition_from > 0 (all
        classes and groups share the result), and otherwise the class.
        """
        if self.condition_from:
            adapter = None
        own = at(adapter, "trunk")
        x = linear(inputs_BNZ, self.embed, own.get("embed"))
        if scales.start == 0:
            x = torch.cat([condition_BD[:, None] + self.start, x], dim=1)
        tokens = self.tokens_of(scales)
        x = x + self.position[tokens] + self.level(self.level_L[tokens])
        return self._run(range(self.condition_from), x, condition_BD, scales, adapter, cache)

    def conditioned(
        self,
        x_BND: Tensor,
        condition_BD: Tensor,
        scales: range,
        adapter: Adapter | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the blocks that see the class on what `common` returned (B, N, D)."""
        blocks = range(self.condition_from, len(self.blocks))
        return self._run(blocks, x_BND, condition_BD, scales, adapter, cache)

    def _run(
        self,
        blocks: range,
        x_BND: Tensor,
        condition_BD: Tensor,
        scales: range,
        adapter: Adapter | None,
        cache: Cache | None,
    ) -> Tensor:
        if not blocks:
            return x_BND
        tokens = self.tokens_of(scales)
        # A single scale sees all that there is: without a mask attention may take a faster kernel.
        mask = None if len(scales) == 1 else self.mask_LL[tokens, : tokens.stop]
        sight = Sight(self.limits_L[tokens], mask, finest=self.scales[scales.stop - 1] ** 2)
        shared = None
        if self.shared_adaln is not None:
            update = at(adapter, "trunk").get("shared_adaln")
            shared = linear(F.silu(condition_BD), self.shared_adaln, update)
        forward: Callable[..., Tensor] = Block.forward
        if self.compiled:
            forward = compiled(forward)
        for i in blocks:
            updates, own = at(adapter, str(i)), None if cache is None else cache.of(i)
            if self.compiled:
                read = [] if own is None else [own.keys, own.values]
                any_batch(x_BND, condition_BD, shared, *read)
            x_BND = forward(self.blocks[i], x_BND, condition_BD, shared, sight, updates, own)
        return x_BND

    def tokens_of(self, scales: range) -> slice:
        """Where the tokens of these scales stand among the L."""
        ends = [0]
        for p in self.scales:
            ends.append(ends[-1] + p * p)
        return slice(ends[scales.start], ends[scales.stop])

    def logits(
        self, features_BLD: Tensor, condition_BD: Tensor, adapter: Adapter | None = None
    ) -> Tensor:
        """The head: features (B, L, D) -> (B, L, V)."""
        own = at(adapter, "trunk")
        modulation = linear(F.silu(condition_BD), self.head_adaln, own.get("head_adaln"))
        scale, shift = modulation[:, None].chunk(2, dim=-1)
        return linear(modulate(features_BLD, scale, shift), self.head, own.get("head"))

    def log_likelihoods(
        self,
        features_BLD: Tensor,
        condition_BD: Tensor,
        tokens_BL: Tensor,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """The head: log p of each of these tokens (B, L), fp32."""
        score = compiled(_log_likelihoods) if self.compiled else _log_likelihoods
        if self.compiled:
            any_batch(features_BLD, condition_BD, tokens_BL)
        return score(self, features_BLD, condition_BD, tokens_BL, adapter)

    def new_adapter(self, rank: int, everywhere: bool) -> Adapter:
        """Low-rank updates of every linear layer, or only of those that read the class (AdaLN).

        What all classes share (`common` with condition_from > 0) is left alone.
        """
        trunk = {"head_adaln": self.head_adaln}
        if self.shared_adaln is not None and self.condition_from < len(self.blocks):
            trunk["shared_adaln"] = self.shared_adaln
        if everywhere:
            trunk["head"] = self.head
            if not self.condition_from:
                trunk["embed"] = self.embed
        places = {"trunk": trunk}
        for i in range(self.condition_from, len(self.blocks)):
            places[str(i)] = self.blocks[i].adaptable(everywhere)  # type: ignore[operator]
        return Adapter({place: layers for place, layers in places.items() if layers}, rank)

    def shared_parts(self) -> list[nn.Module | nn.Parameter]:
        """What `common` reads, if all classes share it: a copy of the trunk shares it too."""
        if not self.condition_from:
            return []
        parts = [self.embed, self.level, self.start, self.position]
        if self.shared_adaln is not None:
            parts.append(self.shared_adaln)
        return [*parts, *self.blocks[: self.condition_from]]

    @torch.no_grad()
    def _initialise(self, width: int) -> None:
        """As published; the blocks do their own."""
        std = (1 / (3 * width)) ** 0.5
        layers = [self.embed, self.head_adaln, self.head]
        if self.shared_adaln is not None:
            layers.append(self.shared_adaln)
        for weight in (self.level.weight, *(layer.weight for layer in layers)):
            nn.init.trunc_normal_(weight, std=std)
        for parameter in (self.start, self.position):
            nn.init.trunc_normal_(parameter, std=std)
        self.head.weight *= 0.02
        self.head_adaln.weight *= 0.5
        for layer in layers:
            layer.bias.zero_()


def _log_likelihoods(
    trunk: VAR, features_BLD: Tensor, condition_BD: Tensor, tokens_BL: Tensor, adapter: Any
) -> Tensor:
    logits = trunk.logits(features_BLD, condition_BD, adapter).flatten(0, 1).float()
    return -F.cross_entropy(logits, tokens_BL.flatten(), reduction="none").view_as(tokens_BL)
