"""Every discriminative method: it learns two experiences, resumes exactly, and keeps what it says.

What they share (precision, loading, errors, logging) is in test_discriminative.py.
"""

import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from cil.config import DiscriminativeConfig
from cil.errors import UserError
from cil.methods.discriminative import Discriminative
from cil.methods.recipes import RECIPES
from cil.methods.seeding import seed_all
from cil.streams.digits import digits
from cil.streams.memory_images import MemoryImages
from cil.streams.stream import Source, Stream, build_stream, class_order

pytestmark = pytest.mark.integration  # every test trains something

# The least accuracy on the first and on the second group, over the four classes, after both. Those
# that keep the first group are told from those that lose it.
LEAST = {
    "finetune": (0.0, 0.8),
    "ewc": (0.0, 0.8),
    "si": (0.0, 0.8),
    "mas": (0.0, 0.8),
    "lwf": (0.8, 0.5),
    "cwr": (0.3, 0.3),
    "ncm": (0.6, 0.6),
    "slda": (0.8, 0.8),
    "fecam": (0.8, 0.8),
    "agem": (0.6, 0.8),
    "replay": (0.7, 0.8),
    "gdumb": (0.7, 0.7),
    "icarl": (0.7, 0.7),
    "derpp": (0.5, 0.7),
    "er_ace": (0.7, 0.7),
    "scr": (0.5, 0.7),
    "bic": (0.7, 0.7),
    "cumulative": (0.9, 0.9),
    "joint": (0.9, 0.9),
}
FREE = ("finetune", "ewc", "si", "mas", "lwf", "cwr", "ncm", "slda", "fecam")


@pytest.fixture(scope="module")
def stream() -> Stream:
    return build_stream(
        digits(validation=0.15, augment=True, image_size=8), "b0-2", class_order(10, 1993)
    )


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Discriminative]:
    """Methods that share no cache, so that each learns all that it knows."""

    def new(name: str, stream: Stream, **changes) -> Discriminative:
        few = {"epochs": 4, "backbone_epochs": 12, "stored_images": 100, "bic_epochs": 20}
        settings = DiscriminativeConfig(**{**few, **changes})
        cache = tmp_path_factory.mktemp("cache")
        cpu = torch.device("cpu")
        return Discriminative(name, stream, settings, cache, device=cpu, show_progress=False)

    return new


def learn(method: Discriminative, *indices: int) -> None:
    for index in indices:
        seed_all(0, index)
        method.learn(method.stream.experiences[index], lambda *_: None)


def accuracies(method: Discriminative, groups: int) -> list[float]:
    values = []
    for experience in method.stream.experiences[:groups]:
        images = torch.stack([image for image, _ in experience.test])
        right = method.scores(images).argmax(1) == torch.tensor(experience.test.targets)
        values.append(right.double().mean().item())
    return values


@pytest.fixture(scope="module")
def learned(stream: Stream, make: Callable[..., Discriminative]) -> dict[str, Discriminative]:
    """Each method after two experiences. Ask them only."""
    methods = {name: make(name, stream) for name in RECIPES}
    for method in methods.values():
        learn(method, 0, 1)
    return methods


def test_every_method_is_tested() -> None:
    assert list(LEAST) == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_it_learns_two_experiences_of_digits(name, learned) -> None:
    method = learned[name]
    assert all(a >= b for a, b in zip(accuracies(method, 2), LEAST[name], strict=True)), accuracies(
        method, 2
    )
    scores = method.scores(torch.rand(5, 1, 8, 8) * 2 - 1)
    assert scores.shape == (5, 4)
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_taking_importances_leaves_the_network_as_it_was(name, stream, make) -> None:
    """Its normalisation, too: nothing is kept yet in the first experience, so all learn alike."""
    plain, method = make("finetune", stream, epochs=1), make(name, stream, epochs=1)
    for each in (plain, method):
        learn(each, 0)
    images = torch.rand(20, 1, 8, 8) * 2 - 1
    assert torch.equal(method.scores(images), plain.scores(images))


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_it_ends_with_the_same_bits(name, tiny_stream, make) -> None:
    stream = tiny_stream
    tiny = {"epochs": 1, "backbone_epochs": 1}
    whole, resumed = make(name, stream, **tiny), make(name, stream, **tiny)
    learn(whole, 0, 1)
    file = io.BytesIO()
    torch.save(whole.state(), file)
    learn(whole, 2)
    file.seek(0)
    resumed.load_state(torch.load(file, weights_only=True))
    learn(resumed, 2)
    images = torch.stack([image for image, _ in stream.experiences[0].test])
    assert torch.equal(whole.scores(images), resumed.scores(images))
    assert whole.size() == resumed.size()
    assert whole.size().learning_macs > 0


