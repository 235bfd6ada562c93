"""A sweep without a server: it runs its trials, goes on where it stopped, and shows the best."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import TINY, folders

from cil import run as cil_run
from cil import trial
from cil.errors import UserError
from cil.records import RunRecord, read_runs
from cil.sweep.__main__ import main
from cil.sweep.metric_names import LOGGED, SUMMARY, is_known

SHORT = ["--stream.stop_after=2", "--discriminative.epochs=2"]
SWEEP: dict[str, Any] = {
    "program": "cil/run.py",
    "command": ["${env}", "${interpreter}", "-m", "cil.run", "split_digits", "${args}"],
    "method": "grid",
    "metric": {"name": "last_accuracy", "goal": "maximize"},
    "parameters": {
        "methods": {"value": "finetune"},
        "discriminative.lr": {"values": [1.0e-6, 5.0e-3]},
        "seeds": {"values": [0, 1]},
        "stream.evaluate": {"value": "validation"},
    },
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "rates.yaml"
    path.write_text(yaml.safe_dump(SWEEP | changes, sort_keys=False))
    return path


def line(file: Path, *arguments: str) -> list[str]:
    runs = folders(file.parent / "runs")
    return [str(file), "--local", *TINY, *SHORT, *runs, *arguments]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("progress.json")}


def begun(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "sweep.json").read_text())["trials"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that was interrupted in its second trial, after one experience."""
    file = written(tmp_path_factory.mktemp("sweep"))
    save, rows = RunRecord.save_evaluated, 0

    def interrupt(self: RunRecord, *arguments: Any) -> None:
        nonlocal rows
        save(self, *arguments)
        rows += 1
        if rows == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecord, "save_evaluated", interrupt)
        assert main(line(file, "--wandb.mode=offline", "--count=3")) == 130
    return file.parent


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to go on in; returns its sweep file."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    return tmp_path / "rates.yaml"


