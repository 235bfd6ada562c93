"""Log-likelihoods against one forward a class, and the weights of the scales."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cil.classify.likelihood import (
    fit_scale_weights,
    group_log_likelihoods,
    staged_scores,
    token_log_likelihoods,
)
from cil.classify.reading import by_scale
from cil.classify.schedule import Stage
from cil.classify.smoothing import noisy_copies
from cil.methods.var_parts import build_model, build_tokenizer
from cil.models.class_groups import Incremental
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import Cache

SIZES = [3, 2, 1]
SCALES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_config) -> MultiScaleTokenizer:
    torch.manual_seed(0)
    return build_tokenizer(tiny_tokenizer_config, 1)


@pytest.fixture(scope="module", params=[("adapter", 0), ("copy", 0), ("adapter", 1), ("copy", 2)])
def model(request, tiny_tokenizer_config, tiny_var_config, shake) -> Incremental:
    """Three groups of different sizes, everything about them different."""
    torch.manual_seed(0)
    plasticity, condition_from = request.param
    settings = replace(tiny_var_config, plasticity=plasticity, condition_from=condition_from)
    model = build_model(tiny_tokenizer_config, settings)
    for classes in SIZES:
        model.grow(classes)
    shake(model)
    return model.eval()


@pytest.fixture(scope="module")
def tokens(tokenizer, tiny_images) -> Tensor:
    with torch.no_grad():
        return tokenizer.tokenize(tiny_images[::8])


@pytest.fixture(scope="module")
def inputs(tokenizer, tokens) -> Tensor:
    with torch.no_grad():
        return tokenizer.var_input(tokens)


@torch.no_grad()
def naive(model: Incremental, tokens: Tensor, inputs: Tensor) -> Tensor:
    """One image, one class, one token at a time -> (B, C, L)."""
    result = torch.zeros(len(tokens), sum(SIZES), tokens.shape[1])
    for image in range(len(tokens)):
        label = 0
        for group, classes in enumerate(SIZES):
            for own in range(classes):
                condition = model.groups.embeddings[group][own : own + 1]
                adapter = model.groups.adapter(group)
                trunk, null = model.trunk(group), model.groups.null
                logits = trunk(inputs[image : image + 1], condition, adapter, null)[0]
                for place, token in enumerate(tokens[image]):
                    row = logits[place]
                    result[image, label, place] = row[token] - row.exp().sum().log()
                label += 1
    return result


def test_all_classes_equal_one_forward_a_class(model, tokens, inputs):
    expected = naive(model, tokens, inputs)
    assert expected.std(1).min() > 0.01  # the classes do differ, at every token
    values = token_log_likelihoods(model, tokens, inputs)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    groups = [group_log_likelihoods(model, g, tokens, inputs) for g in range(3)]
    assert [group.shape[1] for group in groups] == SIZES
    assert torch.equal(torch.cat(groups, 1), values)


def test_probabilities_of_one_token_sum_to_one(model, tokenizer, tokens, tiny_tokenizer_config):
    vocabulary = tiny_tokenizer_config.vocabulary
    for place in (0, 3, 9, 29):
        choices = tokens[:1].repeat(vocabulary, 1)
        choices[:, place] = torch.arange(vocabulary)
        with torch.no_grad():
            inputs = tokenizer.var_input(choices)
        values = token_log_likelihoods(model, choices, inputs)[:, :, place]
        assert values.max() < 0
        assert values.std(0).min() > 0.1
        torch.testing.assert_close(values.exp().sum(0), torch.ones(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 120, 210, 300_000])
def test_chunks_do_not_matter(model, tokens, inputs, max_tokens):
    for group in range(3):
        whole = group_log_likelihoods(model, group, tokens, inputs)
        chunked = group_log_likelihoods(model, group, tokens, inputs, max_tokens)
        assert chunked.shape == whole.shape
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_no_more_pairs_at_a_time_than_allowed(model, tokens, inputs, monkeypatch):
    rows, trunk = [], model.trunk(0)
    logits = trunk.logits
    monkeypatch.setattr(trunk, "logits", lambda x, *rest: rows.append(len(x)) or logits(x, *rest))
    group_log_likelihoods(model, 0, tokens, inputs, max_tokens=7 * 30)
    assert rows == [7, 7, 1]  # five images of three classes


def test_a_later_group_does_not_touch_earlier_scores(
    tiny_tokenizer_config, tiny_var_config, tokens, inputs, shake
):
    model = build_model(tiny_tokenizer_config, tiny_var_config)
    model.grow(3)
    shake(model)
    model.eval()
    before = token_log_likelihoods(model, tokens, inputs)
    model.grow(2)
    after = token_log_likelihoods(model, tokens, inputs)
    assert after.shape[1] == 5
    assert torch.equal(after[:, :3], before)


@pytest.mark.integration
def test_compiled_it_computes_the_same(
    tokens, inputs, tiny_tokenizer_config, tiny_var_config, shake
):
    """Scoring through a cache in batches of two sizes, and gradients."""
    model = build_model(tiny_tokenizer_config, replace(tiny_var_config, depth=1))
    model.grow(3)
    shake(model)
    model.requires_grad_(True)
    labels, stages, found = torch.arange(5) % 3, [Stage(2, 1, 2), Stage(4, 1, 1)], []
    for compiled in (False, True):
        model.trunks[0].compiled = compiled
        scores = [
            staged_scores(model, tokens[None, :n], inputs[None, :n], torch.ones(4), stages)
            for n in (5, 3)
        ]
        loss = -model.log_likelihoods(inputs, labels, tokens, 0).mean()
        gradients = torch.autograd.grad(loss, list(model.trunks[0].parameters()))
        found.append([*scores, loss.detach(), *gradients])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(plain, fast, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def copies(tokenizer, tiny_images) -> tuple[Tensor, Tensor]:
    """Tokens and inputs of three copies of seven images."""
    with torch.no_grad():
        latents = tokenizer.encode(tiny_images[::6])
        noisy = noisy_copies(latents, range(7), samples=3, sigma=0.5 * latents.std().item())
        tokens = [tokenizer.tokenize_latents(copy) for copy in noisy]
        return torch.stack(tokens), torch.stack([tokenizer.var_input(t) for t in tokens])


@pytest.mark.parametrize("mean", ["log_likelihoods", "probabilities"])
@pytest.mark.parametrize("max_tokens", [90, 250, 30_000])
@pytest.mark.parametrize(
    "stages",
    [
        [Stage(4, 1, 1)],
        [Stage(4, 3, 1)],
        [Stage(2, 1, 3), Stage(4, 1, 2), Stage(4, 3, 1)],
        [Stage(1, 2, 4), Stage(3, 3, 2), Stage(4, 2, 1)],
        [Stage(4, 1, 3), Stage(2, 2, 1)],
        [Stage(2, 1, 1), Stage(4, 1, 1)],
        [Stage(1, 1, 6, margin=1.0), Stage(2, 1, 6, margin=4.0), Stage(4, 2, 1)],
    ],
)
def test_stages_score_as_if_everything_had_been_scored(
    model, copies, stages, max_tokens, mean, monkeypatch
):
    monkeypatch.setattr("cil.classify.reading.MAX_LOGITS", 1000)  # two rows of 30 x 16
    tokens, inputs = copies
    weights = torch.tensor([0.4, 1.3, 0.9, 1.4])
    whole = [
        by_scale(token_log_likelihoods(model, t, i), SCALES)
        for t, i in zip(tokens, inputs, strict=True)
    ]
    left = torch.ones(len(tokens[0]), sum(SIZES), dtype=torch.bool)
    expected = torch.zeros(left.shape)
    for stage in stages:
        values = torch.stack(whole[: stage.samples])[..., : stage.scales]
        scores = values @ weights[: stage.scales]
        found = scores.mean(0)
        if mean == "probabilities":
            found = scores.double().exp().mean(0).log().float()
        undecided = left.sum(1) > 1  # nothing more is asked of an image with one class left
        expected[undecided] = found[undecided]
        expected[~left] = -torch.inf
        if stage is not stages[-1]:
            left = expected.argsort(1, descending=True).argsort(1) < stage.keep
            left &= expected >= expected.amax(1, keepdim=True) - stage.margin
    found = staged_scores(model, tokens, inputs, weights, stages, mean, max_tokens)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_no_scale_is_read_twice_for_a_class_that_stays(model, copies):
    """Rows times tokens that pass the last block: all classes on 2 scales, then 2 on the others."""
    tokens, inputs = copies
    read = []
    handles = [
        layer.register_forward_hook(lambda _, x, __: read.append(x[0].shape[:2].numel()))
        for layer in {trunk.blocks[-1].attention for trunk in model.trunks}
    ]
    stages = [Stage(2, 1, 2), Stage(4, 2, 1)]
    reads: list[Tensor] = []
    staged_scores(model, tokens, inputs, torch.ones(4), stages, max_tokens=105, reads=reads)
    for handle in handles:
        handle.remove()
    images = len(tokens[0])
    assert [count.tolist() for count in torch.cat(reads, 1)] == [[6] * images, [2] * images]
    if model.trunk(0).condition_from < len(model.trunk(0).blocks):
        assert sum(read) == images * (6 * 5 + 2 * 25 + 2 * 30)
    else:  # the last block sees no class: once an image, whatever the classes
        assert sum(read) == images * (5 + 25 + 30)


def test_classes_learned_earlier_can_be_left_out(model, copies):
    tokens, inputs = copies
    stages, weights = [Stage(4, 2, 1)], torch.tensor([1.3, 1.1, 0.9, 0.7])
    reads: list[Tensor] = []
    whole = staged_scores(model, tokens, inputs, weights, stages)
    newer = staged_scores(model, tokens, inputs, weights, stages, first=SIZES[0], reads=reads)
    assert torch.equal(newer, whole[:, SIZES[0] :])
    assert reads[0].unique().tolist() == [sum(SIZES[1:])]


def test_what_is_read_last_is_not_kept(model, copies, monkeypatch):
    """Keys and values of the fine scales, most of the memory, are of no use to later stages."""
    kept: list[int] = []
    joined = Cache.joined

    def watched(parts):
        whole = joined(parts)
        kept.extend(
            len(b.keys) * b.keys.shape[2] for b in whole.blocks.values() if b.keys is not None
        )
        return whole

    monkeypatch.setattr(Cache, "joined", staticmethod(watched))
    tokens, inputs = copies
    stages = [Stage(2, 1, 2), Stage(4, 1, 2), Stage(4, 3, 1)]
    staged_scores(model, tokens, inputs, torch.ones(4), stages, max_tokens=100)
    shared = model.trunk(0).condition_from > 0
    # All classes on the first five tokens; where blocks are shared, two copies on all thirty.
    assert max(kept) <= len(tokens[0]) * (2 * 30 if shared else 6 * 5)


def test_by_scale_sums_the_tokens_of_each():
    values = torch.arange(2 * 3 * 14, dtype=torch.float32).view(2, 3, 14)
    expected = torch.zeros(2, 3, 3)
    for place, scale in enumerate([0] + [1] * 4 + [2] * 9):
        expected[:, :, scale] += values[:, :, place]
    assert torch.equal(by_scale(values, (1, 2, 3)), expected)


def accuracy(values_BCK: Tensor, labels_B: Tensor, weights_K: Tensor) -> float:
    return ((values_BCK @ weights_K).argmax(1) == labels_B).float().mean().item()


def evidence(images: int, seed: int, strength: list[float], noise: list[float]) -> tuple:
    """Scores of four classes: each scale speaks for the label, under noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (images,), generator=generator)
    hits = functional.one_hot(labels, 4).float()[:, :, None]
    random = torch.randn(images, 4, len(strength), generator=generator)
    return hits * torch.tensor(strength) + random * torch.tensor(noise), labels


