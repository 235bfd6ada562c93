"""Accuracy of finished runs under shift: on corrupted test images, and on other test sets.

A class is chosen among all that the run has learned, by the method as it was at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from cil import cache
from cil.config import TrainerConfig
from cil.errors import UserError
from cil.files import write_bytes
from cil.methods.registry import restore
from cil.methods.scoring import score
from cil.methods.training import find_device
from cil.records import RunView
from cil.streams.corruptions import CORRUPTIONS, SEVERITIES, Corrupted, check_corruption
from cil.streams.shift_sets import ShiftSet, read_shift_set
from cil.streams.stream import Stream, first_of_each

CLEAN = "clean"


@dataclass(frozen=True)
class Shift:
    """Test images of a stream's classes under one shift; severity 0 where it has none.

    Without a set, `name` is a corruption of the stream's own test images, or `CLEAN`; of these
    the first `per_class` of each class are taken, or all.
    """

    name: str
    severity: int = 0
    found: ShiftSet | None = None
    per_class: int | None = None

    def images(self, stream: Stream) -> Dataset:
        if self.found is not None:
            return self.found.images
        tests: ConcatDataset = ConcatDataset([experience.test for experience in stream.experiences])
        shown = tests if self.name == CLEAN else Corrupted(tests, self.name, self.severity)
        if self.per_class is None:
            return shown
        targets = [label for e in stream.experiences for label in e.test.targets]  # type: ignore[attr-defined]
        return Subset(shown, first_of_each(targets, self.per_class))

    def right(self, classes: int) -> Tensor:
        """(targets, classes): which labels are right for a target of the images."""
        return torch.eye(classes, dtype=torch.bool) if self.found is None else self.found.right


def corruptions(
    names: Sequence[str], severities: Sequence[int], per_class: int | None = None
) -> list[Shift]:
    """Of the stream's own test images, so many of each class; `all` stands for the fifteen.

    Raises:
        UserError: there is no such corruption or severity.
    """
    names = list(CORRUPTIONS) if "all" in names else list(dict.fromkeys(names))
    severities = sorted(set(severities)) or list(SEVERITIES)
    for name in names:
        for severity in severities:
            check_corruption(name, severity)
    return [Shift(name, severity, per_class=per_class) for name in names for severity in severities]


def shift_sets(folders: Mapping[str, Path], run: RunView, cache: Path) -> list[Shift]:
    """The test sets in these folders (by kind, see `read_shift_set`), for a run's classes."""
    names, size = learned_classes(run), int(run.stream["image_size"])
    shifts = []
    for kind, root in folders.items():
        for found in read_shift_set(kind, root, names, size, cache):
            name, _, severity = found.name.rpartition("/")
            shifts.append(Shift(name or severity, int(severity) if name else 0, found))
    return shifts


def learned_classes(run: RunView) -> list[str]:
    """Names of the classes of a run, by label; of a stream cut short those before the cut."""
    count = sum(len(labels) for labels in run.stream["experiences"])
    return list(run.stream["class_names"])[:count]


def evaluate(
    run: RunView,
    shifts: Sequence[Shift],
    trainer: TrainerConfig,
    folder: Path,
    done: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """A row a shift: method, seed, shift, severity, accuracy, images; the first is without shift.

    Unless `shifts` begin with `CLEAN` that one is what the run itself recorded.

    What was evaluated before is read from `folder`, the cache. `done` is called after each shift.

    Raises:
        UserError: the run's images are not there, or its checkpoint cannot be read.
    """
    rows = []
    if not shifts or shifts[0].name != CLEAN:
        rows.append((CLEAN, 0, run.summary["last_accuracy"], sum(run.sizes)))
    opened: tuple[Any, Stream] | None = None  # not before something must be computed
    for shift in shifts:
        key = _key(run, shift, trainer)
        path = cache.place(
            folder / "shifts", f"{run.method}-{shift.name}-{shift.severity}", key, ".csv"
        )
        with cache.alone(path):
            facts = cache.find(path)
            if facts is None:
                opened = opened or restore(run, trainer, folder)
                facts = _evaluate(*opened, shift, trainer, path, key)
        rows.append((shift.name, shift.severity, facts["accuracy"], facts["images"]))
        done()
    frame = pd.DataFrame(rows, columns=["shift", "severity", "accuracy", "images"])
    frame.insert(0, "method", run.method)
    frame.insert(1, "seed", run.seed)
    return frame


def _evaluate(
    method: Any,
    stream: Stream,
    shift: Shift,
    trainer: TrainerConfig,
    path: Path,
    key: Mapping[str, Any],
) -> dict[str, Any]:
    """The facts kept beside `path`, a file of every image's target and prediction."""
    title = f"{method.name} {shift.name} {shift.severity or ''}".strip()
    ((scores, targets),) = score(method, [shift.images(stream)], trainer, title)
    predictions = scores.argmax(1)
    right = shift.right(scores.shape[1])[targets, predictions]
    table = pd.DataFrame({"target": targets, "prediction": predictions, "right": right.int()})
    facts = {"accuracy": right.double().mean().item(), "images": len(right)}
    cache.keep(path, write_bytes(path, table.to_csv(index=False).encode(), cache.KEY), key, facts)
    return facts


def _key(run: RunView, shift: Shift, trainer: TrainerConfig) -> dict[str, Any]:
    """All that decides an accuracy."""
    return {
        "run": run.checkpoint_hash(),
        "config": run.config,
        "stream": run.stream["fingerprint"],
        "evaluated_on": run.stream.get("evaluated_on"),
        "shift": [shift.name, shift.severity, shift.found.content if shift.found else None],
        "per_class": shift.per_class,
        "device": find_device(trainer).type,
        "precision": trainer.precision,
    }


def by_method(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a method; columns (shift, "mean" | "std" | "count") over the seeds.

    A corruption is the mean over its severities; `MEAN` that over the corruptions of the stream's
    own test images.
    """
    order = list(dict.fromkeys(frame["shift"]))
    each = frame.pivot_table("accuracy", ["method", "seed"], "shift", "mean", sort=False)[order]
    corrupted = [name for name in order if name in CORRUPTIONS]
    if corrupted:
        each.insert(1 + len(corrupted), MEAN, each[corrupted].mean(axis=1))
    return each.groupby("method", sort=False).agg(["mean", "std", "count"])


MEAN = "mean of corruptions"


def check_one_experiment(
    runs: Sequence[RunView], folder: Path | str, way_out: str = "choose by --methods"
) -> None:
    """Raises UserError unless the runs are some of one experiment, of the same stream.

    Also of as many experiences, and evaluated on the same images: else their numbers, and images
    that are made for all, would not be of the same classes. `way_out` is what messages advise.
    """
    if not runs:
        raise UserError(
            f"{folder} holds no finished run: start some with `python -m cil.run EXPERIMENT`."
        )
    names = sorted({run.experiment for run in runs})
    if len(names) > 1:
        raise UserError(
            f"{folder} holds runs of several experiments ({', '.join(names)}): name the folder of "
            "one."
        )
    if len({run.stream["fingerprint"] for run in runs}) > 1:
        raise UserError(f"The runs in {folder} are not of the same stream: {way_out}.")
    first = runs[0].stream
    for run in runs:
        if any(run.stream[fact] != first[fact] for fact in ("experiences", "evaluated_on")):
            raise UserError(
                f"{run.method} seed {run.seed} has not learned the classes, or been evaluated on "
                f"the images, that {runs[0].method} has: {way_out}."
            )
