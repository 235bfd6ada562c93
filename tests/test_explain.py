"""Token-wise mutual information against one forward a class, and maps worked by hand."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cil.classify.likelihood import token_log_likelihoods
from cil.classify.pairs import pair_log_likelihoods
from cil.classify.straight_through import straight_through_scores
from cil.errors import UserError
from cil.explain import (
    PASSES,
    Explainable,
    best_wrong,
    combined,
    explain,
    heat_map,
    scale_maps,
    to_pixels,
)
from cil.methods.var import VARMethod
from cil.methods.var_parts import build_model
from cil.models.class_groups import NULL_CLASS, Incremental
from cil.streams.stream import Stream
from experiments.explain import asked_for

SIZES = [3, 2, 1]
LABELS = torch.tensor([[0, 3], [5, 2], [4, 4], [1, 0], [2, 5]])


@pytest.fixture(
    scope="module",
    params=[
        ("adapter", 0),
        ("copy", 0),
        ("adapter", 1),
        ("copy", 2),
        ("scratch", 0),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def method(
    request, tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, shake, tmp_path_factory
) -> VARMethod:
    """One of three groups that has learned nothing, everything about its classes different."""
    torch.manual_seed(0)
    plasticity, condition_from = request.param
    settings = replace(tiny_var_config, plasticity=plasticity, condition_from=condition_from)
    cache = tmp_path_factory.mktemp("cache")
    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache)
    for classes in SIZES:
        method.model.grow(classes)
    shake(method.model)
    method.model.eval()
    method.tokenizer.eval()
    method.scale_weights_K = torch.tensor([0.4, 1.3, 0.9, 1.4])
    return method


@pytest.fixture(scope="module")
def images(tiny_images: Tensor) -> Tensor:
    return tiny_images[::8]


@torch.no_grad()
def without_class(method: VARMethod, images: Tensor, labels_B: Tensor) -> Tensor:
    """log p of the tokens (B, L) under the null class, an image at a time.

    By the first trunk, or from scratch by that of the label's group.
    """
    tokens, inputs = (part[0] for part in method.copies(images, 1))
    model, null_D, rows = method.model, method.model.groups.null, []
    for own, read, label in zip(tokens, inputs, labels_B.tolist(), strict=True):
        group = [0, 0, 0, 1, 1, 2][label]
        trunk = model.trunks[1 + group] if model.plasticity == "scratch" else model.trunks[0]
        logits = trunk(read[None], null_D[None], None, null_D)[0]
        rows.append(logits.log_softmax(-1).gather(1, own[:, None])[:, 0])
    return torch.stack(rows)


def test_tmi_is_the_difference_of_two_likelihoods(method: VARMethod, images: Tensor) -> None:
    tokens, inputs = (part[0] for part in method.copies(images, 1))
    every_BCL = token_log_likelihoods(method.model, tokens, inputs)
    labels_B, rivals_B = LABELS.unbind(1)
    null_BL, rows = without_class(method, images, labels_B), torch.arange(len(images))
    found = explain(method, images, labels_B, rivals_B)
    expected = every_BCL[rows, labels_B] - null_BL
    assert expected.std() > 0.1
    torch.testing.assert_close(found.label_BL, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found.rival_BL, every_BCL[rows, rivals_B] - null_BL, atol=1e-4, rtol=1e-4
    )
    contrast = every_BCL[rows, labels_B] - every_BCL[rows, rivals_B]
    torch.testing.assert_close(found.contrast(), contrast, atol=1e-4, rtol=1e-4)


def test_an_explanation_takes_three_passes_an_image(
    method: VARMethod, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows times tokens that pass the heads: a class named twice is read once."""
    read = []
    for trunk in method.model.trunks:

        def logits(x: Tensor, *rest: object, own=trunk.logits) -> Tensor:
            read.append(x.shape[:2].numel())
            return own(x, *rest)

        monkeypatch.setattr(trunk, "logits", logits)
    labels_B, rivals_B = LABELS.unbind(1)
    explain(method, images, labels_B, rivals_B)
    twice = int((labels_B == rivals_B).sum())
    assert twice == 1
    assert sum(read) == (PASSES * len(images) - twice) * 30


@pytest.mark.parametrize("max_tokens", [1, 70, 100_000])
def test_chunks_do_not_matter(method: VARMethod, images: Tensor, max_tokens: int) -> None:
    tokens, inputs = (part[0] for part in method.copies(images, 1))
    pairs = torch.cat([LABELS, torch.full((5, 1), NULL_CLASS)], 1)
    whole = pair_log_likelihoods(method.model, tokens, inputs, pairs)
    assert whole.shape == (5, 3, 30)
    chunked = pair_log_likelihoods(method.model, tokens, inputs, pairs, max_tokens)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_a_later_group_changes_no_reason(
    tiny_tokenizer_config, tiny_var_config, method: VARMethod, images: Tensor, shake
) -> None:
    """To the last bit: nothing of an earlier group is touched."""
    model: Incremental = build_model(tiny_tokenizer_config, tiny_var_config)
    model.grow(3)
    shake(model)
    model.eval()
    tokens, inputs = (part[0] for part in method.copies(images, 1))
    pairs = torch.tensor([[0, 1, NULL_CLASS]]).repeat(5, 1)
    before = pair_log_likelihoods(model, tokens, inputs, pairs)
    model.grow(2)
    assert torch.equal(pair_log_likelihoods(model, tokens, inputs, pairs), before)


