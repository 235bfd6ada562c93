"""VAR: a transformer that predicts all tokens of one scale from the coarser ones (2404.02905).

Shapes: B images, L tokens, D width, Z latent channels, V vocabulary, K scales.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cil.models.class_groups import Adapter, Updates


def linear(x: Tensor, layer: nn.Linear, update: Tensor | None) -> Tensor:
    """The layer with its class group's update, if any.

    All rows of a batch belong to one group and are many more than the layer has columns, so
    updating the matrix costs less than a second product for every row.
    """
    return layer(x) if update is None else F.linear(x, layer.weight + update, layer.bias)


def modulate(x_BLD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """Layer normalisation whose scale and shift come from the class (AdaLN)."""
    normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_B1D, normed, 1 + scale_B1D)


def unit(x: Tensor) -> Tensor:
    """Vectors along the last axis, scaled to length one."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


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

    def forward(self, x_BLD: Tensor, mask_LL: Tensor, updates: Updates) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x_BLD, self.qkv, updates.get("qkv")) + bias
        q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=self.heads)
        q = unit(q) * self.log_scale.clamp(max=math.log(100.0)).exp()
        attended = F.scaled_dot_product_attention(
            q.to(v), unit(k).to(v), v, attn_mask=mask_LL, scale=1.0
        )
        out = rearrange(attended, "b h l d -> b l (h d)")
        return linear(out, self.proj, updates.get("proj"))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by six vectors from the class (AdaLN-zero)."""

    def __init__(self, width: int, heads: int, drop_path: float, depth: int) -> None:
        super().__init__()
        self.adaln = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop_path = drop_path
        self._initialise(width, depth)

    def adaptable(self, everywhere: bool) -> dict[str, nn.Linear]:
        """The layers that a class group may update, by the names `forward` knows them by."""
        if not everywhere:
            return {"adaln": self.adaln}
        attention = {"qkv": self.attention.qkv, "proj": self.attention.proj}
        return {"adaln": self.adaln, **attention, "fc1": self.fc1, "fc2": self.fc2}

    def forward(
        self, x_BLD: Tensor, condition_BD: Tensor, mask_LL: Tensor, updates: Updates
    ) -> Tensor:
        modulation = linear(F.silu(condition_BD), self.adaln, updates.get("adaln"))
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation[:, None].chunk(6, dim=-1)
        attended = self.attention(modulate(x_BLD, scale1, shift1), mask_LL, updates)
        x_BLD = self._add(x_BLD, attended, gate1)
        h = linear(modulate(x_BLD, scale2, shift2), self.fc1, updates.get("fc1"))
        h = linear(F.gelu(h, approximate="tanh"), self.fc2, updates.get("fc2"))
        return self._add(x_BLD, h, gate2)

    def _add(self, x_BLD: Tensor, branch_BLD: Tensor, gate_B1D: Tensor) -> Tensor:
        """x + gate * branch, with stochastic depth: in training, single images leave it out."""
        if self.training and self.drop_path > 0.0:
            keep = torch.rand(len(x_BLD), 1, 1, device=x_BLD.device) >= self.drop_path
            gate_B1D = gate_B1D * keep / (1 - self.drop_path)
        return torch.addcmul(x_BLD, branch_BLD, gate_B1D)

    @torch.no_grad()
    def _initialise(self, width: int, depth: int) -> None:
        """As published: nearly closed gates, residual branches scaled by the depth."""
        for layer in self.adaptable(everywhere=True).values():
            nn.init.trunc_normal_(layer.weight, std=(1 / (3 * width)) ** 0.5)
            if layer.bias is not None:
                layer.bias.zero_()
        self.adaln.weight[2 * width :] *= 0.5
        self.adaln.weight[: 2 * width] *= 1e-5
        self.attention.proj.weight /= math.sqrt(2 * depth)
        self.fc2.weight /= math.sqrt(2 * depth)


class VAR(nn.Module):
    """The trunk: everything but the class embeddings, which `ClassGroups` holds.

    The published sizes are width = 64 depth and heads = depth.
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
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.width = width
        level_L = torch.cat([torch.full((p * p,), k) for k, p in enumerate(scales)])
        self.level_L: Tensor
        self.register_buffer("level_L", level_L, persistent=False)
        # True where attention is allowed: a token sees its own scale and every coarser one.
        self.mask_LL: Tensor
        mask_LL = level_L[:, None] >= level_L[None, :]
        self.register_buffer("mask_LL", mask_LL, persistent=False)
        self.embed = nn.Linear(latent_channels, width)
        self.start = nn.Parameter(torch.empty(scales[0] ** 2, width))
        self.position = nn.Parameter(torch.empty(len(level_L), width))
        self.level = nn.Embedding(len(scales), width)
        # Stochastic depth grows linearly with the block, as in the official code.
        drops = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(width, heads, drop, depth) for drop in drops)
        self.head_adaln = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, vocabulary)
        self._initialise(width)

    def forward(
        self, inputs_BLZ: Tensor, condition_BD: Tensor, adapter: Adapter | None = None
    ) -> Tensor:
        """Teacher-forced logits (B, L, V).

        inputs_BLZ (B, L - p_1^2, Z) comes from `MultiScaleTokenizer.var_input`; condition_BD are
        class embeddings; `adapter` is that of the class group all of them belong to.
        """
        x = self.features(inputs_BLZ, condition_BD, adapter)
        return self.logits(x, condition_BD, adapter)

    def features(
        self, inputs_BLZ: Tensor, condition_BD: Tensor, adapter: Adapter | None = None
    ) -> Tensor:
        """The last block's output (B, L, D)."""
        start = condition_BD[:, None] + self.start
        own = _at(adapter, "trunk")
        x = torch.cat([start, linear(inputs_BLZ, self.embed, own.get("embed"))], dim=1)
        x = x + self.position + self.level(self.level_L)
        for i, block in enumerate(self.blocks):
            x = block(x, condition_BD, self.mask_LL, _at(adapter, str(i)))
        return x

    def logits(
        self, features_BLD: Tensor, condition_BD: Tensor, adapter: Adapter | None = None
    ) -> Tensor:
        """The head: features (B, L, D) -> (B, L, V)."""
        own = _at(adapter, "trunk")
        modulation = linear(F.silu(condition_BD), self.head_adaln, own.get("head_adaln"))
        scale, shift = modulation[:, None].chunk(2, dim=-1)
        return linear(modulate(features_BLD, scale, shift), self.head, own.get("head"))

    def new_adapter(self, rank: int, everywhere: bool) -> Adapter:
        """Low-rank updates of every linear layer, or only of those that read the class (AdaLN)."""
        places = {"trunk": {"head_adaln": self.head_adaln}}
        if everywhere:
            places["trunk"] |= {"embed": self.embed, "head": self.head}
        for i, block in enumerate(self.blocks):
            places[str(i)] = block.adaptable(everywhere)  # type: ignore[operator]
        return Adapter(places, rank)

    @torch.no_grad()
    def _initialise(self, width: int) -> None:
        """As published; the blocks do their own."""
        std = (1 / (3 * width)) ** 0.5
        for module in (self.embed, self.level, self.head_adaln, self.head):
            nn.init.trunc_normal_(module.weight, std=std)
        for parameter in (self.start, self.position):
            nn.init.trunc_normal_(parameter, std=std)
        self.head.weight *= 0.02
        self.head_adaln.weight *= 0.5
        for layer in (self.embed, self.head_adaln, self.head):
            layer.bias.zero_()


def _at(adapter: Adapter | None, place: str) -> Updates:
    return {} if adapter is None else adapter.at(place)