def test_only_icarl_keeps_pixels_in_its_state(learned) -> None:
    """All others go by indices."""
    for name, method in learned.items():
        images = method.stream.experiences[0].train.base.images
        found = images[method.stream.experiences[0].train.indices[0]].numpy().tobytes()
        assert (found in method.state()["pickled"].numpy().tobytes()) <= (name == "icarl")


def test_a_memory_is_full_shared_evenly_and_never_more_than_it_may_be(learned) -> None:
    for name, method in learned.items():
        stored = method.size().stored_images
        if name in FREE:
            assert stored == 0, name
            assert method.recipe.exemplar_free
        elif method.recipe.memory:
            assert stored == 100, name
        else:
            assert stored == sum(len(e.train) for e in method.stream.experiences[:2]), name


def test_holding_images_out_leaves_the_stream_as_it_was(learned) -> None:
    stream = learned["bic"].stream
    assert all(len(e.avalanche.dataset) == len(e.train) for e in stream.experiences)


def test_bytes_are_those_of_images_logits_statistics_and_old_networks(learned) -> None:
    """A float takes four, a value of an image one; buffers of the normalisation are counted."""
    sizes = {name: method.size() for name, method in learned.items()}
    image, width = 8 * 8, 64
    network = sum(t.nbytes for t in learned["finetune"].model.state_dict().values())
    second = 4 * sizes["finetune"].parameters
    expected = {
        "finetune": 0,
        "ewc": 4 * second,  # the weights and their importances, of either experience
        "si": 2 * second,  # the weights and their importances, of all experiences
        "mas": 2 * second,
        "lwf": network,
        "ncm": 4 * 4 * width,
        "fecam": 4 * 4 * width * (1 + width),
        "slda": 4 * (10 * width + 10 + width * width),
        "replay": 100 * image,
        "er_ace": 100 * image,
        "derpp": 100 * (image + 4 * 10),
        "scr": 100 * image + 4 * 4 * width,
        "cumulative": image * sizes["cumulative"].stored_images,
        "joint": image * sizes["joint"].stored_images,
    }
    assert {name: sizes[name].stored_bytes for name in expected} == expected
    assert sizes["bic"].stored_bytes > 100 * image + second  # the network before
    assert sizes["icarl"].stored_bytes > 100 * image + second
    assert all(size.stored_bytes > 0 for name, size in sizes.items() if name != "finetune")


def test_work_is_counted_in_forward_passes(learned) -> None:
    sizes = {name: method.size() for name, method in learned.items()}
    forward = sizes["finetune"].prediction_macs
    images = sum(len(e.train) for e in learned["finetune"].stream.experiences[:2])
    # Three passes a step; the head, four units of 64, is counted in predicting alone.
    assert sizes["finetune"].learning_macs == 3 * 4 * images * (forward - 4 * 64)
    # The old network reads every image of the second experience, and gets no gradient.
    second = len(learned["lwf"].stream.experiences[1].train)
    extra = sizes["lwf"].learning_macs - sizes["finetune"].learning_macs
    assert extra == 4 * second * (forward - 4 * 64)
    assert sizes["replay"].learning_macs > sizes["finetune"].learning_macs
    assert sizes["joint"].learning_macs > sizes["finetune"].learning_macs


@pytest.mark.parametrize("name", ["cwr", "ncm", "slda", "fecam"])
def test_a_frozen_backbone_learns_the_first_experience_alone(name, stream, make) -> None:
    method = make(name, stream, backbone_epochs=1)
    learn(method, 0)
    features = next(m for m in method.model.modules() if hasattr(m, "passes"))
    before = {key: value.clone() for key, value in features.state_dict().items()}
    learn(method, 1)
    assert all(torch.equal(before[key], value) for key, value in features.state_dict().items())
    assert features.passes.learned == len(stream.experiences[0].train)