@pytest.mark.integration
def test_it_goes_on_where_it_stopped_and_shows_the_best(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped.parent / "runs" / "sweeps" / "rates"
    before = times(folder / "trial0")
    assert [(s["discriminative.lr"], s["seeds"]) for s in begun(folder)] == [(1e-6, 0), (1e-6, 1)]
    assert main(line(stopped, "--count=3")) == 0
    said = capsys.readouterr()
    assert "trial1/split_digits/finetune/seed1: going on after experience 1" in said.err
    assert times(folder / "trial0") == before
    views = {view.folder.parents[2].name: view for view in read_runs(folder)}
    assert set(views) == {"trial0", "trial1", "trial2"}
    assert [s["discriminative.lr"] for s in begun(folder)] == [1e-6, 1e-6, 5e-3]
    for name, settings in zip(("trial0", "trial1", "trial2"), begun(folder), strict=True):
        assert views[name].config["discriminative"]["lr"] == settings["discriminative.lr"]
        assert views[name].seed == settings["seeds"]
        assert views[name].stream["evaluated_on"] == "validation"

    shown = " ".join(said.out.split())  # a caption is broken into lines
    assert shown.index("0.005") < shown.index("1e-06")  # the best first
    assert "±" in shown  # of the two seeds
    assert "no test image was looked at" in shown
    best = next(row for row in said.out.splitlines() if row.startswith("best: "))
    assert "split_digits --methods=finetune --discriminative.lr=0.005" in best
    assert "--seeds" not in best
    assert "evaluate" not in best
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [float(row["metric"]) for row in rows] == [
        views[row["trial"]].summary["last_accuracy"] for row in rows
    ]

    # A finished sweep shows its table at once; the grid ends by itself.
    before = times(folder)
    assert main(line(stopped, "--count=3")) == 0
    assert times(folder) == before
    assert main(line(stopped, "--count=9")) == 0
    assert len(begun(folder)) == 4
    assert {path: times(folder)[path] for path in before} == before


@pytest.mark.integration
def test_its_trials_are_one_group_in_wandb(interrupted: Path) -> None:
    (kept,) = interrupted.rglob("trial0/**/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(kept)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(row) for row in told.splitlines()]
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert run["run_group"] == "rates"
    assert run["display_name"] == "trial0-finetune-seed0"
    assert run["tags"][:2] == ["split_digits", "finetune"]


@pytest.mark.integration
def test_another_sweep_of_the_same_name_is_refused_and_fresh_starts_over(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped.parent / "runs" / "sweeps" / "rates"
    before = times(folder)
    for extra in (["--discriminative.epochs=1"], ["--stream.validation=0.2"]):
        assert main(line(stopped, *extra)) == 2
        assert f"begun with settings.{extra[0][2:].partition('=')[0]}" in capsys.readouterr().err
    other = SWEEP["parameters"] | {"discriminative.lr": {"values": [1.0e-2]}}
    written(stopped.parent, parameters=other)
    assert main(line(stopped)) == 2
    assert "discriminative.lr.values = [1e-06, 0.005] and now it is [0.01]" in (
        capsys.readouterr().err
    )
    assert times(folder) == before
    (folder / "trials.csv").touch()  # as a finished sweep has it
    assert main(line(stopped, "--fresh", "--count=1")) == 0
    assert [settings["discriminative.lr"] for settings in begun(folder)] == [0.01]
    (view,) = read_runs(folder)
    assert view.config["discriminative"]["lr"] == 0.01


@pytest.mark.integration
def test_a_grid_goes_on_by_another_metric_and_a_bayesian_search_does_not(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped.parent / "runs" / "sweeps" / "rates"
    before = times(folder / "trial0")
    written(stopped.parent, metric={"name": "codebook_use", "goal": "maximize"})
    assert main(line(stopped, "--count=1")) == 2
    said = capsys.readouterr().err
    assert f"looks at codebook_use, which {folder / 'trial0'}" in said
    written(stopped.parent, metric={"name": "forgetting", "goal": "minimize"})
    assert main(line(stopped, "--count=1")) == 0
    assert "the minimum of forgetting" in " ".join(capsys.readouterr().out.split())
    assert times(folder / "trial0") == before
    state = json.loads((folder / "sweep.json").read_text())
    assert state["meant"]["sweep"]["metric"]["name"] == "forgetting"
    state["meant"]["sweep"]["method"] = "bayes"
    (folder / "sweep.json").write_text(json.dumps(state))
    written(stopped.parent, method="bayes")
    assert main(line(stopped, "--count=1")) == 2
    assert 'begun with sweep.metric.name = "forgetting"' in capsys.readouterr().err


@pytest.mark.integration
def test_the_numbers_that_a_sweep_may_look_at_are_those_of_runs(tmp_path: Path) -> None:
    methods = "--methods=[finetune,var-adapter,diffusion-adapter]"
    words = ["split_digits", *TINY, *folders(tmp_path / "runs"), methods, "--var.cca_steps=5"]
    assert cil_run.main([*words, "--stream.stop_after=2"]) == 0
    found: set[str] = set()
    for view in read_runs(tmp_path):
        found |= {*view.metrics()["name"]}
        found |= {key for key, value in view.summary.items() if isinstance(value, int | float)}
    assert [name for name in sorted(found) if not is_known(name)] == []
    assert {*SUMMARY, *LOGGED} - found == set()


@pytest.mark.integration
def test_trials_whose_sweep_has_lost_its_state_are_kept(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped.parent / "runs" / "sweeps" / "rates"
    before = times(folder)
    (folder / "sweep.json").unlink()
    assert main(line(stopped)) == 2
    assert f"{folder / 'sweep.json'} is missing" in capsys.readouterr().err
    assert times(folder) == before


@pytest.mark.integration
def test_a_trial_that_fails_is_named_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch of no images is refused when the method is built; the second trial has a result."""
    parameters = SWEEP["parameters"] | {
        "seeds": {"value": 0},
        "discriminative.lr": {"value": 5e-3},
        "discriminative.batch_size": {"values": [0, 64]},
    }
    file = written(tmp_path, parameters=parameters)
    assert main(line(file)) == 0
    said = capsys.readouterr()
    assert "trial0 failed: discriminative.batch_size is 0" in said.err
    assert "1 of the trials failed" in " ".join(said.out.split())
    assert main(line(file)) == 0
    assert "trial0 failed" in capsys.readouterr().err

    bad = parameters | {"discriminative.batch_size": {"values": [0, -1, -2, 64]}}
    assert main(line(written(tmp_path, parameters=bad), "--name=bad")) == 2
    said = capsys.readouterr()
    assert "3 trials of" in said.err
    assert "failed one after the other" in said.err
    assert "trial3" not in said.err


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["--discriminative.lr=1"], "tries values of discriminative.lr: take"),
        ({}, ["--discriminative.rl=1"], "no setting --discriminative.rl: did you mean"),
        ({}, ["--experiment=split_digit"], "no experiment 'split_digit': did you mean"),
        ({}, ["--count=0"], "--count is 0: give 1 or more"),
        ({}, ["--name=../rates"], "give the name of one folder"),
        ({}, ["--name=.."], "give the name of one folder"),
        ({"method": "random"}, [], "give --count=N, 1 or more"),
        ({"parameters": {"var.lrr": {"values": [1]}}}, [], "no setting --var.lrr: did you mean"),
        (
            {"parameters": {"var.plasticity": {"values": ["copy", "x"]}}},
            ["--methods=var", "--seeds=0"],
            "gives var.plasticity as x",
        ),
        ({"parameters": {"methods": {"values": ["var", "vr"]}}}, [], "no method 'vr'"),
        ({"parameters": {"seeds": {"values": [0, -1]}}}, ["--methods=var"], "seeds is [-1]"),
        ({"parameters": {"seeds": {"value": 0}}}, [], "one run, but this one would be 4"),
        ({"parameters": {"methods": {"value": "all"}}}, [], "make methods and seeds parameters"),
        (
            {"parameters": {"var.lr": {"values": [0.001, "hi"]}}},
            ["--methods=var", "--seeds=0"],
            "rates.yaml gives var.lr as hi",
        ),
        (
            {"command": [*SWEEP["command"][:-1], "--var.lr=hi", "${args}"]},
            [],
            "rates.yaml gives var.lr as hi",
        ),
        ({}, ["--var.lr=hi"], "the command line gives var.lr as hi"),
        (
            {"metric": {"name": "last_acuracy"}},
            [],
            "looks at last_acuracy, which no run has: did you mean last_accuracy?",
        ),
        ({"metric": {"name": "speed"}}, [], "looks at speed, which no run has: choose from"),
    ],
)
def test_mistakes_are_one_sentence_before_any_trial(
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(line(written(tmp_path, **changes), *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert not list(tmp_path.rglob("trial*"))


def test_without_local_it_is_wandbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(written(tmp_path))]) == 2
    assert "wandb sweep" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "--count" in capsys.readouterr().out


# --- the trial that a process runs ---


def test_a_trial_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*trial.OF_AGENT, *trial.OF_LOCAL):
        monkeypatch.delenv(name, raising=False)
    assert trial.current() is None
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")  # as `wandb agent` leaves it in a shell: no trial
    assert trial.current() is None
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert trial.current() == trial.Trial("abc", "r1", by_agent=True)
    with trial.running("rates", "trial3"):
        assert trial.current() == trial.Trial("rates", "trial3", by_agent=False)
    assert not {*trial.OF_LOCAL} & {*os.environ}
    assert trial.Trial("abc", "r1", True).folder("runs") == Path("runs/sweeps/abc/r1")


@pytest.mark.integration
def test_an_agents_trial_keeps_to_its_folder_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    monkeypatch.chdir(tmp_path)
    short = ["split_digits", *TINY, "--stream.stop_after=1", "--discriminative.epochs=1"]
    assert cil_run.main([*short, "--methods=[finetune,ewc]"]) == 2
    assert "one run, but this one would be 2" in capsys.readouterr().err
    with pytest.raises(UserError, match="of seeds: 2"):
        trial.check_single(["finetune"], [0, 1])
    assert cil_run.main([*short, "--methods=finetune"]) == 0
    monkeypatch.setenv("WANDB_RUN_ID", "r2")  # other settings would not go on in r1's folder
    assert cil_run.main([*short, "--methods=finetune", "--discriminative.lr=1.0e-4"]) == 0
    assert cil_run.main([*short, "--methods=finetune", "--runs=elsewhere"]) == 0
    assert [str(view.folder.relative_to(tmp_path)) for view in read_runs(tmp_path)] == [
        "elsewhere/split_digits/finetune/seed0",
        "runs/sweeps/abc/r1/split_digits/finetune/seed0",
        "runs/sweeps/abc/r2/split_digits/finetune/seed0",
    ]
