"""Lines: accuracy over experiences, under shift, and as pixels change."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from cil.plots.style import LINES, Style, method_styles, of_diffusion, open_frame

Band = Literal["range", "confidence"]

METHODS_OF_ONE_PANEL = 9  # more of them are drawn family by family
LABEL_GAP = 4.2  # per cent of the axis between the names at the line ends: their height


def forgetting_curves(
    curves: Mapping[str, Sequence[ArrayLike]],
    families: Mapping[str, str] | None = None,
    band: Band = "range",
    columns: int = 2,
) -> Figure:
    """Accuracy on all classes seen so far against the experiences learned, one line a method.

    curves: method -> for each seed the accuracy curve (T,) in [0, 1] of `metrics.accuracy_curve`;
    see `over_experiences`.
    """
    label = "Accuracy on all classes seen (%)"
    return over_experiences(curves, label, families, band, columns, top=100.0)


def over_experiences(
    curves: Mapping[str, Sequence[ArrayLike]],
    y_label: str,
    families: Mapping[str, str] | None = None,
    band: Band = "range",
    columns: int = 2,
    top: float | None = None,
) -> Figure:
    """Shares, in per cent, against the experiences learned, one line a method.

    curves: method -> a curve (T,) for each seed, NaN where there is no value; seeds and methods may
    be of different length. The line is the mean over seeds. The band reaches from the lowest to the
    highest seed; that of "confidence" is Student's 95 % interval of the mean, and every seed is a
    thin line. Methods are drawn in the order given. More than `METHODS_OF_ONE_PANEL` have a panel a
    family, where the others are grey; families: method -> its name; columns: panels beside each
    other, a single one being narrow enough for a phone. top: of the axis, in per cent;
    None: as the values need it.
    """
    values = {name: 100 * _stacked(seeds) for name, seeds in curves.items()}
    panels: dict[str, list[str]] = {}
    for name in curves:
        title = families[name] if families and len(curves) > METHODS_OF_ONE_PANEL else ""
        panels.setdefault(title, []).append(name)
    panels = panels or {"": []}
    width = 5.2 if columns == 1 else 7.2
    columns = min(len(panels), columns)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width * columns, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = method_styles(list(curves))
    note = _seeds({len(seeds) for seeds in curves.values()}, band)
    others = "grey: those of the other panels" if len(panels) > 1 else ""
    last = max((part.shape[1] for part in values.values()), default=1)
    if top is None:
        top = 1.08 * max((float(np.nanmax(part)) for part in values.values()), default=1.0) or 1.0
    for axes, (title, names) in zip(grid, panels.items(), strict=False):
        for name in [name for name in curves if name not in names]:
            known, x = _known(values[name])
            mean = np.nanmean(known, axis=0)
            axes.plot(x, mean, color="#DDDDDD", linewidth=1.0, zorder=1)
        ends = {}
        for name in names:
            known, x = _known(values[name])
            ends[name] = _draw_curve(axes, known, styles[name], name, x, band)
        said = "; ".join(part for part in (note, others) if part)
        _finish_axes(axes, last, top, y_label, ": ".join(part for part in (title, said) if part))
        _label_ends(axes, ends, styles, top)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def _seeds(counts: set[int], band: Band) -> str:
    """What a line and its band are, where there are several seeds."""
    most = max(counts, default=1)
    over = f"{'up to ' if len(counts) > 1 else ''}{most} seeds"
    if most == 1:
        return ""
    if band == "range":
        return f"mean and range over {over}"
    return f"mean, 95 % confidence band, {over} (thin)"


def _known(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[float]]:
    """The columns of (seeds, T) that hold any value, and after how many experiences they were."""
    columns = np.flatnonzero(~np.isnan(values).all(axis=0))
    return values[:, columns], (columns + 1.0).tolist()


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
    A dotted line lies at `chance` per cent. The axis ends at 100, or at 50 if all is well below.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    width = 1.2 + 2.2 * columns
    figure = Figure(figsize=(width, 0.9 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    styles = method_styles(names)
    handles: dict[str, Artist] = {}
    seeds_of_all = [
        seed for curves in panels.values() for seeds in curves.values() for seed in seeds
    ]
    highest = max((np.nan_to_num(seed).max() for seed in seeds_of_all), default=1.0)
    top = 50 if max(100 * highest, chance or 0) < 48 else 100
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for name, seeds in curves.items():
            _draw_curve(axes, 100 * _stacked(seeds), styles[name], name, x)
            handles.setdefault(name, axes.lines[-1])
        axes.set_title(title, loc="left", fontsize="medium")
        if chance is not None:
            axes.axhline(chance, color="#777777", linestyle=":", linewidth=1.2, zorder=1)
        axes.set_ylim(0, top)
        axes.set_xticks(x)
        open_frame(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(x_label, fontsize="medium")
    figure.supylabel(y_label, fontsize="medium")
    lines, fitting = list(handles.values()), max(1, int(width / 1.95))  # names of two inches
    figure.legend(lines, names, loc="outside upper center", ncols=fitting, frameon=False)
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
    x: Sequence[float],
    band: Band = "range",
) -> tuple[float, float]:
    """Draw values (seeds, X) in per cent at x; returns where the line ends."""
    colour, marker = style
    mean = np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)  # of places not known: NaN
    if len(values) > 1:
        low, high = _interval(values) if band == "confidence" else _range(values)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        for seed in values if band == "confidence" else ():
            axes.plot(x, seed, color=colour, linewidth=0.6, alpha=0.7, zorder=2)
    axes.plot(
        x,
        mean,
        color=colour,
        marker=marker,
        markersize=7,
        linewidth=1.8,
        linestyle="--" if of_diffusion(name) else "-",
        markeredgecolor="white",
        markeredgewidth=0.5,
        clip_on=False,
        zorder=3,
    )
    return float(x[-1]), float(mean[-1])


def _range(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.nanmin(values, axis=0), np.nanmax(values, axis=0)


def _interval(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Student's 95 % interval of the mean over seeds; none where there is one seed alone."""
    mean, count = np.nanmean(values, axis=0), (~np.isnan(values)).sum(axis=0)
    freedom = np.maximum(count - 1, 1)
    error = np.sqrt(np.nansum((values - mean) ** 2, axis=0) / freedom / count)
    half = stdtrit(freedom, 0.975) * error
    return mean - half, mean + half


def _finish_axes(axes: Axes, last: int, top: float, y_label: str, note: str) -> None:
    if last == 1:
        axes.set_xlim(0.5, 1.5)
        axes.set_xticks([1])
    else:
        axes.set_xlim(1 - 0.03 * last, last)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, top)
    axes.set_xlabel("Experiences learned")
    axes.set_ylabel(y_label)
    open_frame(axes)
    if note:
        axes.set_title(note, loc="left", fontsize="small", color="#555555")


def _label_ends(
    axes: Axes,
    ends: Mapping[str, tuple[float, float]],
    styles: Mapping[str, Style],
    top: float,
) -> None:
    """Write each method's name and last value to the right of the plot, near its line's end."""
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = spread([ends[name][1] for name in names], LABEL_GAP * top / 100, 0.0, top)
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
