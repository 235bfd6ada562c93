"""Settings are chosen on held-out images of the first experiences, recorded, and taken by a run."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_configs import unexplained
from tiny import TINY, folders

from cil import run
from cil.command_line import parse
from cil.config import Config, StreamConfig
from cil.errors import UserError
from cil.methods.recipes import RECIPES
from cil.methods.registry import KINDS, NAMES, check_tuned, expand, settings
from cil.records import read_runs, write_bytes
from cil.streams import open_stream
from experiments import tune

ROOT = Path(__file__).parent.parent
GRID = """
finetune:
  discriminative.lr: [1.0e-6, 5.0e-3]
ncm:
  discriminative.backbone_epochs: [1, 2]
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return path


def command(tmp_path: Path, grid: Path, *arguments: str) -> list[str]:
    return ["split_digits", f"--grid={grid}", *TINY, *folders(tmp_path / "runs"), *arguments]


# --- the command ---


@pytest.mark.integration
def test_the_better_setting_is_picked_recorded_and_run(tmp_path, grid, capsys) -> None:
    line = command(tmp_path, grid, "--methods=[finetune,ncm]", "--discriminative.epochs=2")
    assert tune.main(line) == 0
    folder = tmp_path / "runs" / "split_digits-tuning"
    runs = {(view.method, view.experiment): view for view in read_runs(folder)}
    assert set(runs) == {
        *(("finetune", f"lr={lr}") for lr in (1e-06, 0.005)),
        *(("ncm", f"backbone_epochs={n}") for n in (1, 2)),
    }
    stream = open_stream(StreamConfig(), tmp_path)
    for view in runs.values():  # two experiences, and their held-out training images
        assert view.sizes == [len(e.validation) for e in stream.experiences[:2]]
        assert view.stream["evaluated_on"] == "validation"
        assert view.config["stream"]["stop_after"] == 2
    best = runs["finetune", "lr=0.005"]
    assert best.summary["last_accuracy"] > runs["finetune", "lr=1e-06"].summary["last_accuracy"]
    picks = yaml.safe_load((folder / "tuned.yaml").read_text())["tuned"]
    assert picks["finetune"] == {"discriminative.lr": 0.005}
    printed = capsys.readouterr().out
    assert "lr=0.005" in printed
    assert "tuned.yaml" in printed

    # The same line trains nothing again; another method's pick stays beside it.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("progress.json")}
    (folder / "tuned.yaml").write_text(yaml.safe_dump({"tuned": picks | {"joint": {}}}))
    assert tune.main(line) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("progress.json")}
    assert set(yaml.safe_load((folder / "tuned.yaml").read_text())["tuned"]) == {*picks, "joint"}

    final = ["split_digits", *TINY, *folders(tmp_path / "runs"), "--methods=finetune"]
    assert run.main([*final, f"--config={folder / 'tuned.yaml'}", "--stream.stop_after=1"]) == 0
    (view,) = read_runs(tmp_path / "runs" / "split_digits")
    assert view.config["discriminative"]["lr"] == 0.005
    assert view.stream["evaluated_on"] == "test"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (GRID, ["--methods=joint"], "no settings for joint"),
        (GRID, ["--methods=jont"], "no method 'jont': did you mean joint?"),
        ("finetune:\n  discriminative.lr: 1", ["--methods=finetune"], "a list of values each"),
        ("finetune:\n  1: [1]", ["--methods=finetune"], "a list of values each"),
        ("3:\n  discriminative.lr: [1]", ["--methods=finetune"], "a list of values each"),
        ("", ["--methods=finetune"], "a list of values each"),
        ("finetune:", ["--methods=finetune"], "a list of values each"),
        ("finetune: 3", ["--methods=finetune"], "a list of values each"),
        (GRID, ["--methods=generative"], "none of the methods: it has them for finetune, ncm"),
        ("finetune:\n  discriminative.rl: [1]", ["--methods=finetune"], "discriminative.rl"),
        ("finetune:\n  seeds: [1]", ["--methods=finetune"], "seeds, which is none of a method"),
        (GRID, ["--methods=finetune", "--experiences=9"], "stop_after is 9"),
        (
            "finetune:\n  discriminative.lr: [0.005, -1]",
            ["--methods=finetune"],
            "discriminative.lr is -1.0: give it above 0",
        ),
        (
            GRID + "replay:\n  discriminative.stored_images: [500, 9]",
            ["--methods=[finetune,replay]"],
            "stored_images is 9, too few for replay",
        ),
        (
            GRID,
            ["--methods=[ncm,finetune]", "--discriminative.lr=0.5"],
            "tries values of discriminative.lr for finetune: take --discriminative.lr off the line",
        ),
        (
            GRID,
            ["--methods=[finetune]", "--discriminative.lr", "0.5"],
            "tries values of discriminative.lr for finetune",
        ),
        (
            GRID,
            ["--methods=[finetune]", "--stream.evaluate=test"],
            "judged by held-out images of the first experiences alone: take --stream.evaluate",
        ),
        (GRID, ["--methods=[finetune]", "--stream.stop_after=4"], "--experiences=N says how many"),
    ],
)
def test_mistakes_end_in_one_sentence(content, arguments, message, tmp_path, grid, capsys) -> None:
    grid.write_text(content)
    assert tune.main(command(tmp_path, grid, *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("**/progress.json"))


def test_the_line_may_set_what_the_grid_does_not_try(tmp_path: Path) -> None:
    config, _ = parse("split_digits", ["--methods=[ncm]"])
    grid = {"ncm": {"discriminative.backbone_epochs": [1]}, "ewc": {"discriminative.lr": [1.0]}}
    trials = tune.trials_of(config, grid)
    tune.check_given(["--discriminative.lr=0.5"], trials)


@pytest.mark.integration
def test_trials_learn_with_what_is_tuned_beside_the_grid(tmp_path, grid) -> None:
    """As the run will that takes the pick; a number is one as in every other file."""
    grid.write_text("lwf: {discriminative.lr: [1e-3]}\n")
    own = "--tuned={lwf: {discriminative.lr: 0.5, discriminative.lwf_alpha: 7.0}}"
    assert tune.main(command(tmp_path, grid, "--methods=[lwf]", own)) == 0
    (view,) = read_runs(tmp_path / "runs")
    tried = view.config["discriminative"]
    assert (tried["lr"], tried["lwf_alpha"]) == (0.001, 7.0)

    # Another method's trials come beside these.
    grid.write_text("finetune: {discriminative.lr: [1e-3]}\n")
    assert tune.main(command(tmp_path, grid, "--methods=[finetune]")) == 0
    table = pd.read_csv(tmp_path / "runs" / "split_digits-tuning" / "trials.csv")
    assert table["method"].tolist() == ["lwf", "finetune"]
    assert table["picked"].all()


@pytest.mark.parametrize("content", [b"", b"\x9f\x00\xc3", b"x,y\n1,2\n"])
def test_a_table_that_is_none_is_not_written_over(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trials.csv"
    path.write_bytes(content)
    trials = pd.DataFrame([{"method": "lwf", "picked": True}])
    with pytest.raises(UserError, match="holds no trials: move it away"):
        tune.write_trials(path, trials)
    assert path.read_bytes() == content


@pytest.mark.integration
def test_a_trial_that_diverges_is_the_worst_and_the_others_go_on(tmp_path, grid, capsys) -> None:
    tried = {"discriminative.lr": [1e30, 5e-3]}
    grid.write_text(yaml.safe_dump({"ewc": {"discriminative.lr": [1e30]}, "finetune": tried}))
    line = command(tmp_path, grid, "--methods=[ewc,finetune]")
    folder = tmp_path / "runs" / "split_digits-tuning"
    tables = []
    for _ in range(2):  # the same line says the same
        assert tune.main(line) == 0
        said = capsys.readouterr()
        for method in ("ewc", "finetune"):
            expected = f"{method} with lr=1e+30 counts as the worst: {method} experience 1/2 div"
            assert expected in said.err
        assert "nothing is picked for ewc: every trial diverged" in said.err
        tables.append((folder / "trials.csv").read_text())
        assert "diverged" in said.out
    assert tables[0] == tables[1]
    table = pd.read_csv(folder / "trials.csv")
    assert table["diverged"].tolist() == [True, True, False]
    assert table["picked"].tolist() == [False, False, True]
    assert table["last_accuracy"].tolist()[:2] == [0, 0]
    picks = yaml.safe_load((folder / "tuned.yaml").read_text())["tuned"]
    assert picks == {"finetune": {"discriminative.lr": 5e-3}}


def test_no_grid_is_one_sentence(tmp_path, capsys) -> None:
    assert tune.main(command(tmp_path, tmp_path / "none.yaml")) == 2
    assert "There is no grid" in capsys.readouterr().err


def test_at_a_tie_the_average_decides_and_then_the_order() -> None:
    columns = ["last_accuracy", "average_incremental_accuracy"]
    rows = [(0.9, 0.9), (0.95, 0.9), (0.95, 0.97), (0.95, 0.97)]
    import pandas as pd

    assert tune._best(pd.DataFrame(rows, columns=columns)) == 2


# --- what it builds on ---


def test_the_grid_has_settings_for_every_method_and_begins_with_the_defaults() -> None:
    path = tune.GRIDS / "split_digits.yaml"
    grid = tune.read_grid(path)
    assert set(grid) == {"var-adapter", *RECIPES}
    assert unexplained(path.read_text()) == []
    config, _ = parse("split_digits", [])
    for name in grid:
        first = next(tune.combinations(name, grid))
        before = settings(name, replace(config, tuned={}), 0)  # what was picked is laid over that
        assert settings(name, replace(config, tuned={name: first}), 0) == before


def test_tuned_settings_are_one_methods_alone() -> None:
    config = Config(tuned={"ewc": {"discriminative.ewc_lambda": 7, "discriminative.epochs": 3}})
    own = settings("ewc", config, 0)["discriminative"]
    assert (own["ewc_lambda"], own["epochs"]) == (7.0, 3)
    assert settings("si", config, 0) == settings("si", Config(), 0)
    assert "ewc_lambda" not in settings("si", config, 0)["discriminative"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ewcc": {"discriminative.lr": 0.1}}, "no method 'ewcc': did you mean ewc?"),
        ({"ewc": {"lr": 0.1}}, "lr, which is none of a method"),
        ({"ewc": {"stream.validation": 0.5}}, "stream.validation, which is none"),
        ({"ewc": {"discriminative.epochs": 2.5}}, "epochs as 2.5, which must be int"),
        ({"ewc": {"discriminative.lr": "high"}}, "lr as high, which must be float"),
        ({"ewc": {"discriminative.optimizer": "sdg"}}, "sdg, which must be one of adam, sgd"),
        ({"diffusion": {"diffusion.size": "M"}}, "size as M, which must be one of S, B, L, XL"),
        ({"ewc": {"discriminative.lwf_alpha": 2.0}}, "lwf_alpha, which ewc does not read"),
        ({"ewc": {"var.lr": 0.1}}, "var.lr, which ewc does not read"),
        ({"var": {"diffusion.lr": 0.1}}, "diffusion.lr, which var does not read"),
        ({"var-copy": {"var.plasticity": "trunk"}}, "plasticity, which var-copy does not read"),
        ({"all": {"discriminative.lr": 0.1}}, "tuned names all, which is many methods"),
    ],
)
def test_tuned_settings_that_do_not_exist_are_refused(content, message) -> None:
    with pytest.raises(UserError, match=message):
        check_tuned(Config(tuned=content))


def test_tuned_settings_are_chosen_from_the_same_words() -> None:
    tuned = {"diffusion-copy": {"diffusion.size": "S", "tokenizer.steps": 9}}
    own = settings("diffusion-copy", Config(tuned=tuned), 0)
    assert (own["diffusion"]["size"], own["tokenizer"]["steps"]) == ("S", 9)
    check_tuned(Config(tuned={"var": {"var.plasticity": "trunk", "var.schedule": "a_varc"}}))
    check_tuned(Config(tuned={"diffusion": {"diffusion.schedule": [[4, 5], [16, 1]]}}))


def test_a_shorter_stream_on_validation_images_has_the_same_training(tmp_path) -> None:
    whole = open_stream(StreamConfig(), tmp_path)
    short = open_stream(StreamConfig(evaluate="validation", stop_after=2), tmp_path)
    assert len(short.experiences) == 2
    for ours, theirs in zip(short.experiences, whole.experiences[:2], strict=True):
        assert ours.train.indices == theirs.train.indices
        assert ours.test.base is short.splits[1]
        assert ours.test.indices == theirs.validation.indices
        assert theirs.test.base is whole.splits[2]
    assert short.fingerprint == whole.fingerprint  # tokenizers and trunks are shared
    for number in (0, 6, -1):
        with pytest.raises(UserError, match=f"stop_after is {number}.*1 to that many"):
            open_stream(StreamConfig(stop_after=number), tmp_path)


def test_all_stands_for_every_method_once() -> None:
    assert expand(["all"]) == [name for name in NAMES if name not in KINDS]
    assert expand(["joint", "all"])[0] == "joint"
    assert len(expand(["joint", "all"])) == len(NAMES) - len(KINDS)
    free = expand(["exemplar_free"])
    assert {"var-adapter", "ewc", "slda"} <= set(free)
    assert not {"replay", "joint", "cumulative", "icarl"} & set(free)


@pytest.mark.integration
def test_a_set_leaves_out_what_the_stream_cannot_run_and_says_so(tmp_path, capsys) -> None:
    """Nine images are too few for every method with a memory, and VAR's tokenizer does not fit."""
    line = ["split_digits", *TINY, *folders(tmp_path / "runs"), "--stream.stop_after=1"]
    line += ["--discriminative.stored_images=9", "--tokenizer.scales=[1,2]"]
    line += ["--discriminative.backbone_epochs=1"]
    assert run.main([*line, "--methods=all"]) == 0
    err = capsys.readouterr().err
    fitting = {n for n, r in RECIPES.items() if not r.memory}
    for name in set(NAMES) - {*KINDS} - fitting:
        assert f"left out: {name}: " in err
    assert {view.method for view in read_runs(tmp_path / "runs")} == fitting
    assert run.main([*line, "--methods=[finetune,replay]"]) == 2
    assert "stored_images is 9" in capsys.readouterr().err
    summary = tmp_path / "runs" / "split_digits" / "ewc" / "seed0" / "summary.json"
    numbers = json.loads(summary.read_text())
    assert min(numbers[k] for k in ("stored_bytes", "learning_macs", "prediction_macs")) > 0


@pytest.mark.parametrize("content", ["", "tuned: 3\n", "other: {}\n", "{"])
def test_picks_that_are_none_are_not_written_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no picks: move it away"):
        tune.write_picks(path, pd.DataFrame(), "a command")
    assert path.read_text() == content


def test_picks_of_searches_that_end_together_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.yaml"

    def slowly(path: Path, data: bytes) -> None:
        time.sleep(0.1)
        write_bytes(path, data)

    def end(method: str) -> None:
        row = {"method": method, "values": {"discriminative.lr": 0.1}, "picked": True}
        tune.write_picks(path, pd.DataFrame([row]), "a command")

    monkeypatch.setattr(tune, "write_bytes", slowly)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(end, ("ewc", "lwf", "si")))
    assert set(yaml.safe_load(path.read_text())["tuned"]) == {"ewc", "lwf", "si"}


@pytest.mark.integration
def test_processes_that_torchrun_starts_meet_once_for_all_trials(tmp_path, grid) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=2"]  # at a port that nobody else has
    asked = command(tmp_path, grid, "--methods=[ncm]", "--trainer.devices=2")
    line = [*launcher, "-m", "experiments.tune", *asked]
    ended = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    trials = pd.read_csv(tmp_path / "runs" / "split_digits-tuning" / "trials.csv")
    assert len(trials) == 2
