"""Test sets of ImageNet's classes, each in the layout it was published in, on generated folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cil.errors import UserError
from cil.streams.shift_sets import KINDS, ShiftSet, ilsvrc_classes, read_shift_set

WNIDS = ilsvrc_classes()
STREAM = (WNIDS[388], WNIDS[0], WNIDS[9], WNIDS[999])  # in order of arrival


def picture(path: Path, shade: int, side: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(path)


def read(kind: str, root: Path, names: tuple[str, ...] = STREAM) -> list[ShiftSet]:
    return read_shift_set(kind, root, names, 8, root.parent / "cache")


def shown(found: ShiftSet) -> list[tuple[int, list[int]]]:
    """(shade, labels that are right) of every image."""
    items = [found.images[i] for i in range(len(found.images))]  # type: ignore[arg-type]
    return [
        (round((image.mean().item() + 1) * 127.5), found.right[row].nonzero()[:, 0].tolist())
        for image, row in items
    ]


def test_the_thousand_classes_are_numbered_by_their_sorted_ids() -> None:
    assert len(WNIDS) == 1000
    assert list(WNIDS) == sorted(WNIDS)
    # Tench, giant panda and toilet tissue, as everywhere in the literature.
    assert (WNIDS[0], WNIDS[388], WNIDS[999]) == ("n01440764", "n02510455", "n15075141")


@pytest.mark.parametrize("kind", ["imagenet-r", "imagenet-a", "imagenet-sketch"])
def test_folders_by_wordnet_id(kind: str, tmp_path: Path) -> None:
    root = tmp_path / kind
    picture(root / STREAM[0] / "a.jpg", 100)
    picture(root / STREAM[3] / "b.JPEG", 200)
    picture(root / WNIDS[5] / "c.png", 50)  # of no class of the stream
    (root / STREAM[1]).mkdir()  # empty
    (root / "README.txt").write_text("of the set")
    (found,) = read(kind, root)
    assert found.name == kind
    assert shown(found) == [(100, [0]), (200, [3])]
    assert found.missing == (STREAM[1], STREAM[2])
    assert found.images[0][0].shape == (3, 8, 8)


def test_imagenet_v2_counts_from_0_to_999(tmp_path: Path) -> None:
    root = tmp_path / "imagenetv2-matched-frequency-format-val"
    for number in (0, 9, 10, 100, 388, 999):
        picture(root / str(number) / f"{number}.jpeg", number % 250)
    (found,) = read("imagenet-v2", root)
    # Not as folders are sorted, 0, 1, 10, 100, ...: what fails there is 9.
    assert sorted(shown(found)) == [(0, [1]), (9, [2]), (138, [0]), (249, [3])]
    assert found.missing == ()


def objectnet(root: Path) -> None:
    """Two objects that ImageNet has, one of them under two names, and one that it has not."""
    for folder in ("clock", "panda", "spoon"):
        picture(root / "images" / folder / f"{folder}.png", 90, side=20)
    with Image.open(root / "images" / "panda" / "panda.png") as image:
        framed = np.array(image)
    framed[:2], framed[-2:], framed[:, :2], framed[:, -2:] = [[255, 0, 0]] * 4
    Image.fromarray(framed).save(root / "images" / "panda" / "panda.png")
    folder = root / "mappings"
    folder.mkdir()
    objects = {"clock": "Clock", "panda": "Giant panda", "spoon": "Tea spoon"}
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps(objects))
    names = {"Clock": "tench, Tinca tinca; ostrich", "Giant panda": "giant panda"}
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps(names))
    # The lines of the list are in another order than the classes.
    (folder / "imagenet_to_label_2012_v2").write_text("giant panda\nostrich\ntench, Tinca tinca\n")
    lines = {"0": 2, "9": 1, "388": 0}
    (folder / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(lines))


def test_objectnet_by_its_own_map_and_without_its_frame(tmp_path: Path) -> None:
    objectnet(tmp_path / "objectnet-1.0")
    (found,) = read("objectnet", tmp_path / "objectnet-1.0")
    assert shown(found) == [(90, [1, 2]), (90, [0])]  # a clock may be called either
    panda, _ = found.images[1]
    assert torch.allclose(panda, torch.tensor(90 / 127.5 - 1), atol=0.005), "no red is left"
    assert found.missing == (STREAM[3],)


@pytest.mark.parametrize("between", ["", "noise"])
def test_imagenet_c_has_a_set_for_each_severity(between: str, tmp_path: Path) -> None:
    root = tmp_path / "imagenet-c"
    for severity in (1, 5):
        place = root / between / "gaussian_noise" / str(severity)
        picture(place / STREAM[0] / "a.JPEG", 10 * severity)
    picture(root / "blur" / "defocus_blur" / "3" / STREAM[2] / "b.JPEG", 30)
    found = {part.name: part for part in read("imagenet-c", root)}
    assert set(found) == {
        "imagenet-c/gaussian_noise/1",
        "imagenet-c/gaussian_noise/5",
        "imagenet-c/defocus_blur/3",
    }
    assert shown(found["imagenet-c/gaussian_noise/5"]) == [(50, [0])]
    assert shown(found["imagenet-c/defocus_blur/3"]) == [(30, [2])]


def test_a_set_that_changed_has_another_hash(tmp_path: Path) -> None:
    root = tmp_path / "imagenet-r"
    picture(root / STREAM[0] / "a.png", 1)
    (before,) = read("imagenet-r", root)
    picture(root / STREAM[0] / "a.png", 2, side=13)
    (after,) = read("imagenet-r", root)
    assert before.content != after.content


# --- bad input ---


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_common_is_an_error(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    objectnet(root)
    for place in (root, root / "gaussian_noise" / "1"):
        picture(place / WNIDS[5] / "a.png", 1)
    picture(root / "5" / "a.png", 1)
    with pytest.raises(UserError, match="no image of any of the 1 classes of the stream"):
        read(kind, root, (WNIDS[3],))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no test set 'imagenet-x': choose from imagenet"):
        read("imagenet-x", tmp_path)
    with pytest.raises(UserError, match=r"no folder .*nowhere for imagenet-r"):
        read("imagenet-r", tmp_path / "nowhere")
    with pytest.raises(UserError, match="its classes are 3, 0"):
        read("imagenet-r", tmp_path, ("3", "0"))
    with pytest.raises(UserError, match="CORRUPTION/SEVERITY/CLASS"):
        read("imagenet-c", tmp_path)


@pytest.mark.parametrize("damage", ["missing", "no json", "a list"])
def test_objectnet_without_its_map(damage: str, tmp_path: Path) -> None:
    objectnet(tmp_path / "objectnet-1.0")
    path = tmp_path / "objectnet-1.0" / "mappings" / "objectnet_to_imagenet_1k.json"
    contents = {"no json": "{", "a list": "[]"}
    path.write_text(contents.get(damage, ""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match=r"objectnet_to_imagenet_1k\.json is missing or cannot be"):
        read("objectnet", tmp_path / "objectnet-1.0")


def test_objectnet_with_another_map(tmp_path: Path) -> None:
    objectnet(tmp_path / "objectnet-1.0")
    path = tmp_path / "objectnet-1.0" / "mappings" / "objectnet_to_imagenet_1k.json"
    path.write_text('{"Clock": "sundial"}')
    with pytest.raises(UserError, match="do not fit each other"):
        read("objectnet", tmp_path / "objectnet-1.0")


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = tmp_path / "imagenet-a"
    picture(root / STREAM[0] / "a.png", 1)
    (root / STREAM[0] / "b.png").write_text("no image")
    with pytest.raises(UserError, match=r"b\.png"):
        read("imagenet-a", root)
