"""Editing: which tokens are given and which are drawn, whose seed it is, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cil.edit import HALF, drawn_tokens, edit
from cil.errors import UserError
from cil.generate import Kept, sample
from cil.methods.seeding import seed_all
from cil.methods.var_parts import build_model, build_tokenizer
from cil.models.class_groups import Incremental
from cil.models.tokenizer import MultiScaleTokenizer

LABELS, SEEDS = [4, 0, 1, 3], [10, 11, 12, 13]  # of three groups
SCALES = (1, 2, 3, 4)  # of latents of 4 x 4, each of 2 x 2 pixels


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_config, shake) -> MultiScaleTokenizer:
    seed_all(0)
    tokenizer = build_tokenizer(tiny_tokenizer_config, image_channels=1)
    shake(tokenizer)
    return tokenizer.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[("adapter", 0), ("copy", 1)])
def model(request, tiny_tokenizer_config, tiny_var_config, shake) -> Incremental:
    seed_all(1)
    plasticity, condition_from = request.param
    settings = replace(tiny_var_config, plasticity=plasticity, condition_from=condition_from)
    model = build_model(tiny_tokenizer_config, settings)
    for classes in (2, 2, 1):
        model.grow(classes)
    shake(model, amount=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def images(tiny_stream) -> Tensor:
    return torch.stack([tiny_stream.experiences[0].test[i][0] for i in (0, 1, 25, 26)])


def region(*pixels: tuple[slice | int, slice | int]) -> Tensor:
    result = torch.zeros(8, 8, dtype=torch.bool)
    for rows, columns in pixels:
        result[rows, columns] = True
    return result


LEFT = region((slice(None), slice(0, 4)))


def by_scale(tokens_L: Tensor) -> list[list[int]]:
    """The places of the true tokens of each scale."""
    parts = tokens_L.split([p * p for p in SCALES])
    return [part.nonzero().flatten().tolist() for part in parts]


def test_a_token_that_the_region_touches_is_drawn(tokenizer):
    """At side 3 every token is pooled from 2 x 2 latents, neighbours sharing one between them."""
    assert by_scale(drawn_tokens(tokenizer, region((0, 0)))) == [[0], [0], [0], [0]]
    assert by_scale(drawn_tokens(tokenizer, region((7, 2)))) == [[0], [2], [6, 7], [13]]
    left = [[0], [0, 2], [0, 1, 3, 4, 6, 7], [0, 1, 4, 5, 8, 9, 12, 13]]
    assert by_scale(drawn_tokens(tokenizer, LEFT)) == left
    assert drawn_tokens(tokenizer, region((slice(None), slice(None)))).all()


def test_with_half_a_cover_coarse_tokens_that_are_mostly_kept_are_given(tokenizer):
    assert by_scale(drawn_tokens(tokenizer, region((0, 0)), HALF)) == [[], [], [], [0]]
    left = [[], [0, 2], [0, 3, 6], [0, 1, 4, 5, 8, 9, 12, 13]]
    assert by_scale(drawn_tokens(tokenizer, LEFT, HALF)) == left
    assert drawn_tokens(tokenizer, region((slice(None), slice(None))), HALF).all()


def test_half_a_cover_draws_fewer_tokens(model, tokenizer, images):
    every, half = (
        edit(model, tokenizer, images, LEFT, LABELS, SEEDS, cover=cover) for cover in (0.0, HALF)
    )
    assert torch.equal(half.drawn_L, drawn_tokens(tokenizer, LEFT, HALF))
    assert half.drawn_L.sum() < every.drawn_L.sum()
    assert (half.raw != every.raw).flatten(1).any(1).all()


def test_a_region_of_all_is_a_drawing(model, tokenizer, images):
    found = edit(model, tokenizer, images, torch.ones(8, 8, dtype=torch.bool), LABELS, SEEDS)
    assert torch.equal(found.images, sample(model, tokenizer, LABELS, SEEDS).images)
    assert torch.equal(found.raw, found.images)


def test_with_all_given_it_is_the_image_as_tokens(model, tokenizer, images):
    kept = Kept(tokenizer.encode(images), torch.ones(4, 30, dtype=torch.bool))
    found = sample(model, tokenizer, LABELS, SEEDS, kept=kept)
    assert torch.equal(found.tokens_BL, tokenizer.tokenize(images))


def test_given_tokens_lead_back_to_the_image_and_the_others_are_drawn(model, tokenizer, images):
    latents, mask_L = tokenizer.encode(images), ~drawn_tokens(tokenizer, LEFT)
    kept = Kept(latents, mask_L.expand(4, -1))
    found = sample(model, tokenizer, LABELS, SEEDS, kept=kept).tokens_BL
    before, first = torch.zeros_like(latents), 0
    for k, after in enumerate(tokenizer.partial_latents(found)):
        own = slice(first, first + SCALES[k] ** 2)
        given = mask_L[own]
        nearest = tokenizer.match(latents - before, k)
        assert torch.equal(found[:, own][:, given], nearest[:, given])
        before, first = after, own.stop
    drawn = found[:, ~mask_L]
    assert (drawn != tokenizer.tokenize(images)[:, ~mask_L]).any()
    other = sample(model, tokenizer, LABELS, [seed + 1 for seed in SEEDS], kept=kept).tokens_BL
    assert (other[:, ~mask_L] != drawn).any(1).all()


def test_kept_pixels_are_the_image_s_own(model, tokenizer, images):
    found = edit(model, tokenizer, images, LEFT, LABELS, SEEDS)
    assert torch.equal(found.images[..., 4:], images[..., 4:])
    assert torch.equal(found.images[..., :4], found.raw[..., :4])
    assert (found.raw[..., 4:] != images[..., 4:]).any()
    assert ((found.images != images).flatten(1)).any(1).all()


def test_an_edit_depends_on_its_own_image_class_and_seed_alone(model, tokenizer, images):
    together = edit(model, tokenizer, images, LEFT, LABELS, SEEDS).images
    for row in range(4):
        one = slice(row, row + 1)
        alone = edit(model, tokenizer, images[one], LEFT, LABELS[one], SEEDS[one]).images
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)
    others = edit(model, tokenizer, images, LEFT, [0, 1, 2, 4], SEEDS).images
    assert ((others - together).abs().amax((1, 2, 3)) > 1e-3).any()


def test_what_cannot_be_edited_is_refused(model, tokenizer, images):
    with pytest.raises(UserError, match="the image has 6 x 8 pixels, but the model draws 8 x 8"):
        edit(model, tokenizer, images[..., :6], LEFT, LABELS, SEEDS)
    with pytest.raises(UserError, match="the mask has 8 x 7 pixels, but the model draws 8 x 8"):
        edit(model, tokenizer, images, LEFT[:7], LABELS, SEEDS)
    with pytest.raises(UserError, match="the mask is empty"):
        edit(model, tokenizer, images, torch.zeros_like(LEFT), LABELS, SEEDS)
    with pytest.raises(UserError, match="classes 0 to 4"):
        edit(model, tokenizer, images, LEFT, [0, 1, 2, 5], SEEDS)
    with pytest.raises(UserError, match="3 labels for 4 images"):
        edit(model, tokenizer, images, LEFT, LABELS[:3], SEEDS)
    with pytest.raises(UserError, match="3 seeds for 4 labels"):
        edit(model, tokenizer, images, LEFT, LABELS, SEEDS[:3])
    with pytest.raises(UserError, match=r"cover is 1\.0: give a share of a token"):
        edit(model, tokenizer, images, LEFT, LABELS, SEEDS, cover=1.0)
