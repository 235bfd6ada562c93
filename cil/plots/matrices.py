"""Matrices: of accuracies, a row an experience and a column a class group, and of confusion."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from cil.plots.style import cell_colours, shortened

NAMED_CLASSES = 50  # names that can be read beside a matrix
MATRICES_ACROSS = 6
ANNOTATED_SMALL = 6  # groups of a small matrix whose cells hold numbers
ANNOTATED_GROUPS = 20  # numbers in the cells of a larger matrix could not be read


def accuracy_matrix(R: ArrayLike, group_names: Sequence[str], title: str) -> Figure:
    """The accuracy matrix R (T, T) in [0, 1]: a row after each experience, a column a class group.

    Cells above the diagonal (NaN) stay empty; group_names: T names, such as "0, 1".
    """
    values = 100 * np.asarray(R, dtype=np.float64)
    T = len(values)
    side = float(np.clip(0.62 * T, 2.8, 9.0))
    figure = Figure(figsize=(side + 1.9, side + 0.9), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="cividis", vmin=0, vmax=100)
    long_names = max(map(len, group_names)) * T > 9 * side
    axes.set_xticks(
        range(T),
        group_names,
        rotation=45 if long_names else 0,
        ha="right" if long_names else "center",
        rotation_mode="anchor" if long_names else "default",
    )
    axes.set_yticks(range(T), [str(t + 1) for t in range(T)])
    axes.set_xlabel("Test images of class group")
    axes.set_ylabel("Experiences learned")
    axes.set_title(title, loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if T <= ANNOTATED_GROUPS:
        _annotate(axes, values)
    figure.colorbar(image, ax=axes, label="Accuracy (%)", fraction=0.046, pad=0.03)
    return figure


def confusion(
    counts_CC: ArrayLike, class_names: Sequence[str], group_sizes: Sequence[int], title: str
) -> Figure:
    """How often each class (a row) was taken for each class (a column), in per cent of its images.

    Lines part the class groups, whose sizes are given: what drifts to the last groups is forgotten.
    """
    counts = np.asarray(counts_CC, np.float64)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    C = len(shares)
    side = float(np.clip(0.42 * C, 3.2, 9.0))
    figure = Figure(figsize=(side + 2.1, side + 0.9), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    borders = np.cumsum(group_sizes)[:-1] - 0.5
    axes.hlines(borders, -0.5, C - 0.5, color="white", linewidth=0.8)
    axes.vlines(borders, -0.5, C - 0.5, color="white", linewidth=0.8)
    shown = range(0, C, -(-C // NAMED_CLASSES))
    names = [shortened(class_names[i]) for i in shown]
    upright = max(map(len, names), default=1) <= 2
    axes.set_xticks(shown, names, rotation=0 if upright else 90, fontsize=8)
    axes.set_yticks(shown, names, fontsize=8)
    axes.set_xlabel("Predicted class, in order of arrival")
    axes.set_ylabel("Class")
    axes.set_title(title, loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if C <= ANNOTATED_GROUPS:
        _annotate(axes, np.where(shares > 0, shares, np.nan))
    figure.colorbar(image, ax=axes, label="Of the class's images (%)", fraction=0.046, pad=0.03)
    return figure


def accuracy_matrices(matrices: Mapping[str, ArrayLike]) -> Figure:
    """A small accuracy matrix (T, T) in [0, 1] for each method, all in the same colours."""
    values = {name: 100 * np.asarray(R, dtype=np.float64) for name, R in matrices.items()}
    T = max((len(part) for part in values.values()), default=1)
    columns = min(max(len(values), 1), MATRICES_ACROSS)
    rows = max(-(-len(values) // columns), 1)
    figure = Figure(figsize=(1.75 * columns + 1.1, 1.95 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    shown = None
    for axes, (name, part) in zip(grid.flatten(), values.items(), strict=False):
        masked = np.ma.masked_invalid(part)
        shown = axes.imshow(masked, cmap="cividis", vmin=0, vmax=100)
        axes.set_title(name, loc="left", fontsize=9)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
        if len(part) <= ANNOTATED_SMALL:
            _annotate(axes, part, fontsize=7)
    few = range(0, T, max(1, T // 5))
    grid[0, 0].set_xticks(few, [str(t + 1) for t in few])
    grid[0, 0].set_yticks(few, [str(t + 1) for t in few])
    for axes in grid.flatten()[len(values) :]:
        axes.set_visible(False)
    for axes in grid.flatten()[max(0, len(values) - columns) : len(values)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("Test images of class group", fontsize="medium")
    figure.supylabel("Experiences learned", fontsize="medium")
    if shown is not None:
        figure.colorbar(shown, ax=grid, label="Accuracy (%)", fraction=0.02, pad=0.01)
    return figure


def _annotate(axes: Axes, values: NDArray[np.float64], fontsize: float = 9) -> None:
    """Write every accuracy into its cell, light on dark and dark on light."""
    for (t, i), value in np.ndenumerate(values):
        if not np.isnan(value):
            _, colour = cell_colours(value / 100)
            axes.text(
                i, t, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=fontsize
            )
