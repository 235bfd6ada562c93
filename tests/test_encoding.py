"""experiments/encoding.py: how fast images become tokens, compared with its parts."""

import csv
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY

from cil import run
from cil.command_line import parse
from cil.config import StreamConfig
from cil.streams import open_stream
from experiments import encoding


@pytest.mark.parametrize("workers", [0, 1])
def test_encoding_stands_beside_its_parts(
    workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["encoding", "split_digits", *TINY, f"--results={tmp_path}", f"--cache={tmp_path}"]
    words += ["--trainer.accelerator=cpu", f"--trainer.workers={workers}", "--var.views=2"]
    monkeypatch.setattr(sys, "argv", [*words, "--rounds=1"])
    assert run.exit_code(encoding.main) == 0
    assert "slower part" in capsys.readouterr().out
    (path,) = tmp_path.glob("encoding-split_digits-16px-*.csv")
    with path.open() as file:
        (row,) = csv.DictReader(file)
    stream = open_stream(StreamConfig())
    assert int(row["images"]) == 2 * len(stream.experiences[0].train)  # type: ignore[arg-type]
    assert int(row["processes"]) == workers
    rates = {part: float(row[part]) for part in encoding.PARTS}
    assert row["slower_part"] == min(("loading", "tokenizer"), key=rates.__getitem__)
    assert float(row["share"]) == pytest.approx(rates["both"] / rates[row["slower_part"]])
    assert not list(tmp_path.glob("tokens/*"))  # what was only timed is kept for no run


def test_what_a_first_time_costs_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = set()

    def part(name: str) -> None:
        if name not in began:
            time.sleep(0.5)
        began.update({name, "both"})  # which does what the others do

    parts = {name: lambda seed, name=name: part(name) for name in encoding.PARTS}
    monkeypatch.setattr(encoding, "jobs", lambda *_: parts)
    config, _ = parse("split_digits", TINY)
    row = encoding.measured(config, open_stream(config.stream), 1, str(tmp_path))
    for name in encoding.PARTS:
        assert row["images"] / row[name] < 0.25  # type: ignore[operator]  # seconds


def test_a_place_that_cannot_be_written_is_said_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError

    (tmp_path / "file").touch()
    monkeypatch.setattr(encoding, "measured", unexpected)
    monkeypatch.setattr(sys, "argv", ["encoding", "split_digits", f"--results={tmp_path}/file/in"])
    assert run.exit_code(encoding.main) == 2
    assert "choose another folder with --results." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "said"), [("--rounds=0", "--rounds is 0"), ("--var.view=2", "did you mean --var.views")]
)
def test_what_it_refuses(
    bad: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["encoding", "split_digits", bad])
    assert run.exit_code(encoding.main) == 2
    assert said in capsys.readouterr().err
