"""The table at the end: few enough columns to be read, and every cost in the CSV beside it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cil import table
from cil.records import RunView
from cil.records.layout import NUMBERS

SUMMARY = {
    "last_accuracy": 0.5,
    "average_incremental_accuracy": 0.75,
    "forgetting": 0.25,
    "backward_transfer": -0.25,
    "training_seconds": 12.0,
    "milliseconds_an_image": 0.5,
    "parameters": 56_554,
    "stored_images": 0,
    "stored_bytes": 0,
    "learning_macs": 6.3e13,
    "prediction_macs": 903_808.0,
    "likelihood_evaluations": 0.0,
    "pretrained_on": "nothing",
}


def view(method: str, evaluated_on: str = "test", **changes: float) -> RunView:
    stream = {"name": "digits", "class_names": ["0", "1"], "fingerprint": "f"}
    return RunView(
        folder=Path("x"),
        experiment="e",
        method=method,
        seed=0,
        config={},
        stream={**stream, "evaluated_on": evaluated_on},
        environment={"commit": "c", "device": "d"},
        summary={**SUMMARY, **changes},
        matrix=np.array([[1.0, np.nan], [0.5, 0.5]]),
        sizes=[10, 10],
    )


@pytest.fixture
def views() -> list[RunView]:
    return [view("ewc"), view("replay", stored_images=200, stored_bytes=51_200)]


def rows(path: Path) -> list[list[str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_budgets_stand_beside_the_accuracies(views, tmp_path) -> None:
    table.publish(views, tmp_path / "t", "command")
    heading, _, ewc, replay = rows(tmp_path / "t.md")
    assert len(heading) <= 11
    shown = dict(zip(heading, replay, strict=True))
    assert shown["last"] == "50.0"
    assert (shown["MACs"], shown["MACs/img"]) == ("63.00 T", "903.8 k")
    assert (shown["params"], shown["stored"], shown["bytes"]) == ("56.6 k", "200", "51.2 k")
    assert shown["train s"] == "12"
    assert [ewc[0], replay[0]] == ["ewc*", "replay"]  # marked: it stores no image
    assert "*: none, exemplar-free" in (tmp_path / "t.md").read_text()
    every = pd.read_csv(tmp_path / "t.csv")
    assert {*SUMMARY} <= {*every.columns}


def test_a_name_with_a_dot_is_kept_whole(views, tmp_path) -> None:
    for name in ("digits_0.1", "digits_0.2"):
        table.publish(views, tmp_path / name, "command")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"digits_0.{n}.{kind}" for n in (1, 2) for kind in ("csv", "md", "svg")}


def test_the_reader_asks_of_every_run_what_the_table_needs() -> None:
    assert {*NUMBERS} == {*table.PERCENT, *table.COSTS}


def test_every_column_fits_a_log_file(views, tmp_path, capsys) -> None:
    table.report("e", [*views, view("var-embedding", learning_macs=1.2e17)], tmp_path)
    out = capsys.readouterr().out
    assert "120.00 P" in out
    assert "…" not in out.partition("records and figures")[0]


def test_what_was_not_judged_on_test_images_says_so(views, tmp_path, capsys) -> None:
    table.report("e", views, tmp_path)
    assert "held-out" not in capsys.readouterr().out
    table.report("e", [view("ewc", evaluated_on="validation")], tmp_path)
    assert "evaluated on held-out training images" in capsys.readouterr().out
