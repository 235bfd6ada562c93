"""The digits as a stream: order, labels, splits, fingerprint, and what is refused."""

import dataclasses
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cil.errors import UserError
from cil.streams import CLASSES, SOURCES, open_stream
from cil.streams.digits import digits
from cil.streams.glyphs import CHARACTERS
from cil.streams.memory_images import MemoryImages
from cil.streams.splits import held_out
from cil.streams.stream import Source, Stream, build_stream, class_order
from cil.streams.torchvision_sets import SETS

ORDER = class_order(10, 1993)


@dataclass
class Settings:
    source: str = "digits"
    root: str | None = None
    class_list: str | None = None
    image_size: int | None = None
    mirror: bool = False
    protocol: str = "b0-2"
    class_order: list[int] | None = None
    order_seed: int = 1993
    validation: float = 0.15
    evaluate: str = "test"
    stop_after: int | None = None
    augment: bool = False


@pytest.fixture(scope="module")
def source() -> Source:
    return digits(validation=0.15, augment=False)


@pytest.fixture(scope="module")
def stream(source) -> Stream:
    return build_stream(source, "b0-2", ORDER)


def splits(source: Source) -> dict[str, MemoryImages]:
    return {"train": source.train, "validation": source.validation, "test": source.test}


def test_order_of_the_literature():
    assert class_order(100, 1993)[:5] == [68, 56, 78, 8, 23]


def test_labels_are_positions_in_arrival_order(source, stream):
    assert [experience.labels for experience in stream.experiences] == [
        (0, 1), (2, 3), (4, 5), (6, 7), (8, 9)
    ]  # fmt: skip
    assert [experience.index for experience in stream.experiences] == [0, 1, 2, 3, 4]
    assert stream.class_order == tuple(ORDER)
    assert stream.class_names == tuple(str(digit) for digit in ORDER)
    for experience in stream.experiences:
        for view in (experience.train, experience.validation, experience.test):
            assert set(view.targets) == set(experience.labels)
            for item in (0, len(view) - 1):
                image, label = view[item]
                original = source.class_names.index(stream.class_names[label])
                assert torch.equal(image, view.base.images[view.indices[item]])
                assert original == view.base.targets[view.indices[item]]


def test_every_image_arrives_exactly_once(source, stream):
    for name, split in splits(source).items():
        arrived = [
            i for experience in stream.experiences for i in getattr(experience, name).indices
        ]
        assert sorted(arrived) == list(range(len(split)))


def test_views_agree_with_avalanche_item_for_item(stream):
    for experience in stream.experiences:
        assert len(experience.train) == len(experience.avalanche.dataset)
        for ours, plain, theirs in zip(
            experience.train, experience.train_plain, experience.avalanche.dataset, strict=True
        ):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(plain[0], theirs[0])
            assert ours[1] == plain[1] == theirs[1]


def test_images_are_16_pixels_in_minus_one_to_one(source):
    for split in splits(source).values():
        assert split.images.shape == (len(split), 1, 16, 16)
        assert split.images.dtype == torch.float32
        assert split.images.min() == -1
        assert split.images.max() == 1


def test_splits_are_disjoint_stratified_and_complete(source):
    from sklearn.datasets import load_digits

    from cil.streams.digits import _split

    targets = load_digits().target
    parts = _split(targets, 0.15)
    assert sorted(np.concatenate(parts)) == list(range(1797))
    assert [len(part) for part in parts] == [1145, 202, 450]
    for part, share in zip(parts, (1145 / 1797, 202 / 1797, 450 / 1797), strict=True):
        for digit, count in Counter(targets.tolist()).items():
            assert abs(np.sum(targets[part] == digit) - share * count) <= 1
    for part, split in zip(parts, splits(source).values(), strict=True):
        assert targets[part].tolist() == split.targets


