"""Pictures: what a model draws, and what spoke for its answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from cil.plots.style import ORANGE, shortened

ROWS_OF_SAMPLES = 25  # of one panel: a hundred classes stand in four of them


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
    shown = [shortened(name) for name in names]
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


def note(sentence: str) -> Figure:
    """A sentence, or a line each of several, where a figure would stand that cannot be drawn."""
    lines = sentence.splitlines()
    figure = Figure(figsize=(0.3 + 0.085 * max(map(len, lines)), 0.3 + 0.2 * len(lines)))
    axes = figure.add_axes((0, 0, 1, 1))  # a notebook shows no figure that has none
    axes.set_axis_off()
    axes.text(0.02, 0.5, sentence, va="center", color="#555555")
    return figure


def tinted(image: NDArray[np.uint8], region: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """An image (H, W, 3) with a region (H, W) of it in colour."""
    colour = 255 * np.array(to_rgb(ORANGE))
    mixed = np.where(region[..., None], 0.35 * image + 0.65 * colour, image)
    return mixed.round().astype(np.uint8)


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
    axes = _beside_pictures(figure, images, row_names, headings, title)
    for n in range(N):
        for m in range(M):
            _draw_picture(axes[n, m + 1], _heated(images[n], heat[n, m]))
            axes[n, m + 1].set_xlabel(notes[n][m], fontsize=8, labelpad=2)
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
    sizes = [f"{part.shape[-1]} x {part.shape[-1]}" for part in values]
    axes = _beside_pictures(figure, images, row_names, sizes, title)
    for n in range(N):
        for k, part in enumerate(values):
            shown = axes[n, k + 1].imshow(part[n], cmap="BrBG", vmin=-most, vmax=most)
            axes[n, k + 1].set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes, label=unit, fraction=0.03, pad=0.02)
    return figure


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


def _beside_pictures(
    figure: Figure,
    images: NDArray[np.float64],
    row_names: Sequence[str],
    headings: Sequence[str],
    title: str,
) -> NDArray[np.object_]:
    """Axes (N, 1 + headings): the first column shows the pictures, the others are to be filled."""
    axes: NDArray[np.object_] = figure.subplots(len(images), 1 + len(headings), squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for ax, image, name in zip(axes[:, 0], images, row_names, strict=True):
        _draw_picture(ax, image)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for ax, heading in zip(axes[0], ["image", *headings], strict=True):
        ax.set_title(heading, fontsize=9)
    return axes


def _draw_picture(axes: Axes, picture: NDArray[np.float64]) -> None:
    grey = picture.shape[-1] == 1
    options: dict[str, Any] = {"cmap": "gray"} if grey else {}
    axes.imshow(picture[..., 0] if grey else picture, vmin=0, vmax=1, **options)
    axes.set(xticks=[], yticks=[])


def _heated(picture: NDArray[np.float64], heat: NDArray[np.float64]) -> NDArray[np.float64]:
    """The picture in grey, and not to white, so that colour is heat alone (H, W, 3)."""
    grey = 0.1 + 0.6 * picture.mean(-1, keepdims=True)
    share = 0.85 * heat[..., None]
    mixed: NDArray[np.float64] = (1 - share) * grey + share * np.array(to_rgb(ORANGE))
    return mixed
