"""Accuracy of every method of an experiment under shift, from its finished runs.

    python -m experiments.robustness runs/split_digits
    python -m experiments.robustness runs/split_digits --corruptions all --severities 3
    python -m experiments.robustness runs/split_imagenet100 --sets imagenet-r=data/imagenet-r
    python -m experiments.robustness runs/split_tiny_imagenet --set var.schedule=a_varc

Corruptions are those of ImageNet-C (arXiv 1903.12261), made on the fly from the experiment's own
test images, the same for every method and seed. Sets are folders as they were published:
imagenet-v2, imagenet-r, imagenet-a, imagenet-sketch, objectnet and imagenet-c (cil/streams/
shift_sets.py), restricted to the classes of the runs. The table goes to
experiments/results/robustness_EXPERIMENT.md, with a CSV file of every shift and severity and a
figure beside it; interrupted, the same line goes on after the last shift.

A-VARC (arXiv 2510.12060, 256 px, pretrained on all of ImageNet) has, in per cent on ImageNet-100:
IN-V2 79.3, IN-R 33.1, IN-Sketch 34.0, ObjectNet 24.5, IN-A 10.0, Gaussian noise 15.5, JPEG 37.7; a
ResNet50 83.4, 44.0, 45.5, 34.7, 2.0 on the first five.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cil import plots
from cil.config import TrainerConfig
from cil.environment import commit, device
from cil.errors import UserError
from cil.methods.registry import asked_by
from cil.records import RunView, figure_bytes, with_ending, write_bytes
from cil.robustness import (
    CLEAN,
    Shift,
    by_method,
    corruptions,
    evaluate,
    shift_sets,
)
from cil.run import exit_code
from cil.streams.image_scan import named
from cil.table import markdown, percent, provenance, show
from experiments.asking import place_of, typed
from experiments.finished import add_experiment, add_set, runs_of, settings_of

CORRUPTIONS = ["gaussian_noise", "jpeg_compression", "defocus_blur", "contrast"]
CAPTION = (
    "Accuracy after the last experience over all classes, in per cent. clean: without shift; a "
    "corruption is the mean over its severities."
)


def main() -> None:
    asked = _arguments()
    runs = runs_of(asked)
    trainer = TrainerConfig(accelerator=asked.accelerator, progress=False)
    settings = settings_of(asked)
    runs = [asked_by(run, settings) for run in runs]
    check_per_class(asked.per_class)
    shifts = corruptions(asked.corruptions, asked.severities, asked.per_class)
    shifts += shift_sets(_folders(asked.sets), runs[0], asked.cache)
    if not shifts:
        raise UserError("Nothing to evaluate: name --corruptions or --sets.")
    if settings or asked.per_class:  # not what the runs have recorded
        shifts.insert(0, Shift(CLEAN, per_class=asked.per_class))
    path = place_of(asked.name, f"robustness_{runs[0].experiment}", typed("robustness"), runs)
    with tqdm(total=len(runs) * len(shifts), unit=" shifts") as bar:
        frames = []
        for run in runs:
            bar.set_description(f"{run.method} seed {run.seed}")
            frames.append(evaluate(run, shifts, trainer, asked.cache, bar.update))
    frame = pd.concat(frames, ignore_index=True)
    _report(frame, runs, shifts, asked, path)


def _arguments() -> Namespace:
    parser = ArgumentParser(
        prog="python -m experiments.robustness",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_experiment(parser)
    add = parser.add_argument
    add("--corruptions", nargs="*", default=CORRUPTIONS, metavar="NAME", help="or all")
    add("--severities", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="1..5")
    add("--sets", nargs="+", default=[], metavar="KIND=FOLDER", help="such as imagenet-a=data/a")
    add("--per_class", type=int, metavar="N", help="test images of a class to corrupt (all)")
    examples = "var.schedule=a_varc var.smoothing_samples=1 diffusion.schedule=[[4,10],[16,1]]"
    add_set(parser, examples)
    return parser.parse_args()


def check_per_class(count: int | None) -> None:
    """Raises UserError for a number of images that cannot be taken."""
    if count is not None and count < 1:
        raise UserError(f"--per_class is {count}: give 1 or more.")


def _folders(sets: Sequence[str]) -> dict[str, Path]:
    pairs = [word.partition("=") for word in sets]
    for word, (_, equals, folder) in zip(sets, pairs, strict=True):
        if not equals or not folder:
            raise UserError(f"'{word}' was not understood: sets are written KIND=FOLDER.")
    return {kind: Path(folder) for kind, _, folder in pairs}


def _report(
    frame: pd.DataFrame,
    runs: Sequence[RunView],
    shifts: Sequence[Shift],
    asked: Namespace,
    path: Path,
) -> None:
    """Write the table, the CSV file and the figure, and print the table."""
    means = by_method(frame)
    names = list(dict.fromkeys(means.columns.get_level_values(0)))
    rows = [
        [str(method), *(percent(row[shift]) for shift in names)] for method, row in means.iterrows()
    ]
    severities = sorted({s.severity for s in shifts if s.severity})
    notes = [CAPTION, f"Severities {severities}." if severities else "", *_missing(shifts)]
    if asked.per_class:
        notes.append(f"Of the stream's own test images the first {asked.per_class} of each class.")
    if asked.set:
        notes.append(f"Classified by {', '.join(asked.set)}, and not as the runs were.")
    place = device(TrainerConfig(accelerator=asked.accelerator))
    where = f"Evaluated at commit {commit()}, on {place}."
    table = markdown(["method", *names], rows)
    text = [*provenance(runs, typed("robustness")), where, *filter(None, notes), table]
    write_bytes(with_ending(path, ".csv"), frame.to_csv(index=False).encode())
    write_bytes(with_ending(path, ".md"), ("\n\n".join(text) + "\n").encode())
    headings = ["method", *(name.replace("_", " ") for name in names)]
    show(f"{runs[0].experiment} under shift", headings, rows, " ".join(notes))
    written = f"written: {with_ending(path, '.md')}"
    if severities:
        write_bytes(with_ending(path, ".svg"), figure_bytes(figure(frame), "svg"))
        written += f"   figure: {with_ending(path, '.svg')}"
    print(written)


def figure(frame: pd.DataFrame) -> plots.Figure:
    """Accuracy against severity, a panel for each shift that has severities; 0 is none."""
    severities = sorted({0, *frame["severity"]})
    clean = frame[frame["shift"] == CLEAN]
    panels: dict[str, dict[str, list[np.ndarray]]] = {}
    for shift, rows in frame[frame["severity"] > 0].groupby("shift", sort=False):
        both = pd.concat([clean, rows])
        table = both.pivot_table("accuracy", ["method", "seed"], "severity", sort=False)
        panel = panels.setdefault(str(shift).replace("_", " "), {})
        for (method, _), values in table.reindex(columns=severities).iterrows():
            panel.setdefault(method, []).append(values.to_numpy())
    return plots.small_multiples(panels, severities, "Severity (0: as it is)", "Accuracy (%)")


def _missing(shifts: Sequence[Shift]) -> list[str]:
    """A sentence for each set that lacks classes of the runs."""
    sentences = []
    for shift in shifts:
        if shift.found is not None and shift.found.missing:
            missing = shift.found.missing
            sentences.append(
                f"{shift.found.name} has no image of {len(missing)} of the classes: "
                f"{named(missing)}."
            )
    return sentences


if __name__ == "__main__":
    sys.exit(exit_code(main))
