"""Methods and streams that are not cil's: the README's examples, run as they stand."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from finished import finish

from cil import own
from cil.errors import UserError
from cil.records import read_run
from cil.streams.stream import Stream

ROOT = Path(__file__).parent.parent
QUICK = ["--discriminative.epochs=1", "--discriminative.backbone_epochs=1", "--wandb.mode=disabled"]


def example(heading: str) -> str:
    """The code in the README's section of this heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The examples learn little, and leave what they make in a folder of the test."""
    real = own.run

    def run(*arguments, overrides=(), **options):
        places = [f"--runs={tmp_path / 'runs'}", f"--cache={tmp_path / 'cache'}"]
        return real(*arguments, overrides=[*QUICK, *places, *overrides], **options)

    monkeypatch.setattr(own, "run", run)
    return tmp_path / "runs"


@pytest.mark.integration
def test_the_method_of_the_readme(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = example("A method of your own")
    assert len(code.splitlines()) < 40
    scope: dict = {}
    exec(code, scope)
    shown = capsys.readouterr().out
    assert "PixelMeans" in shown
    assert "finetune" in shown
    run = read_run((quick / "split_digits" / "PixelMeans" / "seed0").resolve())
    assert run.summary["last_accuracy"] > 0.85
    learned: list[int] = []
    learn = scope["PixelMeans"].learn
    scope["PixelMeans"].learn = lambda self, e, log: learned.append(e.index) or learn(self, e, log)
    (again,) = own.run("split_digits", [scope["PixelMeans"]])
    assert learned == []  # what is finished is shown and not learned again
    assert again.summary == run.summary


@pytest.mark.integration
def test_the_stream_of_the_readme(quick: Path) -> None:
    code = example("A stream of your own")
    assert len(code.splitlines()) < 40
    exec(code, {})
    run = read_run((quick / "turned_digits" / "replay" / "seed0").resolve())
    assert [len(labels) for labels in run.stream["experiences"]] == [10, 5, 5]
    assert run.config["stream"]["source"] == run.stream["fingerprint"]


def test_the_figures_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method, kept in (("var-adapter", 0.9), ("finetune", 0.1)):
        finish(tmp_path / "runs" / "split_digits" / method / "seed0", kept)
    monkeypatch.chdir(tmp_path)
    exec(example("What a run leaves to look at"), {})
    assert "var-adapter" in (tmp_path / "curves.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("methods", "overrides", "sentence"),
    [
        (["replai"], [], "There is no method 'replai': did you mean replay?"),
        (["replay"], ["--trainer.devices=2"], "works on one device"),
        (["replay"], ["--seeds=[1,1]"], "each once"),
        ([], [], "name at least one"),
        (["discriminative", "var"], ["--trainer.devices=2"], "works on one device"),
    ],
)
def test_bad_input(
    methods: list[str], overrides: list[str], sentence: str, tiny_stream: Stream, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        own.run("mine", methods, tiny_stream, overrides=[*overrides, f"--runs={tmp_path}"])


def test_a_set_of_methods_is_each_of_them(
    tiny_stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[str] = []

    def noted(make, wanted, *_) -> None:
        met.append(wanted["method"])
        raise UserError("far enough")

    monkeypatch.setattr(own, "learn_recorded", noted)
    with pytest.raises(UserError, match="far enough"):
        own.run("mine", ["discriminative"], tiny_stream, overrides=[f"--runs={tmp_path}"])
    assert met == ["finetune"]


def test_a_name_of_cil_s_is_taken(tiny_stream: Stream, tmp_path: Path) -> None:
    def replay(stream: Stream) -> Callable:
        raise AssertionError("it must not be made")

    with pytest.raises(UserError, match="cil has a method replay already"):
        own.run("mine", [replay], tiny_stream, overrides=[f"--runs={tmp_path}"])
