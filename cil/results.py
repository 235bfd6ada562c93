"""Finished runs from wherever they are kept: run folders, or a project at Weights & Biases.

runs = results.load("runs/split_digits")
runs = results.load("wandb:ENTITY/PROJECT/split_digits")
"""

import sys
from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cil.errors import UserError
from cil.records import RunView, read_runs, unfinished_runs
from cil.records.layout import FloatArray
from cil.records.resume import changed_keys
from cil.wandb_runs import read_wandb

WANDB = "wandb:"
# Runs of one method may differ in these: `seeds` is what W&B's agent adds to a trial of a sweep,
# and the same images, which the fingerprint tells, may lie elsewhere.
MAY_DIFFER = ("seed", "seeds", "stream.root")


class Run(Protocol):
    """A finished run, read from a folder (`RunView`) or from W&B (`WandbRun`).

    matrix: the accuracy matrix (T, T) in [0, 1], NaN above the diagonal; sizes: test images of each
    class group; summary: the stream-final numbers.
    """

    @property
    def experiment(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def summary(self) -> dict[str, Any]: ...
    @property
    def matrix(self) -> FloatArray: ...
    @property
    def sizes(self) -> list[int]: ...
    @property
    def group_names(self) -> list[str]: ...

    def over_experiences(self, name: str) -> FloatArray:
        """A number such as "samples/drift" after each experience (T,); NaN where there is none."""

    def pictures(self) -> list[str]:
        """The names of its figures."""

    def picture(self, name: str) -> bytes | None:
        """A figure as a PNG file, of those after each experience the last; None: there is none."""


AnyRun = TypeVar("AnyRun", bound=Run)


def load(source: str | Path) -> list[Run]:
    """All finished runs of a source, sorted by experiment, method and seed.

    source: a folder, "wandb:ENTITY/PROJECT" or "wandb:ENTITY/PROJECT/GROUP". A line on stderr names
    the runs of a folder that are not finished.

    Raises:
        UserError: there is no such folder or project, or no finished run in it, a file is damaged,
            or W&B cannot be asked.
    """
    address = str(source)
    if address.startswith(WANDB):
        return list(read_wandb(address.removeprefix(WANDB)))
    if not address.strip():
        raise UserError("The source is empty: name a folder of runs, or wandb:ENTITY/PROJECT.")
    runs = read_runs(Path(source))
    if not runs:
        raise UserError(
            f"There are no finished runs in {source}; is it the folder of an experiment?"
        )
    _name_unfinished(Path(source))
    return list(runs)


def _name_unfinished(folder: Path) -> None:
    """Say which runs are left out; none of them matters enough to fail for."""
    try:
        begun = unfinished_runs(folder)
    except UserError as error:
        print(f"left out: {error}", file=sys.stderr)
        return
    if begun:
        named = [
            f"{r.method} seed {r.seed} ({r.learned} of {r.experiences} learned)" for r in begun
        ]
        print(f"not finished and left out: {', '.join(named)}", file=sys.stderr)


def first_seeds(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Of every method of every experiment the run with the lowest seed."""
    first: dict[tuple[str, str], AnyRun] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        first.setdefault((run.experiment, run.method), run)
    return [run for run in runs if first[run.experiment, run.method] is run]


def check_seeds_alone_differ(runs: Sequence[Run]) -> None:
    """Raises UserError unless a mean over each method's runs is one over seeds.

    There must be runs, all of one experiment, those of a method of one setting, and each once.
    """
    if not runs:
        raise UserError("There are no runs to show: read some with results.load.")
    experiments = sorted({run.experiment for run in runs})
    if len(experiments) > 1:
        raise UserError(
            f"These runs are of the experiments {', '.join(experiments)}: name the place of one, "
            f"such as {_place_of_experiment(runs[0])}."
        )
    first: dict[str, Run] = {}
    seen: dict[tuple[str, int], Run] = {}
    for run in sorted(runs, key=_place):
        _check_settings(first.setdefault(run.method, run), run)
        twin = seen.get((run.method, run.seed))
        if twin is not None and _place(twin) == _place(run):
            raise UserError(f"The run in {_place(run)} is given twice: give it once.")
        if twin is not None:
            raise UserError(
                f"Two runs are of {run.method} with seed {run.seed}, in {_place(twin)} and in "
                f"{_place(run)}: {_way_out(twin, run)}."
            )
        seen[run.method, run.seed] = run


def _check_settings(one: Run, other: Run) -> None:
    """Raises UserError naming the first setting in which two runs of a method differ."""
    changed = changed_keys(_settings(one), _settings(other))
    differing = [key for key in changed if key not in MAY_DIFFER]
    if differing:
        key, (mine, theirs) = differing[0], changed[differing[0]]
        more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
        raise UserError(
            f"The runs of {one.method} differ in {key}, which is {mine} in {_place(one)} and "
            f"{theirs} in {_place(other)}{more}: {_way_out(one, other)}."
        )


def _settings(run: Run) -> dict[str, Any]:
    """Its config, and which images it learned: at W&B they stand together."""
    if isinstance(run, RunView):
        return {**run.config, "stream_fingerprint": run.stream["fingerprint"]}
    return run.config


def _place(run: Run) -> str:
    return str(run.folder) if isinstance(run, RunView) else str(getattr(run, "url", "W&B"))


def _place_of_experiment(run: Run) -> str:
    if isinstance(run, RunView):
        return str(run.folder.parents[1])
    return f"{WANDB}ENTITY/PROJECT/{run.experiment}"


def _way_out(one: Run, other: Run) -> str:
    """How to read one of two runs alone, and as many others with it as can be."""
    if not isinstance(one, RunView) or not isinstance(other, RunView):
        return "keep one of the two"
    mine, theirs = one.folder.resolve(), other.folder.resolve()
    shared = Path(commonpath([mine, theirs]))
    apart = shared.joinpath(*mine.relative_to(shared).parts[:1])
    return f"name a folder that holds one of the two, such as {apart}"
