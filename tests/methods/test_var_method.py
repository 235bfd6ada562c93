"""The generative method: what learning reports and what scores are made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cil.classify.reading import by_scale
from cil.classify.schedule import encoder_cost, schedule
from cil.classify.smoothing import image_seeds
from cil.config import StreamConfig, TokenizerConfig, TrainerConfig, VARConfig
from cil.errors import UserError
from cil.methods.scoring import score
from cil.methods.seeding import seed_all
from cil.methods.var import VARMethod
from cil.methods.var_module import VARModule
from cil.streams import open_stream

pytestmark = pytest.mark.integration  # every test learns


@pytest.fixture(scope="module")
def learned(tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, tmp_path_factory):
    """A method after two experiences, and what it logged in each."""
    # Enough steps to tell two digits apart.
    tokenizer = replace(tiny_tokenizer_config, steps=60, vocabulary=32)
    settings = replace(tiny_var_config, width=32, views=4, first_steps=120, steps=45)
    seed_all(0)
    cache = tmp_path_factory.mktemp("cache")
    method = VARMethod("var", tiny_stream, tokenizer, settings, quiet_cpu, cache)
    rows: list[list[tuple[int, dict[str, float]]]] = []
    tokenizers = []
    for experience in tiny_stream.experiences[:2]:
        rows.append([])
        seed_all(0, experience.index)
        method.learn(experience, lambda step, values: rows[-1].append((step, dict(values))))
        tokenizers.append({n: v.clone() for n, v in method.tokenizer.state_dict().items()})
    return method, rows, tokenizers


def test_steps_count_through_tokenizer_and_trunk(learned):
    _, (first, second), _ = learned
    steps = {
        name: [step for step, values in first if name in values]
        for name in ("tokenizer/reconstruction", "tokenizer/codebook_use", "var/nats_a_token")
    }
    assert steps["tokenizer/reconstruction"] == list(range(9, 60, 10))
    assert steps["tokenizer/codebook_use"] == [180]
    # 120 steps of the trunk, then 45 of the first group.
    assert steps["var/nats_a_token"] == [*range(69, 180, 10), 189, 199, 209, 219, 224]
    # The last step is logged though it is no multiple of ten: the stream counts by it.
    assert [step for step, _ in second] == [0, 9, 19, 29, 39, 44]


def test_the_loss_falls_in_both_experiences(learned):
    _, rows, _ = learned
    first, second = (
        [v["var/nats_a_token"] for _, v in experience if "var/nats_a_token" in v]
        for experience in rows
    )
    for losses in (first[:12], second):  # the trunk's, the second group's
        assert np.mean(losses[-2:]) < losses[0] - 0.05


def test_the_tokenizer_is_frozen_after_the_first_experience(learned):
    method, _, (first, second) = learned
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(p.requires_grad for p in method.tokenizer.parameters())
    assert not method.tokenizer.training
    assert not method.model.training


def test_it_tells_the_first_two_digits_apart(learned, tiny_stream, tiny_images):
    method, _, _ = learned
    labels = torch.tensor(tiny_stream.experiences[0].test.targets)
    two = method.scores(tiny_images)[:, :2]
    assert (two.argmax(1) == labels).float().mean() > 0.9


def test_scores_are_weighted_log_likelihoods_of_the_classes_seen(learned, tiny_images):
    method, _, _ = learned
    assert method.classes_seen == 4
    values = method.scale_log_likelihoods(tiny_images)
    assert values.shape == (40, 4, 4)  # images, classes, scales
    assert values.max() < 0
    weights = method.scale_weights_K
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert weights.std() > 0.01
    torch.testing.assert_close(method.log_likelihood(tiny_images), values.sum(-1))
    expected = sum(weights[k] * values[:, :, k] for k in range(4))
    smoothed = method.settings
    method.settings = replace(smoothed, smoothing_samples=1)
    torch.testing.assert_close(method.scores(tiny_images), expected)
    method.settings = replace(smoothed, smoothing_samples=3, smoothing_sigma=0.0)
    torch.testing.assert_close(method.scores(tiny_images), expected)
    method.settings = smoothed


def test_smoothing_averages_the_log_likelihoods_of_noisy_copies(learned, tiny_images):
    method, _, _ = learned
    settings = method.settings
    method.settings = replace(settings, smoothing_samples=3, smoothing_sigma=0.3)
    scores = method.scores(tiny_images)
    assert (scores - method.log_likelihood(tiny_images)).abs().max() > 0.1
    # A score depends on its image alone, and asking again gives it again.
    torch.testing.assert_close(method.scores(tiny_images[5:7]), scores[5:7])
    assert torch.equal(method.scores(tiny_images), scores)
    method.settings = settings


def test_views_of_an_image_are_all_encoded_and_all_counted(learned):
    method, _, _ = learned
    settings, found = method.settings, {}
    for smoothing in ("noise", "views"):
        method.settings = replace(settings, smoothing=smoothing, smoothing_samples=3)
        found[smoothing] = method.size().prediction_macs
    method.settings = settings
    encoder = encoder_cost(method.tokenizer).layers
    assert found["views"] - found["noise"] == pytest.approx(2 * encoder)


def test_smoothing_by_views_averages_over_varied_images(learned, tiny_stream, tiny_images):
    method, _, _ = learned
    settings = method.settings
    method.settings = replace(settings, smoothing="views", smoothing_samples=3)
    tokens_SBL, _ = method.copies(tiny_images, 3)
    assert torch.equal(tokens_SBL[0], method.tokenizer.tokenize(tiny_images))
    assert (tokens_SBL[1] != tokens_SBL[0]).any(1).float().mean() > 0.5
    assert (tokens_SBL[1] != tokens_SBL[2]).any(1).float().mean() > 0.5
    scores = method.scores(tiny_images)
    weights = method.scale_weights_K
    with torch.random.fork_rng():
        torch.manual_seed(image_seeds(tiny_images[:1])[0])
        views = [tiny_images[0], *(tiny_stream.augment(tiny_images[0]) for _ in range(2))]
    each = (method.scale_log_likelihoods(torch.stack(views)) * weights).sum(-1)
    torch.testing.assert_close(scores[0], each.mean(0))
    # A score depends on its image alone, and neither asking nor scoring draws from the global seed.
    torch.testing.assert_close(method.scores(tiny_images[5:7]), scores[5:7])
    before = torch.get_rng_state()
    assert torch.equal(method.scores(tiny_images), scores)
    assert torch.equal(torch.get_rng_state(), before)
    method.settings = settings


def test_smoothing_by_views_needs_images_that_are_varied(
    tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache
):
    settings = replace(tiny_var_config, smoothing="views")
    still = replace(tiny_stream, augment=None)
    with pytest.raises(UserError, match="is views, but with stream"):
        VARMethod("var", still, tiny_tokenizer_config, settings, quiet_cpu, cache)


def test_scale_weights_can_be_switched_off(
    tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, tiny_images, cache
):
    settings = replace(tiny_var_config, scale_weights=False, smoothing_samples=1)
    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache)
    method.learn(tiny_stream.experiences[0], lambda step, values: None)
    assert torch.equal(method.scale_weights_K, torch.ones(4))
    torch.testing.assert_close(method.scores(tiny_images), method.log_likelihood(tiny_images))


@pytest.mark.parametrize("plasticity", ["trunk", "copy"])
def test_stochastic_depth_acts_whenever_a_trunk_learns(
    plasticity, tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, monkeypatch, cache
):
    modes = []
    step = VARModule.training_step
    monkeypatch.setattr(
        VARModule,
        "training_step",
        lambda self, *rest: modes.append(self.model.training) or step(self, *rest),
    )
    settings = replace(tiny_var_config, plasticity=plasticity, drop_path=0.5, steps=2)
    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache)
    for experience in tiny_stream.experiences[:2]:
        method.learn(experience, lambda step, values: None)
    assert modes == [True] * (settings.first_steps + 2 * settings.steps)


def test_divergence_is_an_error_that_says_what_to_do(
    tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache
):
    settings = replace(tiny_var_config, lr=1e30)
    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache)
    with pytest.raises(UserError, match="var trunk diverged"):
        method.learn(tiny_stream.experiences[0], lambda step, values: None)


def test_too_little_memory_is_an_error_that_says_what_to_lower(
    tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, monkeypatch, cache
):
    def full(*_):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache)
    monkeypatch.setattr(VARModule, "training_step", full)
    with pytest.raises(UserError, match=r"var trunk does not fit .* lower var\.batch_size"):
        method.learn(tiny_stream.experiences[0], lambda step, values: None)


def test_too_little_memory_in_scoring_says_what_helps(learned, tiny_stream, quiet_cpu, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    method, _, _ = learned
    monkeypatch.setattr(VARMethod, "scores", full)
    with pytest.raises(UserError, match=r"evaluation 1 does not fit .*var\.smoothing_samples"):
        score(method, [tiny_stream.experiences[0].test], quiet_cpu, "var evaluation 1")


def test_the_adaptive_schedule_keeps_the_predictions(learned, tiny_stream, tiny_images):
    """Margins come from each experience's held-out images, and never shrink."""
    method, *_ = learned
    before = method.settings, method.margins_K, method.reads
    every = method.scores(tiny_images)
    method.settings = replace(method.settings, schedule="adaptive")
    margins, costs = [], []
    for experience in tiny_stream.experiences[:2]:
        method._fit_margins(experience.validation)
        margins.append(method.margins_K)
        costs.append(method.size().likelihood_evaluations)
    found = method.scores(tiny_images)
    method.settings, method.margins_K, method.reads = before
    assert all(old <= new for old, new in zip(*margins, strict=True))
    assert len(margins[0]) == 4
    assert found.isinf().any()
    assert (found.argmax(1) == every.argmax(1)).float().mean() > 0.9
    assert costs[1] < method.size().likelihood_evaluations