# --- gradients ---


def test_straight_through_the_scores_are_those_of_the_engine(
    method: VARMethod, images: Tensor
) -> None:
    expected = method.every_class(images, 1)
    found = method.differentiable_scores(images)
    assert expected.std(1).min() > 0.1
    torch.testing.assert_close(found.detach(), expected, atol=1e-3, rtol=1e-4)


def test_gradients_reach_the_pixels_on_both_ways(method: VARMethod, images: Tensor) -> None:
    """A token is read by finer scales and is itself predicted; the latter alone is the finest's."""
    for weights in ([1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]):
        pixels = images.clone().requires_grad_()
        scores = straight_through_scores(
            method.model, method.tokenizer, pixels, torch.tensor(weights)
        )
        (gradient,) = torch.autograd.grad(scores[:, 0].sum(), pixels)
        assert gradient.isfinite().all()
        assert (gradient.abs().amax((1, 2, 3)) > 0).all()


# --- maps ---


def test_maps_add_up_as_the_method_says() -> None:
    """Scales 1 and 2: the one token counts a quarter at each of the four places."""
    values = torch.tensor([[8.0, 1.0, -2.0, 3.0, 4.0]])
    one, two = scale_maps(values, (1, 2))
    assert one.tolist() == [[[8.0]]]
    assert two.tolist() == [[[1.0, -2.0], [3.0, 4.0]]]
    assert combined(values, (1, 2)).tolist() == [[[3.0, 0.0], [5.0, 6.0]]]


def test_a_scale_that_does_not_divide_the_finest_is_enlarged_by_the_nearest() -> None:
    values = torch.arange(1.0, 10)[None]
    padded = torch.cat([values, torch.zeros(1, 36)], 1)
    expected = torch.tensor([[1.0, 1, 2, 2, 3, 3]]) * 9 / 36
    assert torch.allclose(combined(padded, (3, 6))[:, 0], expected)


def test_the_heat_map_cuts_off_what_speaks_against_and_fills_the_range() -> None:
    maps = torch.tensor([[[-3.0, 0.0], [1.0, 4.0]], [[2.0, 2.0], [4.0, 3.0]], [[-1.0] * 2] * 2])
    assert heat_map(maps).tolist() == [
        [[0, 0], [0.25, 1]],
        [[0, 0], [1, 0.5]],
        [[0, 0], [0, 0]],  # nothing speaks for it
    ]


def test_pixels_keep_the_order_of_the_map() -> None:
    larger = to_pixels(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), 8)
    assert larger.shape == (1, 8, 8)
    assert larger[0, 0, 0] == 0
    assert larger[0, -1, -1] == 3
    assert (larger.diff(dim=1) >= 0).all()
    assert (larger.diff(dim=2) >= 0).all()


def test_the_best_wrong_class() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [-5.0, -torch.inf, -9.0]])
    assert best_wrong(scores, torch.tensor([0, 1, 0])).tolist() == [1, 0, 2]
    with pytest.raises(UserError, match="One class alone was learned"):
        best_wrong(scores[:, :1], torch.tensor([0, 0, 0]))


# --- bad input ---


def test_images_of_another_size_are_refused(method: VARMethod) -> None:
    with pytest.raises(UserError, match="The images are 9 x 8 pixels: the model reads 8 x 8"):
        explain(method, torch.zeros(1, 1, 8, 9), torch.tensor([0]), torch.tensor([1]))


@pytest.mark.parametrize("label", [6, -1])
def test_a_class_never_learned_is_refused(method: VARMethod, images: Tensor, label: int) -> None:
    with pytest.raises(UserError, match=f"Class {label} was never learned: there are 0 to 5"):
        explain(method, images[:1], torch.tensor([label]), torch.tensor([1]))


@pytest.mark.parametrize("images", ["-1", "0,-1", "-1,a.png"])
def test_a_number_below_zero_is_no_test_image(images: str) -> None:
    run: Any = SimpleNamespace(labels=[0, 1], images=None)
    with pytest.raises(UserError, match="There is no test image -1: they are numbered from 0"):
        asked_for(run, Namespace(images=images, label=None))


def test_methods_without_tokens_have_no_reasons(method: VARMethod, tiny_stream: Stream) -> None:
    from cil.config import DiscriminativeConfig
    from cil.methods.discriminative import Discriminative

    settings, unused = DiscriminativeConfig(), Path("cache")
    cnn = Discriminative("finetune", tiny_stream, settings, unused, device=torch.device("cpu"))
    assert isinstance(method, Explainable)
    assert not isinstance(cnn, Explainable)
