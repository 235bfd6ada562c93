"""Runs that were begun and not finished: what a page or a notebook should say is missing."""

import re
from dataclasses import dataclass
from pathlib import Path

from cil.files import explained
from cil.records.layout import PROGRESS, SUMMARY, read_progress, read_stream


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that waits to be gone on with, or is being run now."""

    folder: Path
    experiment: str
    method: str
    seed: int
    learned: int  # experiences learned, of so many
    experiences: int


def unfinished_runs(root: Path) -> list[UnfinishedRun]:
    """All at or below a folder, sorted by experiment, method and seed.

    Raises:
        UserError: a file that says how far a run came is damaged.
    """
    with explained(root):
        folders = [path.parent.resolve() for path in Path(root).rglob(PROGRESS)]
    found = [
        _unfinished(folder)
        for folder in folders
        if re.fullmatch(r"seed\d+", folder.name) and not (folder / SUMMARY).exists()
    ]
    return sorted(found, key=lambda run: (run.experiment, run.method, run.seed))


def _unfinished(folder: Path) -> UnfinishedRun:
    progress = read_progress(folder)
    return UnfinishedRun(
        folder=folder,
        experiment=folder.parent.parent.name,
        method=folder.parent.name,
        seed=int(folder.name.removeprefix("seed")),
        learned=progress.learned,
        experiences=len(read_stream(folder, progress)["experiences"]),
    )
