"""The discriminative methods: what they score, forget and store, and that they resume exactly."""

import io
import multiprocessing
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from cil.config import Config, DiscriminativeConfig, TrainerConfig
from cil.errors import UserError
from cil.methods import registry
from cil.methods.avalanche_steps import following, without_noise
from cil.methods.discriminative import Discriminative
from cil.methods.seeding import seed_all
from cil.models.backbones import Classifier, Features
from cil.models.cnn import CNN
from cil.streams.digits import digits
from cil.streams.memory_images import MemoryImages
from cil.streams.stream import Stream, build_stream, class_order

pytestmark = pytest.mark.integration  # every test trains something

METHODS = ["finetune", "replay", "joint"]  # a kind each; the others have a test file of their own
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stream() -> Stream:
    return build_stream(digits(validation=0.15, augment=True), "b0-2", class_order(10, 1993))


@pytest.fixture(scope="module")
def coloured() -> Stream:
    """Few digits at 32 px in three channels: a ResNet18 takes a third of a second a step."""
    source = digits(validation=0.15, augment=False, image_size=32)
    parts = ("train", "validation", "test")
    return build_stream(
        replace(source, channels=3, **{part: few(getattr(source, part)) for part in parts}),
        "b0-5",
        class_order(10, 1993),
    )


def few(split: MemoryImages) -> MemoryImages:
    """Two of each class, the colours of one kind each."""
    kept = [i for c in range(10) for i in [j for j, t in enumerate(split.targets) if t == c][:2]]
    tint = torch.tensor([1.0, 0.8, 0.6])[:, None, None]
    return MemoryImages(split.images[kept] * tint, [split.targets[i] for i in kept])


def make(
    name: str,
    stream: Stream,
    *,
    device: torch.device = CPU,
    trainer: TrainerConfig | None = None,
    show_progress: bool = False,
    **changes,
) -> Discriminative:
    settings = DiscriminativeConfig(**{"epochs": 1, "stored_images": 60, **changes})
    options = {"device": device, "trainer": trainer, "show_progress": show_progress}
    unused = Path("cache")  # of frozen backbones, and these have none
    return Discriminative(name, stream, settings, unused, **options)


def learn(method: Discriminative, *indices: int) -> list[tuple[int, float]]:
    logged: list[tuple[int, float]] = []
    for index in indices:
        seed_all(0, index)
        method.learn(
            method.stream.experiences[index],
            lambda step, values: logged.append((step, values["train/loss"])),
        )
    return logged


def group_accuracy(method: Discriminative, group: int) -> float:
    test = method.stream.experiences[group].test
    images = torch.stack([image for image, _ in test])
    return (method.scores(images).argmax(1) == torch.tensor(test.targets)).float().mean().item()


@pytest.mark.parametrize("name", METHODS)
def test_resumed_between_experiences_it_ends_with_the_same_bits(name, stream):
    whole = make(name, stream)
    learn(whole, 0, 1)
    file = io.BytesIO()
    torch.save(whole.state(), file)
    learn(whole, 2)

    file.seek(0)
    resumed = make(name, stream)
    resumed.load_state(torch.load(file, weights_only=True))
    assert resumed.classes_seen == 4
    learn(resumed, 2)

    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    images = torch.stack([image for image, _ in stream.experiences[0].test])
    assert torch.equal(whole.scores(images), resumed.scores(images))
    assert whole.size() == resumed.size()


