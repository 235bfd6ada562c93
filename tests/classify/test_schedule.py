"""What schedules cost: the figures of the literature, and hand-counted small ones."""

import pytest
import torch

from cil.classify.schedule import (
    Cost,
    Stage,
    class_cost,
    common_cost,
    cost,
    encoder_cost,
    schedule,
)
from cil.errors import UserError
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import VAR

G = 1e9


def d16(condition_from: int = 0) -> VAR:
    """The released model at 256 px, without memory for its weights."""
    with torch.device("meta"):
        return VAR(
            vocabulary=4096,
            latent_channels=32,
            scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
            depth=16,
            width=1024,
            heads=16,
            condition_from=condition_from,
        )


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleTokenizer:
    with torch.device("meta"):
        return MultiScaleTokenizer()


def test_the_figures_of_the_literature(tokenizer):
    """notes of arXiv 2510.12060: 14,105 G and 4,649 G for 100 classes, in MACs of layers."""
    trunk = d16()
    assert class_cost(trunk, 10).layers == pytest.approx(139.9 * G, rel=0.01)
    assert class_cost(trunk, 6).layers == pytest.approx(18.8 * G, rel=0.01)
    assert encoder_cost(tokenizer).layers == pytest.approx(107.3 * G, rel=0.01)
    for name, samples, figure in (("varc", 1, 14_105), ("a_varc", 3, 4_649)):
        found = cost(schedule(name, 10, samples), trunk, 100, tokenizer, cached=False)
        assert found.layers == pytest.approx(figure * G, rel=0.01)


def test_a_cache_saves_what_was_read_before(tokenizer):
    trunk = d16()
    whole, first = class_cost(trunk, 10), class_cost(trunk, 6)
    stages = schedule("a_varc", 10, samples=3)
    # 10 classes read on from scale 6; two noisy copies of 3 classes are new, the clean one is not.
    expected = first.times(100) + (whole - first).times(10) + whole.times(6)
    found = cost(stages, trunk, 100)
    assert found.layers == pytest.approx(expected.layers)
    assert found.attention == pytest.approx(expected.attention)
    without = cost(stages, trunk, 100, cached=False)
    assert without.layers == pytest.approx(
        (first.times(100) + whole.times(10) + whole.times(9)).layers
    )
    varc = schedule("varc", 10, samples=4)
    assert cost(varc, trunk, 100) == cost(varc, trunk, 100, cached=False)


@pytest.mark.parametrize("m", [0, 1, 2])
def test_hand_counted(m):
    d, z, v = 4, 3, 5
    trunk = VAR(
        vocabulary=v,
        latent_channels=z,
        scales=(1, 2),
        depth=2,
        width=d,
        heads=2,
        condition_from=m,
    )
    # 5 tokens, of which 4 are embedded; a token costs 12 d^2 a block, a class 6 d^2 a block.
    block = 5 * 12 * d * d + 6 * d * d
    head = 5 * d * v + 2 * d * d
    embedding = 4 * z * d
    # The first token sees itself, each of the four others all five: 21 pairs, two products each.
    pairs = 2 * (1 + 4 * 5) * d
    if m == 0:
        expected = Cost(0, 0), Cost(2 * block + head + embedding, 2 * pairs)
    else:
        expected = (
            Cost(m * block + embedding, m * pairs),
            Cost((2 - m) * block + head, (2 - m) * pairs),
        )
    assert (common_cost(trunk, 2), class_cost(trunk, 2)) == expected
    both = expected[0] + expected[1].times(7)
    assert cost((Stage(2, 1, 1),), trunk, 7) == both


def test_late_conditioning_costs_a_class_half():
    assert class_cost(d16(8), 10).layers == pytest.approx(
        0.5 * class_cost(d16(), 10).layers, rel=0.03
    )


def test_schedules_by_name():
    assert schedule("a_varc", 10, 3) == (Stage(6, 1, 10), Stage(10, 1, 3), Stage(10, 3, 1))
    assert schedule("a_varc", 4, 5) == (Stage(2, 1, 10), Stage(4, 1, 3), Stage(4, 5, 1))
    assert schedule("varc", 4, 2) == (Stage(4, 2, 1),)
    with pytest.raises(UserError, match="no schedule vark"):
        schedule("vark", 4, 1)