def test_images_that_are_all_missed_leave_the_margins_alone(learned, tiny_images):
    method, *_ = learned
    before = method.settings, method.margins_K, method.reads
    labels = method.scores(tiny_images).argmin(1)  # never right
    method.settings = replace(method.settings, schedule="adaptive")
    method.margins_K = [6.0, 7.0, 8.0, 9.0]
    method._fit_margins(TensorDataset(tiny_images, labels))
    kept = method.margins_K
    method.margins_K = []
    method._fit_margins(TensorDataset(tiny_images, labels))
    first = method.margins_K
    method.settings, method.margins_K, method.reads = before
    assert kept == [6.0, 7.0, 8.0, 9.0]
    assert first == [float("inf")] * 4  # nothing is known: nothing is dropped


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("condition_from", [0, 1])
def test_on_a_gpu_16_bits_find_the_same_classes(condition_from, cache):
    """The shipped settings, learned and scored in mixed precision, against naive 32 bits."""
    config = replace(VARConfig(), condition_from=condition_from)
    stream, seen = open_stream(StreamConfig()), []
    mixed = TrainerConfig(accelerator="gpu", progress=False)
    method = VARMethod("var", stream, TokenizerConfig(), config, mixed, cache)
    for experience in stream.experiences:
        method.learn(experience, lambda step, values: None)
        seen += list(experience.test)
    images = torch.stack([image for image, _ in seen]).cuda()
    labels = torch.tensor([label for _, label in seen])
    one_copy = schedule("varc", 4, 1)
    found = method.scores(images, stages=one_copy).argmax(1).cpu()
    assert (found == labels).double().mean() > 0.9
    tokens, inputs = method.copies(images, 1)
    values = torch.empty(len(images), 10, 4)
    with torch.no_grad():
        for group, label in ((label // 2, label) for label in range(10)):
            wanted = torch.full((len(images),), label, device="cuda")
            logits = method.model(inputs[0].clone(), wanted, group)
            chosen = logits.log_softmax(-1).gather(-1, tokens[0][..., None])[..., 0]
            values[:, label] = by_scale(chosen, method.tokenizer.scales).cpu()
    exact = (values * method.scale_weights_K).sum(-1).argmax(1)
    assert (found == exact).double().mean() >= 0.995


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compile_", ["never", "always"])
def test_learning_and_scoring_alternate_on_a_gpu(
    compile_, tiny_stream, tiny_tokenizer_config, tiny_var_config, tiny_images, cache
):
    trainer = TrainerConfig(accelerator="gpu", progress=False, compile=compile_)
    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, tiny_var_config, trainer, cache)
    for experience in tiny_stream.experiences[:2]:
        method.learn(experience, lambda step, values: None)
        assert method.scores(tiny_images.cuda()).isfinite().all()


@pytest.mark.parametrize("rotations", [False, True])
def test_turned_classes_leave_with_the_first_experience(
    rotations, tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, tiny_images, cache
):
    settings = replace(tiny_var_config, rotations=rotations)
    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache)
    method.learn(tiny_stream.experiences[0], lambda step, values: None)
    assert method.classes_seen == 2
    assert method.scores(tiny_images).shape == (40, 2)
    assert method.size().likelihood_evaluations == 2 * settings.smoothing_samples