def test_at_16_px_it_is_avalanches_strategy_on_the_small_cnn_with_adam(stream):
    """The same bits as the strategy put together by hand: precision and loading add nothing."""
    from avalanche.models import IncrementalClassifier
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    method = make("finetune", stream, epochs=2)
    learn(method, 0, 1)
    seed_all(0, 0)
    model = nn.Sequential(CNN(1), IncrementalClassifier(64, 1))
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    sizes = {"train_mb_size": 32, "train_epochs": 2}
    with without_noise():
        quiet = EvaluationPlugin(loggers=[])
        plain = Naive(model=model, optimizer=adam, evaluator=quiet, **sizes)
        for experience in stream.experiences[:2]:
            if experience.index > 0:
                seed_all(0, experience.index)
            with following(plain, "", lambda *_: None, show_progress=False):
                plain.train(experience.avalanche, eval_streams=[])
    pairs = zip(method.model.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_resnet_learns_larger_images_by_sgd(coloured):
    options = {"optimizer": "sgd", "lr": 0.02, "weight_decay": 5e-4, "batch_size": 5}
    method = make("finetune", coloured, epochs=3, **options)
    assert method.backbone == "resnet18"
    losses = [loss for _, loss in learn(method, 0)]
    assert losses[-1] < losses[0]
    group = method.strategy.optimizer.param_groups[0]
    assert isinstance(method.strategy.optimizer, torch.optim.SGD)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    assert method.size().parameters == 11_168_832 + 5 * (512 + 1)

    restored = make("finetune", coloured, epochs=3, **options)
    restored.load_state(method.state())
    images = torch.stack([image for image, _ in coloured.experiences[0].test])
    assert torch.equal(method.scores(images), restored.scores(images))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_images_that_are_left_over_count_as_two_of_a_batch(momentum, stream):
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    images, lr, steps = stream.experiences[0].avalanche, 1e-3, []
    full = len(images.dataset) - 2

    class Watch:
        supports_distributed = False

        def before_update(self, strategy, **_):
            self.before = weights(strategy.model)
            self.gradient = torch.cat([p.grad.flatten() for p in strategy.model.parameters()])

        def after_training_iteration(self, strategy, **_):
            step = weights(strategy.model) - self.before
            steps.append((len(strategy.mb_y), self.gradient, step))
            kept = torch.cat([p.grad.flatten() for p in strategy.model.parameters()])
            torch.testing.assert_close(kept, self.gradient)  # si asks for it

    seed_all(0, 0)
    model = nn.Sequential(CNN(1), nn.Linear(64, 10))
    with without_noise():
        options = {"evaluator": EvaluationPlugin(loggers=[]), "plugins": [Watch()]}
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        plain = Naive(model=model, optimizer=sgd, train_mb_size=full, train_epochs=1, **options)
        with following(plain, "", lambda *_: None, show_progress=False):
            plain.train(images, eval_streams=[])
    (many, first, first_step), (few, second, second_step) = steps
    assert (many, few) == (full, 2)
    torch.testing.assert_close(first_step, -lr * first, rtol=1e-2, atol=1e-7)
    wanted = -lr / 2 * (momentum * first + second * 2 / full)  # half way down the cosine
    torch.testing.assert_close(second_step, wanted, rtol=1e-2, atol=1e-7)


def test_images_that_fill_no_batch_are_a_whole_one(stream):
    images = len(stream.experiences[0].avalanche.dataset)
    settings = {"epochs": 2, "optimizer": "sgd", "lr": 0.01}
    exact, roomy = (make("finetune", stream, batch_size=images + n, **settings) for n in (0, 500))
    assert learn(exact, 0) == learn(roomy, 0)
    assert torch.equal(weights(exact.model), weights(roomy.model))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_precision_is_the_trainers_when_learning_and_when_restored(stream):
    bf16 = TrainerConfig(accelerator="cpu", precision="bf16-mixed")
    mixed, plain = make("replay", stream, trainer=bf16), make("replay", stream)
    learn(mixed, 0)
    learn(plain, 0)
    images = torch.rand(6, 1, 16, 16)
    scores = mixed.scores(images)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, plain.scores(images))
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())

    same, other = make("replay", stream, trainer=bf16), make("replay", stream)
    same.load_state(mixed.state())
    other.load_state(mixed.state())
    assert torch.equal(same.scores(images), scores)
    assert not torch.equal(other.scores(images), scores)
    torch.testing.assert_close(other.scores(images), scores, rtol=0.05, atol=0.05)
    learn(same, 1)
    learn(mixed, 1)
    assert torch.equal(same.scores(images), mixed.scores(images))


