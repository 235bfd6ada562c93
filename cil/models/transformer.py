"""The transformer block of VAR and DiT: attention and MLP under AdaLN, with low-rank updates.

Shapes: B rows, L tokens, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cil.models.attention import Sight, attend
from cil.models.class_groups import Adapter, LowRank, Updates


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


class Attention(nn.Module):
    """Multi-head attention.

    VAR's has L2-normalised queries and keys and a learned scale a head (`normalised`); DiT's is the
    plain one, which divides by the root of a head's features.
    """

    def __init__(self, width: int, heads: int, normalised: bool = True) -> None:
        super().__init__()
        self.heads, self.normalised = heads, normalised
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))  # a bias of the keys would cancel out
        if normalised:
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
        if self.normalised:
            q = unit(q) * self.log_scale.clamp(max=math.log(100.0)).exp()
            q, k = q.to(v), unit(k).to(v)
        else:
            q = q * q.shape[-1] ** -0.5
        if cache is not None:
            k, v = cache.extend(k, v)
        return linear(attend(q, k, v, sight), self.proj, updates.get("proj"))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by six vectors from the class (AdaLN-zero).

    Of its own the block projects the class to the six; with a projection shared by all blocks it
    only adds a learned vector to each.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        drop_path: float,
        depth: int,
        shared_adaln: bool,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        if shared_adaln:
            self.own_modulation = nn.Parameter(torch.randn(6 * width) * width**-0.5)
        else:
            self.adaln = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads, normalised)
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


def at(adapter: Adapter | None, place: str) -> Updates:
    return {} if adapter is None else adapter.at(place)
