"""The drawn characters: images, splits, cache, and whether the classes can be told apart."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cil.errors import UserError
from cil.streams import glyphs as module
from cil.streams.glyphs import CHARACTERS, Wobble, faces_of, glyphs
from cil.streams.memory_images import MemoryImages
from cil.streams.stream import Source, build_stream, class_order

FEW = (6, 2)  # training and test images of a class


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return glyphs(0.34, False, tmp_path_factory.mktemp("cache"), per_class=FEW)


@pytest.fixture
def three_characters(monkeypatch) -> None:
    """Makes drawing a matter of milliseconds."""
    monkeypatch.setattr(module, "CHARACTERS", "AЖ♠")


def few(cache: Path, validation: float = 0.5) -> Source:
    return glyphs(validation, False, cache, per_class=FEW)


def splits(source: Source) -> dict[str, MemoryImages]:
    return {"train": source.train, "validation": source.validation, "test": source.test}


def edges(split: MemoryImages) -> Tensor:
    """Where edges run in which of four directions, whatever the colours: (N, features)."""
    grey = (split.images / 127.5 - 1).mean(1)
    right = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    down = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    strength = (right**2 + down**2).sqrt() + 1e-6
    straight, slanted = (right**2 - down**2) / strength, 2 * right * down / strength
    maps = torch.stack([straight, -straight, slanted, -slanted], 1).relu()
    return functional.normalize(functional.avg_pool2d(maps, 5, 3).flatten(1))


def nearest_centroid_accuracy(source: Source) -> float:
    features, targets = edges(source.train), torch.tensor(source.train.targets)
    centroids = torch.stack([features[targets == c].mean(0) for c in range(len(CHARACTERS))])
    nearest = torch.cdist(edges(source.test), centroids).argmin(1)
    return (nearest == torch.tensor(source.test.targets)).float().mean().item()


def test_images_are_32_pixels_in_minus_one_to_one(source):
    assert (source.name, source.image_size, source.channels) == ("glyphs100", 32, 3)
    for split in splits(source).values():
        assert split.images.dtype == torch.uint8
        image, label = split[len(split) - 1]
        assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 99)
    images = torch.stack([image for image, _ in source.train])
    assert images.min() == -1
    assert images.max() == 1
    assert (images.amax((1, 2, 3)) - images.amin((1, 2, 3))).min() > 0.3  # each shows something


def test_splits_are_disjoint_stratified_and_complete(source):
    for split, count in zip(splits(source).values(), (4, 2, 2), strict=True):
        assert Counter(split.targets) == dict.fromkeys(range(100), count)
        assert len(split) == len(split.images) == 100 * count
    every = [image.numpy().tobytes() for split in splits(source).values() for image in split.images]
    assert len(set(every)) == 800


def test_a_hundred_distinct_characters_of_many_faces():
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 100
    assert min(len(faces) for faces in faces_of().values()) >= 10


def test_class_names_are_unique_and_readable(source):
    assert len(set(source.class_names)) == 100
    assert source.class_names[CHARACTERS.index("Ж")] == "cyrillic capital letter zhe"


def test_no_character_is_drawn_like_another():
    faces = faces_of()
    looks = {
        character: [np.asarray(module._mask(character, face, 16, 0), np.float32) for face in found]
        for character, found in faces.items()
    }
    means = np.stack([np.mean(masks, axis=0).ravel() for masks in looks.values()])
    alike = np.corrcoef(means) - np.eye(len(means))
    first, second = np.unravel_index(alike.argmax(), alike.shape)
    assert alike.max() < 0.95, f"{CHARACTERS[first]} and {CHARACTERS[second]} look alike"
    assert all(mask.max() > 128 for masks in looks.values() for mask in masks)  # none is empty


def test_classes_can_be_told_apart_from_few_images(source):
    assert nearest_centroid_accuracy(source) > 0.2  # chance is 0.01


def test_the_stream_takes_it(source):
    stream = build_stream(source, "b0-10", class_order(100, 1993))
    assert [len(experience.train) for experience in stream.experiences] == [40] * 10
    image, label = stream.experiences[3].test[0]
    assert image.shape == (3, 32, 32)
    assert label in stream.experiences[3].labels


@pytest.mark.usefixtures("three_characters")
def test_same_images_every_time_and_the_global_generators_are_left_alone(tmp_path):
    def draws():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = draws()
    one, other = few(tmp_path / "one"), few(tmp_path / "other")
    assert draws() == before
    assert one.content == other.content
    for first, second in zip(splits(one).values(), splits(other).values(), strict=True):
        assert torch.equal(first.images, second.images)
        assert first.targets == second.targets


@pytest.mark.usefixtures("three_characters")
def test_content_follows_the_split_and_the_test_images_do_not(tmp_path):
    sources = [few(tmp_path, share) for share in (0.5, 0.17)]
    assert sources[0].content != sources[1].content
    assert len(sources[1].validation) == 3
    assert torch.equal(sources[0].test.images, sources[1].test.images)
    larger = glyphs(0.5, False, tmp_path, image_size=48, per_class=FEW)
    assert larger.test[0][0].shape == (3, 48, 48)
    assert larger.content != sources[0].content


@pytest.mark.usefixtures("three_characters")
def test_the_second_time_comes_from_the_cache(tmp_path, monkeypatch, capfd):
    cache = tmp_path / "not" / "there yet"
    drawn = few(cache)
    file = cache / "glyphs100-32px.npz"
    assert list(cache.iterdir()) == [file]
    assert str(file) in capfd.readouterr().err  # the bar says where they go
    monkeypatch.setattr(module, "draw", None)
    again = few(cache)
    assert again.content == drawn.content
    assert torch.equal(again.train.images, drawn.train.images)
    assert capfd.readouterr().err == ""


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.usefixtures("three_characters")
@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: b"no archive"])
def test_a_damaged_cache_is_noticed_and_made_again(tmp_path, damage):
    drawn, file = few(tmp_path), tmp_path / "glyphs100-32px.npz"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = few(tmp_path)
    assert again.content == drawn.content
    assert torch.equal(again.train.images, drawn.train.images)
    assert module._load(file, module._key(32, FEW)) is not None


@pytest.mark.usefixtures("three_characters")
@pytest.mark.parametrize(
    ("name", "value"),
    [("_VERSION", 2), ("_SEED", 1), ("CHARACTERS", "AЖ♥"), ("_FACES", ("cmr10",))],
)
def test_an_outdated_cache_is_noticed(tmp_path, monkeypatch, name, value):
    few(tmp_path)
    file = tmp_path / "glyphs100-32px.npz"
    assert module._load(file, module._key(32, FEW)) is not None
    monkeypatch.setattr(module, name, value)
    assert module._load(file, module._key(32, FEW)) is None


@pytest.mark.usefixtures("three_characters")
def test_what_is_interrupted_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        few(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused_before_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "draw", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"glyphs100-32px.npz cannot be written .*--cache"):
        few(tmp_path / "file" / "below")


def test_a_missing_font_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FACES", ("Helvetica",))
    with pytest.raises(UserError, match=r"Helvetica.ttf is missing"):
        few(tmp_path)


@pytest.mark.parametrize("validation", [0.0, 1.0, -0.1, 0.08, 0.92, float("nan")])
def test_a_share_that_leaves_a_split_without_a_class_is_refused(tmp_path, validation):
    with pytest.raises(UserError, match=rf"validation is {validation}: .* from 1 to 5 of the 6"):
        few(tmp_path, validation)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("three_characters")
def test_augmentation_moves_a_little_and_leaves_no_rim(tmp_path):
    assert few(tmp_path).augment is None
    augment = glyphs(0.5, True, tmp_path, per_class=FEW).augment
    assert isinstance(augment, Wobble)
    torch.manual_seed(0)
    image = few(tmp_path).train[0][0]
    moved = torch.stack([augment(image) for _ in range(50)])
    assert moved.shape[1:] == image.shape
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert len({one.numpy().tobytes() for one in moved}) == 50
    plain = torch.full((3, 32, 32), 0.4)
    assert all(torch.allclose(augment(plain), plain, atol=1e-5) for _ in range(50))
    # A dot in the middle stays within the shift: rotation and scale are about the middle.
    dot = torch.full((1, 33, 33), -1.0)
    dot[:, 16, 16] = 1
    for _ in range(50):
        y, x = divmod(int(augment(dot).argmax()), 33)
        assert max(abs(y - 16), abs(x - 16)) <= 2


@pytest.mark.slow
def test_a_hundred_characters_are_told_apart_from_some_dozen_images(tmp_path):
    source = glyphs(0.1, True, tmp_path, per_class=(50, 10))
    assert [len(split) for split in splits(source).values()] == [4_500, 500, 1_000]
    assert nearest_centroid_accuracy(source) > 0.45