@pytest.mark.parametrize("name", ["gdumb", "icarl", "lwf", "bic"])
def test_networks_kept_beside_its_own_are_restored_in_the_same_precision(name, stream):
    bf16 = TrainerConfig(accelerator="cpu", precision="bf16-mixed")
    plain = make(name, stream, stored_images=100)
    mixed = make(name, stream, stored_images=100, trainer=bf16)
    learn(plain, 0)
    mixed.load_state(plain.state())
    seen = []
    hook = register_module_forward_hook(
        lambda module, _, __: seen.append(module.bf16) if isinstance(module, Features) else None
    )
    with hook:
        learn(mixed, 1, 2)  # gdumb goes on from a copy of the network it began with
    assert seen
    assert all(seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu_it_learns_in_16_bits_and_moves_to_the_cpu(name, coloured):
    options = {"optimizer": "sgd", "lr": 0.02, "batch_size": 5, "epochs": 4, "stored_images": 10}
    before = torch.backends.cudnn.benchmark
    method = make(name, coloured, device=torch.device("cuda"), **options)
    losses = [loss for _, loss in learn(method, 0)]
    assert losses[-1] < losses[0]
    assert method.model.backbone.bf16
    assert method.model.backbone.network.layer1[0].conv1.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    assert torch.backends.cudnn.benchmark == before

    images = torch.stack([image for image, _ in coloured.experiences[0].test])
    scores = method.scores(images)
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
    moved = make(name, coloured, trainer=TrainerConfig(accelerator="cpu"), **options)
    moved.load_state(method.state())
    torch.testing.assert_close(moved.scores(images), scores, rtol=0.1, atol=0.1)
    learn(moved, 1)
    assert moved.scores(images).shape == (10, 10)


@pytest.mark.parametrize("name", METHODS)
def test_other_processes_read_the_images_and_end_with_the_experience(name, stream, monkeypatch):
    read_here = []
    plain = MemoryImages.__getitem__

    def read(self: MemoryImages, item: int) -> object:
        read_here.append(item)
        return plain(self, item)

    monkeypatch.setattr(MemoryImages, "__getitem__", read)
    trainer = TrainerConfig(workers=2)
    methods = [make(name, stream, epochs=2, trainer=trainer) for _ in range(2)]
    for method in methods:
        learn(method, 0, 1)
        assert not multiprocessing.active_children()
    assert not read_here
    images = torch.rand(4, 1, 16, 16)
    assert torch.equal(methods[0].scores(images), methods[1].scores(images))
    learn(make(name, stream), 0)
    assert read_here


def test_the_registry_hands_every_setting_on(coloured):
    settings = DiscriminativeConfig(backbone="resnet50", optimizer="sgd", momentum=0.8, epochs=3)
    trainer = TrainerConfig(accelerator="cpu", workers=3)
    method = registry.build("joint", Config(discriminative=settings, trainer=trainer), coloured)
    assert method.backbone == "resnet50"
    assert (method.settings, method.trainer.workers) == (settings, 3)


@pytest.mark.parametrize("name", METHODS)
def test_a_state_restores_scores_without_further_learning(name, stream):
    method, restored = make(name, stream), make(name, stream)
    learn(method, 0)
    restored.load_state(method.state())
    images = torch.rand(3, 1, 16, 16)
    assert torch.equal(method.scores(images), restored.scores(images))


@pytest.mark.parametrize("name", METHODS)
def test_scores_cover_exactly_the_classes_seen(name, stream):
    method = make(name, stream)
    images = torch.rand(7, 1, 16, 16) * 2 - 1
    assert method.classes_seen == 0
    for index in (0, 1):
        learn(method, index)
        scores = method.scores(images)
        assert scores.shape == (7, 2 * index + 2)
        assert method.classes_seen == 2 * index + 2
        assert not scores.requires_grad
        # In evaluation mode an image's scores do not depend on its neighbours.
        torch.testing.assert_close(scores[:1], method.scores(images[:1]))


def test_one_class_an_experience():
    stream = build_stream(digits(validation=0.15, augment=False), "b0-1", class_order(10, 1993))
    method = make("finetune", stream)
    for index in (0, 1):
        learn(method, index)
        assert method.scores(torch.zeros(2, 1, 16, 16)).shape == (2, index + 1)


def test_finetune_forgets_what_joint_and_replay_keep(stream):
    first, second = {}, {}
    for name in METHODS:
        method = make(name, stream, epochs=3, stored_images=200)
        learn(method, 0, 1)
        first[name], second[name] = group_accuracy(method, 0), group_accuracy(method, 1)
    assert min(second.values()) > 0.8
    assert first["finetune"] < 0.3
    assert first["replay"] > 0.7
    assert first["joint"] > 0.9


def test_joint_starts_afresh_on_all_classes_seen(stream):
    both, later = make("joint", stream), make("joint", stream)
    learn(both, 0, 1)
    learn(later, 0)
    with torch.no_grad():  # what it learned before must leave no trace
        for parameter in later.model.parameters():
            parameter.zero_()
    learn(later, 1)
    for one, other in zip(both.model.parameters(), later.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_states_hold_no_images(stream):
    states = {}
    for name in METHODS:
        method = make(name, stream, stored_images=200)
        learn(method, 0, 1)
        states[name] = method.state()["pickled"]
        images = stream.experiences[0].train.base.images
        assert len(states[name]) < 4 * 4 * method.size().parameters + 50_000
        assert images[:8].numpy().tobytes() not in states[name].numpy().tobytes()
        file = io.BytesIO()
        torch.save(method.state(), file)
        assert len(file.getvalue()) < len(states[name]) + 5_000  # as it is, not coded as text
    assert len(states["replay"]) - len(states["finetune"]) < 30_000  # indices of 200 images
    assert len(states["joint"]) < len(states["finetune"]) / 2  # no optimiser: it starts afresh


def test_every_class_has_as_much_of_the_memory():
    """Also where groups differ in size; Avalanche's default gives as much to every group."""
    stream = build_stream(digits(validation=0.15, augment=True), "b6-2", class_order(10, 1993))
    method = make("replay", stream)
    learn(method, 0, 1)
    memory = next(p.storage_policy for p in method.strategy.plugins if hasattr(p, "storage_policy"))
    counts = Counter(int(label) for label in memory.buffer.targets)
    assert set(counts) == set(range(8))
    assert set(counts.values()) <= {60 // 8, 60 // 8 + 1}
    assert method.size().stored_images == sum(counts.values()) == 60


def test_size_counts_parameters_and_stored_images(stream):
    stored = {"finetune": [0, 0, 0], "replay": [0, 60, 60], "joint": [0, 229, 459]}
    for name, counts in stored.items():
        method = make(name, stream)
        sizes = [method.size()]
        for index in (0, 1):
            learn(method, index)
            sizes.append(method.size())
        assert [size.stored_images for size in sizes] == counts
        assert sizes[0].parameters == 0
        assert sizes[2].parameters == sizes[1].parameters + 2 * (64 + 1)
        assert sizes[2].parameters < 100_000
        assert sizes[2].likelihood_evaluations == 0
        assert method.pretrained_on == "nothing"


@pytest.mark.parametrize("name", METHODS)
def test_logs_the_loss_of_the_first_and_the_last_step(name, stream):
    steps = [step for step, _ in learn(make(name, stream), 0)]
    assert steps == [0, 5, 7]  # 229 images in batches of 32: eight steps
    losses = [loss for _, loss in learn(make(name, stream, epochs=4), 0)]
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]


def test_progress_bar_names_the_experience_and_nothing_else_is_printed(stream, capfd, recwarn):
    method = make("replay", stream, show_progress=True)
    learn(method, 0, 1)
    out, err = capfd.readouterr()
    assert "replay experience 1/5" in err
    assert "replay experience 2/5" in err
    assert out == ""
    learn(make("joint", stream), 0)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("joint", {"epochs": 0}, "discriminative.epochs is 0"),
        ("joint", {"batch_size": -1}, "discriminative.batch_size is -1"),
        ("joint", {"lr": 0.0}, "discriminative.lr is 0.0"),
        ("joint", {"weight_decay": -0.1}, "discriminative.weight_decay is -0.1"),
        ("joint", {"optimizer": "sgd", "momentum": 1.0}, "discriminative.momentum is 1.0"),
        ("joint", {"trainer": TrainerConfig(workers=-1)}, "trainer.workers is -1"),
        ("replay", {"stored_images": 9}, "stored_images is 9.*10 classes.*10 or more"),
    ],
)
def test_refused(name, changes, message, stream):
    with pytest.raises(UserError, match=message):
        make(name, stream, **changes)


