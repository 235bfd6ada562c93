"""Several runs at a time: they leave what one after the other would, and all end together."""

import json
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
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


def test_a_log_file_gets_a_line_of_progress_when_there_is_news(
    quick_starts: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = line(tmp_path, 2, *LEARNERS, "--trainer.progress=true", "--stream.stop_after=2")
    assert run.main(arguments) == 0
    drawn = re.findall(r"(\d)/4 \[.*?(?:it/s|s/it)(.*?)\]", capfd.readouterr().err)
    assert any("finetune seed 0" in names for _, names in drawn)
    closed = drawn.pop()  # once more, where it stays
    assert closed == drawn[-1] == ("4", "")
    assert all(one != next_one for one, next_one in pairwise(drawn))


def test_what_one_refuses_ends_all(
    quick_starts: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = line(tmp_path, 2, *LEARNERS)
    config, _ = parse(name, arguments)
    full = tmp_path / name / "replay" / "seed0"
    full.mkdir(parents=True)
    (full / "letter.txt").write_text("kept")
    with pytest.raises(UserError, match="replay/seed0 holds files that are not a run's"):
        learning.complete(name, config)
    assert capfd.readouterr().err == "opening the stream digits ...\n"
    assert len(list((tmp_path / name).rglob("summary.json"))) < 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_where_one_diverges_the_others_are_learned_and_shown(
    jobs: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    methods = "--methods=[ewc,finetune,replay]"
    own = "--tuned={ewc: {discriminative.ewc_lambda: 1.0e+300}}"
    arguments = line(tmp_path, jobs, methods, own, "--stream.stop_after=2")
    assert run.main(arguments) == 2
    said = capfd.readouterr()
    assert "goes on without ewc seed 0: ewc experience 2/2 diverged" in said.err
    tables = [said.out]
    assert run.main(arguments) == 2  # the same line tries it again
    said = capfd.readouterr()
    assert "error: ewc experience 2/2 diverged" in said.err
    tables.append(said.out)
    for table in tables:
        assert "replay" in table
        assert "ewc" not in table
    assert [view.method for view in read_runs(tmp_path)] == ["finetune", "replay"]


def test_a_search_goes_on_from_divergence_alone(tmp_path: Path) -> None:
    name, *arguments = line(tmp_path, 2, *LEARNERS, "--discriminative.lr=1e30")
    config, _ = parse(name, arguments)
    with pytest.raises(DivergenceError, match=r"^\w+ experience 1/5 diverged, .*lower disc"):
        learning.complete(name, config)


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
