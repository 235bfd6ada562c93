"""Methods beside each other: bars of a number, and accuracy against what it cost."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from cil.plots.style import Style, method_styles, of_diffusion, open_frame

Pairs = Sequence[tuple[float, float]]

ROUNDED = 1e-6  # what is smaller is zero, and no scale of an axis
ROW = 0.23  # inches of a bar, and of a line of the legend


def bars(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """A panel of horizontal bars for each number, a bar a method: its mean, and a dot a seed.

    panels: label with its unit -> method -> a value for each seed. Methods stand in the same order
    in all panels, that of their means in the first, the lowest on top.
    """
    first = next(iter(panels.values()), {})
    names = sorted(first, key=lambda name: float(np.mean(first[name])))
    figure = Figure(
        figsize=(1.4 + 4.3 * max(len(panels), 1), 0.8 + ROW * max(len(names), 3)),
        layout="constrained",
    )
    grid = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    styles = method_styles(names)
    for axes, (label, values) in zip(grid, panels.items(), strict=False):
        for row, name in enumerate(names):
            _draw_bar(axes, row, values[name], styles[name], name)
        axes.axvline(0, color="#555555", linewidth=0.8)
        axes.set_xlabel(label)
        open_frame(axes, "x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.14)
        if not np.any(np.abs(np.concatenate([*values.values(), [0.0]])) > ROUNDED):
            axes.set_xlim(-1, 1)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def costs(panels: Mapping[str, Mapping[str, Pairs]], y_label: str) -> Figure:
    """A point a method against each cost, on a logarithmic axis; the legend, best first, is one.

    panels: label with its unit -> method -> (cost, accuracy in [0, 1]) for each seed. Points are
    means over seeds, whiskers reach over them; the grey line joins the methods that none beats in
    accuracy at the same cost or less.
    """
    figure = Figure(figsize=(4.4 * max(len(panels), 1) + 2.2, 5.0), layout="constrained")
    grid = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    first = next(iter(panels.values()), {})
    names = sorted(first, key=lambda name: -float(np.mean([y for _, y in first[name]])))
    figure.set_figheight(max(4.2, 0.7 + ROW * len(names)))
    styles = method_styles(names)
    for axes, (label, values) in zip(grid, panels.items(), strict=False):
        points = {}
        for name in names:
            points[name] = _draw_point(axes, np.asarray(values[name]), styles[name], name)
        best = _best(list(points.values()))
        axes.plot(*best, color="#BBBBBB", linewidth=1.2, drawstyle="steps-post", zorder=1)
        _scale_by_tens(axes, [cost for pairs in values.values() for cost, _ in pairs])
        axes.set_xlabel(label)
        axes.set_ylim(0, 102)
        open_frame(axes, "both")
    grid[0].set_ylabel(y_label)
    if names:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _scale_by_tens(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis that is wide enough for three numbers at the least."""
    axes.set_xscale("log")
    low, high = min(costs, default=1), max(costs, default=10)
    if high < 5 * low:
        middle = (low * high) ** 0.5
        axes.set_xlim(middle / 10**0.5, middle * 10**0.5)
    if high < 50 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(_number)


def _number(value: float, _: float) -> str:
    """10 M and 20 k, but 0.5 of what is less than one."""
    return EngFormatter(sep=" ")(value) if value >= 1 else f"{value:g}"


def _draw_bar(axes: Axes, row: int, seeds: Sequence[float], style: Style, name: str) -> None:
    colour, mean = style[0], float(np.mean(seeds))
    hatch = "////" if of_diffusion(name) else None
    face = "white" if hatch else colour
    axes.barh(row, mean, height=0.72, facecolor=face, edgecolor=colour, hatch=hatch, zorder=2)
    if len(seeds) > 1:
        axes.plot(
            seeds,
            [row] * len(seeds),
            ".",
            color="black",
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.4,
            zorder=3,
        )
    outer = max(seeds, key=abs)
    axes.annotate(
        f"{mean:.1f}",
        xy=(outer, row),
        xytext=(-4 if outer < 0 else 4, 0),
        textcoords="offset points",
        ha="right" if outer < 0 else "left",
        va="center",
        fontsize=8,
        color="#222222",
    )


def _draw_point(
    axes: Axes, seeds: NDArray[np.float64], style: Style, name: str
) -> tuple[float, float]:
    """Draw seeds (S, 2) of (cost, accuracy) as one point; returns where it is."""
    colour, marker = style
    cost, accuracy = float(seeds[:, 0].mean()), 100 * float(seeds[:, 1].mean())
    low, high = seeds.min(axis=0), seeds.max(axis=0)
    axes.plot([low[0], high[0]], [accuracy] * 2, color=colour, linewidth=1.0, zorder=2)
    axes.plot([cost] * 2, [100 * low[1], 100 * high[1]], color=colour, linewidth=1.0, zorder=2)
    hollow = of_diffusion(name)
    axes.plot(
        cost,
        accuracy,
        linestyle="none",
        marker=marker,
        markersize=11 if marker == "*" else 8,
        markerfacecolor="white" if hollow else colour,
        markeredgecolor=colour if hollow else "white",
        markeredgewidth=1.4 if hollow else 0.5,
        label=f"{name}  {accuracy:.1f}",
        zorder=3,
    )
    return cost, accuracy


def _best(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Of (cost, accuracy) those that no other reaches at the same cost or less, by cost."""
    xs: list[float] = []
    ys: list[float] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not ys or accuracy > ys[-1]:
            xs.append(cost)
            ys.append(accuracy)
    return xs, ys
