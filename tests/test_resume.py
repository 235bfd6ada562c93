"""Killed at any moment and started again with the same line, a command ends with the same bytes.

Every command here is a process of its own and dies by a real SIGKILL, at the n-th call of some
function. The processes are forked from a server that has imported torch already, which saves ten
seconds each.
"""

import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, folders

from cil import run

pytestmark = pytest.mark.integration

PRELOADED = [
    "cil.run",
    "cil.protocol",
    "cil.methods.var",
    "cil.methods.discriminative",
    "avalanche.benchmarks",
    "avalanche.training.supervised",
]
METHODS = ("var", "replay")
COMPARED = ("accuracy_matrix.csv", "predictions.csv", "metrics.csv", "config.yaml", "stream.json")


@dataclass(frozen=True)
class Moment:
    """Die at a call of `function`: the `call`-th of those whose last argument ends in `on`."""

    function: str  # module:attribute
    call: int
    at: tuple[str, int, int]  # the method that was running, experiences learned and evaluated
    on: str = ""
    after: bool = False  # the call itself is carried out


# One after the other in one run folder, each in a process that goes on where the one before died;
# calls are counted from the start of the process.
TOKENIZER = "cil.methods.tokenizer:TokenizerModule.training_step"
EVALUATED = "cil.records:RunRecord.save_evaluated"
MOMENTS = {
    "in the tokenizer": Moment(TOKENIZER, 3, ("var", 0, 0)),
    "writing, before it counts": Moment("os:replace", 1, ("var", 0, 0), on="progress.json"),
    "writing, as it counts": Moment("os:replace", 1, ("var", 1, 0), on="progress.json", after=True),
    "between two": Moment(EVALUATED, 2, ("var", 2, 2), after=True),
    "in an experience": Moment("cil.methods.var_module:VARModule.training_step", 3, ("var", 2, 2)),
    "in evaluation": Moment("cil.methods.var:VARMethod.scores", 4, ("var", 3, 2)),
    "writing the summary": Moment("os:replace", 1, ("var", 5, 5), on="summary.json"),
    # 8 or so batches an experience, and then its evaluation: the 30th is in experience 2
    "in the second method": Moment("cil.models.cnn:CNN.forward", 30, ("replay", 2, 2)),
    "between two of it": Moment(EVALUATED, 1, ("replay", 3, 3), after=True),
    "writing its predictions": Moment("os:replace", 1, ("replay", 5, 4), on="predictions.csv"),
}


def whole_command(runs: Path, moment: Moment | None) -> None:
    """In a process of its own: the command, killed at `moment`; its exit code is the process's."""
    if moment is not None:
        arm(moment)
    raise SystemExit(
        run.main(["split_digits", *TINY, *folders(runs), f"--methods=[{','.join(METHODS)}]"])
    )


def arm(moment: Moment) -> None:
    name, _, attribute = moment.function.partition(":")
    owner: Any = importlib.import_module(name)
    *path, last = attribute.split(".")
    for step in path:
        owner = getattr(owner, step)
    setattr(owner, last, killing(getattr(owner, last), moment))


def killing(original: Callable[..., Any], moment: Moment) -> Callable[..., Any]:
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += not moment.on or str(arguments[-1]).endswith(moment.on)
        if calls < moment.call:
            return original(*arguments, **named)
        if moment.after:
            original(*arguments, **named)
        return os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    patch = pytest.MonkeyPatch()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # bits are promised for one CPU
        patch.setenv(name, "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    yield context
    patch.undo()


def exit_code(processes: ForkServerContext, runs: Path, moment: Moment | None = None) -> int | None:
    process = processes.Process(target=whole_command, args=(runs, moment))
    process.start()
    process.join(timeout=600)
    if process.is_alive():
        process.kill()
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted") / "runs"
    assert exit_code(processes, runs) == 0
    return runs


def place(runs: Path, method: str) -> Path:
    return runs / "split_digits" / method / "seed0"


def progress(runs: Path, method: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place(runs, method) / "progress.json").read_text())
    return content


def outcome(runs: Path, method: str) -> dict[str, Any]:
    """Everything but times, which differ between any two runs."""
    folder = place(runs, method)
    files: dict[str, Any] = {name: (folder / name).read_bytes() for name in COMPARED}
    rows = files["metrics.csv"].splitlines()
    files["metrics.csv"] = [row for row in rows if b"seconds" not in row]
    summary = json.loads((folder / "summary.json").read_text())
    files["summary.json"] = {k: v for k, v in summary.items() if not re.search("seconds", k)}
    return files


def test_killed_at_ten_moments_it_ends_the_same(
    processes: ForkServerContext, uninterrupted: Path, tmp_path: Path
) -> None:
    runs, seconds = tmp_path / "runs", {name: list[float]() for name in METHODS}
    for name, moment in MOMENTS.items():
        method, learned, evaluated = moment.at
        before = METHODS[: METHODS.index(method)]
        finished = {done: kept(place(runs, done)) for done in before if is_finished(runs, done)}
        assert exit_code(processes, runs, moment) == -signal.SIGKILL, name
        found = progress(runs, method)
        assert (found["learned"], found["evaluated"]) == (learned, evaluated), name
        assert not is_finished(runs, method), name
        # Learned again, an experience would have taken another time.
        assert found["seconds"][: len(seconds[method])] == seconds[method], name
        seconds[method] = found["seconds"]
        assert finished == {done: kept(place(runs, done)) for done in finished}, name

    assert exit_code(processes, runs) == 0
    for method in METHODS:
        assert outcome(runs, method) == outcome(uninterrupted, method)
        assert not list(place(runs, method).rglob("*.tmp"))


def is_finished(runs: Path, method: str) -> bool:
    return (place(runs, method) / "summary.json").exists()


def kept(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_an_unfinished_copy_ends_the_same_elsewhere(
    processes: ForkServerContext, uninterrupted: Path, tmp_path: Path
) -> None:
    runs = Path(shutil.copytree(uninterrupted, tmp_path / "moved"))
    for name in METHODS:
        (place(runs, name) / "summary.json").unlink()
    assert exit_code(processes, runs) == 0
    for name in METHODS:
        assert outcome(runs, name) == outcome(uninterrupted, name)
