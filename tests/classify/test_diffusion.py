"""The diffusion classifier against its definition, its stages, and the published costs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cil.classify.diffusion import diffusion_scores, stage_times
from cil.classify.schedule import (
    Timesteps,
    denoising_cost,
    diffusion_cost,
    diffusion_schedule,
    encoder_cost,
)
from cil.config import DiffusionConfig
from cil.errors import UserError
from cil.methods.diffusion_parts import build_model
from cil.methods.var_parts import build_tokenizer
from cil.models.class_groups import Incremental
from cil.models.dit import SIZES, DiT
from cil.models.latents import Latents
from cil.models.noising import Noising

STAGED = (Timesteps(4, 3), Timesteps(6, 2), Timesteps(10, 1))
SEEDS = [5, 6, 7, 8]


@pytest.fixture(scope="module", params=["adapter", "copy"])
def model(request, tiny_diffusion_config, shake) -> Incremental:
    """Five classes in three groups, none of which is untouched."""
    torch.manual_seed(0)
    settings = replace(tiny_diffusion_config, plasticity=request.param)
    model = build_model(Latents(None, 2, 4), settings)
    for classes in (2, 2, 1):
        model.grow(classes)
    shake(model, amount=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["noise", "flow"])
def noising(request) -> Noising:
    return Noising(request.param, "linear")


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(3))


def by_definition(model, noising, clean, stages) -> Tensor:
    """Mean squared errors of every class over all timesteps, one image and class at a time."""
    sums = torch.zeros(len(clean), 5)
    times = stage_times(noising, stages)
    for image, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        for stage in times:
            noise = torch.randn(len(stage), 2, 4, 4, generator=generator)
            noised = noising.noised(clean[image].expand_as(noise), noise, stage)
            wanted = noising.target(clean[image], noise)
            for label in range(5):
                labels = torch.full((len(stage),), label)
                with torch.no_grad():
                    found = model.predictions(noised, stage, labels, label // 2)
                sums[image, label] += (found - wanted).square().sum()
    return -sums / sum(len(stage) for stage in times)


def test_a_score_is_the_mean_error_of_its_class(model, noising, clean):
    stages = (Timesteps(7, 1),)
    found = diffusion_scores(model, noising, clean, SEEDS, stages)
    expected = by_definition(model, noising, clean, stages)
    torch.testing.assert_close(found, expected)
    assert expected.std(1).min() > 0.01  # the classes differ
    pieces = diffusion_scores(model, noising, clean, SEEDS, stages, max_tokens=12)
    torch.testing.assert_close(pieces, expected)


def test_classes_learned_earlier_can_be_left_out(model, noising, clean):
    settings = noising, clean, SEEDS, (Timesteps(7, 1),)
    whole = diffusion_scores(model, *settings)
    assert torch.equal(diffusion_scores(model, *settings, first=2), whole[:, 2:])


def test_stages_end_as_if_the_classes_kept_had_been_read_alone(model, noising, clean):
    found = diffusion_scores(model, noising, clean, SEEDS, STAGED)
    whole = by_definition(model, noising, clean, STAGED)
    left = found.isfinite()
    assert (left.sum(1) == 2).all()
    torch.testing.assert_close(found[left], whole[left])
    first = by_definition(model, noising, clean, diffusion_schedule([[20, 1]]))
    assert not torch.equal(first[left], whole[left])  # other noise: the check above can fail
    best = diffusion_scores(model, noising, clean, SEEDS, (*STAGED[:1], Timesteps(16, 1)))
    assert (best.isfinite().sum(1) == 3).all()


def test_an_image_with_one_class_left_is_decided(model, noising, clean):
    once = diffusion_scores(model, noising, clean, SEEDS, (Timesteps(4, 1), Timesteps(16, 1)))
    assert (once.isfinite().sum(1) == 1).all()
    four = stage_times(noising, (Timesteps(4, 1), Timesteps(16, 1)))[0]
    assert len(four) == 4
    read = diffusion_scores(model, noising, clean, SEEDS, (Timesteps(4, 5), Timesteps(16, 1)))
    assert not torch.equal(read.amax(1), once.amax(1))  # more was read of it


def test_classes_share_the_noise_of_an_image(model, noising, clean):
    """Two classes with one embedding cannot differ but by their noise."""
    before = model.groups.embeddings[1][1].clone()
    with torch.no_grad():
        model.groups.embeddings[1][1] = model.groups.embeddings[1][0]
    found = diffusion_scores(model, noising, clean, SEEDS, (Timesteps(9, 1),))
    with torch.no_grad():
        model.groups.embeddings[1][1] = before
    torch.testing.assert_close(found[:, 2], found[:, 3], rtol=1e-6, atol=0)
    assert (found[:, 0] - found[:, 1]).abs().min() > 1e-3


def test_a_score_depends_on_its_own_image_and_seed_alone(model, noising, clean):
    together = diffusion_scores(model, noising, clean, SEEDS, STAGED)
    for row in range(4):
        alone = diffusion_scores(model, noising, clean[row : row + 1], SEEDS[row : row + 1], STAGED)
        torch.testing.assert_close(alone[0], together[row])
    other = diffusion_scores(model, noising, clean, [9, 9, 9, 9], STAGED)
    assert not torch.isclose(other.amax(1), together.amax(1)).any()


@pytest.mark.parametrize("counts", [[25], [25, 225], [3, 4, 5], [7, 993], [10, 15, 225]])
def test_stages_share_one_even_grid(noising, counts):
    stages = [Timesteps(count, 1) for count in counts]
    times = stage_times(noising, stages)
    assert [len(t) for t in times] == counts
    every = torch.cat(times).sort().values
    assert torch.equal(every, noising.even_times(sum(counts)))
    # Each stage is about evenly spaced by itself.
    gaps = times[0].diff()
    assert gaps.max() - gaps.min() <= 1000 / sum(counts) + 2


def test_named_and_listed_schedules():
    assert diffusion_schedule("dc_25") == (Timesteps(25, 1),)
    assert diffusion_schedule("dc_25_250") == (Timesteps(25, 5), Timesteps(225, 1))
    for nonsense in ([4, 1], [["a", "b"]], [[None, 1]], [[4.5, 1]], [[4, True]], [[4]], []):
        with pytest.raises(UserError, match="no schedule of timesteps"):
            diffusion_schedule(nonsense)  # type: ignore[arg-type]
    assert diffusion_schedule([[10, 4], [40, 1]]) == (Timesteps(10, 4), Timesteps(40, 1))


@pytest.mark.parametrize(
    "wanted", ["dc_7", [], [[25]], [[0, 1]], [[25, 0]], [[1001, 1]], [[999, 2], [2, 1]]]
)
def test_what_is_no_schedule_is_refused(wanted):
    with pytest.raises(UserError, match="no schedule of timesteps"):
        diffusion_schedule(wanted)


def test_a_stage_cannot_keep_more_classes_than_are_left():
    with pytest.raises(UserError, match="a stage keeps 9 classes, but the one before it leaves 4;"):
        diffusion_schedule([[10, 4], [40, 9]])
    with pytest.raises(UserError, match="keeps 3 classes, but the one before it leaves 2;"):
        diffusion_schedule([[10, 4], [10, 2], [40, 3]])
    assert diffusion_schedule([[10, 4], [40, 4]]) == (Timesteps(10, 4), Timesteps(40, 4))


@pytest.mark.parametrize(
    ("size", "published"), [("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)]
)
def test_the_costs_of_the_literature(size, published):
    """Table 4 of the DiT paper, in G multiply-accumulates, attention's products included."""
    cost = denoising_cost(trunk(size))
    assert (cost.layers + cost.attention) / 1e9 == pytest.approx(published, rel=0.005)