def test_the_test_images_are_the_same_for_every_order_and_validation_share(source):
    other = digits(validation=0.3, augment=True)
    assert torch.equal(source.test.images, other.test.images)
    assert len(other.validation) == 404
    judged = {
        sum(len(experience.test) for experience in build_stream(other, "b0-2", order).experiences)
        for order in (ORDER, class_order(10, 0))
    }
    assert judged == {450}


def test_building_is_repeatable_and_leaves_the_global_generators_alone():
    def draws():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = draws()
    first, second = open_stream(Settings()), open_stream(Settings(augment=True))
    assert draws() == before
    assert first.fingerprint == second.fingerprint
    for one, other in zip(first.experiences, second.experiences, strict=True):
        assert one.train.indices == other.train.indices


def test_fingerprint_follows_order_split_and_source(source, stream):
    renamed = dataclasses.replace(source, name="other")
    others = [
        build_stream(source, "b0-2", ORDER[::-1]),
        build_stream(source, "b0-5", ORDER),
        build_stream(digits(validation=0.2, augment=False), "b0-2", ORDER),
        build_stream(digits(validation=0.15, augment=False, image_size=8), "b0-2", ORDER),
        build_stream(renamed, "b0-2", ORDER),
    ]
    assert len({stream.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert len(stream.fingerprint) == 16
    assert stream.fingerprint == build_stream(source, "b0-2", ORDER).fingerprint


def test_fingerprint_is_the_one_of_earlier_runs(stream):
    # A run folder is resumed under this value: change it only together with the images.
    assert stream.fingerprint == "6a09a1d743e33d8b"


def test_a_list_is_known_by_a_hash_that_a_shell_gives_too(source, stream, tmp_path):
    (tmp_path / "list").write_text("".join(f"{digit}\n" for digit in range(10)))
    shell = subprocess.run(["sha256sum", tmp_path / "list"], capture_output=True, check=True)
    assert stream.class_list_hash == shell.stdout.decode()[:16]
    assert stream.class_list_hash == build_stream(source, "b0-5", ORDER[::-1]).class_list_hash
    fewer = dataclasses.replace(source, class_names=(*source.class_names[:9], "nine"))
    assert stream.class_list_hash != build_stream(fewer, "b0-2", ORDER).class_list_hash
    assert stream.class_list is None


def test_reproducibility_data_is_json(stream):
    assert json.loads(json.dumps(stream.reproducibility)) == stream.reproducibility
    assert stream.reproducibility["classes_order_original_ids"] == ORDER


def test_augmentation_is_of_training_images_alone_and_fills_with_background():
    experience = open_stream(Settings(augment=True)).experiences[0]
    assert not torch.equal(experience.train[0][0], experience.train[0][0])
    theirs = experience.avalanche.dataset
    assert not torch.equal(theirs[0][0], theirs[0][0])
    for plain in (experience.train_plain, experience.validation, experience.test):
        assert torch.equal(plain[0][0], plain[0][0])
    images = torch.stack([image for image, _ in experience.train])
    assert images.shape[1:] == (1, 16, 16)
    assert images.min() >= -1
    assert images.max() <= 1
    empty = torch.full((1, 16, 16), -1.0)
    assert all(torch.equal(experience.train.augment(empty), empty) for _ in range(20))


@pytest.mark.parametrize(
    ("protocol", "sizes"),
    [
        ("b0-10", [10]),
        ("b10-3", [10]),
        ("b0-1", [1] * 10),
        ("b4-2", [4, 2, 2, 2]),
        ("b5-5", [5, 5]),
    ],
)
def test_a_protocol_cuts_the_classes(source, protocol, sizes):
    built = build_stream(source, protocol, ORDER)
    labels = [label for experience in built.experiences for label in experience.labels]
    assert labels == list(range(10))
    assert [len(experience.labels) for experience in built.experiences] == sizes
    assert sum(len(experience.train) for experience in built.experiences) == 1145


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "b0-3"}, "stream.protocol is b0-3.*10 classes.*one of 1, 2, 5, 10"),
        ({"protocol": "b0-0"}, "stream.protocol is b0-0.*one of 1, 2, 5, 10"),
        ({"protocol": "b20-1"}, "stream.protocol is b20-1"),
        ({"protocol": "b5-2"}, "stream.protocol is b5-2.*another first group"),
        ({"protocol": "10x1"}, "stream.protocol is '10x1': write b0-10"),
        ({"class_order": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]}, r"holds \[8\] more than once"),
        ({"class_order": [0, 1, 2, 3]}, "has 4 entries, but digits has 10 classes"),
        ({"class_order": []}, "has 0 entries"),
        ({"class_order": [10, 1, 2, 3, 4, 5, 6, 7, 8, 9]}, r"holds \[10\], no class of digits"),
        ({"class_order": [-1, 1, 2, 3, 4, 5, 6, 7, 8, 9]}, r"holds \[-1\], no class of digits"),
        ({"source": "digit"}, "'digit', which does not exist: did you mean digits?"),
        ({"source": "letters"}, "'letters', which does not exist: choose one of digits, glyphs100"),
        ({"root": "data"}, "stream.root is data, but the source digits does not read it"),
        ({"class_list": "ucir"}, "stream.class_list is ucir, but .* does \\(image_folder\\)"),
        ({"image_size": 0}, "stream.image_size is 0, but the source digits"),
        ({"mirror": True}, "stream.mirror is true, but the source digits"),
        ({"source": "mnist", "mirror": True}, "stream.mirror is true, but the source mnist"),
        ({"order_seed": -1}, "stream.order_seed is -1"),
        ({"validation": 0.0}, "stream.validation is 0.0.*above 0 and below 1"),
        ({"validation": 1.0}, "stream.validation is 1.0"),
        ({"validation": float("nan")}, "stream.validation is nan"),
    ],
)
def test_refused(change, message):
    with pytest.raises(UserError, match=message):
        open_stream(dataclasses.replace(Settings(), **change))


