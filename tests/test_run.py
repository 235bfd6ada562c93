"""The whole command on tiny settings: what it leaves, how it goes on, and what it refuses."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import written
import yaml
from tiny import TINY, folders

from cil import learning, metrics, run
from cil.config import TrainerConfig
from cil.errors import UserError
from cil.records import read_run, read_runs

METHODS = ("var", "finetune", "replay", "joint")


def line(runs: Path, *arguments: str) -> list[str]:
    return ["split_digits", *TINY, *folders(runs), *arguments]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one sentence with which the command refuses these arguments."""
    assert run.main(arguments) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert all(said.startswith("opening the stream") or "going on" in said for said in before)
    assert error.startswith("error: ")
    assert error.endswith((".", "?"))
    return error.removeprefix("error: ")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of one whole command. Read it only, or work on a copy."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    assert run.main(line(runs)) == 0
    return runs


@pytest.fixture
def copied(ran: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ran, tmp_path / "runs"))


# --- a whole command ---


@pytest.mark.integration
@pytest.mark.parametrize("name", ["var", "replay"])
def test_a_finished_run_gives_back_its_method(ran: Path, name: str) -> None:
    """As it was at the end: it predicts what the record says it predicted."""
    from cil.methods.registry import restore
    from cil.protocol import score_groups

    view = read_run(ran / "split_digits" / name / "seed0")
    trainer = TrainerConfig(accelerator="cpu", progress=False)
    method, stream = restore(view, trainer, ran / "cache")
    results = score_groups(method, stream.experiences, trainer)
    found = [int(c) for scores, _ in results for c in scores.argmax(1)]
    assert found == view.predictions()["prediction"].tolist()


@pytest.mark.integration
@pytest.mark.parametrize("change", [{"renamed": 1}, {"width": 32}])
def test_a_run_of_another_version_is_refused(ran: Path, change: dict[str, int]) -> None:
    from cil.methods.registry import restore

    view = read_run(ran / "split_digits" / "var" / "seed0")
    config = view.config | {"var": view.config["var"] | change}
    trainer = TrainerConfig(accelerator="cpu", progress=False)
    with pytest.raises(UserError, match="another version"):
        restore(replace(view, config=config), trainer, ran / "cache")


