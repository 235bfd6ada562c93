"""What schedules cost: the figures of the literature, and hand-counted small ones."""

import math

import pytest
import torch
from torch import Tensor

from cil.classify.schedule import (
    Cost,
    Stage,
    adaptive,
    class_cost,
    common_cost,
    cost,
    encoder_cost,
    fit_margins,
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


def test_copies_of_the_image_are_encoded_one_by_one(tokenizer):
    trunk, stages = d16(), schedule("a_varc", 10, samples=3)
    once, thrice = (cost(stages, trunk, 100, tokenizer, encodings=n) for n in (1, 3))
    assert (thrice - once).layers == pytest.approx(2 * encoder_cost(tokenizer).layers)


def test_a_cache_saves_what_was_read_before(tokenizer):
    trunk = d16()
    whole, first = class_cost(trunk, 10), class_cost(trunk, 6)
    stages = schedule("a_varc", 10, samples=3)
    # 10 classes read on from scale 6; two noisy copies of 3 classes are new, the clean one is not.
    # Reading on, the class is projected to AdaLN's vectors anew: 6 D^2 a block, 2 D^2 for the head.
    adaln = Cost((16 * 6 + 2) * 1024**2, 0.0)
    expected = first.times(100) + (whole - first + adaln).times(10) + whole.times(6)
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


def test_one_class_is_read_once():
    trunk = d16()
    found = cost(schedule("a_varc", 10, samples=3), trunk, 1)
    assert found == class_cost(trunk, 6)


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_tolerance_is_a_share(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        fit_margins(*values_and_labels(), tolerance=tolerance)


def values_and_labels() -> tuple[Tensor, Tensor]:
    """Evidence of 400 images for 6 classes on 3 scales: weak and noisy first, stronger later."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (400,), generator=generator)
    values = 4 * torch.randn(400, 6, 3, generator=generator)
    values[torch.arange(400), labels] += torch.tensor([2.0, 6.0, 12.0])
    return values, labels


def pruned(values: Tensor, margins: list[float]) -> tuple[Tensor, float]:
    """The class found by pruning after every scale, and how many classes the last one reads."""
    partial = values.cumsum(-1)
    left = torch.ones(values.shape[:2], dtype=torch.bool)
    for k, margin in enumerate(margins[:-1]):
        scores = partial[..., k].masked_fill(~left, -torch.inf)
        left &= scores >= scores.amax(1, keepdim=True) - margin
    return partial[..., -1].masked_fill(~left, -torch.inf).argmax(1), left.sum(1).float().mean()


@pytest.mark.parametrize("tolerance", [0.003, 0.02, 0.1])
def test_fitted_margins_lose_as_much_as_is_allowed(tolerance):
    values, labels = values_and_labels()
    margins = fit_margins(values, labels, tolerance=tolerance)
    whole = (values.sum(-1).argmax(1) == labels).float().mean()
    found, left = pruned(values, margins)
    assert whole - (found == labels).float().mean() <= tolerance
    assert left < 6
    tighter = [0.8 * margin for margin in margins]
    lost = whole - (pruned(values, tighter)[0] == labels).float().mean()
    assert lost > tolerance / 2 or min(margins) == pytest.approx(-math.log(tolerance))


def test_margins_leave_what_is_not_settled():
    """Where the first scale separates all held-out images, the margin is that of a posterior."""
    values = torch.zeros(20, 2, 2)
    labels = torch.arange(20) % 2
    values[torch.arange(20), labels] = 50.0
    assert fit_margins(values, labels) == pytest.approx([math.log(200)] * 2)
    wrong = fit_margins(values, 1 - labels)
    assert wrong == [math.inf, math.inf]  # nothing to learn from


def test_the_adaptive_schedule_reads_scale_after_scale():
    *clean, last = adaptive([3.0, 5.0, 7.0], samples=4)
    found = [(stage.scales, stage.samples, stage.margin) for stage in clean]
    assert found == [(1, 1, 3.0), (2, 1, 5.0), (3, 1, 7.0)]
    assert last == Stage(3, 4, 1)
    assert list(adaptive([3.0, 5.0, 7.0], samples=1)) == clean
    with pytest.raises(ValueError, match="no margins yet"):
        adaptive([], samples=1)


def test_margins_spare_what_only_the_copies_put_right():
    """Ten images that the clean copy alone gets wrong by 9 nats: they must stay open."""
    values, labels = torch.zeros(100, 3, 1), torch.zeros(100, dtype=torch.long)
    values[:, 0] = 30.0
    values[:10, 1] = 39.0
    final = torch.tensor([1.0, 0.0, 0.0]).expand(100, 3)
    assert fit_margins(values, labels)[0] == pytest.approx(math.log(200))
    assert fit_margins(values, labels, final)[0] == pytest.approx(9.0)
