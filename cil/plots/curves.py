"""Lines and matrices: accuracies over experiences, over strengths, over pixels."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from cil.plots.style import LINES, Style, method_styles, open_frame, shortened

METHODS_OF_ONE_PANEL = 9  # more of them are drawn family by family
LABEL_GAP = 4.2  # per cent of accuracy between the names at the line ends: their height
NAMED_CLASSES = 50  # names that can be read beside a matrix
ANNOTATED_GROUPS = 20  # numbers in the cells of a larger matrix could not be read


def forgetting_curves(
    curves: Mapping[str, Sequence[ArrayLike]], families: Mapping[str, str] | None = None
) -> Figure:
    """Accuracy on all classes seen so far against the experiences learned, one line a method.

    curves: method -> for each seed the accuracy curve (T,) in [0, 1] of `metrics.accuracy_curve`;
    seeds and methods may be of different length. The line is the mean over seeds, the band reaches
    from the lowest to the highest seed. Methods are drawn in the order given. More than
    `METHODS_OF_ONE_PANEL` have a panel a family, where the others are grey; families: method -> its
    name.
    """
    values = {name: 100 * _stacked(seeds) for name, seeds in curves.items()}
    panels: dict[str, list[str]] = {}
    for name in curves:
        title = families[name] if families and len(curves) > METHODS_OF_ONE_PANEL else ""
        panels.setdefault(title, []).append(name)
    panels = panels or {"": []}
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.2 * columns, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = method_styles(list(curves))
    counts = {len(seeds) for seeds in curves.values()}
    over = f"{'up to ' if len(counts) > 1 else ''}{max(counts, default=1)} seeds"
    note = f"mean and range over {over}" if max(counts, default=1) > 1 else ""
    last = max((part.shape[1] for part in values.values()), default=1)
    for axes, (title, names) in zip(grid, panels.items(), strict=False):
        for name in set(curves) - set(names):
            mean = np.nanmean(values[name], axis=0)
            axes.plot(np.arange(1, len(mean) + 1), mean, color="#DDDDDD", linewidth=1.0, zorder=1)
        ends = {name: _draw_curve(axes, values[name], styles[name], name) for name in names}
        _finish_axes(axes, last, ": ".join(part for part in (title, note) if part))
        _label_ends(axes, ends, styles)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


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


def small_multiples(
    panels: Mapping[str, Mapping[str, Sequence[ArrayLike]]],
    x: Sequence[float],
    x_label: str,
    y_label: str,
    chance: float | None = None,
) -> Figure:
    """A small plot a panel, all with the same axes and methods; one legend above them.

    panels: title -> method -> for each seed the values (X,) in [0, 1] at `x`, shown in per cent;
    NaN where there is none. Lines are means over seeds, bands reach from the lowest to the highest.
    A dotted line lies at `chance` per cent.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 2.2 * columns, 0.9 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    styles = method_styles(names)
    handles: dict[str, Artist] = {}
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for name, seeds in curves.items():
            _draw_curve(axes, 100 * _stacked(seeds), styles[name], name, x)
            handles.setdefault(name, axes.lines[-1])
        axes.set_title(title, loc="left", fontsize="medium")
        if chance is not None:
            axes.axhline(chance, color="#777777", linestyle=":", linewidth=1.2, zorder=1)
        axes.set_ylim(0, 100)
        axes.set_xticks(x)
        open_frame(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(x_label, fontsize="medium")
    figure.supylabel(y_label, fontsize="medium")
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=5, frameon=False
    )
    return figure


def changing_pixels(
    curves: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], title: str
) -> Figure:
    """Insertion and deletion: the probability of the class against the share of pixels changed.

    curves: "insertion" and "deletion" -> name -> (fractions, probabilities), one panel each.
    """
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for ax, (kind, lines) in zip(axes, curves.items(), strict=True):
        for (name, (x, y)), style in zip(lines.items(), LINES, strict=False):
            colour, dashes = style
            share = 100 * np.asarray(x)
            ax.plot(share, y, color=colour, linestyle=dashes, linewidth=1.8, label=name)
        ax.set(xlim=(0, 100), ylim=(0, 1), xlabel=f"{kind}: pixels changed (%)")
        open_frame(ax)
    axes[0].set_ylabel("Probability of the class")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _stacked(seeds: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Curves of one method -> (seeds, longest), NaN where a seed is shorter."""
    curves = [np.asarray(curve, dtype=np.float64) for curve in seeds]
    stacked = np.full((len(curves), max(map(len, curves))), np.nan)
    for row, curve in zip(stacked, curves, strict=True):
        row[: len(curve)] = curve
    return stacked


def _draw_curve(
    axes: Axes,
    values: NDArray[np.float64],
    style: Style,
    name: str,
    at: Sequence[float] | None = None,
) -> tuple[int, float]:
    """Draw values (seeds, T) in per cent, at 1 to T or `at`; returns where the line ends."""
    colour, marker = style
    x = np.arange(1, values.shape[1] + 1) if at is None else np.asarray(at)
    mean = np.nanmean(values, axis=0)
    if len(values) > 1:
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        x,
        mean,
        color=colour,
        marker=marker,
        markersize=7,
        linewidth=1.8,
        linestyle="--" if name.startswith("diffusion") else "-",
        markeredgecolor="white",
        markeredgewidth=0.5,
        clip_on=False,
        zorder=3,
    )
    return int(x[-1]), float(mean[-1])


def _finish_axes(axes: Axes, last: int, note: str) -> None:
    axes.set_xlim(1 - 0.03 * last, last)
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Experiences learned")
    axes.set_ylabel("Accuracy on all classes seen (%)")
    open_frame(axes)
    if note:
        axes.set_title(note, loc="left", fontsize="small", color="#555555")


def _label_ends(
    axes: Axes, ends: Mapping[str, tuple[int, float]], styles: Mapping[str, Style]
) -> None:
    """Write each method's name and last value to the right of the plot, near its line's end."""
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = spread([ends[name][1] for name in names], LABEL_GAP, 0.0, 100.0)
    for name, height in zip(names, heights, strict=True):
        x, y = ends[name]
        axes.annotate(
            f"{name}  {y:.1f}",
            xy=(x, y),
            xytext=(1.05, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color="#222222",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": styles[name][0],
                "linewidth": 1.0,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 5,
            },
        )


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending values moved as little as needed to lie `gap` apart, within low..high if it fits.

    Neighbours that are too close form a block around their mean; blocks that touch are merged.
    """
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and _start(blocks[-1], gap, low, high) < (
            _start(blocks[-2], gap, low, high) + gap * len(blocks[-2])
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_start(block, gap, low, high) + gap * k for block in blocks for k in range(len(block))]


def _start(block: Sequence[float], gap: float, low: float, high: float) -> float:
    """Where the first of a block's evenly spaced values lies."""
    length = gap * (len(block) - 1)
    centred = sum(block) / len(block) - length / 2
    return max(low, min(centred, high - length))


def _annotate(axes: Axes, values: NDArray[np.float64]) -> None:
    """Write every accuracy into its cell, light on dark and dark on light."""
    for (t, i), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value < 55 else "black"
            axes.text(i, t, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