@pytest.mark.integration
@pytest.mark.parametrize("end", [torch.OutOfMemoryError, RuntimeError])
def test_a_machine_too_small_is_no_other_version(
    ran: Path, end: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cil.methods.registry import restore
    from cil.methods.var import VARMethod

    def too_large(*_: Any) -> None:
        raise end("out of memory")

    monkeypatch.setattr(VARMethod, "load_state", too_large)
    view = read_run(ran / "split_digits" / "var" / "seed0")
    with pytest.raises(end, match="out of memory"):
        restore(view, TrainerConfig(accelerator="cpu", progress=False), ran / "cache")


@pytest.mark.integration
def test_restoring_keeps_to_the_cache_it_is_given(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cil.methods.registry import restore

    view = read_run(ran / "split_digits" / "var" / "seed0")
    config = view.config | {"stream": view.config["stream"] | {"source": "mnist"}}
    written.mnist(tmp_path / "cache" / "torchvision")
    monkeypatch.chdir(tmp_path / "cache")
    trainer = TrainerConfig(accelerator="cpu", progress=False)
    with pytest.raises(UserError, match="images of mnist are not those"):  # read, and told apart
        restore(replace(view, config=config), trainer, tmp_path / "cache")


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_in_130(end: type[BaseException]) -> None:
    """Also where Lightning has made an exit of it; another exit stays what it is."""

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise end from None

    assert run.exit_code(interrupted) == 130
    with pytest.raises(SystemExit):
        run.exit_code(sys.exit)


@pytest.mark.parametrize("option", ["--devices=0", "--images=0", "--classes=0", "--batch_size=0"])
def test_scaling_refuses_nothing_to_measure(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import scaling

    monkeypatch.setattr(sys, "argv", ["scaling", option])
    assert run.exit_code(scaling.main) == 2
    assert "must be 1 or more" in capsys.readouterr().err


@pytest.mark.integration
def test_efficiency_compares_the_schedules_of_a_finished_run(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import efficiency

    # Two groups: one forward an image and class would take half a minute with ten classes.
    assert run.main(line(tmp_path / "runs", "--methods=[var]", "--stream.stop_after=2")) == 0
    place = tmp_path / "runs" / "split_digits" / "var" / "seed0"
    options = ["--rounds=1", "--accelerator=cpu", f"--results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["efficiency", str(place), *options])
    assert run.exit_code(efficiency.main) == 0
    (path,) = tmp_path.glob("efficiency-split_digits-var-seed0-*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = [(row["variant"], row["copies"]) for row in rows]
    kinds = ("varc", "a_varc", "adaptive")
    schedules = [(kind, copies) for copies in "14" for kind in kinds]
    assert names == [("naive", "1"), *schedules, ("learning", "1")]
    assert rows[0]["accuracy"] == rows[1]["accuracy"]  # batches change nothing
    assert "--rounds=1" in rows[0]["command"]
    assert "--results" not in rows[0]["command"]
    macs = [float(row["macs"]) for row in rows]
    assert macs[1] == macs[0]
    assert macs[4] > 2 * macs[1]
    # Five steps teach nothing that could drop a class; AdaLN is projected anew for every scale.
    assert 0.2 < macs[3] / macs[0] < 1.2
    assert all(float(row["images_a_second"]) > 0 for row in rows)
    assert rows[-1]["images"] == "24"

    replay = ran / "split_digits" / "replay" / "seed0"
    monkeypatch.setattr(sys, "argv", ["efficiency", str(replay), *options])
    assert run.exit_code(efficiency.main) == 2
    assert "is no run of a var method" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["efficiency", str(place), *options, "--rounds=0"])
    assert run.exit_code(efficiency.main) == 2
    assert "--rounds and --batch_sizes must be 1 or more" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["efficiency", str(place), *options, "--images=3"])
    assert run.exit_code(efficiency.main) == 2
    assert "--images is for a published size alone" in capsys.readouterr().err


@pytest.mark.integration
def test_it_leaves_a_table_figures_and_a_record_of_every_method(ran: Path) -> None:
    folder = ran / "split_digits"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(METHODS)
    pictures = [folder / "forgetting_curves"]
    for name in METHODS:
        place = folder / name / "seed0"
        pictures.append(place / "figures" / "accuracy_matrix")
        for file_name in ("config.yaml", "environment.json", "stream.json", "predictions.csv"):
            assert (place / file_name).stat().st_size > 0
        assert [p.name for p in place.glob("checkpoints/*")] == ["experience4.pt"]
        assert not list(place.rglob("*.tmp"))
    for picture in pictures:
        assert picture.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in picture.with_suffix(".svg").read_text()


@pytest.mark.integration
def test_the_numbers_of_the_records_agree_with_each_other(ran: Path) -> None:
    for view in read_runs(ran):
        predictions = view.predictions()
        right = predictions["label"] == predictions["prediction"]
        assert len(predictions) == sum(view.sizes) == 450
        assert view.matrix[-1].tolist() == right.groupby(predictions["group"]).mean().tolist()
        assert view.summary["last_accuracy"] == pytest.approx(right.mean())
        expected = metrics.summarise(view.matrix, view.sizes)
        assert {key: view.summary[key] for key in expected} == expected
        logged = view.metrics()
        (last,) = logged[(logged["name"] == "cl/accuracy") & (logged["experience"] == 4)]["value"]
        assert last == pytest.approx(right.mean())
        assert set(predictions["class"].astype(str)) == set(view.stream["class_names"])


@pytest.mark.integration
def test_a_record_says_what_it_was_made_with(ran: Path) -> None:
    for name in METHODS:
        place = ran / "split_digits" / name / "seed0"
        config = yaml.safe_load((place / "config.yaml").read_text())
        section = "var" if name == "var" else "discriminative"
        assert config["method"] == name
        assert config["stream"]["order_seed"] == 1993
        assert section in config
        environment = json.loads((place / "environment.json").read_text())
        assert environment["device"].endswith("threads")  # --trainer.accelerator=cpu
        assert {"commit", "python", "versions", "command", "created"} <= environment.keys()


@pytest.mark.integration
def test_the_same_line_shows_the_table_at_once(ran: Path) -> None:
    script = (
        "import sys; from cil import run\n"
        "code = run.main(sys.argv[1:])\n"
        "assert not {'torch', 'avalanche', 'wandb'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    before = {path: path.stat().st_mtime_ns for path in ran.glob("*/*/*/*")}
    command = [sys.executable, "-c", script, *line(ran)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "forgetting_curves.png" in shown.stdout
    page = ran / "split_digits" / "report.html"
    assert f"report: {page}" in shown.stdout
    assert "4 methods, 1 seed, 4 finished runs" in page.read_text()
    first = [text.strip("│ ").partition(" ")[0].rstrip("*") for text in shown.stdout.splitlines()]
    assert [word for word in first if word in METHODS][:4] == list(METHODS)
    assert before == {path: path.stat().st_mtime_ns for path in ran.glob("*/*/*/*")}


@pytest.mark.integration
def test_other_methods_and_seeds_come_beside_what_is_there(copied: Path) -> None:
    before = (copied / "split_digits/finetune/seed0/summary.json").stat().st_mtime_ns
    assert run.main(line(copied, "--methods=finetune", "--seeds=[0,1]")) == 0
    assert (copied / "split_digits/finetune/seed0/summary.json").stat().st_mtime_ns == before
    with (copied / "split_digits" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [("finetune", "0"), ("finetune", "1")]
    assert rows[0]["last_accuracy"] != rows[1]["last_accuracy"]


@pytest.mark.integration
def test_fresh_starts_the_chosen_methods_over_and_no_others(copied: Path) -> None:
    places = {name: copied / "split_digits" / name / "seed0" for name in METHODS}
    (places["finetune"] / "predictions.csv").write_text("old")
    before = {name: (places[name] / "summary.json").stat().st_mtime_ns for name in METHODS}
    assert run.main(line(copied, "--methods=finetune", "--discriminative.lr=1e-3", "--fresh")) == 0
    after = {name: (places[name] / "summary.json").stat().st_mtime_ns for name in METHODS}
    assert [name for name in METHODS if before[name] != after[name]] == ["finetune"]
    assert (places["finetune"] / "predictions.csv").read_text() != "old"
    config = yaml.safe_load((places["finetune"] / "config.yaml").read_text())
    assert config["discriminative"]["lr"] == 1e-3


@pytest.mark.integration
def test_methods_of_changed_images_are_not_shown_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, runs = tmp_path / "pictures", tmp_path / "runs"
    written.image_folder(root, ["a", "b", "c", "d"], train=8, test=2, side=16)
    own = [f"--stream.root={root}", "--stream.image_size=16", "--stream.protocol=b0-2"]
    arguments = ["split_image_folder", *TINY, *folders(runs), *own]
    assert run.main([*arguments, "--methods=[finetune]"]) == 0
    capsys.readouterr()
    (root / "train" / "a" / "a_0.JPEG").unlink()
    sentence = refused(capsys, [*arguments, "--methods=[finetune,joint]"])
    assert "finetune/seed0 was begun on another stream (fingerprint" in sentence
    assert not (runs / "split_image_folder" / "joint").exists()
    assert run.main([*arguments, "--methods=[joint]"]) == 0
    capsys.readouterr()
    sentence = refused(capsys, [*arguments, "--methods=[finetune,joint]"])  # both are finished
    assert "joint/seed0 was begun on another stream (fingerprint" in sentence
    assert run.main([*arguments, "--methods=[finetune,joint]", "--fresh"]) == 0


@pytest.mark.parametrize("key", ["runs", "cache"])
def test_an_empty_folder_name_is_refused(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must not be empty" in refused(capsys, ["split_digits", *TINY, f"--{key}="])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--var.depth=2", ["/var/seed0", "var.depth = 1 and now it is 2", "--fresh", "--runs"]),
        ("--stream.order_seed=7", ["stream.order_seed = 1993 and now it is 7"]),
        ("--discriminative.lr=0.1", ["/finetune/seed0", "discriminative.lr"]),
    ],
)
def test_a_changed_setting_is_refused_by_its_name(
    change: str, words: list[str], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    sentence = refused(capsys, line(copied, change))
    assert all(word in sentence for word in words), sentence
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


@pytest.mark.integration
def test_settings_that_a_method_does_not_read_may_change(copied: Path) -> None:
    assert run.main(line(copied, "--methods=[finetune]", "--var.depth=2")) == 0


@pytest.mark.integration
@pytest.mark.parametrize("name", ["summary.json", "progress.json", "accuracy_matrix.csv"])
def test_a_damaged_record_of_a_finished_run(
    name: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "split_digits" / "replay" / "seed0" / name
    path.write_bytes(path.read_bytes()[:-20])
    sentence = refused(capsys, line(copied))
    assert f"replay/seed0/{name} is damaged" in sentence
    assert "--fresh" in sentence


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["progress.json", "metrics.csv", "accuracy_matrix.csv", "checkpoints/experience4.pt"]
)
def test_a_damaged_record_of_an_unfinished_run(
    name: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied / "split_digits" / "replay" / "seed0"
    (place / "summary.json").unlink()
    (place / name).write_bytes((place / name).read_bytes()[:-20])
    sentence = refused(capsys, line(copied, "--methods=[replay]"))
    assert f"replay/seed0/{name} is damaged" in sentence
    assert "--fresh" in sentence


@pytest.mark.integration
def test_wandb_holds_the_numbers_the_matrix_and_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert run.main(line(tmp_path, "--methods=[finetune]", "--wandb.mode=offline")) == 0
    (view,) = read_runs(tmp_path)
    (kept,) = view.folder.glob("wandb/offline-run-*")
    records = inspected(kept)

    (begun,) = [record["run"] for record in records if record["type"] == "run"]
    assert (begun["run_group"], begun["display_name"]) == ("split_digits", "finetune-seed0")
    assert begun["config"]["update"]["stream_fingerprint"] == view.stream["fingerprint"]
    summary: dict[str, Any] = {}
    for record in records:
        summary |= record["summary"]["update"] if record["type"] == "summary" else {}
    for key, value in view.summary.items():
        assert summary[key] == value, key

    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    rows = [item for item in history if "cl/accuracy" in item]
    assert [row["experience"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["cl/accuracy"] == pytest.approx(view.summary["last_accuracy"])
    steps = [item["step"] for item in history if "train/loss" in item]
    assert steps == sorted(set(steps)), "the step counts along the whole stream"

    (table,) = kept.glob("files/media/table/accuracy_matrix*.json")
    cells = [row[1:] for row in json.loads(table.read_text())["data"]]
    for t, row in enumerate(cells):
        assert row == [*view.matrix[t, : t + 1], *[None] * (4 - t)]
    (image,) = kept.glob("files/media/images/figures/accuracy_matrix*.png")
    assert image.read_bytes() == (view.folder / "figures" / "accuracy_matrix.png").read_bytes()


def inspected(folder: Path) -> list[dict[str, Any]]:
    """The records of an offline run, as `wandb leet inspect` reads them back."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(record) for record in result.stdout.splitlines()]


# --- settings that do not fit ---


def unexpected(*_: Any) -> None:
    raise AssertionError("these settings were taken for good ones")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("--stream.protocol=b0-3", ["stream.protocol is b0-3", "10 classes", "1, 2, 5, 10"]),
        ("--stream.class_order=[0,1]", ["stream.class_order", "10 classes"]),
        ("--stream.validation=2", ["stream.validation is 2"]),
        ("--stream.source=digit", ["digit", "did you mean digits"]),
        ("--var.heads=3", ["var.heads is 3", "var.width 16"]),
        ("--tokenizer.scales=[1,2,3]", ["tokenizer.scales", "12 px", "16 px"]),
        ("--tokenizer.scales=[]", ["tokenizer.scales"]),
        ("--tokenizer.scales=[2,1,4]", ["tokenizer.scales"]),
        ("--tokenizer.multipliers=[]", ["tokenizer.multipliers"]),
        ("--tokenizer.multipliers=[0,1,1]", ["tokenizer.multipliers"]),
        ("--tokenizer.phis=0", ["tokenizer.phis"]),
        ("--tokenizer.channels=0", ["tokenizer.channels"]),
        ("--tokenizer.latent_channels=0", ["tokenizer.latent_channels"]),
        ("--tokenizer.residual_blocks=-1", ["tokenizer.residual_blocks"]),
        ("--tokenizer.vocabulary=1", ["tokenizer.vocabulary is 1"]),
        ("--tokenizer.lr=nan", ["tokenizer.lr"]),
        ("--var.width=0", ["var.width"]),
        ("--var.heads=0", ["var.heads"]),
        ("--var.steps=0", ["var.steps is 0"]),
        ("--var.drop_path=1", ["var.drop_path"]),
        ("--var.condition_dropout=2", ["var.condition_dropout"]),
        ("--var.weight_decay=-1", ["var.weight_decay"]),
        ("--discriminative.epochs=0", ["discriminative.epochs is 0"]),
        ("--discriminative.lr=nan", ["discriminative.lr"]),
        ("--discriminative.stored_images=1", ["discriminative.stored_images is 1"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_folder_is_made(
    setting: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learning, "_run_method", unexpected)
    sentence = refused(capsys, line(tmp_path / "runs", setting))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "runs").exists(), "the line put right must not find the wrong one's"


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_method_that_can_learn_the_stream_is_said(
    jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scales = "--tokenizer.scales=[1,2,3,5]"
    arguments = line(tmp_path, "--methods=[generative]", scales, f"--trainer.jobs={jobs}")
    assert run.main(arguments) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert any(said.startswith("left out: var-adapter: tokenizer") for said in before)
    assert error.startswith("error: None of the methods can learn this stream")
    assert not list(tmp_path.rglob("results.csv"))


def test_no_accelerator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sentence = refused(capsys, line(tmp_path, "--trainer.accelerator=gpu"))
    assert "trainer.accelerator is gpu" in sentence


def test_a_runs_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    sentence = refused(capsys, line(tmp_path / "file" / "runs", "--methods=[finetune]"))
    assert str(tmp_path / "file" / "runs") in sentence
    assert "--runs" in sentence


@pytest.mark.integration
def test_the_table_is_shown_though_nothing_can_be_written(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = copied / "split_digits" / "forgetting_curves.png"
    curves.unlink()
    curves.mkdir()  # as of a folder that is to be read alone: root may write into those
    assert run.main(line(copied)) == 2
    said = capsys.readouterr()
    assert "forgetting_curves.png" in said.err
    assert all(name in said.out for name in METHODS)


def test_a_folder_that_holds_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "split_digits" / "finetune" / "seed0"
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("mine")
    assert "not a run's" in refused(capsys, line(tmp_path, "--methods=[finetune]", "--fresh"))
    assert (place / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("method", "function"),
    [
        ("finetune", "cil.models.cnn.CNN.forward"),
        ("var", "cil.methods.tokenizer.TokenizerModule.training_step"),  # within Lightning
    ],
)
def test_an_interrupt_is_no_crash(
    method: str,
    function: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert run.main(line(tmp_path, f"--methods={method}")) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert "the same line goes on" in capsys.readouterr().err
