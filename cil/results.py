"""Finished runs from wherever they are kept: run folders, or a project at Weights & Biases.

runs = results.load("runs/split_digits")
runs = results.load("wandb:ENTITY/PROJECT/split_digits")
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cil.errors import UserError
from cil.records import read_runs, unfinished_runs
from cil.records.layout import FloatArray
from cil.wandb_runs import read_wandb

WANDB = "wandb:"


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
    runs, begun = read_runs(Path(source)), unfinished_runs(Path(source))
    if not runs:
        raise UserError(
            f"There are no finished runs in {source} ({len(begun)} begun); is it the folder of an "
            "experiment?"
        )
    if begun:
        named = [
            f"{r.method} seed {r.seed} ({r.learned} of {r.experiences} learned)" for r in begun
        ]
        print(f"not finished and left out: {', '.join(named)}", file=sys.stderr)
    return list(runs)


def first_seeds(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Of every method of every experiment the run with the lowest seed."""
    first: dict[tuple[str, str], AnyRun] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        first.setdefault((run.experiment, run.method), run)
    return [run for run in runs if first[run.experiment, run.method] is run]
