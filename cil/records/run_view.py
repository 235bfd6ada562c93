"""A finished run, to be read: what tables, figures, reports and notebooks are made of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cil.errors import UserError
from cil.files import explained, read_bytes, read_json
from cil.records.checkpoints import load_checkpoint
from cil.records.layout import (
    CHECKPOINTS,
    ENVIRONMENT,
    FIGURES,
    METRICS,
    PREDICTIONS,
    PROGRESS,
    SUMMARY,
    FloatArray,
    checkpoint,
    newest_checkpoint,
    read_config,
    read_explanations,
    read_matrix,
    read_progress,
    read_stream,
    read_summary,
    read_table,
)
from cil.records.samples import Images, read_samples, sheet

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RunView:
    """A finished run, to be read: matrix (T, T), sizes the test images of each class group."""

    folder: Path
    experiment: str
    method: str
    seed: int
    config: dict[str, Any]
    stream: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    matrix: FloatArray
    sizes: list[int]

    @property
    def group_names(self) -> list[str]:
        """What figures call the class groups."""
        names, groups = self.stream["class_names"], self.stream["experiences"]
        return [group_name([names[label] for label in labels]) for labels in groups]

    def over_experiences(self, name: str) -> FloatArray:
        """A number such as "samples/drift" after each experience (T,); NaN where there is none."""
        rows = self.metrics()
        last = rows[rows["name"] == name].groupby("experience")["value"].last()
        values: FloatArray = last.reindex(range(len(self.sizes))).to_numpy(np.float64)
        return values

    def pictures(self) -> list[str]:
        """The names of its figures; of those drawn after each experience without its number."""
        paths = (self.folder / FIGURES).glob("*.png")
        return sorted({re.sub(r"_experience\d+$", "", path.stem) for path in paths})

    def picture(self, name: str) -> bytes | None:
        """A figure as a PNG file, of those after each experience the last; None: there is none."""
        folder = self.folder / FIGURES
        each = [folder / f"{name}_experience{t}.png" for t in reversed(range(len(self.sizes)))]
        paths = [path for path in (folder / f"{name}.png", *each) if path.exists()]
        return read_bytes(paths[0]) if paths else None

    def metrics(self) -> "pd.DataFrame":
        """metrics.csv: experience, step, name, value."""
        return read_table(self.folder / METRICS)

    def state(self, experience: int | None = None) -> dict[str, Any]:
        """The method as it was at the end (`cil.methods.registry.restore` makes one of it).

        Or as it was after an earlier experience, which must be among `kept_states`.
        """
        progress = read_progress(self.folder)
        name = newest_checkpoint(progress) if experience is None else checkpoint(experience)
        return load_checkpoint(self.folder / name, progress.sha256[name])

    def kept_states(self) -> list[int]:
        """The experiences after which the method is on disk, ascending; the last is the end."""
        kept = read_progress(self.folder).sha256
        return [t for t in range(len(self.sizes)) if checkpoint(t) in kept]

    def checkpoint_hash(self, experience: int | None = None) -> str:
        """The sha256 of the method as it was at the end, or after one of `kept_states`."""
        progress = read_progress(self.folder)
        name = newest_checkpoint(progress) if experience is None else checkpoint(experience)
        return progress.sha256[name]

    def samples(self, experience: int) -> Images | None:
        """What was drawn after an experience (classes, images, H, W, channels); None: nothing."""
        return read_samples(sheet(self.folder, experience), self.stream["image_size"])

    def predictions(self) -> "pd.DataFrame":
        """predictions.csv as the protocol wrote it."""
        return read_table(self.folder / PREDICTIONS)

    def explanations(self) -> "pd.DataFrame":
        """What tokens said of a few test images after each experience; see `cil.drift.reasons`."""
        return read_explanations(self.folder)


def group_name(class_names: Sequence[str]) -> str:
    """What figures call a class group: its classes, of many the first and the last."""
    few = len(class_names) <= 3
    return ", ".join(class_names) if few else f"{class_names[0]} … {class_names[-1]}"


def read_runs(root: Path) -> list[RunView]:
    """All finished runs at or below a folder, sorted by experiment, method and seed.

    Raises:
        UserError: there is no such folder, or a file of a finished run is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}; give the one that holds the runs.")
    with explained(root):
        folders = [path.parent.resolve() for path in root.rglob(SUMMARY)]
    views = [read_run(folder) for folder in folders if re.fullmatch(r"seed\d+", folder.name)]
    return sorted(views, key=lambda view: (view.experiment, view.method, view.seed))


def read_run(folder: Path) -> RunView:
    """The finished run in a folder.

    Raises:
        UserError: there is no run in it, it is not finished, or one of its files is damaged.
    """
    if not (folder / SUMMARY).exists():
        raise _unfinished(folder)
    progress = read_progress(folder)
    config = read_config(folder, progress)
    method, seed = folder.parent.name, int(folder.name.removeprefix("seed"))
    own = (config.get("method", method), config.get("seed", seed))
    if own != (method, seed):  # one run would count as two
        raise UserError(
            f"{folder} holds a run of {own[0]} with seed {own[1]}: a copy keeps the names of its "
            "last two folders."
        )
    return RunView(
        folder=folder,
        experiment=folder.parent.parent.name,
        method=method,
        seed=seed,
        config=config,
        stream=read_stream(folder, progress),
        environment=read_json(folder / ENVIRONMENT),
        summary=read_summary(folder),
        matrix=read_matrix(folder, progress),
        sizes=progress.test_sizes,
    )


def _unfinished(folder: Path) -> UserError:
    """What to do about a folder without summary.json."""
    if not any((folder / name).exists() for name in (PROGRESS, CHECKPOINTS)):
        return UserError(
            f"There is no run in {folder}: name a folder RUNS/EXPERIMENT/METHOD/seedK that there "
            "is."
        )
    learned = read_progress(folder).learned
    command = read_json(folder / ENVIRONMENT).get("command")
    return UserError(
        f"{folder} is not finished (experiences learned: {learned}): go on with the line that "
        f"began it, `python {command}`."
    )
