"""DiT: the published sizes and start, its attention and AdaLN against plain formulas, adapters."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cil.models.dit import SIZES, DiT


@pytest.fixture
def trunk(shake) -> DiT:
    torch.manual_seed(0)
    trunk = DiT(channels=3, side=4, patch=2, depth=2, width=16, heads=2)
    shake(trunk)
    return trunk.eval()


def inputs(rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noised = torch.randn(rows, 3, 4, 4, generator=generator)
    times = torch.linspace(0, 999, rows)
    return noised, times, torch.randn(rows, 16, generator=generator)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_published_sizes(size, millions):
    """Table 1 and 4 of the paper, whose count holds the class embeddings and the variances."""
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        trunk = DiT(channels=4, side=32, patch=2, depth=depth, width=width, heads=heads)
    classes, variances = 1001 * width, (width + 1) * 16
    found = sum(p.numel() for p in trunk.parameters()) + classes + variances
    assert found == pytest.approx(millions * 1e6, rel=0.015)


def test_it_starts_by_predicting_nothing_whatever_it_is_told():
    trunk = DiT(channels=3, side=4, patch=2, depth=2, width=16, heads=2)
    noised, times, condition = inputs()
    assert torch.equal(trunk(noised, times, condition), torch.zeros(5, 3, 4, 4))
    # Every block is the identity: only what the head reads can differ.
    torch.nn.init.ones_(trunk.head.weight)
    assert torch.equal(trunk(noised, times, condition), trunk(noised, times + 5, 2 * condition))
    torch.nn.init.ones_(trunk.blocks[1].adaln.weight)
    assert not torch.equal(trunk(noised, times, condition), trunk(noised, times, 2 * condition))


def test_it_is_the_published_formula(trunk):
    """Patch by patch, head by head, with the gates, scales and shifts of adaLN-Zero."""
    noised, times, condition = inputs(2)
    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)])
    for row in range(2):
        waves = torch.cat([(times[row] * frequencies).cos(), (times[row] * frequencies).sin()])
        c = F.silu(condition[row] + trunk.time2(F.silu(trunk.time1(waves))))
        corners = list(product((0, 2), (0, 2)))
        patches = [noised[row, :, i : i + 2, j : j + 2].flatten() for i, j in corners]
        x = trunk.embed(torch.stack(patches)) + trunk.position_LD
        for block in trunk.blocks:
            gate1, gate2, scale1, scale2, shift1, shift2 = block.adaln(c).chunk(6)
            h = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale1) + shift1
            x = x + gate1 * naive_attention(block.attention, h)
            h = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale2) + shift2
            x = x + gate2 * block.fc2(F.gelu(block.fc1(h), approximate="tanh"))
        scale, shift = trunk.head_adaln(c).chunk(2)
        out = trunk.head(F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift)
        found = trunk(noised, times, condition)[row]
        for (i, j), patch in zip(corners, out, strict=True):
            expected = patch.view(3, 2, 2)
            torch.testing.assert_close(found[:, i : i + 2, j : j + 2], expected, atol=1e-3, rtol=0)
        assert out.std() > 0.1


def naive_attention(attention, x_LD: Tensor) -> Tensor:
    q, k, v = (x_LD @ attention.qkv.weight.T).chunk(3, dim=1)
    q, v = q + attention.q_bias, v + attention.v_bias
    heads = []
    for i in (0, 8):
        weights = (q[:, i : i + 8] @ k[:, i : i + 8].T / 8**0.5).softmax(1)
        heads.append(weights @ v[:, i : i + 8])
    return attention.proj(torch.cat(heads, 1))


def test_positions_tell_all_places_apart():
    trunk = DiT(channels=1, side=8, patch=1, depth=1, width=16, heads=2)
    positions = trunk.position_LD
    assert positions.shape == (64, 16)
    assert len(positions.unique(dim=0)) == 64
    assert not positions.requires_grad
    # Neighbours are more alike than places far apart.
    assert (positions[0] - positions[1]).norm() < (positions[0] - positions[63]).norm()


@pytest.mark.parametrize("everywhere", [True, False])
def test_an_adapter_begins_as_nothing_and_reaches_every_layer(trunk, shake, everywhere):
    torch.manual_seed(2)
    adapter = trunk.new_adapter(2, everywhere)
    noised, times, condition = inputs()
    plain = trunk(noised, times, condition)
    assert torch.equal(trunk(noised, times, condition, adapter), plain)
    assert len(list(adapter.parameters())) == 2 * (2 * 5 + 3 if everywhere else 2 + 1)
    for name, parameter in adapter.named_parameters():
        if name.endswith("up"):
            torch.nn.init.ones_(parameter)
            assert not torch.equal(trunk(noised, times, condition, adapter), plain), name
            torch.nn.init.zeros_(parameter)
