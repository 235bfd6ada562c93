"""The numbers of a page: rows of the tables, accuracy matrices and curves, all from the records.

Letters: T experiences. Methods come in one order everywhere: the best last accuracy first.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cil import metrics, plots, table
from cil.records import RunView, figure_bytes
from cil.report.pictures import data_uri

HIGH_IS_BEST = ("last_accuracy", "average_incremental_accuracy", "backward_transfer")
LARGEST_TABLE = 20  # class groups: larger matrices are pictures
# What stands in the summary beside the table's costs: number -> heading.
MORE_COSTS = {
    "training_seconds": "train s",
    "milliseconds_an_image": "ms/img",
    "likelihood_evaluations": "evaluations/img",
}


@dataclass(frozen=True)
class Column:
    """A sortable column; high: whether its highest number is the best, and comes first."""

    heading: str
    high: bool


@dataclass(frozen=True)
class Cell:
    """A number as it is shown and as it is sorted; link: where it comes from."""

    text: str
    value: float
    link: str


@dataclass(frozen=True)
class Row:
    name: str
    id: str  # of the method's runs on the page
    seeds: int
    stores: bool  # training images
    cells: list[Cell]


@dataclass(frozen=True)
class Matrix:
    """One method's accuracy matrix, the mean over its seeds, as lines of (per cent, colours)."""

    method: str
    seeds: int
    groups: list[str]
    lines: list[list[tuple[str, str, str]]]
    picture: str  # a data URI instead of lines, where numbers in cells could not be read
    last: tuple[str, str]  # the lowest and the highest of its last row


def in_order(runs: Sequence[RunView]) -> list[RunView]:
    """The best method first, its seeds together.

    Raises:
        UserError: runs of several experiments, or of several settings of one method.
    """
    best = table.over_seeds(runs)[("last_accuracy", "mean")]
    return sorted(runs, key=lambda r: (-best[r.method], r.method, r.seed))


def by_method(runs: Sequence[RunView]) -> dict[str, list[RunView]]:
    groups: dict[str, list[RunView]] = {}
    for r in runs:
        groups.setdefault(r.method, []).append(r)
    return groups


def by_stream(runs: Sequence[RunView]) -> list[list[RunView]]:
    """The runs of the same stream and class groups together: their numbers can be compared.

    A fingerprint alone does not tell, as that of a stream cut short is the whole one's.
    """
    streams: dict[tuple[str, ...], list[RunView]] = {}
    for r in runs:
        streams.setdefault((r.stream["fingerprint"], *group_names(r.stream)), []).append(r)
    return list(streams.values())


def anchor(method: str) -> str:
    """The id of a method's runs on the page."""
    return "runs-" + re.sub(r"[^A-Za-z0-9_-]", "-", method)


def result_keys() -> list[str]:
    """The numbers of the result columns, by their names in the summary."""
    return [*table.PERCENT, *table.COSTS]


def result_columns() -> list[Column]:
    percents = [Column(f"{table.PERCENT[k]} %", k in HIGH_IS_BEST) for k in table.PERCENT]
    return [*percents, *(Column(heading, False) for heading in table.COSTS.values())]


def result_rows(runs: Sequence[RunView]) -> list[Row]:
    """A row a method with the numbers of the table that the command prints."""
    rows = []
    for name, numbers in table.over_seeds(runs).iterrows():
        method = str(name)
        link, keys = f"#{anchor(method)}", result_keys()
        texts = [table.percent(numbers[k]) for k in table.PERCENT]
        texts += [table.quantity(numbers[k]["mean"]) for k in table.COSTS]
        values = [float(numbers[k]["mean"]) for k in keys]
        cells = [Cell(_spaced(t), v, link) for t, v in zip(texts, values, strict=True)]
        rows.append(_row(method, numbers, cells))
    return rows


def run_cells(run: RunView, link: str) -> list[Cell]:
    """One run's numbers, each of them with a link to its folder."""
    texts = [f"{100 * run.summary[k]:.1f}" for k in table.PERCENT]
    texts += [table.quantity(run.summary[k]) for k in table.COSTS]
    values = [float(run.summary[k]) for k in result_keys()]
    return [Cell(_spaced(t), v, link) for t, v in zip(texts, values, strict=True)]


def cost_rows(runs: Sequence[RunView]) -> list[Row]:
    """A row a method: what a user waits for, mean and deviation over the seeds."""
    keys = [k for k in MORE_COSTS if all(k in r.summary for r in runs)]
    numbers = table.results(runs)
    each = numbers.groupby("method", sort=False)[[*keys, "stored_images"]]
    counted = each.agg(["mean", "std", "count"])
    return [
        _row(str(name), row, [_cost_cell(row[k], f"#{anchor(str(name))}") for k in keys])
        for name, row in counted.iterrows()
    ]


def matrices(runs: Sequence[RunView]) -> list[Matrix]:
    """The mean matrix of each method."""
    return [_matrix(method, seeds) for method, seeds in by_method(runs).items()]


def curve_rows(runs: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """The curves in numbers: a method and its accuracy after each experience, in per cent."""
    rows = []
    for method, seeds in by_method(runs).items():
        curves = pd.DataFrame([metrics.accuracy_curve(r.matrix, r.sizes) for r in seeds])
        each = curves.agg(["mean", "std", "count"])
        rows.append((method, [_spaced(table.percent(each[t])) for t in each]))
    return rows


def group_names(stream: Mapping[str, Any]) -> list[str]:
    """The classes of each group, by name, in the order they arrived."""
    names = stream["class_names"]
    return [", ".join(str(names[label]) for label in group) for group in stream["experiences"]]


def _row(method: str, numbers: pd.Series, cells: list[Cell]) -> Row:
    stored = numbers["stored_images"]
    return Row(method, anchor(method), int(stored["count"]), bool(stored["mean"] > 0), cells)


def _cost_cell(number: pd.Series, link: str) -> Cell:
    mean, several = float(number["mean"]), number["count"] > 1 and number["std"] > 0
    digits = 0 if mean.is_integer() and not several else 2 - int(np.clip(np.log10(mean), 0, 2))
    text = f"{mean:.{digits}f}"
    if several:
        text += f"±{number['std']:.{digits}f}"
    return Cell(_spaced(text), mean, link)


def _matrix(method: str, runs: Sequence[RunView]) -> Matrix:
    mean: NDArray[np.float64] = np.mean([r.matrix for r in runs], axis=0)
    groups = group_names(runs[0].stream)[: len(mean)]
    if max(map(len, groups)) > 8:
        groups = [str(i + 1) for i in range(len(mean))]
    last = (f"{100 * mean[-1].min():.0f}", f"{100 * mean[-1].max():.0f}")
    if len(mean) > LARGEST_TABLE:
        figure = plots.accuracy_matrix(mean, groups, "")
        picture = data_uri(figure_bytes(figure, "svg"), "svg+xml")
        return Matrix(method, len(runs), groups, [], picture, last)
    lines = [
        [(f"{100 * value:.0f}", *plots.cell_colours(float(value))) for value in row[: t + 1]]
        for t, row in enumerate(mean)
    ]
    return Matrix(method, len(runs), groups, lines, "", last)


def _spaced(text: str) -> str:
    """With spaces that do not break and a minus as long as a plus, which no zero has."""
    text = re.sub(r"^-(0\.0+(?!\d))", r"\1", text)
    return text.replace("±", "\u00a0±\u00a0").replace("-", "−")
