"""The discriminative methods: what they score, forget and store, and that they resume exactly."""

import io
import random

import numpy as np
import pytest
import torch

from cil.errors import UserError
from cil.methods.discriminative import Discriminative
from cil.methods.seeding import seed_all
from cil.streams.digits import digits
from cil.streams.stream import Stream, build_stream, class_order

pytestmark = pytest.mark.integration  # every test trains something

METHODS = ["finetune", "replay", "joint"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stream() -> Stream:
    return build_stream(digits(validation=0.15, augment=True), "b0-2", class_order(10, 1993))


def make(name: str, stream: Stream, **changes) -> Discriminative:
    settings = {"epochs": 1, "batch_size": 32, "lr": 5e-3, "stored_images": 60, "device": CPU}
    return Discriminative(name, stream, **{**settings, "show_progress": False, **changes})


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
        ("finetun", {}, "'finetun': did you mean finetune?"),
        ("x", {}, "choose one of finetune, replay, joint"),
        ("joint", {"epochs": 0}, "discriminative.epochs is 0"),
        ("joint", {"batch_size": -1}, "discriminative.batch_size is -1"),
        ("joint", {"lr": 0.0}, "discriminative.lr is 0.0"),
        ("replay", {"stored_images": 9}, "stored_images is 9.*10 classes.*10 or more"),
    ],
)
def test_refused(name, changes, message, stream):
    with pytest.raises(UserError, match=message):
        make(name, stream, **changes)


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
