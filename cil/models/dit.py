"""DiT: a transformer that predicts the noise in an image or its latents (arXiv 2212.09748).

Shapes: B rows, Z channels, h = w side, L = (h / patch)^2 tokens, D width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cil.models.attention import Sight
from cil.models.class_groups import Adapter
from cil.models.compiling import any_batch, compiled
from cil.models.transformer import Block, at, linear, modulate

# The published sizes: depth, width, heads.
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
FREQUENCIES = 256  # sines and cosines that describe a time, as published


class DiT(nn.Module):
    """The trunk: everything but the class embeddings, which `ClassGroups` holds.

    Class and time enter through the AdaLN-zero of every block. The published model also predicts
    the variance of each step; classification and DDIM do not read it, and it is left out. A learned
    bias of the keys is left out too, as softmax cancels it.

    With `compiled` set, the blocks go through torch.compile.
    """

    def __init__(
        self, *, channels: int, side: int, patch: int, depth: int, width: int, heads: int
    ) -> None:
        """`channels` and `side` are those of what is denoised; `width` is a multiple of four."""
        super().__init__()
        self.channels, self.side, self.patch, self.width = channels, side, patch, width
        self.compiled = False
        self.embed = nn.Linear(channels * patch**2, width)
        self.position_LD: Tensor
        self.register_buffer("position_LD", _positions(side // patch, width), persistent=False)
        self.limits_L: Tensor  # of attention: every token sees all
        limits_L = torch.full((self.tokens,), self.tokens, dtype=torch.int32)
        self.register_buffer("limits_L", limits_L, persistent=False)
        self.time1 = nn.Linear(FREQUENCIES, width)
        self.time2 = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, 0.0, depth, shared_adaln=False, normalised=False)
            for _ in range(depth)
        )
        self.head_adaln = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, channels * patch**2)
        self._initialise()

    @property
    def tokens(self) -> int:
        """L."""
        return (self.side // self.patch) ** 2

    def forward(
        self,
        noised_BZhw: Tensor,
        times_B: Tensor,
        condition_BD: Tensor,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """What is predicted (B, Z, h, w), fp32, at times from 0 (clean) to 1000 (noise).

        condition_BD are class embeddings; `adapter` is that of the class group all of them belong
        to.
        """
        own, p = at(adapter, "trunk"), self.patch
        patches = rearrange(noised_BZhw, "b z (h p) (w q) -> b (h w) (z p q)", p=p, q=p)
        x_BLD = linear(patches, self.embed, own.get("embed")) + self.position_LD
        condition_BD = condition_BD + self.time(times_B)
        x_BLD = self._run(x_BLD, condition_BD, adapter)
        modulation = linear(F.silu(condition_BD), self.head_adaln, own.get("head_adaln"))
        scale, shift = modulation[:, None].chunk(2, dim=-1)
        patches = linear(modulate(x_BLD, scale, shift), self.head, own.get("head")).float()
        h = self.side // p
        return rearrange(patches, "b (h w) (z p q) -> b z (h p) (w q)", h=h, p=p, q=p)

    def time(self, times_B: Tensor) -> Tensor:
        """The embedding of a time (B, D): sines and cosines through an MLP."""
        half = FREQUENCIES // 2
        powers = torch.arange(half, device=times_B.device) / half
        angles = times_B.float()[:, None] * torch.exp(-math.log(10000) * powers)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: Tensor = self.time2(F.silu(self.time1(waves)))
        return embedded

    def _run(self, x_BLD: Tensor, condition_BD: Tensor, adapter: Adapter | None) -> Tensor:
        sight = Sight(self.limits_L, None, finest=self.tokens)
        forward: Callable[..., Tensor] = Block.forward
        if self.compiled:
            forward = compiled(forward)
        for i, block in enumerate(self.blocks):
            if self.compiled:
                any_batch(x_BLD, condition_BD)
            x_BLD = forward(block, x_BLD, condition_BD, None, sight, at(adapter, str(i)))
        return x_BLD

    def new_adapter(self, rank: int, everywhere: bool) -> Adapter:
        """Low-rank updates of every linear layer, or only of those that read the class (AdaLN).

        The time's own embedding is left alone: it says nothing of a class.
        """
        trunk = {"head_adaln": self.head_adaln}
        if everywhere:
            trunk |= {"head": self.head, "embed": self.embed}
        places = {"trunk": trunk}
        for i, block in enumerate(self.blocks):
            places[str(i)] = block.adaptable(everywhere)  # type: ignore[operator]
        return Adapter(places, rank)

    def shared_parts(self) -> list[nn.Module | nn.Parameter]:
        """What the copies of a trunk share: nothing."""
        return []

    @torch.no_grad()
    def _initialise(self) -> None:
        """As published: every block begins as the identity, and the head predicts zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    layer.bias.zero_()
        for layer in (self.time1, self.time2):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            block.adaln.weight.zero_()  # type: ignore[operator, union-attr]
        self.head_adaln.weight.zero_()
        self.head.weight.zero_()


def _positions(side: int, width: int) -> Tensor:
    """Fixed sines and cosines of row and column (side^2, width), a quarter of the width each."""
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)
