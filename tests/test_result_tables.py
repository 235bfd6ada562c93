"""The commands that write tables of results, in small: what they write comes from the records."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny import TINY, folders

from cil import streams
from cil.command_line import parse
from cil.environment import commit
from cil.errors import UserError
from cil.learning import complete
from cil.records import read_runs
from cil.run import exit_code
from cil.streams import image_folder
from experiments import asking, two_tasks

ROOT = Path(__file__).parent.parent


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


def rows(path: Path) -> dict[str, list[str]]:
    """Method -> cells of the Markdown table in a file."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.integration
def test_a_table_of_forgetting(tmp_path: Path) -> None:
    options = ["--methods=[finetune,joint]", "--seeds=[0,1]", f"--name={tmp_path / 'table'}"]
    words = ["experiments.forgetting", "split_digits", *TINY, *folders(tmp_path / "runs")]
    words.append("--stream.stop_after=2")
    result = command(*words, *options)
    assert result.returncode == 0, result.stderr
    written = rows(tmp_path / "table.md")
    assert list(written) == ["method", "---", "finetune*", "joint"]
    numbers = pd.read_csv(tmp_path / "table.csv")
    assert len(numbers) == 4
    assert {*numbers["commit"]} == {commit()}
    mean, std = numbers.groupby("method")["last_accuracy"].agg(["mean", "std"]).loc["joint"]
    assert written["joint"][0] == f"{100 * mean:.1f}±{100 * std:.1f}"
    text = (tmp_path / "table.md").read_text()
    assert f"Written by `python -m {' '.join([*words, *options])}`." in text
    assert "Seeds [0, 1]." in text
    assert "<svg" in (tmp_path / "table.svg").read_text()


def ask(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command of two tasks, in this process."""
    monkeypatch.setattr("sys.argv", ["two_tasks", *words])
    return exit_code(two_tasks.main)


@pytest.mark.integration
def test_two_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--methods=[finetune,joint]", "--seeds=[0]", f"--name={tmp_path / 'two'}"]
    words = ["split_digits", *TINY, *folders(tmp_path / "runs"), *options]
    assert ask(monkeypatch, *words) == 0
    written = rows(tmp_path / "two.md")
    assert written["method"] == ["task 1", "task 2", "average"]
    (run,) = [run for run in read_runs(tmp_path / "runs") if run.method == "finetune"]
    first, second = run.matrix[-1]
    expected = [first, second, (first + second) / 2]
    assert written["finetune"] == [f"{100 * value:.1f}" for value in expected]


@pytest.mark.integration
def test_two_tasks_of_finished_runs_need_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their records count the class groups, and refuse those that are not two."""
    words = ["split_digits", *TINY, *folders(tmp_path), "--seeds=[0]", f"--name={tmp_path / 'two'}"]
    words.append("--methods=[finetune]")
    assert ask(monkeypatch, *words) == 0
    written = (tmp_path / "two.md").read_text()
    one = [*words, "--stream.stop_after=1", f"--runs={tmp_path / 'one'}"]
    settings = [word for word in one[1:] if not word.startswith("--name=")]
    config, _ = parse("split_digits", [*two_tasks.DEFAULTS, *settings])
    complete("two_tasks_split_digits", config)

    def gone(*_: object) -> None:
        raise UserError("There are no images.")

    monkeypatch.setattr(two_tasks, "open_stream", gone)
    monkeypatch.setattr(streams, "open_stream", gone)
    (tmp_path / "two.md").unlink()
    assert ask(monkeypatch, *words) == 0
    assert (tmp_path / "two.md").read_text() == written
    capsys.readouterr()
    assert ask(monkeypatch, *one) == 2
    assert "which leaves one class group of split_digits" in capsys.readouterr().err
    assert ask(monkeypatch, *words, "--seeds=[0,1]") == 2  # the second is to be learned
    assert "There are no images." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "blamed"),
    [
        (
            "--stream.protocol=b0-2",
            "makes 5 class groups of split_digits: choose one that makes two",
        ),
        ("--stream.stop_after=1", "stream.stop_after is 1, which leaves one class group of"),
    ],
)
def test_two_tasks_are_two(
    setting: str,
    blamed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ask(monkeypatch, "split_digits", *folders(tmp_path), setting) == 2
    said = capsys.readouterr().err
    assert blamed in said
    assert said.count("\n") == 1


@pytest.mark.integration
@pytest.mark.parametrize("module", ["forgetting", "two_tasks"])
def test_a_place_that_cannot_be_written_is_said_before_computing(
    module: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    words = ["split_digits", *TINY, *folders(tmp_path / "runs"), "--methods=[finetune]"]
    result = command(f"experiments.{module}", *words, f"--name={tmp_path}/file/in", "--seeds=[0]")
    assert result.returncode == 2
    assert f"{tmp_path}/file cannot be written" in result.stderr
    assert "choose another folder with --name." in result.stderr
    assert not list(tmp_path.rglob("progress.json"))


def test_a_table_of_another_line_is_kept(tmp_path: Path) -> None:
    result = command("experiments.forgetting", "split_digits", "--seeds=[7]", *folders(tmp_path))
    assert result.returncode == 2
    assert "split_digits.md was written by another line" in result.stderr
    assert not list(tmp_path.rglob("progress.json"))


@pytest.mark.parametrize(
    ("word", "said"),
    [("--methods=[nope]", "nope"), ("--seeds=[0,0]", "seeds")],
)
def test_a_mistake_on_the_line_is_said_before_that(
    word: str, said: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert ask(monkeypatch, "split_digits", *folders(tmp_path), word) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "another line" not in error


def test_what_decides_no_number_makes_no_other_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "RESULTS", tmp_path)
    line = "python -m experiments.two_tasks split_digits"
    (tmp_path / "two.md").write_text(f"Written by `{line} --trainer.progress=false`.\n")
    for more in ("", " --fresh", " --trainer.accelerator=cpu"):
        assert asking.place_of(None, "two", line + more) == tmp_path / "two"
    for name in (None, ""):
        with pytest.raises(UserError, match="written by another line"):
            asking.place_of(name, "two", f"{line} --seeds=[7]")


def test_the_list_of_a_hundred_classes_is_that_of_the_tables() -> None:
    listed = (image_folder.LISTS / image_folder.NAMED["tiny_imagenet100"]).read_bytes()
    said = f"sha256 of the list {hashlib.sha256(listed).hexdigest()[:16]};"
    tables = [*(ROOT / "experiments" / "results").glob("split_tiny_imagenet100*.md")]
    assert tables
    for table in tables:
        assert said in table.read_text(), table.name


@pytest.mark.parametrize("name", ["forgetting", "two_tasks", "sample_quality"])
def test_help_teaches(name: str) -> None:
    result = command(f"experiments.{name}", "--help")
    assert result.returncode == 0
    assert "experiments/results" in result.stdout