def test_images_too_small_for_a_resnet_are_refused(tiny_stream):
    assert make("finetune", tiny_stream).backbone == "cnn"
    with pytest.raises(UserError, match=r"resnet18, which needs images of 16 px.*digits has 8 px"):
        make("finetune", tiny_stream, backbone="resnet18")


def test_what_diverges_or_does_not_fit_says_which_setting_to_lower(stream, monkeypatch):
    with pytest.raises(UserError, match=r"finetune experience 1/5 diverged.*discriminative.lr"):
        learn(make("finetune", stream, optimizer="sgd", lr=1e30), 0)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Classifier, "forward", full)
    with pytest.raises(UserError, match=r"replay experience 1/5.*lower discriminative.batch_size"):
        learn(make("replay", stream), 0)


def test_order_of_use_is_enforced(stream):
    method = make("finetune", stream)
    with pytest.raises(ValueError, match="no experience"):
        method.scores(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="given experience 1, not 0"):
        learn(method, 1)


def test_a_state_of_the_cpu_is_refused_elsewhere_and_an_unreadable_one_is_named(stream):
    method = make("finetune", stream)
    learn(method, 0)
    with pytest.raises(UserError, match=r"finetune learned on the CPU.*cuda"):
        make("finetune", stream, device=torch.device("cuda")).load_state(method.state())
    unknown = method.state()
    pickled = unknown["pickled"].numpy().tobytes()
    changed = pickled.replace(b"strategy_wrappers", b"strategy_droppers")
    unknown["pickled"] = torch.frombuffer(bytearray(changed), dtype=torch.uint8)
    with pytest.raises(UserError, match="finetune does not fit the installed packages"):
        make("finetune", stream).load_state(unknown)


def test_seeds_are_functions_of_all_parts():
    def draw(*parts: int) -> tuple[float, float, float]:
        seed_all(*parts)
        return torch.rand(()).item(), np.random.rand(), random.random()

    draws = [draw(0, 1), draw(1, 0), draw(1), draw(0), draw(11)]
    assert draw(0, 1) == draws[0]
    for column in zip(*draws, strict=True):
        assert len(set(column)) == len(draws)