def test_a_class_without_images_is_refused(source):
    kept = [i for i, target in enumerate(source.validation.targets) if target != 7]
    fewer = MemoryImages(
        source.validation.images[kept], [source.validation.targets[i] for i in kept]
    )
    with pytest.raises(UserError, match="held-out training images of digits hold none of: 7;"):
        build_stream(dataclasses.replace(source, validation=fewer), "b0-2", ORDER)


# --- the share held out ---


def shared_out(counts, share):
    """Held-out images of each class, of so many training images of each."""
    targets = np.repeat(np.arange(len(counts)), counts)
    kept, apart = held_out(targets, share)
    assert sorted([*kept, *apart]) == list(range(len(targets)))
    assert set(targets[kept]) == set(targets[apart]) == set(targets)
    return np.bincount(targets[apart]).tolist()


@pytest.mark.parametrize(
    ("counts", "share", "apart"),
    [
        ([95, 3, 2], 0.05, [5, 1, 1]),
        ([95, 3, 2], 0.97, [92, 2, 1]),
        ([2, 2, 2], 0.05, [1, 1, 1]),
        ([2, 2, 2], 0.95, [1, 1, 1]),
        ([40, 20], 0.1, [4, 2]),
    ],
)
def test_every_class_has_an_image_held_out_and_one_left(counts, share, apart):
    assert shared_out(counts, share) == apart


