"""Two processes on a CPU against one: the same bits, the same records, one end for all of them."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, first_of_each
from tiny import TINY, folders
from torch.utils.data import Subset

from cil import parallel, run
from cil.config import (
    Config,
    DiffusionConfig,
    DiscriminativeConfig,
    SamplesConfig,
    TokenizerConfig,
    TrainerConfig,
    VARConfig,
)
from cil.errors import UserError
from cil.launch import launch
from cil.methods.drawing import as_bytes, drawn
from cil.methods.method import Generative
from cil.methods.registry import build
from cil.methods.scoring import BATCH_SIZE, score
from cil.methods.tokenizer import TokenizerModule
from cil.protocol import run as run_protocol
from cil.protocol import score_groups
from cil.records import RunRecord, read_run
from cil.streams.digits import digits
from cil.streams.stream import Stream, build_stream
from cil.tracking import Tracker

ROOT = Path(__file__).parent.parent
TWO = TrainerConfig(accelerator="cpu", devices=2, progress=False)
ONE = replace(TWO, devices=1)
LEARNERS = (
    *("var-embedding", "var-adapter", "var-trunk", "var-copy"),
    *("diffusion-adapter", "replay", "slda"),
)
ALONE = ("replay", "slda")  # the first process learns these; one of them keeps its backbone
SAMPLES = SamplesConfig(per_class=30, steps=3)  # two batches a group
RESTARTING, DROPPING = "var-embedding", "var-copy"


def few_digits() -> Stream:
    source = digits(validation=0.15, augment=True, image_size=8)
    splits = {"train": 30, "validation": 12, "test": 70}  # two batches a group
    images = {name: first_of_each(getattr(source, name), n) for name, n in splits.items()}
    source = replace(source, class_names=source.class_names[:CLASSES], content="few", **images)
    return build_stream(source, "b0-3", (3, 0, 5, 1, 4, 2))


def configured(name: str, trainer: TrainerConfig, cache: Path) -> Config:
    # More phis than scales and a block that does not see the class; one method drops paths and
    # aligns its groups.
    tokenizer = TokenizerConfig(
        channels=8, multipliers=[1, 1], latent_channels=4, vocabulary=32, phis=6, steps=8,
        batch_size=16, lr=5e-3,
    )  # fmt: skip
    var = VARConfig(
        depth=2, width=16, heads=2, adapter_rank=2, views=1, first_steps=6, steps=4, batch_size=16,
        condition_from=1, drop_path=0.1 if name == DROPPING else 0.0, smoothing_samples=2,
        cca_steps=3 if name == DROPPING else 0,
    )  # fmt: skip
    diffusion = DiffusionConfig(
        depth=2, width=16, heads=2, adapter_rank=2, views=1, first_steps=6, steps=4, batch_size=16,
        schedule=[[3, 3], [4, 1]],
    )  # fmt: skip
    cnn = DiscriminativeConfig(epochs=1, backbone_epochs=6, stored_images=20)
    sections = {"tokenizer": tokenizer, "var": var, "diffusion": diffusion, "discriminative": cnn}
    sections["trainer"] = trainer
    return Config(**sections, cache=str(cache))


def learn_all(folder: Path, trainer: TrainerConfig) -> None:
    """Every kind of method learns two experiences; what each process then holds goes to a file."""
    stream, decay = few_digits(), TokenizerModule.decay
    for name in LEARNERS:
        # Codes are dead after four steps and restart, which must be the same on all processes.
        TokenizerModule.decay = 0.5 if name == RESTARTING else decay
        config = configured(name, trainer, folder / f"{name}-cache")
        build_method = lambda name=name, config=config: build(name, config, stream)  # noqa: E731
        built: list[Any] = []

        def building(make: Callable[[], Any] = build_method, kept: list[Any] = built) -> Any:
            kept.append(make())
            return kept[0]

        place = folder / name / "seed0"
        record = None
        if parallel.is_first():
            facts = {
                "name": stream.name,
                "fingerprint": stream.fingerprint,
                "image_size": stream.image_size,
            }
            record = RunRecord.open(place, {"seed": 0}, facts, {"commit": "unknown"})
        run_protocol(building, stream, record, Tracker(None), trainer, seed=0, samples=SAMPLES)
        scores = [scores for scores, _ in score_groups(built[0], stream.experiences, trainer)]
        few = Subset(stream.experiences[0].test, range(5))  # one batch: nothing for the second
        ((alone, _),) = score(built[0], [few], trainer, "few")
        state, draw = built[0].state(), torch.rand(1)
        kept = {"state": state, "scores": scores, "few": alone, "draw": draw}
        torch.save(kept, folder / f"{name}-{parallel.rank()}.pt")
    TokenizerModule.decay = decay


@pytest.fixture(scope="module")
def learned(quick_starts: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of what one process has learned, and of what two have."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    learn_all(one, ONE)
    launch(TWO, learn_all, two, TWO)
    return one, two


def tensors(state: Any) -> list[torch.Tensor]:
    """All tensors of a state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    nested = [tensors(p) for p in parts if isinstance(p, dict | list | torch.Tensor)]
    return [tensor for part in nested for tensor in part]