def test_a_prediction_of_a_hundred_classes():
    """2510.12060 has 286,288 G and 415,056 G, in layers, with a latent encoder of some 138 G."""
    for name, figure in (("dc_25", 286_288), ("dc_25_250", 415_056)):
        found = diffusion_cost(diffusion_schedule(name), trunk("XL"), 100)
        assert found.layers / 1e9 + 138 == pytest.approx(figure, rel=0.002)


def trunk(size: str) -> DiT:
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        return DiT(channels=4, side=32, patch=2, depth=depth, width=width, heads=heads)


def test_hand_counted(tiny_tokenizer_config):
    small = DiT(channels=3, side=4, patch=2, depth=2, width=8, heads=2)
    # Four tokens; 12 D^2 a token and 6 D^2 a row in each block, two products of four pairs each.
    layers = 2 * (4 * 12 + 6) * 64 + 4 * 2 * 12 * 8 + 2 * 64 + (256 * 8 + 64)
    found = denoising_cost(small)
    assert (found.layers, found.attention) == (layers, 2 * 2 * 16 * 8)
    stages = (Timesteps(5, 4), Timesteps(3, 1))
    assert diffusion_cost(stages, small, 7) == found.times(5 * 7 + 3 * 4)
    assert diffusion_cost(stages, small, 1) == found.times(5)  # one class is decided
    tokenizer = build_tokenizer(tiny_tokenizer_config, 1)
    encoded = diffusion_cost(stages, small, 7, tokenizer)
    assert encoded == found.times(47) + encoder_cost(tokenizer)


def test_the_default_is_a_name():
    assert diffusion_schedule(DiffusionConfig().schedule) == (Timesteps(25, 1),)