def test_si_gives_a_weight_the_importance_that_its_paper_defines() -> None:
    """How far it lowered the loss over how far it went; none to a weight that did nothing."""
    from cil.methods.avalanche_plugins import MendedSI

    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    strategy = SimpleNamespace(model=model, loss=None)
    plugin = MendedSI(si_lambda=1.0, damping=0.5)
    plugin.before_training_exp(strategy)
    for _ in range(300):
        plugin.before_training_iteration(strategy)
        sgd.zero_grad()
        strategy.loss = 3 * model.weight[0, 0].square() + 0 * model.weight[0, 1]
        plugin.before_backward(strategy)
        strategy.loss.backward()
        sgd.step()
        plugin.after_training_iteration(strategy)
    plugin.after_training_exp(strategy)
    expected = torch.tensor([[3 / (1 + 0.5), 0.0]])
    torch.testing.assert_close(plugin.importances["weight"], expected, rtol=0.05, atol=0)


def test_si_holds_on_to_the_weights_that_mattered(stream, make) -> None:
    free, held = (make("si", stream, si_lambda=strength) for strength in (0.0, 100.0))
    for method in (free, held):
        learn(method, 0)
    before = _weights(free)
    assert torch.equal(before, _weights(held))  # nothing to hold on to yet
    plugin = next(p for p in held.strategy.plugins if hasattr(p, "importances"))
    importances = torch.cat([value.flatten() for value in plugin.importances.values()])
    assert importances.min() >= 0
    assert importances.max() > 10 * importances.median() > 0
    for method in (free, held):
        learn(method, 1)
    assert (_weights(held) - before).norm() < 0.5 * (_weights(free) - before).norm()


def _weights(method: Discriminative) -> torch.Tensor:
    """Those of the backbone."""
    features = next(m for m in method.model.modules() if hasattr(m, "passes"))
    return torch.cat([weight.detach().flatten() for weight in features.parameters()])


@pytest.mark.parametrize("name", ["lwf", "er_ace"])
def test_logits_far_apart_are_learned_from(name, stream, make) -> None:
    """Among some classes alone: a class whose softmax is rounded to zero has a loss nonetheless."""
    method = make(name, stream, epochs=1)
    learn(method, 0)
    method.model.head.register_forward_hook(lambda _, __, logits_BC: 1e4 * logits_BC)
    learn(method, 1)  # or it says that its weights are no numbers


def test_losses_of_some_classes_alone_are_avalanches() -> None:
    """From which they differ where logits are far apart."""
    from avalanche.training.losses import MaskedCrossEntropy
    from avalanche.training.regularization import ACECriterion

    from cil.methods.avalanche_plugins import OwnCrossEntropy, asymmetric_cross_entropy

    experience = SimpleNamespace(classes_in_this_experience=[3, 4, 5])
    logits, labels = torch.randn(8, 6), torch.tensor([3, 4, 5, 3, 4, 3, 4, 3])
    stored, stored_labels = torch.randn(5, 6), torch.tensor([0, 1, 5, 2, 3])
    ours, theirs = OwnCrossEntropy(), MaskedCrossEntropy(mask="new")
    for loss in (ours, theirs):
        loss.pre_adapt(None, experience)
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))
    batch = (logits, labels, stored, stored_labels)
    torch.testing.assert_close(asymmetric_cross_entropy(*batch), ACECriterion()(*batch))


def test_icarl_takes_no_mean_of_mirrored_digits(learned) -> None:
    method = learned["icarl"]
    plugin = next(p for p in method.strategy.plugins if hasattr(p, "x_memory"))
    with torch.no_grad():
        features = method.model.eval().feature_extractor(plugin.x_memory[0])
    mean = torch.nn.functional.normalize(features, dim=1).mean(0)
    mean = mean / mean.norm()
    label = plugin.y_memory[0][0]
    torch.testing.assert_close(method.model.eval_classifier.class_means[label], mean)


def test_agem_asks_images_of_all_classes_in_every_step(stream, make, monkeypatch) -> None:
    """They lie in its memory class after class."""
    from cil.methods.avalanche_plugins import SharedAGEM

    method, asked, ask = make("agem", stream, epochs=2), [], SharedAGEM.sample_from_memory

    def watched(plugin: SharedAGEM) -> list[torch.Tensor]:
        batch = ask(plugin)
        asked.append(batch[1])
        return batch

    monkeypatch.setattr(SharedAGEM, "sample_from_memory", watched)
    learn(method, 0, 1, 2)
    *_, last = asked
    assert last.unique().tolist() == [0, 1, 2, 3]
    assert {len(labels) for labels in asked} == {method.settings.batch_size}
    assert {len(labels.unique()) for labels in asked} <= {2, 3, 4}


