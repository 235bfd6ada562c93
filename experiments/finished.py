"""Finished runs as commands on them need: the method as it was at the end, and its images."""

import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import ConcatDataset

from cil.command_line import near
from cil.config import TrainerConfig
from cil.errors import UserError
from cil.methods.registry import restore
from cil.methods.training import find_device
from cil.records import RunView, read_run, read_runs
from cil.results import check_seeds_alone_differ
from cil.robustness import check_one_experiment
from cil.streams.image_scan import named
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
        """Test images (N, channels, H, W) by their numbers.

        Raises:
            UserError: there are not so many.
        """
        beyond = [number for number in numbers if number >= len(self.labels)]
        if beyond:
            raise UserError(
                f"There is no test image {beyond[0]}: they are 0 to {len(self.labels) - 1}."
            )
        return torch.stack([self.test[number][0] for number in numbers])

    def class_of(self, name: str) -> int:
        """The label of a class by its name.

        Raises:
            UserError: it was never learned.
        """
        learned = list(self.stream.class_names[: self.method.classes_seen])
        if name not in learned:
            hint = near(name, learned) or f"it knows {named(learned)}."
            raise UserError(f"The run never learned a class '{name}': {hint}")
        return learned.index(name)


def add_arguments(parser: ArgumentParser) -> None:
    """Where it runs, and the cache that the run had."""
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument(
        "--cache", type=Path, default=Path("cache"), help="as that of the run (default: cache)"
    )
    parser.add_argument("--no_progress", action="store_true", help="show no progress bars")


def add_experiment(parser: ArgumentParser) -> None:
    """Which runs of an experiment a table is made of, where it runs and where it goes."""
    add = parser.add_argument
    add("runs", type=Path, help="folder of an experiment's runs, such as runs/split_digits")
    add("--methods", nargs="+", default=[], metavar="NAME", help="all there are by default")
    add("--accelerator", default="auto", choices=["auto", "cpu", "gpu"])
    add("--cache", type=Path, default=Path("cache"), help="as that of the runs (default: cache)")
    add("--name", help="of the files in experiments/results, or a path")


def add_set(parser: ArgumentParser, examples: str) -> None:
    """By what a finished run's method classifies."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings to classify by instead of the runs' own, of those methods that have them: "
        + examples,
    )


def runs_of(asked: Namespace) -> list[RunView]:
    """The finished runs that `add_experiment` was answered.

    Raises:
        UserError: they are not of one experiment, those of a method differ in more than their
            seed, or there are none of a method that was named.
    """
    every = read_runs(asked.runs)
    there = list(dict.fromkeys(run.method for run in every))
    for name in asked.methods:
        if every and name not in there:
            hint = near(name, there) or f"there are those of {', '.join(there)}."
            raise UserError(f"{asked.runs} holds no finished run of '{name}': {hint}")
    runs = [run for run in every if not asked.methods or run.method in asked.methods]
    check_one_experiment(runs, asked.runs)
    check_seeds_alone_differ(runs)
    return runs


def settings_of(asked: Namespace) -> dict[str, Any]:
    """The settings that `add_set` was answered.

    Raises:
        UserError: a word is no KEY=VALUE.
    """
    values: dict[str, Any] = {}
    for word in asked.set:
        key, equals, value = word.partition("=")
        if key in values:
            raise UserError(f"--set names {key} twice: give it one value.")
        try:
            values[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # what looks like a date that is none
            equals = ""
        if not equals or value == "":
            raise UserError(f"'{word}' was not understood: settings are written KEY=VALUE.")
    return values


def finished(folder: Path, options: Namespace) -> Finished:
    """Read a run folder and load its method.

    Raises:
        UserError: it is no folder of a finished run, or what `restore` refuses.
    """
    run, trainer = named_run(folder), trainer_of(options)
    method, stream = restore(run, trainer, options.cache)
    parts = [experience.test for experience in stream.experiences]
    labels = [label for part in parts for label in part.targets]  # type: ignore[attr-defined]
    return Finished(run, method, stream, ConcatDataset(parts), labels, trainer)


def named_run(folder: Path) -> RunView:
    """The record in a run folder; UserError when it is no folder of a finished run."""
    folder = folder.resolve()
    if not re.fullmatch(r"seed\d+", folder.name):
        raise UserError(f"{folder} is no run: name a folder RUNS/EXPERIMENT/METHOD/seedK.")
    return read_run(folder)


def trainer_of(options: Namespace) -> TrainerConfig:
    """What `add_arguments` was answered."""
    return TrainerConfig(accelerator=options.accelerator, progress=not options.no_progress)


def picture(path: Path, stream: Stream) -> Tensor:
    """An image file (channels, H, W) in [-1, 1].

    Raises:
        UserError: it is not there, no picture, or of another size than the stream's.
    """
    values = pixels(path, "RGB" if stream.channels == 3 else "L", stream)
    return torch.from_numpy(values).float().view(*values.shape[:2], -1).movedim(-1, 0) / 127.5 - 1


def pixels(path: Path, mode: str, stream: Stream) -> np.ndarray:
    """The values of an image file, in a mode of Pillow's; raises as `picture` does."""
    side = stream.image_size
    try:
        with Image.open(path) as image:
            if image.size != (side, side):
                raise UserError(
                    f"{path} has {image.width} x {image.height} pixels: the run reads {side} x "
                    f"{side}, so cut and resize it first."
                )
            return np.array(image.convert(mode))
    except (UnidentifiedImageError, SyntaxError, ValueError):
        raise UserError(f"{path} is no picture that can be read.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None


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
