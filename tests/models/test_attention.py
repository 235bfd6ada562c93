"""Attention that is causal by scale, against softmax written out."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cil.models import attention
from cil.models.attention import Sight, attend

SCALES = (1, 2, 3, 5, 6)
LIMITS = [end for end, p in zip((1, 5, 14, 39, 75), SCALES, strict=True) for _ in range(p * p)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def qkv(first: int, last: int, features: int) -> list[Tensor]:
    """Queries of tokens first..last and keys and values up to last, as views of one tensor."""
    torch.manual_seed(0)
    together = torch.randn(2, last, 3, 3, features).permute(2, 0, 3, 1, 4)
    return [together[0][:, :, first:], together[1], together[2]]


def sight(first: int, last: int) -> Sight:
    limits = torch.tensor(LIMITS[first:last], dtype=torch.int32)
    finest = SCALES[(1, 5, 14, 39, 75).index(last)] ** 2
    mask = torch.arange(last) < limits[:, None]
    return Sight(limits, None if last - first == finest else mask, finest)


def by_hand(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    out = torch.empty(len(q), q.shape[2], q.shape[1], q.shape[3], dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for m in range(q.shape[2]):
        seen = LIMITS[first + m]
        weights = (q[:, :, m, None] * k[:, :, :seen]).sum(-1).softmax(-1)
        out[:, m] = (weights[..., None] * v[:, :, :seen]).sum(2)
    return out.flatten(2)


SPANS = [(0, 75), (0, 1), (14, 75), (39, 75), (5, 39)]


@pytest.mark.parametrize(("first", "last"), SPANS)
def test_a_token_sees_its_own_scale_and_coarser_ones(first: int, last: int) -> None:
    q, k, v = qkv(first, last, 16)
    found = attend(q, k, v, sight(first, last))
    torch.testing.assert_close(found.double(), by_hand(q, k, v, first), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("features", [32, 64])
@pytest.mark.parametrize(("first", "last"), SPANS)
def test_on_a_gpu_in_16_bits(first: int, last: int, features: int) -> None:
    """Through the kernel without a gradient, through torch's own with one."""
    q, k, v = (x.bfloat16() for x in qkv(first, last, features))
    seen = sight(first, last)
    mask = None if seen.mask_MN is None else seen.mask_MN.cuda()
    seen = Sight(seen.limits_M.cuda(), mask, seen.finest)
    expected = by_hand(q, k, v, first)
    for gradient in (False, True):
        on_gpu = [x.cuda().requires_grad_(gradient) for x in (q, k, v)]
        found = attend(*on_gpu, seen).detach().cpu().double()
        assert (found - expected).norm() / expected.norm() < 5e-3


INTERPRETED = """
import sys
import torch
sys.path[:0] = {path}
from cil.models.attention import _attend_kernel
from test_attention import SPANS, LIMITS, by_hand, qkv
for first, last in SPANS:
    q, k, v = qkv(first, last, 16)
    limits = torch.tensor(LIMITS[first:last], dtype=torch.int32)
    rows, heads, queries, d = q.shape
    for m, n in ((16, 16), (32, 64), (64, 32)):
        out = torch.full((rows, queries, heads * d), float("nan"))
        strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
        _attend_kernel.fn[(-(-queries // m) * heads * rows,)](
            q, k, v, out, limits, *strides, heads, queries, last, D=d, TILE_M=m, TILE_N=n
        )
        torch.testing.assert_close(out.double(), by_hand(q, k, v, first), atol=1e-5, rtol=1e-5)
"""


@pytest.mark.skipif(attention.triton is None, reason="needs triton")
def test_the_kernel_computes_the_same() -> None:
    """Step by step on the CPU, as triton's interpreter does: CI has no GPU."""
    program = INTERPRETED.format(path=[os.path.dirname(__file__), os.getcwd()])
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
