"""Sampling: the cached path against teacher forcing, filters, guidance, and whose seed it is."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cil.errors import UserError
from cil.generate import denoise, sample
from cil.methods.diffusion_parts import build_model as build_diffusion
from cil.methods.seeding import seed_all
from cil.methods.var_parts import build_model, build_tokenizer
from cil.models.class_groups import NULL_CLASS, Incremental
from cil.models.latents import Latents
from cil.models.noising import Noising
from cil.models.tokenizer import MultiScaleTokenizer

LABELS, SEEDS = [4, 0, 1, 3], [10, 11, 12, 13]  # of three groups


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_config, shake) -> MultiScaleTokenizer:
    seed_all(0)
    tokenizer = build_tokenizer(tiny_tokenizer_config, image_channels=1)
    shake(tokenizer)
    return tokenizer.eval().requires_grad_(False)


@pytest.fixture(
    scope="module",
    params=[("adapter", 0), ("copy", 0), ("scratch", 0), ("adapter", 1), ("copy", 1)],
)
def model(request, tiny_tokenizer_config, tiny_var_config, shake) -> Incremental:
    seed_all(1)
    plasticity, condition_from = request.param
    settings = replace(tiny_var_config, plasticity=plasticity, condition_from=condition_from)
    model = build_model(tiny_tokenizer_config, settings)
    for classes in (2, 2, 1):
        model.grow(classes)
    shake(model, amount=0.3)
    return model.eval()


def group_of(model: Incremental, label: int) -> int:
    return next((g for g in range(3) if label in model.groups.labels(g)), 0)


def teacher_forced(
    model: Incremental, tokenizer: MultiScaleTokenizer, tokens_BL: Tensor, label: int
) -> Tensor:
    with torch.no_grad():
        inputs = tokenizer.var_input(tokens_BL)
        return model(inputs, torch.full((len(tokens_BL),), label), group_of(model, label))


def test_the_cached_path_draws_what_teacher_forcing_finds_likeliest(model, tokenizer):
    drawn = sample(model, tokenizer, LABELS, SEEDS, guidance=0, top_k=1)
    for row, label in enumerate(LABELS):
        tokens = drawn.tokens_BL[row : row + 1]
        logits = teacher_forced(model, tokenizer, tokens, label)
        assert torch.equal(logits.argmax(-1), tokens)
    assert drawn.images.shape == (4, 1, 8, 8)
    assert torch.equal(drawn.images, tokenizer.decode(drawn.tokens_BL))


def test_guidance_grows_with_the_scale(model, tokenizer):
    drawn = sample(model, tokenizer, LABELS, SEEDS, guidance=3.0, top_k=1)
    level = model.trunk(0).level_L
    changed = 0
    for row, label in enumerate(LABELS):
        tokens = drawn.tokens_BL[row : row + 1]
        own = teacher_forced(model, tokenizer, tokens, label)
        inputs = tokenizer.var_input(tokens)
        null = torch.tensor([NULL_CLASS])
        with torch.no_grad():
            condition = model.groups.condition(null)
            own_trunk = model.plasticity == "scratch"  # the first trunk has learned nothing there
            trunk = model.trunk(group_of(model, label)) if own_trunk else model.trunks[0]
            plain = trunk(inputs, condition, None, model.groups.null)
        share = (3.0 * level / 3)[:, None]
        guided = (1 + share) * own - share * plain
        assert torch.equal(guided.argmax(-1), tokens)
        changed += int((own.argmax(-1) != tokens).sum())
    assert changed > 0


def test_an_image_depends_on_its_own_label_and_seed_alone(model, tokenizer):
    together = sample(model, tokenizer, LABELS, SEEDS)
    assert torch.equal(sample(model, tokenizer, LABELS, SEEDS).tokens_BL, together.tokens_BL)
    for row in range(4):
        alone = sample(model, tokenizer, LABELS[row : row + 1], SEEDS[row : row + 1])
        assert torch.equal(alone.tokens_BL[0], together.tokens_BL[row])
    other = sample(model, tokenizer, LABELS, [seed + 1 for seed in SEEDS])
    assert (other.tokens_BL != together.tokens_BL).any(1).all()


def test_draws_follow_the_probabilities(model, tokenizer):
    count = 3000
    drawn = sample(model, tokenizer, [0] * count, range(count), guidance=0, top_k=0, top_p=1.0)
    expected = teacher_forced(model, tokenizer, drawn.tokens_BL[:1], 0)[0, 0].softmax(0)
    found = drawn.tokens_BL[:, 0].bincount(minlength=len(expected)) / count
    assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5


def test_only_the_likeliest_tokens_are_drawn(model, tokenizer):
    count = 500
    start = teacher_forced(model, tokenizer, torch.zeros(1, 30, dtype=torch.long), 0)[0, 0]
    order = start.argsort(descending=True)
    top = sample(model, tokenizer, [0] * count, range(count), guidance=0, top_k=3, top_p=1.0)
    assert set(top.tokens_BL[:, 0].tolist()) <= set(order[:3].tolist())
    before = start.softmax(0)[order].cumsum(0) - start.softmax(0)[order]
    nucleus = set(order[before < 0.5].tolist())
    most = sample(model, tokenizer, [0] * count, range(count), guidance=0, top_k=0, top_p=0.5)
    assert set(most.tokens_BL[:, 0].tolist()) <= nucleus
    assert len(set(most.tokens_BL[:, 0].tolist())) == len(nucleus)


def test_unknown_labels_and_missing_seeds_are_refused(model, tokenizer):
    for labels in ([5], [-1]):
        with pytest.raises(UserError, match="classes 0 to 4"):
            sample(model, tokenizer, labels, [0])
    with pytest.raises(UserError, match="1 seeds for 2 labels"):
        sample(model, tokenizer, [0, 1], [0])
    drawn = sample(model, tokenizer, [0], [0], guidance=0, top_p=0.0)
    likeliest = sample(model, tokenizer, [0], [0], guidance=0, top_k=1)
    assert torch.equal(drawn.tokens_BL, likeliest.tokens_BL)


def test_a_later_group_changes_no_pixel_of_an_earlier_class(
    tokenizer, tiny_tokenizer_config, tiny_var_config, shake
):
    seed_all(1)
    model = build_model(tiny_tokenizer_config, replace(tiny_var_config, plasticity="adapter"))
    model.grow(2)
    shake(model, amount=0.3)
    before = sample(model.eval(), tokenizer, [0, 1], [5, 6])
    model.grow(2)
    torch.nn.init.normal_(model.groups.embeddings[1])
    shake(model.groups.adapters[1])
    assert torch.equal(sample(model.eval(), tokenizer, [0, 1], [5, 6]).images, before.images)


class Points(nn.Module):
    """A trunk that knows its data: at every place a class has one value, its embedding's first."""

    def __init__(self, noising: Noising) -> None:
        super().__init__()
        self.noising = noising

    def forward(
        self, x_BZhw: Tensor, times_B: Tensor, condition_BD: Tensor, adapter: None = None
    ) -> Tensor:
        a, s = self.noising.coefficients(times_B)
        clean = condition_BD[:, 0, None, None, None].expand_as(x_BZhw)
        return self.noising.target(clean, (x_BZhw - a * clean) / s)