@pytest.mark.parametrize("steps", [1, 10, 11])
def test_any_number_of_steps_can_be_learned(
    steps, tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, tiny_images, cache
):
    tokenizer = replace(tiny_tokenizer_config, steps=steps)
    settings = replace(tiny_var_config, first_steps=steps, steps=steps)
    method = VARMethod("var", tiny_stream, tokenizer, settings, quiet_cpu, cache)
    logged: list[int] = []
    method.learn(tiny_stream.experiences[0], lambda step, values: logged.append(step))
    assert max(logged) == 3 * steps - 1
    scores: Tensor = method.scores(tiny_images)
    assert scores.isfinite().all()


@pytest.mark.parametrize("plasticity", ["adapter", "copy"])
def test_classes_that_enter_late_are_as_safe_from_later_groups(
    plasticity, tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, tiny_images, cache
):
    settings = replace(tiny_var_config, plasticity=plasticity, condition_from=1)
    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache)
    method.learn(tiny_stream.experiences[0], lambda step, values: None)
    before = method.scale_log_likelihoods(tiny_images)
    early = {n: p.clone() for n, p in method.model.named_parameters()}
    method.learn(tiny_stream.experiences[1], lambda step, values: None)
    assert torch.equal(method.scale_log_likelihoods(tiny_images)[:, :2], before)
    after = dict(method.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in early.items())
    if plasticity == "copy":  # what no class enters is kept once
        assert len([name for name in after if name.endswith("blocks.0.fc1.weight")]) == 1
        assert len([name for name in after if name.endswith("blocks.1.fc1.weight")]) == 3
    resumed = VARMethod("var", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache)
    resumed.load_state(method.state())
    assert torch.equal(resumed.scores(tiny_images), method.scores(tiny_images))


def test_a_schedule_drops_classes_and_costs_less(learned, tiny_images):
    method, _, _ = learned
    settings = method.settings
    whole, evaluations = method.scores(tiny_images), method.size().likelihood_evaluations
    assert evaluations == 4 * settings.smoothing_samples
    method.settings = replace(settings, schedule="a_varc")
    scores = method.scores(tiny_images)
    left = scores.isfinite()
    assert (left.sum(1) == 3).all()  # of four
    torch.testing.assert_close(scores[left], whole[left])
    assert (scores.argmax(1) == whole.argmax(1)).float().mean() > 0.9
    assert method.size().likelihood_evaluations < evaluations
    method.settings = settings
