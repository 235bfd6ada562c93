"""Several runs at a time: they leave what one after the other would, and all end together."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import TINY, folders

from cil import learning, run
from cil.command_line import parse
from cil.errors import DivergenceError, UserError
from cil.records import read_runs

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parent.parent
LEARNERS = ("--methods=[finetune,replay]", "--seeds=[0,1]")


def line(runs: Path, jobs: int, *arguments: str) -> list[str]:
    return ["split_digits", *TINY, *folders(runs), f"--trainer.jobs={jobs}", *arguments]


def test_runs_beside_each_other_learn_what_they_learn_alone(
    quick_starts: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for jobs in (1, 2):
        arguments = line(tmp_path / str(jobs), jobs, *LEARNERS, "--stream.stop_after=2")
        assert run.main(arguments) == 0
        said = capfd.readouterr()
        assert "finetune" in said.out
        assert said.err == "opening the stream digits ...\n"
    alone, beside = (read_runs(tmp_path / str(jobs) / "split_digits") for jobs in (1, 2))
    assert len(alone) == len(beside) == 4
    for one, other in zip(alone, beside, strict=True):
        assert (one.method, one.seed) == (other.method, other.seed)
        assert one.predictions().equals(other.predictions())
        written = [(r.folder / "config.yaml").read_text() for r in (one, other)]
        assert written[0] == written[1]


def test_what_one_refuses_ends_all(
    quick_starts: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It stays what it was on its way here: a search goes on from divergence alone."""
    name, *arguments = line(tmp_path, 2, *LEARNERS, "--discriminative.lr=1e30")
    config, _ = parse(name, arguments)
    said = r"^\w+ experience 1/5 diverged, .*: lower discriminative.lr\.$"
    with pytest.raises(DivergenceError, match=said):
        learning.complete(name, config)
    assert capfd.readouterr().err == "opening the stream digits ...\n"


def test_interrupted_the_same_line_goes_on(tmp_path: Path) -> None:
    arguments = line(tmp_path, 2, "--methods=[finetune,replay]", "--stream.stop_after=3")
    started = subprocess.Popen(
        [sys.executable, "-m", "cil.run", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    places = [tmp_path / "split_digits" / name / "seed0" for name in ("finetune", "replay")]
    deadline = time.monotonic() + 240
    while not all(evaluated(place) for place in places):
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert started.stderr is not None
    said = started.stderr.read()  # ends when both jobs have
    assert started.wait() == 130
    assert said.endswith("\ninterrupted: the same line goes on from the last experience\n")
    assert "Traceback" not in said
    assert run.main(arguments) == 0
    assert len(read_runs(tmp_path / "split_digits")) == 2


def test_the_last_run_that_is_left_has_as_many_threads_as_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its last bits would be others than those of a run that was never interrupted."""

    def complete(jobs: int, methods: str) -> None:
        config, _ = parse("split_digits", line(tmp_path, jobs, f"--methods={methods}")[1:])
        learning.complete("split_digits", config)

    complete(1, "finetune")
    had, before = [], torch.get_num_threads()
    monkeypatch.setattr(learning, "_run_method", lambda *_: had.append(torch.get_num_threads()))
    torch.set_num_threads(6)
    try:
        for jobs in (1, 2, 4):
            complete(jobs, "[finetune,replay]")
            assert torch.get_num_threads() == 6
        with pytest.raises(UserError):  # as it leaves no record here
            complete(4, "replay")
    finally:
        torch.set_num_threads(before)
    assert had == [6, 3, 3, 6]


def evaluated(place: Path) -> bool:
    try:
        return bool(json.loads((place / "progress.json").read_text())["evaluated"])
    except FileNotFoundError:
        return False


def test_no_job_at_all_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(line(tmp_path, 0)) == 2
    assert capsys.readouterr().err == "error: trainer.jobs is 0: give 1 or more.\n"
