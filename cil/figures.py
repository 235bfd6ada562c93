"""Figures of finished runs, as notebooks show them: of folders or of W&B alike."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cil import plots, table
from cil.errors import UserError
from cil.results import Run, check_seeds_alone_differ

COSTS = {
    "prediction_macs": "Multiply-accumulates of classifying an image",
    "training_seconds": "Training time (s)",
}


# Recorded after each experience -> what the axis says.
SHARES = {
    "explanations/drift": "Change of the reasons (1 - cosine to the first, %)",
    "samples/drift": "Change of drawn images (mean over pixels, %)",
}


def forgetting_curves(runs: Sequence[Run]) -> plots.Figure:
    """Accuracy on all classes seen after each experience: every seed, mean, confidence band.

    Like all figures here it raises UserError for runs of several experiments, and for runs of one
    method that differ in more than their seed.
    """
    _check(runs)
    return table.curves(runs, "confidence")


def accuracy_matrices(runs: Sequence[Run]) -> plots.Figure:
    """The accuracy matrix of every method, mean over seeds; the best last accuracy first."""
    by_method = _by_method(runs)
    best = sorted(by_method, key=lambda name: -_mean(by_method[name], "last_accuracy"))
    return plots.accuracy_matrices(
        {name: np.mean([run.matrix for run in by_method[name]], axis=0) for name in best}
    )


def forgetting_bars(runs: Sequence[Run]) -> plots.Figure:
    """Forgetting and backward transfer of every method, a dot a seed; what forgets least first."""
    labels = {
        "forgetting": "Forgetting (points of accuracy, Chaudhry et al. 2018)",
        "backward_transfer": "Backward transfer (points of accuracy, GEM)",
    }
    by_method = _by_method(runs)
    return plots.bars(
        {
            label: {
                name: [100 * run.summary[number] for run in seeds]
                for name, seeds in by_method.items()
            }
            for number, label in labels.items()
        }
    )


def accuracy_against_cost(runs: Sequence[Run]) -> plots.Figure:
    """Accuracy after the last experience against what classifying an image and learning take."""
    by_method = _by_method(runs)
    panels = {
        label: {
            name: [(run.summary[cost], run.summary["last_accuracy"]) for run in seeds]
            for name, seeds in by_method.items()
        }
        for cost, label in COSTS.items()
    }
    return plots.costs(panels, "Accuracy on all classes at the end (%)")


def over_experiences(runs: Sequence[Run], name: str) -> plots.Figure:
    """A share recorded after each experience, one of `SHARES`, of all methods that have it."""
    curves: dict[str, list[np.ndarray]] = {}
    for method, seeds in _by_method(runs).items():
        values = [run.over_experiences(name) for run in seeds]
        known = [value for value in values if not np.isnan(value).all()]
        if known:
            curves[method] = known
    if not curves:
        return plots.note(f"None of these runs recorded {name}.")
    return plots.over_experiences(curves, SHARES[name], band="confidence")


@dataclass(frozen=True)
class Gallery:
    """PNG files, each with what a reader is told of it; a notebook shows them."""

    pictures: list[tuple[str, bytes]]
    sentence: str  # where there are none

    def __repr__(self) -> str:
        count = len(self.pictures)
        several = "s" if count > 1 else ""
        return f"{count} picture{several}, shown in a notebook" if count else self.sentence

    def _repr_html_(self) -> str:
        if not self.pictures:
            return f"<p>{html.escape(self.sentence)}</p>"
        return "".join(
            f'<figure style="margin: 0 0 1em"><img style="max-width: 100%" '
            f'alt="{html.escape(words)}" src="data:image/png;base64,'
            f'{base64.b64encode(png).decode()}"/>'
            f"<figcaption>{html.escape(words)}</figcaption></figure>"
            for words, png in self.pictures
        )


def pictures(runs: Sequence[Run], name: str) -> Gallery:
    """A figure of the records, such as "explanations" or "samples", of every run that has it."""
    found = [(f"{run.method}, seed {run.seed}: {name}", run.picture(name)) for run in runs]
    shown = [(words, png) for words, png in found if png is not None]
    return Gallery(shown, f"None of these runs has a picture {name}.")


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    _check(runs)
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def _check(runs: Sequence[Run]) -> None:
    check_seeds_alone_differ(runs)
    if len({tuple(run.group_names) for run in runs}) > 1:
        raise UserError(
            "These runs learned different class groups, which no figure can compare: load those of "
            "one stream."
        )


def _mean(runs: Sequence[Run], number: str) -> float:
    return float(np.mean([run.summary[number] for run in runs]))