@pytest.fixture(params=[("noise", "linear"), ("noise", "cosine"), ("flow", "linear")])
def noising(request) -> Noising:
    return Noising(*request.param)


@pytest.fixture
def points(noising) -> Incremental:
    model = Incremental(Points(noising), 4, "embedding", 1, True)
    for classes in (2, 2, 1):
        model.grow(classes)
    with torch.no_grad():
        model.groups.null[:] = 0.1
        for group, embedding in enumerate(model.groups.embeddings):
            embedding[:] = 0.1 * group + torch.tensor([0.0, 0.05])[: len(embedding), None]
    return model


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_from_noise_to_what_the_model_knows(points, noising, steps):
    """A perfect model's data are reached in any number of steps, guided beyond them or not."""
    space = Latents(None, 1, 4)
    images = denoise(points, space, noising, LABELS, SEEDS, steps=steps, guidance=0)
    values = torch.tensor([0.2, 0.0, 0.05, 0.15])[:, None, None, None]
    torch.testing.assert_close(images, values.expand(4, 1, 4, 4), atol=2e-3, rtol=0)
    guided = denoise(points, space, noising, LABELS, SEEDS, steps=steps, guidance=2.0)
    beyond = 3 * values - 2 * 0.1
    torch.testing.assert_close(guided, beyond.expand(4, 1, 4, 4), atol=8e-3, rtol=0)


@pytest.fixture
def denoiser(tokenizer, tiny_diffusion_config, shake) -> tuple[Incremental, Latents]:
    seed_all(1)
    latents = Latents(tokenizer, 4, 4)
    latents.standardise(torch.full((4,), 0.1), torch.full((4,), 0.5))
    model = build_diffusion(latents, tiny_diffusion_config)
    for classes in (2, 2, 1):
        model.grow(classes)
    shake(model, amount=0.3)
    return model.eval(), latents


def test_a_denoised_image_depends_on_its_own_label_and_seed_alone(denoiser, noising):
    model, latents = denoiser
    together = denoise(model, latents, noising, LABELS, SEEDS, steps=5)
    assert together.shape == (4, 1, 8, 8)
    assert together.abs().max() <= 1
    for row in range(4):
        alone = denoise(model, latents, noising, LABELS[row:][:1], SEEDS[row:][:1], steps=5)
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=0)
    other = denoise(model, latents, noising, LABELS, [seed + 1 for seed in SEEDS], steps=5)
    changed = denoise(model, latents, noising, [0, 1, 2, 4], SEEDS, steps=5)
    for images in (other, changed):
        assert ((images - together).abs().amax((1, 2, 3)) > 1e-3).all()


def test_what_cannot_be_denoised_is_refused(denoiser, noising):
    model, latents = denoiser
    with pytest.raises(UserError, match="classes 0 to 4"):
        denoise(model, latents, noising, [5], [0])
    with pytest.raises(UserError, match="1 seeds for 2 labels"):
        denoise(model, latents, noising, [0, 1], [0])
    for steps in (0, 1001):
        with pytest.raises(UserError, match=f"steps is {steps}"):
            denoise(model, latents, noising, [0], [0], steps=steps)