def test_scr_answers_by_what_its_present_network_makes_of_its_memory(learned) -> None:
    method = learned["scr"]
    means = method.model.eval_classifier.class_means
    buffers = method.strategy.replay_plugin.storage_policy.buffer_groups
    for label, own in buffers.items():
        images = torch.stack([own.buffer.eval()[i][0] for i in range(len(own.buffer))])
        mean = functional.normalize(method.features(images)).mean(0)
        torch.testing.assert_close(means[label], functional.normalize(mean, dim=0))


def test_fecam_scores_as_one_class_after_another(learned) -> None:
    """As Avalanche's own, from which it differs in speed alone."""
    from avalanche.models import FeCAMClassifier

    own = learned["fecam"].model.eval_classifier
    features = torch.rand(6, 64)
    torch.testing.assert_close(
        own(features), FeCAMClassifier.forward(own, features), rtol=1e-3, atol=1e-3
    )


def test_fecam_tells_classes_of_a_single_image(tiny_stream, make) -> None:
    """They have no covariance of their own: they take the mean of the others', or none at all."""
    one, all_single = with_images(tiny_stream, 1, 1), tiny_stream
    for label in range(6):
        all_single = with_images(all_single, label, 1)
    for stream in (one, all_single):
        method = make("fecam", stream)
        learn(method, 0, 1, 2)
        images = torch.stack([image for e in stream.experiences for image, _ in e.test])
        scores = method.scores(images)
        assert scores.isfinite().all()
        assert (scores.argmax(1).bincount(minlength=6) > 0).all()
        assert sum(accuracies(method, 3)) / 3 > 0.3


def test_slda_is_the_discriminant_analysis_of_its_images(learned) -> None:
    """Its covariance is that of the features around their class means, and nothing larger."""
    method = learned["slda"]
    train = method.stream.experiences
    images = torch.stack([image for e in train[:2] for image, _ in e.train_plain])
    labels = torch.tensor([label for e in train[:2] for label in e.train_plain.targets])
    with torch.no_grad():
        features = method.model.eval()(images)
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    away = features - means[labels]
    whole = (away.T @ away / len(away)).trace()
    assert 0.5 < method.strategy.Sigma.trace() / whole < 2


def test_slda_takes_a_batch_in_as_image_after_image() -> None:
    from avalanche.training.supervised import StreamingLDA

    from cil.methods.avalanche_plugins import MendedSLDA

    settings = {"criterion": None, "input_size": 6, "num_classes": 4, "evaluator": None}
    batch, single = (MendedSLDA(slda_model=torch.nn.Identity(), **settings) for _ in range(2))
    features, labels = torch.rand(40, 6), torch.randint(4, (40,))
    for start in range(0, 40, 16):
        batch.fit(features[start : start + 16], labels[start : start + 16])
    for x, y in zip(features.split(1), labels.split(1), strict=True):
        if single.cK[y] == 0:  # where Avalanche's takes its distance from zero
            single.muK[y] = x
        StreamingLDA.fit(single, x, y)
    assert batch.num_updates == single.num_updates == 40
    for name in ("Sigma", "muK", "cK"):
        torch.testing.assert_close(getattr(batch, name), getattr(single, name))


def test_mas_learns_from_a_loss_of_zero(stream, make) -> None:
    """As of a network that fits its images; Avalanche's takes it for none."""
    method = make("mas", stream, epochs=1)
    learn(method, 0)
    right = torch.nn.CrossEntropyLoss(reduction="sum")
    method.strategy._criterion = lambda logits, labels: 0 * right(logits, labels)
    learn(method, 1)


def test_icarls_loss_is_avalanches() -> None:
    """From which it differs where a logit is no number: a divergence is told as one."""
    from avalanche.training.losses import ICaRLLossPlugin

    from cil.methods.avalanche_plugins import StableICaRLLoss

    logits, labels, old = torch.randn(8, 4), torch.randint(2, 4, (8,)), torch.randn(8, 4)
    ours, theirs = StableICaRLLoss(), ICaRLLossPlugin()
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))
    for loss in (ours, theirs):
        loss.old_classes, loss.old_logits = [0, 1], old
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))


@pytest.mark.parametrize("name", RECIPES)
def test_what_diverges_says_which_setting_to_lower(name, tiny_stream, make) -> None:
    method = make(name, tiny_stream, epochs=2, optimizer="sgd", lr=1e30, backbone_epochs=1)
    with pytest.raises(UserError, match=rf"{name} experience 1/.*discriminative.lr"):
        learn(method, 0)