def test_which_images_are_held_out_is_as_in_earlier_runs():
    # Numbers are published of this split: a small class may add to it, and moves nothing else.
    assert held_out(np.repeat([0, 1, 2], 10), 0.2)[1].tolist() == [0, 5, 14, 17, 27, 29]
    _, apart = held_out(np.repeat([0, 1, 2], [95, 3, 2]), 0.05)
    assert apart[:5].tolist() == [44, 47, 64, 67, 91]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 0, 0, 1, 2, 2], "Class 1 has a single training image: .*stream.validation"),
        ([], "no training images to hold out for stream.validation"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(targets, message):
    with pytest.raises(UserError, match=message):
        held_out(np.array(targets, dtype=int), 0.5)


# --- a stream of one's own ---


def four_classes(images=None, targets=(0, 1, 2, 3) * 2, **changes):
    """Digits 0 to 3 twice, 8 px, or other images."""
    if images is None:
        images = digits(0.15, augment=False, image_size=8).test.images[:8]
    split = MemoryImages(images, targets)
    parts = dict.fromkeys(("train", "validation", "test"), split)
    options = {"image_size": 8, "channels": 1, "content": "eight", **parts, **changes}
    return Source("mine", ("a", "b", "c", "d"), **options)


def test_a_class_of_a_single_image_is_enough():
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    built = build_stream(four_classes(images, range(4)), "b0-2", np.arange(4))
    assert [len(experience.train) for experience in built.experiences] == [2, 2]
    assert {type(original) for original in built.class_order} == {int}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 16}, r"first of the training images of mine is \(1, 8, 8\), .*\(1, 16, 16"),
        ({"channels": 3}, r"is \(1, 8, 8\), but channels and image_size make it \(3, 8, 8\)"),
        ({"targets": (0, 1, 2, 3, -1, 1, 2, 3)}, "targets that are no classes: -1; give 0 to 3"),
        ({"targets": (0, 1, 2, 3, 4, 5, 2, 3)}, "targets that are no classes: 4, 5; .*class_names"),
        ({"images": torch.full((8, 1, 8, 8), -255.0)}, "has values from -255 to -255: scale all"),
        ({"images": torch.full((8, 1, 8, 8), float("nan"))}, "scale all images to \\[-1, 1\\]"),
        ({"images": torch.zeros(8, 1, 8, 8, dtype=torch.int64)}, "is no tensor of floats"),
        ({"images": torch.zeros(50, 1, 8, 8)}, "given 50 images and 8 targets"),
        ({"images": torch.zeros(4, 1, 8, 8)}, "given 4 images and 8 targets"),
    ],
)
def test_images_that_are_not_what_their_source_says_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build_stream(four_classes(**changes), "b0-2", range(4))


@pytest.mark.parametrize("name", ["glyphs100", "mnist"])
def test_classes_that_do_not_divide_are_refused_before_images_are_made(name, tmp_path):
    settings = dataclasses.replace(Settings(), source=name, protocol="b0-7")
    with pytest.raises(UserError, match=f"the 10+ classes of {name} do not divide"):
        open_stream(settings, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_classes_are_those_of_the_sources(source):
    assert {*CLASSES} == {*SOURCES} - {"image_folder"} == {"digits", "glyphs100", *SETS}
    assert CLASSES["digits"] == len(source.class_names)
    assert CLASSES["glyphs100"] == len(CHARACTERS)


def test_every_split_is_looked_at(source):
    brighter = MemoryImages(source.test.images * 1.5, source.test.targets)
    with pytest.raises(UserError, match=r"test images of digits has values from -1\.5"):
        build_stream(dataclasses.replace(source, test=brighter), "b0-2", ORDER)


def test_no_more_than_the_first_image_of_a_split_is_read(source, monkeypatch):
    read = []
    plain = MemoryImages.__getitem__
    monkeypatch.setattr(
        MemoryImages, "__getitem__", lambda self, item: read.append(item) or plain(self, item)
    )
    build_stream(source, "b0-2", ORDER)
    assert read == [0, 0, 0]


def test_an_order_of_anything_but_class_ids_is_refused():
    with pytest.raises(UserError, match=r"class_order holds \[1\.5, None, None, \[\]\], no class"):
        build_stream(four_classes(), "b0-2", [0, 1.5, None, None, []])


def test_naming_streams_costs_no_import_of_avalanche_or_torch():
    code = (
        "import sys, cil.streams; assert 'torch' not in sys.modules;"
        "import cil.streams.stream, cil.streams.digits; assert 'avalanche' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
