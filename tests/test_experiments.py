"""Every experiment of configs/ by its name: on small data of its kind, and without its data."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import written
from tiny import TINY

from cil import run
from cil.command_line import experiments
from cil.records import RunView, read_run, read_runs
from cil.streams import glyphs, image_folder

WNIDS = (image_folder.LISTS / "imagenet100_ucir.txt").read_text().split()
TINIER = [
    "--stream.validation=0.15",  # a smaller share of few images is none
    "--tokenizer.residual_blocks=0",
    "--tokenizer.vocabulary=32",
    "--tokenizer.batch_size=8",
    "--var.batch_size=8",
    "--var.smoothing_samples=1",
    "--discriminative.backbone=cnn",  # a ResNet18 takes half a minute
]
# Its own 256 px would take minutes.
AT_16_PX = ["--stream.image_size=16", "--tokenizer.multipliers=[1,1,1]", "--tokenizer.scales=[1,4]"]

Prepare = Callable[[Path, pytest.MonkeyPatch], list[str]]


def line(folder: Path, *arguments: str) -> list[str]:
    """TINY settings, with records and caches in `folder`; `arguments` begin with the name."""
    name, *others = arguments
    return [
        name,
        *TINY,
        *TINIER,
        f"--runs={folder / 'runs'}",
        f"--cache={folder / 'cache'}",
        *others,
    ]


def few_glyphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(glyphs, "glyphs", partial(glyphs.glyphs, per_class=(4, 1)))
    return ["--stream.validation=0.25"]


def torchvision(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    root = folder / "cache" / "torchvision"
    if kind.startswith("CIFAR"):
        written.cifar(root, int(kind.removeprefix("CIFAR")), monkeypatch)
    else:
        written.mnist(root, kind)
    return []


def pictures(
    names: list[str], side: int, more: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    written.image_folder(folder / "pictures", names, train=4, test=1, side=side)
    return [f"--stream.root={folder / 'pictures'}", "--stream.validation=0.25", *more]


# Experiment -> what puts small data where it looks for its own, and how many classes its stream
# has; split_digits is test_run.py's.
DATA: dict[str, tuple[Prepare, int]] = {
    "split_glyphs100": (few_glyphs, 100),
    "split_mnist": (partial(torchvision, "MNIST"), 10),
    "split_fashion_mnist": (partial(torchvision, "FashionMNIST"), 10),
    "split_cifar10": (partial(torchvision, "CIFAR10"), 10),
    "split_cifar100": (partial(torchvision, "CIFAR100"), 100),
    "split_image_folder": (partial(pictures, ["äpfel", "b", "c", "d"], 70, []), 4),
    "split_tiny_imagenet": (partial(pictures, WNIDS[:20], 64, []), 20),
    "split_imagenet100": (partial(pictures, WNIDS, 20, AT_16_PX), 100),
}


def test_every_experiment_is_started_here() -> None:
    assert {*DATA, "split_digits"} == set(experiments())


@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(set(DATA) - {"split_imagenet100"}))
def test_it_runs_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, classes = DATA[name]
    options = [*prepare(tmp_path, monkeypatch), "--stream.stop_after=2"]
    assert run.main(line(tmp_path, name, "--methods=[var,finetune]", *options)) == 0
    views = read_runs(tmp_path / "runs")
    assert [(view.experiment, view.method) for view in views] == [(name, "finetune"), (name, "var")]
    for view in views:
        assert view.matrix.shape == (2, 2)
        assert view.summary["unreadable_images"] == 0
        assert len(view.stream["class_order"]) == classes


# --- ImageNet-100 ---


@pytest.fixture(scope="module")
def imagenet100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which it ran on small JPEG files with the names of the list."""
    folder, methods = tmp_path_factory.mktemp("imagenet100"), "--methods=[var,finetune]"
    prepare, _ = DATA["split_imagenet100"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = prepare(folder, monkeypatch)
    assert run.main(line(folder, "split_imagenet100", methods, *options)) == 0
    return folder


def view_of(folder: Path, method: str) -> RunView:
    return read_run(folder / "runs" / "split_imagenet100" / method / "seed0")


@pytest.mark.integration
@pytest.mark.parametrize("method", ["var", "finetune"])
def test_imagenet100_from_end_to_end(imagenet100: Path, method: str) -> None:
    view = view_of(imagenet100, method)
    assert view.matrix.shape == (10, 10)
    assert np.array_equal(np.isnan(view.matrix), np.triu(np.ones((10, 10), bool), 1))
    assert view.sizes == [10] * 10
    order = view.stream["class_order"]
    assert order[:5] == [68, 56, 78, 8, 23]  # numpy's RandomState(1993), as in the literature
    assert view.stream["class_names"] == [sorted(WNIDS)[original] for original in order]
    assert view.stream["class_list"] == "ucir"
    assert view.stream["class_list_hash"] == list_hash("ucir")
    assert len(view.stream["fingerprint"]) == 16
    assert len(view.predictions()) == 100


def list_hash(name: str) -> str:
    return hashlib.sha256(
        (image_folder.LISTS / f"imagenet100_{name}.txt").read_bytes()
    ).hexdigest()[:16]


def test_the_three_lists_have_three_hashes() -> None:
    assert len({list_hash(name) for name in ("ucir", "cmc", "podnet")}) == 3


@pytest.mark.integration
def test_its_table_names_the_list(imagenet100: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--stream.root={imagenet100 / 'pictures'}", "--stream.validation=0.25", *AT_16_PX]
    methods = "--methods=[var,finetune]"
    assert run.main(line(imagenet100, "split_imagenet100", methods, *options)) == 0
    (said,) = [text for text in capsys.readouterr().out.splitlines() if "class list" in text]
    view = view_of(imagenet100, "var")
    assert said == (
        f"stream pictures (ucir): 100 classes, class list ucir, sha256 of the list "
        f"{list_hash('ucir')}; fingerprint {view.stream['fingerprint']}"
    )


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one sentence with which the command refuses these arguments."""
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    *before, error = captured.err.splitlines()
    assert [said.partition(" the")[0] for said in before] == ["opening"]
    assert captured.out == ""
    return error


def test_without_imagenet_it_says_what_it_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, ["split_imagenet100"]) == (
        f"error: {tmp_path / 'data' / 'imagenet100'} was looked for and is not there as it should "
        "be: it must hold the folders train and val (or test), and in each a folder of images for "
        "every class; stream.root says where it is."
    )
    assert not list(tmp_path.iterdir())
    assert "stream.root is not set" in refused(capsys, ["split_image_folder"])


def test_classes_that_are_not_there_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = [name for name in WNIDS if name not in WNIDS[40:42]]
    for split in ("train", "val"):
        for name in there:
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
    root = f"--stream.root={tmp_path / 'pictures'}"
    said = refused(capsys, line(tmp_path, "split_imagenet100", root))
    assert "no folder for 2 of the 100 classes of the class list ucir" in said
    assert said.endswith(f": {WNIDS[40]}, {WNIDS[41]}.")


# --- images that break after the scan ---


@pytest.fixture
def broken(tmp_path: Path) -> list[Path]:
    """Two training images and a test image that end as they should and hold nonsense before."""
    written.image_folder(tmp_path / "pictures", ["a", "b", "c", "d"], train=5, test=2, side=64)
    paths = sorted((tmp_path / "pictures" / "train" / "a").iterdir())[:2]
    for path in paths:
        _spoil(path)
    return [*paths, next((tmp_path / "pictures" / "val" / "c").iterdir())]


def below_root(path: Path) -> str:
    return "/".join(path.parts[-3:])


def _spoil(path: Path) -> None:
    head = path.read_bytes()[:200]  # the tables of a JPEG: its beginning is in order
    path.write_bytes(head + bytes(500) + b"\xff\xd9")


@pytest.mark.integration
def test_images_that_cannot_be_decoded_are_counted_and_reported(
    broken: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [f"--stream.root={tmp_path / 'pictures'}", "--stream.validation=0.2"]
    command = line(tmp_path, "split_image_folder", "--methods=[var,finetune]", *options)
    scan = image_folder.scan

    def scanned(folder: Path, *others: object, **options: object) -> object:
        found = scan(folder, *others, **options)  # type: ignore[arg-type]
        if folder.name == "val":  # test images are decoded by the scan: one breaks only now
            _spoil(broken[2])
        return found

    monkeypatch.setattr(image_folder, "scan", scanned)
    assert run.main(command) == 0
    captured = capsys.readouterr()
    place = tmp_path / "runs" / "split_image_folder"
    for method in ("var", "finetune"):
        summary = json.loads((place / method / "seed0" / "summary.json").read_text())
        assert summary["unreadable_images"] == 3
        progress = json.loads((place / method / "seed0" / "progress.json").read_text())
        assert sorted(progress["unreadable"]) == sorted(map(below_root, broken))
        warned = [
            said for said in captured.err.splitlines() if said.startswith(f"warning: {method}")
        ]
        assert any("learning" in said and below_root(broken[0]) in said for said in warned), warned
        assert any("evaluation" in said and below_root(broken[2]) in said for said in warned), (
            warned
        )
        (noted,) = [said for said in captured.out.splitlines() if said.startswith(f"{method} seed")
                    and "decoded" in said]  # fmt: skip
        assert "could not be decoded: 3" in noted
