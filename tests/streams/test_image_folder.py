"""Folders of image files as they are found in practice."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from cil.errors import UserError
from cil.streams import decoded, open_stream
from cil.streams import image_folder as module
from cil.streams.image_folder import (
    ImageFiles,
    ShiftAndMirror,
    decode,
    decode_bytes,
    image_folder,
)
from cil.streams.stream import Source, build_stream

DIGITS = load_digits().images.astype(np.uint8) * 15
CLASSES = ("apfel", "birne", "zwölf")


def picture(number: int, side: int = 24) -> Image.Image:
    """A real digit as an RGB picture."""
    return Image.fromarray(DIGITS[number]).resize((side, side)).convert("RGB")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of eight training and two test images, saved as JPEG."""
    root, number = tmp_path / "photos", 0
    for split, count in (("train", 8), ("val", 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(number).save(root / split / name / f"{i}.jpg")
                number += 1
    return root


def opened(root: Path, class_list: str | None = None) -> Source:
    return image_folder(root, 16, 0.25, True, True, root.parent / "cache", class_list)


def refusal(root: Path, class_list: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        opened(root, class_list)
    return str(error.value)


def test_splits_are_the_folders_and_a_share_held_out(root: Path) -> None:
    source = opened(root)
    assert source.class_names == CLASSES
    assert [len(x) for x in (source.train, source.validation, source.test)] == [18, 6, 6]
    image, label = source.train[17]
    assert image.shape == (3, 16, 16)
    assert -1 <= image.min() < -0.5 < 0.3 < image.max() <= 1
    assert label == 2
    assert not set(source.train.paths) & set(source.validation.paths)
    assert sorted(source.validation.targets) == [0, 0, 1, 1, 2, 2]
    assert opened(root).content == source.content


def test_a_list_chooses_the_classes(root: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "two.txt"
    chosen.write_text("zwölf\n\napfel\n", encoding="utf-8-sig")  # as some editors begin a file
    source = opened(root, str(chosen))
    assert source.class_names == ("apfel", "zwölf")
    assert (source.name, source.class_list) == ("photos (two)", "two")
    assert opened(root).class_list is None
    assert source.content != opened(root).content
    said = refusal(root, "cmc")
    assert "no folder for 100 of the 100 classes of the class list cmc (stream.class_list)" in said
    assert "n01558993" in said
    assert "and 95 more" in said
    assert "ucir, cmc, podnet, tiny_imagenet100 or a text file" in refusal(root, "uci")
    chosen.write_text("apfel\napfel\n")
    assert "twice" in refusal(root, str(chosen))


@pytest.mark.parametrize("missing", ["", "train", "val"])
def test_a_folder_that_is_not_there_is_described(root: Path, missing: str) -> None:
    (root / missing).rename(root.parent / "elsewhere")
    said = refusal(root)
    assert str(root) in said
    assert "train and val" in said
    assert "stream.root" in said


@pytest.mark.parametrize("chosen", [False, True])
def test_images_of_test_are_read_before_those_of_val(root: Path, chosen: bool) -> None:
    (root.parent / "two.txt").write_text("apfel\nbirne")
    class_list = str(root.parent / "two.txt") if chosen else None
    shutil.copytree(root / "val", root / "test")
    picture(50).save(root / "test" / "birne" / "2.jpg")
    targets = opened(root, class_list).test.targets
    assert targets == [0, 0, 1, 1, 1, 2, 2][: 5 if chosen else 7]
    shutil.rmtree(root / "test" / "apfel")  # some of the classes: val is no way out
    assert f"{root / 'test'} has no folder for 1 of the" in refusal(root, class_list)
    shutil.rmtree(root / "val")
    picture(51).save(root / "test" / "birne" / "3.jpg")
    (root / "test" / "apfel").mkdir()
    picture(52).save(root / "test" / "apfel" / "0.jpg")
    assert opened(root, class_list).test.targets[:5] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("place", [".", "images"])  # of ImageNet, of Tiny ImageNet
def test_a_test_folder_without_classes_leaves_val(root: Path, place: str) -> None:
    (root / "test" / place).mkdir(parents=True)
    picture(50).save(root / "test" / place / "test_0.jpg")
    test = opened(root).test
    assert (test.folder, len(test)) == (root / "val", 6)


def test_a_class_without_test_images_is_named(root: Path) -> None:
    (root / "val" / "birne").rename(root / "val" / "pflaume")
    assert "val has no folder for 1 of the 3 classes" in refusal(root)
    assert "birne" in refusal(root)


def test_an_empty_class_is_named(root: Path) -> None:
    for file in (root / "train" / "birne").iterdir():
        file.unlink()
    assert "class folders without an image: birne" in refusal(root)


def test_a_class_with_a_single_training_image_is_named(root: Path) -> None:
    for name in CLASSES[1:]:
        for file in sorted((root / "train" / name).iterdir())[1:]:
            file.unlink()
    said = refusal(root)
    assert "train has classes with a single image: birne, zwölf; " in said
    assert "two or more" in said
    picture(0).save(root / "train" / "birne" / "1.jpg")
    assert "single image: zwölf; " in refusal(root)


def test_a_class_of_few_images_has_one_held_out(root: Path) -> None:
    for file in sorted((root / "train" / "birne").iterdir())[2:]:
        file.unlink()
    source = image_folder(root, 16, 0.05, True, True, root.parent / "cache")
    (experience,) = build_stream(source, "b0-3", [0, 1, 2]).experiences
    for part in (experience.train_plain, experience.validation):
        assert part.targets.count(1) == 1  # type: ignore[attr-defined]


def test_a_folder_without_classes_is_refused(root: Path) -> None:
    for split in ("train", "val"):
        (root / split).rename(root / f"no_{split}")
        (root / split).mkdir()
    assert "no training images" in refusal(root)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def no_target(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize("damage", [cut, text, nothing, no_target])
@pytest.mark.parametrize("place", ["train/apfel/3.jpg", "val/apfel/1.jpg"])
def test_damaged_files_are_refused_by_name(
    root: Path, damage: Callable[[Path], None], place: str
) -> None:
    opened(root)  # what was found is remembered, but a changed file is looked at again
    damage(root / place)
    said = refusal(root)
    assert "1 cannot be read as images: " + place.partition("/")[2] in said
    assert refusal(root) == said  # remembered as damaged
    picture(0).save(root / place)
    opened(root)


def test_what_is_no_picture_by_name_does_not_count(root: Path) -> None:
    for name in (".hidden.jpg", "Thumbs.db", "notes.txt"):
        (root / "train" / "apfel" / name).write_text("x")
    (root / "train" / ".cache").mkdir()
    assert len(opened(root).train) == 18


def test_what_macos_adds_to_an_archive_does_not_count(root: Path) -> None:
    for folder in (root / "train", root / "val", root / "train" / "apfel"):
        (folder / "__MACOSX" / "apfel").mkdir(parents=True)
        for i in range(2):
            picture(50 + i).save(folder / "__MACOSX" / "apfel" / f"{i}.jpg")
    source = opened(root)
    assert source.class_names == CLASSES
    assert [len(x) for x in (source.train, source.validation, source.test)] == [18, 6, 6]


def test_links_are_followed_but_not_in_circles(root: Path) -> None:
    apfel = root / "train" / "apfel"
    (apfel / "more").mkdir()
    picture(50).save(apfel / "more" / "9.png")
    for name, target in (("self", "."), ("up", ".."), ("round", "more"), ("top", "../..")):
        (apfel / name).symlink_to(target)
    os.symlink(root, apfel / "more" / "root")
    counted = [path for path in opened(root).train.paths if "apfel" in path]
    counted += [path for path in opened(root).validation.paths if "apfel" in path]
    assert len(counted) == 9


def test_a_scan_is_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(root)
    monkeypatch.setattr(Image, "open", None)
    assert len(opened(root).train) == 18
    (scan,) = (root.parent / "cache" / "scans").glob("train-*.json")
    scan.write_text("[{")
    # Nothing is known any more: every file is opened again.
    assert "24 cannot be read" in refusal(root)


def test_other_pictures_in_files_of_one_size_are_other_images(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for split, name, number in (
        ("train", "a", 0),
        ("train", "b", 1),
        ("val", "a", 2),
        ("val", "b", 3),
    ):
        (root / split / name).mkdir(parents=True)
        for i in range(2):
            picture(number + 4 * i).save(root / split / name / f"{i}.bmp")
    before = image_folder(root, 16, 0.5, True, True, tmp_path / "cache").content
    file = root / "train" / "a" / "0.bmp"
    size = file.stat().st_size
    picture(50).save(file)
    assert file.stat().st_size == size
    assert image_folder(root, 16, 0.5, True, True, tmp_path / "cache").content != before


def test_class_names_that_are_no_text_are_refused(root: Path) -> None:
    for split in ("train", "val"):
        os.rename(root / split / "apfel", os.fsencode(root / split) + b"/\xff")
    assert "names are no UTF-8: \\udcff; rename" in refusal(root)


def middle(path: Path) -> list[float]:
    image = decode(path, 16)
    assert image.shape == (3, 16, 16)
    return [round(value, 1) for value in image[:, 6:10, 6:10].mean((1, 2)).tolist()]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 255, [1, 1, 1]),
        ("1", 1, [1, 1, 1]),
        ("P", 3, None),
        ("I;16", 32768, [0, 0, 0]),
        ("RGBA", (255, 0, 0, 0), [1, 1, 1]),  # transparent: white
        ("LA", (0, 255), [-1, -1, -1]),
        ("CMYK", (0, 255, 255, 0), [1, -1, -1]),
        ("RGB", (255, 0, 0), [1, -1, -1]),
    ],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode, colour, expected) -> None:
    ending = "tif" if mode == "CMYK" else "png"
    path = tmp_path / f"a.{ending}"
    if mode == "I;16":
        Image.fromarray(np.full((20, 30), colour, dtype=np.uint16)).save(path)
    else:
        Image.new(mode, (30, 20), colour).save(path)
    found = middle(path)
    assert expected is None or found == expected


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert middle(tmp_path / "a.gif") == [1, -1, -1]


def test_pictures_stand_upright(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright: the left half comes to the top
    wide.save(tmp_path / "a.jpg", exif=exif)
    image = decode(tmp_path / "a.jpg", 16)
    assert image[:, :6].mean() > 0.9
    assert image[:, -6:].mean() < -0.9


def raising(error: type[Exception], broken: Path) -> Callable[[Path, int], torch.Tensor]:
    """Decoders of damaged files raise whatever comes to hand."""

    def decoding(path: Path, size: int, border: int = 0) -> torch.Tensor:
        if path == broken:
            raise error
        return decode_bytes(path, size, border)

    return decoding


def test_a_file_that_breaks_later_is_counted_and_replaced(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: ImageFiles = opened(root).train  # type: ignore[assignment]
    (root / "train" / str(files.paths[0])).write_bytes(b"gone")
    (root / "train" / str(files.paths[1])).unlink()
    image, label = files[0]
    assert label == 0
    assert torch.equal(image, files[2][0])
    first, second = (f"train/{path}" for path in files.paths[:2])
    assert files.marked() == [first, second]
    files.mark({second, "of another split"})
    assert files.marked() == [second]
    broken = files.folder / str(files.paths[3])
    monkeypatch.setattr(module, "decode_bytes", raising(TypeError, broken))
    assert torch.equal(files[3][0], files[4][0])
    monkeypatch.undo()
    for path in files.paths[:6]:
        (root / "train" / str(path)).write_bytes(b"gone")
    with pytest.raises(UserError, match="no readable image left"):
        files[3]
    with pytest.raises(UserError) as error:
        list(DataLoader(files, num_workers=1))
    assert str(error.value).startswith(str(files.folder))  # no traceback of the other process


def test_the_stream_says_which_files_of_every_split_broke(root: Path) -> None:
    stream = build_stream(opened(root), "b0-3", [2, 0, 1])
    assert stream.unreadable() == []
    (experience,) = stream.experiences
    splits = (experience.train_plain, experience.validation, experience.test)
    broken = []
    for view in splits:
        files = view.base  # type: ignore[attr-defined]
        broken.append(files.folder / str(files.paths[1]))
        broken[-1].write_bytes(b"gone")
    for context in ("fork", "spawn"):  # other processes load the images
        for view in splits:
            loader = DataLoader(view, num_workers=1, multiprocessing_context=context)
            assert len(list(loader)) == len(view)  # type: ignore[arg-type]
        assert stream.unreadable() == ["/".join(path.parts[-3:]) for path in broken]
        stream.mark_unreadable(())
        assert stream.unreadable() == []


def test_small_images_are_decoded_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = opened(root).train
    assert few.decoded is None  # type: ignore[attr-defined]
    monkeypatch.setattr(decoded, "FEWEST_IMAGES", 1)
    broken = root / "train" / str(few.paths[1])  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "decode_bytes", raising(TypeError, broken))
    kept = opened(root)
    monkeypatch.setattr(module, "decode_bytes", raising(TypeError, root))
    again = opened(root)
    for files in (kept.train, again.train):
        assert all(torch.equal(files[i][0], few[i][0]) for i in range(len(few)))  # type: ignore[arg-type]
        assert files.decoded.failed == {1}  # type: ignore[attr-defined]
        assert len(pickle.dumps(files.decoded)) < 1000  # type: ignore[attr-defined]
    monkeypatch.undo()
    monkeypatch.setattr(decoded, "FEWEST_IMAGES", 1)
    path = kept.train.decoded.path  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    mended = opened(root).train
    assert f"{path} is damaged and is made again" in capsys.readouterr().err
    assert mended.decoded.failed == set()  # type: ignore[attr-defined]
    before = mended[0][0]
    path.unlink()  # while it is in use, by processes that start afresh
    with pytest.raises(UserError, match="decoded/train-"):
        list(DataLoader(mended, num_workers=1, multiprocessing_context="spawn"))
    assert mended.marked() == []  # type: ignore[attr-defined]
    picture(70).save(root / "train" / str(mended.paths[0]))  # type: ignore[attr-defined]
    assert not torch.equal(opened(root).train[0][0], before)
    monkeypatch.setattr(decoded, "MOST_BYTES", 18 * 3 * 16 * 16 - 1)
    assert opened(root).train.decoded is None  # type: ignore[attr-defined]


def test_augmentation_shifts_and_mirrors() -> None:
    torch.manual_seed(0)
    image = torch.arange(3 * 16 * 16).view(3, 16, 16) / 384 - 1
    views = torch.stack([ShiftAndMirror(mirror=True)(image) for _ in range(200)])
    assert views.shape == (200, 3, 16, 16)
    rising = (views[:, 0, 8, 9] > views[:, 0, 8, 8]).float().mean()
    assert 0.35 < rising < 0.65
    assert len(views[:, 0, 8, 8].unique()) > 20
    plain = torch.stack([ShiftAndMirror(mirror=False)(image) for _ in range(50)])
    assert (plain[:, 0, 8, 9] > plain[:, 0, 8, 8]).all()


def test_it_needs_a_folder_and_a_size() -> None:
    from cil.config import StreamConfig

    with pytest.raises(UserError, match=r"stream\.root is not set.*train and val"):
        open_stream(StreamConfig(source="image_folder", image_size=64))
    with pytest.raises(UserError, match=r"stream\.image_size is not set.*from 4 to 1024"):
        open_stream(StreamConfig(source="image_folder", root="photos"))


@pytest.mark.parametrize("size", [-64, 0, 1, 3, 1025, 20_000, 100_000])
def test_a_side_out_of_range_is_refused_before_the_folder_is_opened(size: int) -> None:
    from cil.config import StreamConfig

    with pytest.raises(UserError, match=rf"stream\.image_size is {size}: .* from 4 to 1024,"):
        open_stream(StreamConfig(source="image_folder", root="not there", image_size=size))


@pytest.mark.parametrize("size", [4, 1024])
def test_the_ends_of_the_range_are_shown(root: Path, size: int) -> None:
    from cil.config import StreamConfig

    settings = StreamConfig(
        source="image_folder", root=str(root), image_size=size, protocol="b0-3", augment=True
    )
    image, *_ = open_stream(settings, root.parent / "cache").experiences[0].train[0]
    assert image.shape == (3, size, size)