def test_bic_needs_room_for_both_of_its_memories(stream, make) -> None:
    with pytest.raises(
        UserError, match=r"stored_images is 90, too few for bic.*give it 100 or more"
    ):
        make("bic", stream, stored_images=90)
    for name in ("agem", "gdumb", "icarl", "derpp", "er_ace", "scr"):
        with pytest.raises(UserError, match=f"stored_images is 9, too few for {name}.*10 or more"):
            make(name, stream, stored_images=9)


def with_images(stream: Stream, label: int, count: int) -> Stream:
    """The same stream with fewer training images of a class."""
    original, train = stream.class_order[label], stream.splits[0]
    own = [i for i, target in enumerate(train.targets) if target == original]
    kept = [i for i in range(len(train)) if i not in own[count:]]
    fewer = MemoryImages(train.images[kept], [train.targets[i] for i in kept])
    source = Source(
        stream.name,
        tuple(
            stream.class_names[stream.class_order.index(i)] for i in range(len(stream.class_names))
        ),
        fewer,
        *stream.splits[1:],
        stream.image_size,
        stream.channels,
        f"{count} of {label}",
    )
    return build_stream(source, "b0-2", stream.class_order)


@pytest.mark.parametrize("held_out", [0.1, 0.5])
def test_bic_holds_out_no_more_than_its_share_of_a_class(held_out, tiny_stream, make) -> None:
    """Thirty images a class, and of one of them three: the memory has room for far more."""
    stream = with_images(tiny_stream, 1, 3)
    method = make("bic", stream, stored_images=1000, bic_held_out=held_out)
    learn(method, 0, 1, 2)
    plugin = next(p for p in method.strategy.plugins if hasattr(p, "val_buffer"))
    held = {label: len(buffer.buffer) for label, buffer in plugin.val_buffer.items()}
    share = int(30 * held_out)
    assert held == dict.fromkeys(range(6), share) | {1: 1}
    assert method.size().stored_images == 5 * 30 + 3
    assert accuracies(method, 3)[2] > 0.25  # chance is a sixth


def test_bic_needs_two_images_of_a_class(tiny_stream, make) -> None:
    stream = with_images(tiny_stream, 1, 1)
    name = stream.class_names[1]
    with pytest.raises(UserError, match=f"bic .* two .* one training image of {name}\\.$"):
        make("bic", stream)


@pytest.mark.parametrize(
    ("key", "value", "range_"),
    [
        ("ewc_lambda", -1.0, "0 or more"),
        ("mas_alpha", 1.5, "0 to 1"),
        ("scr_temperature", 0.0, "above 0"),
        ("backbone_epochs", 0, "above 0"),
        ("bic_held_out", 1.0, "0.01 to 0.99"),
        ("lr", float("inf"), "above 0"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, range_, stream, make) -> None:
    with pytest.raises(UserError, match=f"discriminative.{key} is {value}: give .*{range_}"):
        make("finetune", stream, **{key: value})


def test_groups_of_different_size_share_a_memory_evenly(make) -> None:
    source = digits(validation=0.15, augment=True, image_size=8)
    stream = build_stream(source, "b6-2", class_order(10, 1993))
    for name in ("agem", "derpp", "icarl", "bic"):
        method = make(name, stream, epochs=1)
        learn(method, 0, 1)
        counts = _counts(method)
        assert set(counts) == set(range(8)), name
        assert max(counts.values()) - min(counts.values()) <= 2, name  # bic: one of each memory


@pytest.mark.parametrize("name", ["derpp", "er_ace"])
def test_a_memory_smaller_than_a_batch_is_replayed_whole(name, make) -> None:
    source = digits(validation=0.15, augment=True, image_size=8)
    stream = build_stream(source, "b0-1", class_order(10, 1993))
    method = make(name, stream, batch_size=192, stored_images=200, epochs=1)
    learn(method, 0)
    assert len(method.strategy.storage_policy.buffer) < 192
    replayed = []

    class Watch:
        supports_distributed = False

        def before_backward(self, strategy, **_) -> None:
            replayed.append(strategy.replay_loader is not None)

    method.strategy.plugins.append(Watch())
    learn(method, 1)
    assert replayed
    assert all(replayed)


def _counts(method: Discriminative) -> dict[int, int]:
    labels: list[int] = []
    for owner in (method.strategy, *method.strategy.plugins):
        if hasattr(owner, "storage_policy"):
            labels += [int(label) for label in owner.storage_policy.buffer.targets]
        for held in getattr(owner, "val_buffer", {}).values():
            labels += [int(label) for label in held.buffer.targets]
        labels += [int(y) for ys in getattr(owner, "y_memory", []) for y in ys]
    return {label: labels.count(label) for label in set(labels)}