@pytest.mark.integration
@pytest.mark.parametrize("name", LEARNERS)
def test_all_processes_hold_the_same_bits(name: str, learned: tuple[Path, Path]) -> None:
    first, second = (torch.load(learned[1] / f"{name}-{rank}.pt") for rank in (0, 1))
    for a, b in zip(first["scores"], second["scores"], strict=True):
        assert torch.equal(a, b)
    assert first["few"].shape == (5, 6)
    assert torch.equal(first["few"], second["few"])
    if name not in ALONE:
        assert first["draw"] == second["draw"], "they would draw other batches from here on"
        ours, theirs = tensors(first["state"]), tensors(second["state"])
        assert len(ours) > 50
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.integration
@pytest.mark.parametrize("name", LEARNERS)
def test_one_process_scores_and_draws_the_same_model_alike(
    name: str, learned: tuple[Path, Path], tmp_path: Path
) -> None:
    kept = torch.load(learned[1] / f"{name}-0.pt")
    stream = few_digits()
    method = build(name, configured(name, ONE, tmp_path), stream)
    method.load_state(kept["state"])
    results = score_groups(method, stream.experiences, ONE)
    for (scores, labels), shared in zip(results, kept["scores"], strict=True):
        assert len(labels) > BATCH_SIZE
        assert torch.equal(scores, shared)
    sheet = read_run(learned[1] / name / "seed0").samples(1)
    if not isinstance(method, Generative):
        assert sheet is None
        return
    groups = [e.labels for e in stream.experiences]
    guided = {"guidance": SAMPLES.guidance, "steps": SAMPLES.steps}
    images = drawn(method, groups, SAMPLES.per_class, **guided, title="", progress=False)
    assert sheet is not None
    assert np.array_equal(sheet, as_bytes(images))


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in LEARNERS if name not in (RESTARTING, DROPPING)])
def test_what_they_learn_is_what_one_learns(name: str, learned: tuple[Path, Path]) -> None:
    """Every loss along the way but for rounding: the same images, dropped classes and codebook."""
    one, two = (read_run(folder / name / "seed0") for folder in learned)
    ours, theirs = (view.metrics().set_index(["experience", "step", "name"]) for view in (one, two))
    assert list(ours.index) == list(theirs.index)
    losses = [
        row for row in ours.index if re.search("train|tokenizer/[rc]o|var/|diffusion/", row[2])
    ]
    assert len(losses) > 3
    for row in losses:
        assert theirs.value[row] == pytest.approx(ours.value[row], rel=2e-3), row
    assert abs(one.matrix - two.matrix)[one.matrix >= 0].max() < 0.05


# --- whole commands ---


def line(runs: Path, *arguments: str) -> list[str]:
    return ["split_digits", *TINY, *folders(runs), "--methods=[var]", *arguments]


