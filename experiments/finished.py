"""Finished runs as commands on them need: the method as it was at the end, and test images."""

import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from cil.config import TrainerConfig
from cil.errors import UserError
from cil.methods.registry import restore
from cil.methods.training import find_device
from cil.records import RunView, read_run
from cil.streams.stream import Stream

BATCH_SIZE = 256  # images that are scored at once


@dataclass(frozen=True, eq=False)
class Finished:
    """A run, what it learned, and its test images in the order of predictions.csv."""

    run: RunView
    method: Any
    stream: Stream
    test: ConcatDataset
    labels: list[int]
    trainer: TrainerConfig

    @property
    def device(self) -> torch.device:
        return find_device(self.trainer)

    def images(self, numbers: Sequence[int]) -> Tensor:
        """Test images (N, channels, H, W) by their numbers."""
        return torch.stack([self.test[number][0] for number in numbers])

    def class_of(self, name: str) -> int:
        """The label of a class by its name.

        Raises:
            UserError: it was never learned.
        """
        if name not in self.stream.class_names:
            known = ", ".join(self.stream.class_names[:10])
            more = ", ..." if len(self.stream.class_names) > 10 else ""
            raise UserError(f"The run learned no class '{name}': it knows {known}{more}.")
        return self.stream.class_names.index(name)


def add_arguments(parser: ArgumentParser) -> None:
    """Where it runs, and the cache that the run had."""
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument(
        "--cache", type=Path, default=Path("cache"), help="as that of the run (default: cache)"
    )
    parser.add_argument("--no_progress", action="store_true", help="show no progress bars")


def finished(folder: Path, options: Namespace) -> Finished:
    """Read a run folder and load its method.

    Raises:
        UserError: it is no folder of a finished run, or what `restore` refuses.
    """
    folder = folder.resolve()
    if not re.fullmatch(r"seed\d+", folder.name):
        raise UserError(f"{folder} is no run: name a folder RUNS/EXPERIMENT/METHOD/seedK.")
    trainer = TrainerConfig(accelerator=options.accelerator, progress=not options.no_progress)
    run = read_run(folder)
    method, stream = restore(run, trainer, options.cache)
    parts = [experience.test for experience in stream.experiences]
    labels = [label for part in parts for label in part.targets]  # type: ignore[attr-defined]
    return Finished(run, method, stream, ConcatDataset(parts), labels, trainer)


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The function of all images, of so many at a time as fit."""
    return torch.cat([function(part) for part in images.split(BATCH_SIZE)])


def every_label_in_turn(labels: Sequence[int], count: int) -> list[int]:
    """The numbers of `count` images, spread evenly over the classes.

    Raises:
        UserError: there are not so many.
    """
    if not 1 <= count <= len(labels):
        raise UserError(f"images is {count}: there are {len(labels)}, so give 1 to that many.")
    met: Counter[int] = Counter()
    turns = []
    for label in labels:
        turns.append(met[label])
        met[label] += 1
    order = sorted(range(len(labels)), key=lambda i: (turns[i], labels[i]))
    return sorted(order[:count])