NOISY = ([2.0, 1.0, 0.0, 0.0], [1.0, 1.0, 4.0, 8.0])  # the finer, the more noise


def test_fitted_weights_raise_accuracy_where_fine_scales_are_noise():
    weights = fit_scale_weights(*evidence(400, 0, *NOISY))
    values, labels = evidence(2000, 1, *NOISY)  # others than it was fitted on
    plain = accuracy(values, labels, torch.ones(4))
    fitted = accuracy(values, labels, weights)
    best = accuracy(values, labels, torch.tensor([2.0, 1.0, 0.0, 0.0]))
    assert plain < 0.4 < 0.7 < best
    assert fitted > best - 0.1
    assert weights[0] > weights[1] > weights[2] > weights[3] > 0


def test_weights_have_mean_one_whatever_the_scale_of_the_evidence():
    values, labels = evidence(400, 0, *NOISY)
    weights = fit_scale_weights(values, labels)
    assert weights.dtype == torch.float32
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    for factor in (0.05, 20.0):
        torch.testing.assert_close(
            fit_scale_weights(values * factor, labels), weights, atol=0.01, rtol=0.01
        )


def test_weights_stay_at_one_where_every_scale_separates():
    """An easy first experience says nothing about which scale to trust."""
    values, labels = evidence(200, 0, [50.0, 200.0, 800.0, 400.0], [1.0, 2.0, 9.0, 16.0])
    assert accuracy(values, labels, torch.ones(4)) == 1
    torch.testing.assert_close(fit_scale_weights(values, labels), torch.ones(4), atol=0.02, rtol=0)


def test_a_stronger_prior_holds_the_weights_together():
    values, labels = evidence(400, 0, *NOISY)
    spreads = [fit_scale_weights(values, labels, prior).std() for prior in (0.01, 0.1, 10.0)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[2] < 0.1 < spreads[1]


def test_weights_can_be_fitted_where_nothing_else_takes_gradients(model, tokens, inputs):
    with torch.inference_mode():
        values = by_scale(token_log_likelihoods(model, tokens, inputs), SCALES)
    labels = torch.tensor([0, 1, 2, 3, 4])
    with torch.no_grad():
        weights = fit_scale_weights(values, labels)
    assert torch.equal(weights, fit_scale_weights(values, labels))
    assert not weights.requires_grad