@pytest.mark.integration
def test_killed_on_two_it_goes_on_with_one_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "split_digits" / "var" / "seed0"
    stop_after(monkeypatch, 1)
    assert run.main(line(tmp_path)) == 130

    command = [sys.executable, "-m", "cil.run", *line(tmp_path, "--trainer.devices=2")]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: progress(place)["learned"] >= 3)
    started.kill()
    assert started.stderr is not None
    assert "going on after experience 1" in started.stderr.read()  # ends when the children have
    reached = progress(place)["learned"]

    monkeypatch.undo()
    assert run.main(line(tmp_path)) == 0
    view = read_run(place)
    devices = [view.environment, *view.environment["resumed"]]
    assert [sitting["device"][:4] == "2 x " for sitting in devices] == [False, True, False]
    assert "-m cil.run split_digits" in devices[1]["command"]
    assert reached >= 3
    assert len(view.predictions()) == 450
    assert not view.metrics().duplicated(["step", "name"]).any()
    assert "devices" not in (place / "config.yaml").read_text()


def stop_after(monkeypatch: pytest.MonkeyPatch, experiences: int) -> None:
    save = RunRecord.save_evaluated

    def saved(record: RunRecord, *arguments: Any) -> None:
        save(record, *arguments)
        if record.evaluated == experiences:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunRecord, "save_evaluated", saved)


def progress(place: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / "progress.json").read_text())
    return content


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- how they end ---


def fail(how: str) -> None:
    """The second process comes to its end; the first one waits for it meanwhile."""
    if parallel.rank() == 1:
        if how == "refused":
            raise UserError("The second process has no more paper.")
        if how == "crashed":
            raise ZeroDivisionError("the second process")
        parent = multiprocessing.parent_process()
        os.kill(parent.pid if how == "interrupted" else os.getpid(), SIGNALS[how])
    parallel.barrier()


SIGNALS = {"interrupted": signal.SIGINT, "killed": signal.SIGKILL}


@pytest.mark.integration
@pytest.mark.usefixtures("quick_starts")
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("refused", 2, "error: The second process has no more paper.\n"),
        ("killed", 2, "error: Process 1 of 2 was ended by SIGKILL, .* last experience.\n"),
        ("interrupted", 130, "\ninterrupted: the same line goes on from the last experience\n"),
    ],
)
def test_one_end_for_all(how: str, code: int, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.exit_code(lambda: launch(TWO, fail, how)) == code
    assert re.fullmatch(said, capfd.readouterr().err)
    assert multiprocessing.active_children() == []


@pytest.mark.integration
@pytest.mark.usefixtures("quick_starts")
def test_an_interrupt_while_they_start_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    start = BaseProcess.start

    def interrupted(child: BaseProcess) -> None:
        start(child)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(BaseProcess, "start", interrupted)
    assert run.exit_code(lambda: launch(TWO, parallel.barrier)) == 130
    assert multiprocessing.active_children() == []


@pytest.mark.integration
@pytest.mark.usefixtures("quick_starts")
def test_a_crash_shows_its_own_traceback_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch(TWO, fail, "crashed")
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1
    assert said.endswith("ZeroDivisionError: the second process\n")


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--trainer.devices=0"], ["trainer.devices is 0"]),
        (["--trainer.num_nodes=-1"], ["trainer.num_nodes is -1"]),
        (["--trainer.devices=5"], ["tokenizer.batch_size is 32", "multiple of 5"]),
        (["--trainer.devices=2", "--var.batch_size=25"], ["var.batch_size is 25", "2 devices"]),
        (["--trainer.num_nodes=2"], ["trainer.num_nodes is 2", "torchrun"]),
    ],
)
def test_devices_that_cannot_be_had_are_refused(
    settings: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(line(tmp_path, *settings)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(word in said for word in words), said


def test_other_processes_than_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert run.main(line(tmp_path, "--trainer.devices=2")) == 2
    assert "4 processes were started" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert run.main(line(tmp_path, "--trainer.devices=2")) == 2
    assert capsys.readouterr().err == "", "the first one says it"
