"""The table at the end: few enough columns to be read, and every cost in the CSV beside it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cil import figures, table
from cil.errors import UserError
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


def trial(number: int, seed: int = 0, **settings: Any) -> RunView:
    """A run in a folder of its own, as a local sweep leaves it."""
    folder = Path(f"/runs/sweeps/s/trial{number}/e/ewc/seed{seed}")
    return replace(view("ewc"), folder=folder, seed=seed, config={"seed": seed, **settings})


POOLING: list[Callable[[list[RunView]], Any]] = [
    table.frame,
    table.over_seeds,
    figures.forgetting_curves,
    figures.forgetting_bars,
    lambda runs: figures.over_experiences(runs, "samples/drift"),
]


def refused(pool: Callable[[list[RunView]], Any], runs: list[RunView]) -> str:
    with pytest.raises(UserError) as caught:
        pool(runs)
    return str(caught.value)


@pytest.mark.parametrize("pool", POOLING)
def test_runs_of_two_settings_are_no_seeds_of_one(pool) -> None:
    slow, fast = (trial(i, seed=i, discriminative={"lr": lr}) for i, lr in enumerate([0.001, 0.01]))
    assert refused(pool, [slow, fast]) == (
        "The runs of ewc differ in discriminative.lr, which is 0.001 in "
        "/runs/sweeps/s/trial0/e/ewc/seed0 and 0.01 in /runs/sweeps/s/trial1/e/ewc/seed1: name a "
        "folder that holds one of the two, such as /runs/sweeps/s/trial0."
    )


@pytest.mark.parametrize("pool", POOLING)
def test_no_run_counts_twice(pool) -> None:
    assert refused(pool, [trial(0), trial(1)]) == (
        "Two runs are of ewc with seed 0, in /runs/sweeps/s/trial0/e/ewc/seed0 and in "
        "/runs/sweeps/s/trial1/e/ewc/seed0: name a folder that holds one of the two, such as "
        "/runs/sweeps/s/trial0."
    )
    said = "The run in /runs/sweeps/s/trial0/e/ewc/seed0 is given twice: give it once."
    assert refused(pool, 2 * [trial(0)]) == said


@pytest.mark.parametrize("pool", POOLING)
def test_runs_of_several_experiments_are_led_to_the_folder_of_one(pool) -> None:
    other = replace(trial(1, seed=1), experiment="f")
    assert refused(pool, [trial(0), other]) == (
        "These runs are of the experiments e, f: name the place of one, such as "
        "/runs/sweeps/s/trial0/e."
    )


def test_other_images_under_the_same_settings_are_another_stream() -> None:
    other = trial(1, seed=1)
    other = replace(other, stream={**other.stream, "fingerprint": "g"})
    assert "differ in stream_fingerprint" in refused(table.frame, [trial(0), other])


def test_seeds_and_where_the_images_lay_may_differ() -> None:
    roots = enumerate(["/a", "/b"])
    runs = [trial(i, seed=i, stream={"root": root}, seeds=[i]) for i, root in roots]
    assert table.frame(runs).loc["ewc*", "last"] == "50.0±0.0"
    assert table.over_seeds(runs).loc["ewc", ("last_accuracy", "count")] == 2


@pytest.mark.parametrize("pool", POOLING)
def test_there_must_be_runs(pool) -> None:
    assert "There are no runs" in refused(pool, [])
