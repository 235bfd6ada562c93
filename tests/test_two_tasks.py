"""What is no stream of two tasks is known without its images, where that can be."""

from pathlib import Path

import pytest
from tiny import folders

from cil.run import exit_code
from cil.streams import SOURCES
from cil.streams.glyphs import CHARACTERS
from cil.streams.torchvision_sets import SETS
from experiments import two_tasks


@pytest.mark.parametrize(
    ("words", "blamed"),
    [
        (["split_glyphs100"], "makes 20 class groups of split_glyphs100: choose one that makes"),
        (["split_cifar100"], "makes 20 class groups of split_cifar100: choose one that makes"),
        (["split_glyphs100", "--stream.stop_after=3"], "stop_after is 3, which leaves 3 class"),
        (["split_cifar10", "--stream.protocol=b0-3"], "the 10 classes of cifar10 do not divide"),
    ],
)
def test_images_are_not_made_before_it_is_refused(
    words: list[str],
    blamed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["two_tasks", *words, *folders(tmp_path / "runs")])
    assert exit_code(two_tasks.main) == 2
    said = capsys.readouterr().err
    assert blamed in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_classes_are_those_of_the_sources() -> None:
    assert {*two_tasks.CLASSES} == {"digits", "glyphs100", *SETS} == {*SOURCES} - {"image_folder"}
    assert two_tasks.CLASSES["glyphs100"] == len(CHARACTERS)
