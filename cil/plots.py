"""Figures, used alike by runs, W&B and notebooks.

They are built on matplotlib's objects alone: no pyplot, no global state, no window, so they can be
drawn in any thread and on a machine without a display. Colours are Okabe & Ito's ("Color universal
design", 2008), told apart by readers of every kind of colour vision; a marker a method says the
same once more for a print in grey.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

Style = tuple[str, str]  # colour, marker

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

# By what a class group of a generative method may change; diffusion's lines are dashed.
PLASTICITY_STYLES: dict[str, Style] = {
    "adapter": (BLUE, "o"),
    "copy": (SKY, "P"),
    "scratch": (ORANGE, "*"),
    "embedding": (GREEN, "^"),
    "trunk": (PURPLE, "v"),
}
# A method looks the same in every figure; two of a family share a colour where they end far apart.
STYLES: dict[str, Style] = {
    "var": (BLUE, "o"),
    **{f"var-{name}": style for name, style in PLASTICITY_STYLES.items()},
    "diffusion": (BLUE, "o"),
    **{f"diffusion-{name}": style for name, style in PLASTICITY_STYLES.items()},
    "finetune": (VERMILION, "X"),
    "ewc": (BLUE, "h"),
    "si": (ORANGE, "p"),
    "mas": (SKY, "8"),
    "lwf": (PURPLE, ">"),
    "cwr": (GREEN, "<"),
    "ncm": (YELLOW, "H"),
    "slda": (BLACK, "d"),
    "fecam": (VERMILION, "*"),
    "agem": (VERMILION, "<"),
    "replay": (ORANGE, "D"),
    "gdumb": (PURPLE, "8"),
    "icarl": (BLUE, "p"),
    "derpp": (GREEN, "h"),
    "er_ace": (SKY, ">"),
    "scr": (YELLOW, "d"),
    "bic": (VERMILION, "H"),
    "cumulative": (BLACK, "*"),
    "joint": (BLACK, "s"),
}
# For other methods; yellow comes last, it is faint on white.
SPARE: list[Style] = [
    (SKY, "8"),
    (GREEN, "<"),
    (PURPLE, ">"),
    (BLUE, "h"),
    (ORANGE, "p"),
    (VERMILION, "d"),
    (YELLOW, "H"),
]

FEWEST_PANELS = 10  # methods: more of them are drawn family by family
# Colours and dashes of lines that are no methods, in the order they are drawn.
LINES: list[tuple[str, str]] = [
    (BLUE, "-"),
    (SKY, "--"),
    (VERMILION, "-"),
    (ORANGE, "--"),
    (GREEN, "-."),
    (PURPLE, "-"),
    (YELLOW, "-"),
    (BLACK, ":"),
    (BLACK, "-."),
]

LABEL_GAP = 4.2  # per cent of accuracy between the names at the line ends: their height
ROWS_OF_SAMPLES = 25  # of one panel: a hundred classes stand in four of them
ANNOTATED_GROUPS = 20  # numbers in the cells of a larger matrix could not be read


def forgetting_curves(
    curves: Mapping[str, Sequence[ArrayLike]], families: Mapping[str, str] | None = None
) -> Figure:
    """Accuracy on all classes seen so far against the experiences learned, one line a method.

    curves: method -> for each seed the accuracy curve (T,) in [0, 1] of `metrics.accuracy_curve`;
    seeds and methods may be of different length. The line is the mean over seeds, the band reaches
    from the lowest to the highest seed. Methods are drawn in the order given. From `FEWEST_PANELS`
    methods on, each family has a panel, where the others are grey; families: method -> its name.
    """
    values = {name: 100 * _stacked(seeds) for name, seeds in curves.items()}
    panels: dict[str, list[str]] = {}
    for name in curves:
        title = families[name] if families and len(curves) >= FEWEST_PANELS else ""
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
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
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


def sample_grid(
    images: NDArray[np.uint8],
    names: Sequence[str],
    title: str,
    columns: Sequence[str] = (),
    tile: float = 0.45,
) -> Figure:
    """Images (rows, columns, H, W, channels), a row for each name, every pixel as it is.

    `columns` are headings, `tile` the inches of an image. More than `ROWS_OF_SAMPLES` rows go on
    beside the first ones.
    """
    rows, across = images.shape[:2]
    panels = max(1, -(-rows // ROWS_OF_SAMPLES))
    height = -(-rows // panels)
    shown = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
    letters = 0.08 * max(map(len, shown), default=1)
    width = max(panels * (tile * across + letters + 0.3) + 0.2, 0.09 * len(title))
    around = 0.1 + 0.35 * bool(title) + 0.25 * bool(columns)
    figure = Figure(figsize=(width, tile * height + around), layout="constrained")
    for panel, axes in enumerate(np.atleast_1d(figure.subplots(1, panels))):
        part = slice(panel * height, min((panel + 1) * height, rows))
        _draw_tiles(axes, images[part], height, shown[part], columns)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return figure


def tinted(image: NDArray[np.uint8], region: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """An image (H, W, 3) with a region (H, W) of it in colour."""
    colour = 255 * np.array(to_rgb(ORANGE))
    mixed = np.where(region[..., None], 0.35 * image + 0.65 * colour, image)
    return mixed.round().astype(np.uint8)


def _draw_tiles(
    axes: Axes,
    images: NDArray[np.uint8],
    height: int,
    names: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Tiles in `height` rows, those below the last image left white, with a gap between them."""
    rows, across, side, _, channels = images.shape
    step = side + max(1, side // 16)
    canvas = np.full((height * step, across * step, channels), 255, np.uint8)
    for row, column in np.ndindex(rows, across):
        top, left = row * step, column * step
        canvas[top : top + side, left : left + side] = images[row, column]
    axes.imshow(
        canvas[..., 0] if channels == 1 else canvas,
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest",
    )
    middle = (side - 1) / 2
    axes.set_yticks([middle + step * row for row in range(rows)], names)
    axes.set_xticks([middle + step * i for i in range(len(columns))], columns)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def heat_maps(
    pictures: ArrayLike,
    maps: ArrayLike,
    row_names: Sequence[str],
    headings: Sequence[str],
    notes: Sequence[Sequence[str]],
    title: str,
) -> Figure:
    """A row a picture: the picture itself, then heat maps laid over it in orange.

    pictures (N, H, W, 1 or 3) and maps (N, M, H, W) in [0, 1]; row_names: N; headings: M, of the
    maps; notes: N rows of M, under each map.
    """
    images, heat = np.asarray(pictures, np.float64), np.asarray(maps, np.float64)
    N, M = heat.shape[:2]
    figure = Figure(figsize=(1.7 + 1.35 * (M + 1), 0.9 + 1.55 * N), layout="constrained")
    axes = figure.subplots(N, M + 1, squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for n in range(N):
        _draw_picture(axes[n, 0], images[n])
        axes[n, 0].set_ylabel(row_names[n], rotation=0, ha="right", va="center", fontsize=8)
        for m in range(M):
            _draw_picture(axes[n, m + 1], _heated(images[n], heat[n, m]))
            axes[n, m + 1].set_xlabel(notes[n][m], fontsize=8, labelpad=2)
    for ax, heading in zip(axes[0], ["image", *headings], strict=True):
        ax.set_title(heading, fontsize=9)
    return figure


def signed_maps(
    pictures: ArrayLike, maps: Sequence[ArrayLike], row_names: Sequence[str], title: str, unit: str
) -> Figure:
    """A row a picture: the picture, then maps of K scales; green speaks for, brown against.

    pictures (N, H, W, 1 or 3) in [0, 1]; maps: K of (N, p_k, p_k). One range of colours for all.
    """
    images = np.asarray(pictures, np.float64)
    values = [np.asarray(part, np.float64) for part in maps]
    N, K = len(images), len(values)
    most = max(float(np.abs(part).max()) for part in values) or 1.0
    figure = Figure(figsize=(2.3 + 1.35 * (K + 1), 0.6 + 1.45 * N), layout="constrained")
    axes = figure.subplots(N, K + 1, squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for n in range(N):
        _draw_picture(axes[n, 0], images[n])
        axes[n, 0].set_ylabel(row_names[n], rotation=0, ha="right", va="center", fontsize=8)
        for k, part in enumerate(values):
            shown = axes[n, k + 1].imshow(part[n], cmap="BrBG", vmin=-most, vmax=most)
            axes[n, k + 1].set(xticks=[], yticks=[])
    headings = ["image", *(f"{part.shape[-1]} x {part.shape[-1]}" for part in values)]
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.set_title(heading, fontsize=9)
    figure.colorbar(shown, ax=axes, label=unit, fraction=0.03, pad=0.02)
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
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Probability of the class")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def method_styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour and marker for each method: fixed for known ones, for others by name.

    Two unknown methods of one figure never share a style as long as there are spare ones.
    """
    styles = {name: STYLES[name] for name in names if name in STYLES}
    for name in names:
        if name in styles:
            continue
        start = zlib.crc32(name.encode())  # hash() differs from process to process
        order = [SPARE[(start + k) % len(SPARE)] for k in range(len(SPARE))]
        colours = {colour for colour, _ in styles.values()}
        free = [style for style in order if style not in styles.values()]
        unused = [style for style in free if style[0] not in colours]
        styles[name] = (unused or free or order)[0]
    return {name: styles[name] for name in names}


def _draw_picture(axes: Axes, picture: NDArray[np.float64]) -> None:
    grey = picture.shape[-1] == 1
    options: dict[str, Any] = {"cmap": "gray"} if grey else {}
    axes.imshow(picture[..., 0] if grey else picture, vmin=0, vmax=1, **options)
    axes.set(xticks=[], yticks=[])


def _heated(picture: NDArray[np.float64], heat: NDArray[np.float64]) -> NDArray[np.float64]:
    """The picture in grey, and not to white, so that colour is heat alone (H, W, 3)."""
    grey = 0.1 + 0.6 * picture.mean(-1, keepdims=True)
    colour = np.array([int(ORANGE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    share = 0.85 * heat[..., None]
    mixed: NDArray[np.float64] = (1 - share) * grey + share * colour
    return mixed


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
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
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
