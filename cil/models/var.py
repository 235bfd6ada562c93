"""VAR: a transformer that predicts all tokens of one scale from the coarser ones (2404.02905).

Shapes: B images, L tokens, D width, Z latent channels, V vocabulary, K scales.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cil.models.attention import Sight, attend
from cil.models.class_groups import Adapter, LowRank, Updates
from cil.models.compiling import any_batch, compiled


def linear(
    x: Tensor, layer: nn.Linear, update: LowRank | None, bias: Tensor | None = None
) -> Tensor:
    """The layer with its class group's update, if any; `bias` stands in where it has none.

    All rows of a batch belong to one group. Most layers see a row a token, which are more than they
    have columns: updating the matrix then costs less than a second product for every row.
    """
    weight = layer.weight if update is None else layer.weight + update.matrix()
    return F.linear(x, weight, layer.bias if bias is None else bias)


def linear_gelu(x: Tensor, layer: nn.Linear, update: LowRank | None) -> Tensor:
    """GELU (tanh) of the layer, in the product's own kernel where there is such a one.

    Apart, it reads and writes the widest activations of a block once more.
    """
    if not x.is_cuda or torch.is_grad_enabled() or not torch.is_autocast_enabled("cuda"):
        return F.gelu(linear(x, layer, update), approximate="tanh")
    dtype = torch.get_autocast_dtype("cuda")
    weight = layer.weight if update is None else layer.weight + update.matrix()
    rows = x.to(dtype).flatten(0, -2)
    out = torch._addmm_activation(layer.bias.to(dtype), rows, weight.to(dtype).T, use_gelu=True)
    return out.view(*x.shape[:-1], -1)


def modulate(x_BLD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """Layer normalisation whose scale and shift come from the class (AdaLN)."""
    normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_B1D, normed, 1 + scale_B1D)


def unit(x: Tensor) -> Tensor:
    """Vectors along the last axis, scaled to length one."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


@dataclass
class BlockCache:
    """What attention in one block has read so far: (B, heads, tokens, D / heads) each."""

    keys: Tensor | None = None
    values: Tensor | None = None
    last: bool = False  # nothing will be read after the next tokens: they need not be kept

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append further tokens; returns all there are."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        else:  # not as a view of queries, keys and values together, which would keep them all
            keys, values = keys.contiguous(), values.contiguous()
        self.keys, self.values = (None, None) if self.last else (keys, values)
        return keys, values

    def rows(self, which: Tensor | slice, last: bool) -> "BlockCache":
        if self.keys is None or self.values is None:
            return BlockCache(last=last)
        return BlockCache(self.keys[which], self.values[which], last)


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


class Attention(nn.Module):
    """Multi-head attention with L2-normalised queries and keys and a learned scale a head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))  # a bias of the keys would cancel out
        self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x_BLD: Tensor,
        sight: Sight,
        updates: Updates,
        cache: BlockCache | None = None,
    ) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x_BLD, self.qkv, updates.get("qkv"), bias)
        q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=self.heads)
        q = unit(q) * self.log_scale.clamp(max=math.log(100.0)).exp()
        q, k = q.to(v), unit(k).to(v)
        if cache is not None:
            k, v = cache.extend(k, v)
        return linear(attend(q, k, v, sight), self.proj, updates.get("proj"))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by six vectors from the class (AdaLN-zero).

    Of its own the block projects the class to the six; with a projection shared by all blocks it
    only adds a learned vector to each.
    """

    def __init__(
        self, width: int, heads: int, drop_path: float, depth: int, shared_adaln: bool
    ) -> None:
        super().__init__()
        if shared_adaln:
            self.own_modulation = nn.Parameter(torch.randn(6 * width) * width**-0.5)
        else:
            self.adaln = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drops = drop_path > 0
        self.keep: Tensor  # a tensor: for a number of each block's own torch.compile makes a graph
        self.register_buffer("keep", torch.tensor(1 - drop_path, device="cpu"), persistent=False)
        self._initialise(width, depth)

    def adaptable(self, everywhere: bool) -> dict[str, nn.Linear]:
        """The layers that a class group may update, by the names `forward` knows them by."""
        layers = {"adaln": self.adaln} if hasattr(self, "adaln") else {}
        if everywhere:
            layers |= {"qkv": self.attention.qkv, "proj": self.attention.proj}
            layers |= {"fc1": self.fc1, "fc2": self.fc2}
        return layers

    def forward(
        self,
        x_BLD: Tensor,
        condition_BD: Tensor,
        shared_B6D: Tensor | None,
        sight: Sight,
        updates: Updates,
        cache: BlockCache | None = None,
    ) -> Tensor:
        if shared_B6D is None:
            modulation = linear(F.silu(condition_BD), self.adaln, updates.get("adaln"))
        else:
            modulation = shared_B6D + self.own_modulation
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation[:, None].chunk(6, dim=-1)
        h = modulate(x_BLD, scale1, shift1)
        attended = self.attention(h, sight, updates, cache)
        x_BLD = self._add(x_BLD, attended, gate1)
        h = linear_gelu(modulate(x_BLD, scale2, shift2), self.fc1, updates.get("fc1"))
        return self._add(x_BLD, linear(h, self.fc2, updates.get("fc2")), gate2)

    def _add(self, x_BLD: Tensor, branch_BLD: Tensor, gate_B1D: Tensor) -> Tensor:
        """x + gate * branch, with stochastic depth: in training, single images leave it out."""
        if self.training and self.drops:
            kept = torch.rand(len(x_BLD), 1, 1, device=x_BLD.device) < self.keep
            gate_B1D = gate_B1D * kept / self.keep
        return torch.addcmul(x_BLD, branch_BLD, gate_B1D)

    @torch.no_grad()
    def _initialise(self, width: int, depth: int) -> None:
        """As published: nearly closed gates, residual branches scaled by the depth."""
        for layer in self.adaptable(everywhere=True).values():
            nn.init.trunc_normal_(layer.weight, std=(1 / (3 * width)) ** 0.5)
            if layer.bias is not None:
                layer.bias.zero_()
        if hasattr(self, "adaln"):
            self.adaln.weight[2 * width :] *= 0.5
            self.adaln.weight[: 2 * width] *= 1e-5
        else:
            self.own_modulation[2 * width :] *= 0.5
            self.own_modulation[: 2 * width] *= 1e-3
        self.attention.proj.weight /= math.sqrt(2 * depth)
        self.fc2.weight /= math.sqrt(2 * depth)


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
        own = _at(adapter, "trunk")
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
            update = _at(adapter, "trunk").get("shared_adaln")
            shared = linear(F.silu(condition_BD), self.shared_adaln, update)
        forward: Callable[..., Tensor] = Block.forward
        if self.compiled:
            forward = compiled(forward)
        for i in blocks:
            updates, own = _at(adapter, str(i)), None if cache is None else cache.of(i)
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
        own = _at(adapter, "trunk")
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


def _at(adapter: Adapter | None, place: str) -> Updates:
    return {} if adapter is None else adapter.at(place)
