"""A backbone that is to be frozen is learned once, and serves every method that freezes it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cil.config import DiscriminativeConfig, TrainerConfig
from cil.methods.discriminative import Discriminative
from cil.methods.recipes import RECIPES
from cil.methods.seeding import seed_all
from cil.streams.stream import Stream

pytestmark = pytest.mark.integration  # every test learns

FROZEN = [name for name, recipe in RECIPES.items() if recipe.frozen]
Learned = tuple[Discriminative, list[tuple[int, dict[str, float]]], float]
Learn = Callable[..., Learned]


@pytest.fixture
def learn(tiny_stream: Stream, quiet_cpu: TrainerConfig, cache: Path) -> Learn:
    """Learns two groups with changed settings -> (method, log of the first, seconds saved)."""

    def run(name: str, seed: int = 0, *, stream: Stream = tiny_stream, **changes) -> Learned:
        ours = {key: changes.pop(key) for key in ("precision", "workers") if key in changes}
        few = {"epochs": 1, "backbone_epochs": 2, "batch_size": 16, "stored_images": 20}
        settings = DiscriminativeConfig(**{**few, **changes})
        options = {"device": torch.device("cpu"), "trainer": replace(quiet_cpu, **ours)}
        method = Discriminative(name, stream, settings, cache, show_progress=False, **options)
        rows: list[tuple[int, dict[str, float]]] = []
        seed_all(seed, 0)
        saved = method.learn(
            stream.experiences[0], lambda step, values: rows.append((step, dict(values)))
        )
        seed_all(seed, 1)
        assert method.learn(stream.experiences[1], lambda *_: None) == 0
        return method, rows, saved

    return run


def files(cache: Path) -> list[Path]:
    return sorted((cache / "backbones").glob("*.pt"))


def trained(method: Discriminative) -> int:
    """Images that its backbone was trained on in this run."""
    return next(m for m in method.model.modules() if hasattr(m, "passes")).passes.learned


def same(one: Discriminative, other: Discriminative, images: Tensor) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    equal = all(torch.equal(value, theirs[key]) for key, value in ours.items())
    return equal and torch.equal(one.scores(images), other.scores(images))


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_found_is_what_would_have_been_learned(
    name: str, learn: Learn, cache: Path, tmp_path: Path, tiny_images: Tensor
) -> None:
    alone, rows, saved = learn(name)
    assert saved == 0
    assert len(rows) > 1
    cache.rename(tmp_path / "elsewhere")
    other, _, _ = learn(next(other for other in FROZEN if other != name))
    assert trained(other) > 0
    found, again, saved = learn(name)
    assert trained(found) == 0
    assert saved > 0
    assert again == rows
    assert same(found, alone, tiny_images)
    assert found.size() == alone.size()
    assert len(files(cache)) == 1


@pytest.mark.parametrize(
    ("change", "another"),
    [
        ({"epochs": 2, "stored_images": 30, "fecam_shrinkage": 0.2}, False),
        ({"slda_shrinkage": 1e-3, "backbone": "cnn"}, False),  # auto is cnn at this size
        ({"backbone_epochs": 3}, True),
        ({"lr": 1e-2}, True),
        ({"batch_size": 8}, True),
        ({"optimizer": "sgd"}, True),
        ({"weight_decay": 1e-4}, True),
        ({"seed": 1}, True),
        ({"precision": "bf16-mixed"}, True),
        ({"workers": 1}, True),  # which varies the images by other draws
    ],
)
def test_only_what_its_learning_reads_asks_for_another(
    change: dict, another: bool, learn: Learn, cache: Path
) -> None:
    learn("ncm")
    method, _, saved = learn("slda", **change)
    assert len(files(cache)) == 1 + another
    assert (trained(method) > 0) == another
    assert (saved == 0) == another


def test_another_augmentation_asks_for_another(
    learn: Learn, cache: Path, tiny_stream: Stream
) -> None:
    learn("ncm")
    learn("ncm", stream=replace(tiny_stream, augment=None))
    learn("ncm", stream=replace(tiny_stream, fingerprint="other"))
    assert len(files(cache)) == 3


def test_a_damaged_one_is_learned_again(
    learn: Learn, cache: Path, capsys: pytest.CaptureFixture, tiny_images: Tensor
) -> None:
    first, _, _ = learn("fecam")
    (file,) = files(cache)
    file.write_bytes(file.read_bytes()[:-9])
    second, _, saved = learn("fecam")
    assert "damaged" in capsys.readouterr().err
    assert saved == 0
    assert trained(second) > 0
    assert same(second, first, tiny_images)
    third, _, saved = learn("fecam")
    assert saved > 0
    assert same(third, first, tiny_images)


def test_what_goes_on_learning_is_not_kept(learn: Learn, cache: Path) -> None:
    assert learn("finetune")[2] == 0
    assert not cache.exists()
