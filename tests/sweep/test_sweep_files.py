"""The shipped sweeps: W&B takes them, our parser takes what W&B makes of them, and its agent runs.

W&B's own library proposes, its own agent expands the command and starts it; only the server, which
would pass on the one to the other, is not there.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sweeps
import yaml
from tiny import TINY
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.wandb_agent import Agent

from cil.command_line import parse
from cil.methods.registry import check_names
from cil.methods.var_parts import check_settings
from cil.records import read_runs
from cil.sweep.definition import read
from cil.sweep.proposals import grid_size, propose

FOLDER = Path(__file__).parents[2] / "configs" / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))
EXPANDED = ["/usr/bin/env", "python", "-m", "cil.run", "split_digits"]


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def proposed(sweep: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What W&B would have an agent run: parameter -> {"value": ...}."""
    return [run.config for run in sweeps.next_runs(sweep, [], validate=True, n=count) if run]


def expanded(sweep: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The command line of a trial, as the agent puts it together."""
    parts = create_sweep_command_args({"args": config})
    parts |= {"env": EXPANDED[:1], "interpreter": EXPANDED[1:2]}
    words = create_sweep_command(list(sweep["command"]))
    return [w for word in words for w in parts.get(word.removeprefix("${")[:-1], [word])]


def test_the_four_are_shipped() -> None:
    assert {path.stem for path in FILES} == {
        *("forgetting", "adapter_rank", "var_lr_bayes", "schedules")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_a_sweep_by_the_schema_of_wandb(path: Path) -> None:
    sweep = content(path)
    assert sweeps.schema_violations_from_proposed_config(sweep) == []
    broken = sweep | {"early_stopping": 1}
    assert sweeps.schema_violations_from_proposed_config(broken) != []
    assert Path(FOLDER.parents[1], sweep["program"]).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_wandb_proposes_is_understood(path: Path) -> None:
    sweep, ours = content(path), read(path)
    configs = proposed(sweep, 200 if ours.method == "grid" else 5)
    if ours.method == "grid":
        own = [propose(ours, [({}, None)] * k) or {} for k in range(grid_size(ours))]
        theirs = [{name: given["value"] for name, given in c.items()} for c in configs]
        assert sorted(str(sorted(c.items())) for c in own) == sorted(
            str(sorted(c.items())) for c in theirs
        )
        configs = [config for config in configs if config["seeds"]["value"] == 0]
    fitting: Any = SimpleNamespace(name="digits", image_size=16, augment=str)
    for config in configs:
        words = expanded(sweep, config)
        assert words[:5] == EXPANDED
        parsed, fresh = parse("split_digits", words[5:])
        assert not fresh
        assert isinstance(parsed.methods, str)  # one method and one seed are one W&B run
        assert isinstance(parsed.seeds, int)
        check_names([parsed.methods])
        check_settings(fitting, parsed.tokenizer, parsed.var)
        for name, given in config.items():
            section, _, key = name.rpartition(".")
            value = getattr(getattr(parsed, section) if section else parsed, key)
            assert value == given["value"]


def test_what_settings_are_chosen_by_is_no_test_image() -> None:
    evaluated = {path.stem: content(path)["parameters"]["stream.evaluate"] for path in FILES}
    chosen = {name for name, given in evaluated.items() if given == {"value": "validation"}}
    assert chosen == {"adapter_rank", "var_lr_bayes"}
    assert evaluated["forgetting"] == evaluated["schedules"] == {"value": "test"}


@pytest.mark.skipif(
    version("sweeps") < "0.3",
    reason="it counts otherwise than the server: pip install --no-deps 'sweeps>=0.3'",
)
def test_early_termination_ends_what_falls_behind_and_nothing_else() -> None:
    """By W&B's own rule, of runs whose accuracies fall as those of class-incremental ones do."""
    sweep = content(FOLDER / "var_lr_bayes.yaml")
    name = sweep["metric"]["name"]

    def run(label: str, accuracies: list[float], state: sweeps.RunState) -> sweeps.SweepRun:
        sums = [sum(accuracies[: t + 1]) / 3 for t in range(len(accuracies))]
        history = [{"step": 3}, *({name: value} for value in sums)]
        return sweeps.SweepRun(name=label, sampledHistory=history, state=state)  # the server's word

    done = [run(f"done{k}", [1.0, 0.9 - k / 50, 0.8], sweeps.RunState.finished) for k in range(4)]
    behind = run("behind", [1.0, 0.3], sweeps.RunState.running)
    ahead = run("ahead", [0.99, 0.95], sweeps.RunState.running)
    early = run("early", [0.5], sweeps.RunState.running)
    assert sweeps.stop_runs(sweep, [*done, behind, ahead, early], validate=True) == [behind]
    assert done[0].metric_extremum(name, "maximum") == pytest.approx(2.7 / 3)  # the last value


@pytest.mark.integration
def test_an_agent_runs_two_trials_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them in os.environ
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep7")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    monkeypatch.chdir(tmp_path)
    sweep = content(FOLDER / "forgetting.yaml")
    short = [*TINY[:-1], "--stream.stop_after=2", "--cache=cache", "--wandb.mode=offline"]
    agent = Agent(api=None, queue=None)
    agent._sweep_command = [*sweep["command"][:-1], *short, sweep["command"][-1]]
    quick = [c for c in proposed(sweep, 100) if c["methods"]["value"] == "finetune"]
    trials = dict(zip(("run1", "run2"), quick[:2], strict=True))
    for name, config in trials.items():
        agent._command_run({"run_id": name, "args": config, "program": sweep["program"]})
    assert [trial.wait(240) for trial in agent._run_processes.values()] == [0, 0]

    for name, config in trials.items():
        (view,) = read_runs(tmp_path / "runs" / "sweeps" / "sweep7" / name)
        assert view.experiment == "split_digits"
        assert view.method == config["methods"]["value"]
        assert view.seed == config["seeds"]["value"]
        (kept,) = view.folder.glob("wandb/offline-run-*")
        assert kept.name.endswith(f"-{name}")  # the W&B run of the server's, no other one
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(kept)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records = [json.loads(row) for row in told.splitlines()]
        (run,) = [r["run"] for r in records if r["type"] == "run"]
        assert (run["run_id"], run["run_group"]) == (name, "sweep7")
        assert run["sweep_id"] == "sweep7"
        summary: dict[str, Any] = {}
        for record in records:
            summary |= record.get("summary", {}).get("update", {})
        assert summary[sweep["metric"]["name"]] == view.summary["last_accuracy"]
        last = view.summary["average_incremental_accuracy"]
        assert summary["cl/accumulated_accuracy"] == pytest.approx(last)
