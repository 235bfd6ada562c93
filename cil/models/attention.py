"""Attention that is causal by scale: a token sees its own scale and every coarser one (2404.02905).

Shapes: B rows, H heads, M queries, N keys, d features a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # comes with torch where there may be a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass(frozen=True)
class Sight:
    """What each of M tokens sees of the N read so far, its own scale included."""

    limits_M: Tensor  # the first so many (int32, never falling)
    mask_MN: Tensor | None  # the same as booleans; None where every token sees everything
    finest: int  # tokens of the finest scale, the last ones: they see everything


def attend(q_BHMd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, sight: Sight) -> Tensor:
    """softmax(q k) v over what each token sees -> (B, M, H d). Nothing is scaled."""
    if _kernel_suits(q_BHMd):
        return torch.ops.cil.attend(q_BHMd, k_BHNd, v_BHNd, sight.limits_M)
    mask, last = sight.mask_MN, sight.finest
    if mask is None or not q_BHMd.is_cuda:
        out = F.scaled_dot_product_attention(q_BHMd, k_BHNd, v_BHNd, attn_mask=mask, scale=1.0)
        return out.transpose(1, 2).flatten(2)
    # The finest scale, a good third of all tokens, needs no mask: apart it is faster on a GPU.
    coarse, fine = q_BHMd[:, :, :-last], q_BHMd[:, :, -last:]
    k, v = k_BHNd[:, :, :-last], v_BHNd[:, :, :-last]
    parts = [
        F.scaled_dot_product_attention(coarse, k, v, attn_mask=mask[:-last, :-last], scale=1.0),
        F.scaled_dot_product_attention(fine, k_BHNd, v_BHNd, scale=1.0),
    ]
    return torch.cat(parts, 2).transpose(1, 2).flatten(2)


def _kernel_suits(q_BHMd: Tensor) -> bool:
    """Whether our kernel takes it: it rounds to 16 bits and knows no gradient."""
    half = q_BHMd.dtype in (torch.bfloat16, torch.float16)
    d = q_BHMd.shape[-1]
    power_of_two = 16 <= d <= 128 and d & (d - 1) == 0
    free = not (torch.is_grad_enabled() and q_BHMd.requires_grad)
    return triton is not None and q_BHMd.is_cuda and half and power_of_two and free


if triton is not None:
    # Queries and keys a program takes at a time; few warps where few queries keep them busy.
    _SIZES = ((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3))

    @triton.autotune(
        [
            triton.Config({"TILE_M": m, "TILE_N": n}, num_warps=warps, num_stages=stages)
            for m, n, warps, stages in _SIZES
        ],
        key=["queries", "keys"],
    )
    @triton.jit
    def _attend_kernel(  # type: ignore[no-untyped-def]  # a program of the GPU
        q, k, v, out, limits,
        q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n,
        heads, queries, keys,
        D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    ):  # fmt: skip
        """One tile of queries of one row and head, over the keys that any of them sees."""
        tiles = tl.cdiv(queries, TILE_M)
        first = tl.program_id(0) % tiles * TILE_M
        head = tl.program_id(0) // tiles % heads
        row = (tl.program_id(0) // tiles // heads).to(tl.int64)
        m, d = first + tl.arange(0, TILE_M), tl.arange(0, D)
        real = m < queries
        q_tile = tl.load(
            q + row * q_b + head * q_h + m[:, None] * q_m + d[None, :], real[:, None], 0.0
        )
        limit = tl.load(limits + m, real, 0)
        # Limits never fall: all queries see the keys before `shared`, none sees those from `end`.
        shared = tl.load(limits + first) // TILE_N * TILE_N
        end = tl.load(limits + tl.minimum(first + TILE_M, queries) - 1)
        k_tiles = k + row * k_b + head * k_h + tl.arange(0, TILE_N)[None, :] * k_n + d[:, None]
        v_tiles = v + row * v_b + head * v_h + tl.arange(0, TILE_N)[:, None] * v_n + d[None, :]
        summed = tl.zeros([TILE_M, D], tl.float32)
        weight = tl.zeros([TILE_M], tl.float32)
        highest = tl.full([TILE_M], -float("inf"), tl.float32)
        for n in tl.range(0, shared, TILE_N):
            scores = tl.dot(q_tile, tl.load(k_tiles + n * k_n)) * 1.4426950408889634  # base 2
            top = tl.maximum(highest, tl.max(scores, 1))
            p, fade = tl.exp2(scores - top[:, None]), tl.exp2(highest - top)
            weight, highest = weight * fade + tl.sum(p, 1), top
            summed = tl.dot(p.to(q_tile.dtype), tl.load(v_tiles + n * v_n), summed * fade[:, None])
        for n in tl.range(shared, end, TILE_N):
            at = n + tl.arange(0, TILE_N)
            k_tile = tl.load(k_tiles + n * k_n, (at < keys)[None, :], 0.0)
            v_tile = tl.load(v_tiles + n * v_n, (at < keys)[:, None], 0.0)
            scores = tl.dot(q_tile, k_tile) * 1.4426950408889634
            # Finite, so that a row that sees none of this tile's keys does not turn into NaN.
            scores = tl.where(at[None, :] < limit[:, None], scores, -1e30)
            top = tl.maximum(highest, tl.max(scores, 1))
            p, fade = tl.exp2(scores - top[:, None]), tl.exp2(highest - top)
            weight, highest = weight * fade + tl.sum(p, 1), top
            summed = tl.dot(p.to(q_tile.dtype), v_tile, summed * fade[:, None])
        tile = (summed / weight[:, None]).to(q_tile.dtype)
        width = heads * D
        at = (row * queries + m)[:, None] * width + head * D + d[None, :]
        tl.store(out + at, tile, real[:, None])

    @torch.library.triton_op("cil::attend", mutates_args={})
    def _attend(q: Tensor, k: Tensor, v: Tensor, limits: Tensor) -> Tensor:
        rows, heads, queries, d = q.shape
        out = q.new_empty(rows, queries, heads * d)

        def programs(tile: dict[str, int]) -> tuple[int]:
            return (triton.cdiv(queries, tile["TILE_M"]) * heads * rows,)

        torch.library.wrap_triton(_attend_kernel)[programs](
            q, k, v, out, limits,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            heads, queries, k.shape[2], D=d,
        )  # fmt: skip
        return out
