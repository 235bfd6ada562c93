"""The one look of all figures: who has which colour and marker.

Colours are Okabe & Ito's ("Color universal design", 2008), told apart by readers of every kind of
colour vision; a marker a method says the same once more for a print in grey.
"""

import zlib
from collections.abc import Sequence
from typing import Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

Style = tuple[str, str]  # colour, marker

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

LETTERS = 18  # of a class's name
# By what a class group of a generative method may change; diffusion's lines are dashed.
PLASTICITY_STYLES: dict[str, Style] = {
    "adapter": (BLUE, "o"),
    "copy": (ORANGE, "P"),
    "scratch": (SKY, "*"),
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


def shortened(name: str) -> str:
    """A class's name, cut where it would take more room than what it names."""
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def of_diffusion(name: str) -> bool:
    """Diffusion has the colours of VAR's plasticities; its lines are dashed, its markers hollow."""
    return name.startswith("diffusion")


def cell_colours(accuracy: float) -> tuple[str, str]:
    """The colours of an accuracy in [0, 1] in a matrix and of its number, at a contrast of 4.5."""
    red, green, blue, _ = colormaps["cividis"](accuracy)
    return to_hex((red, green, blue)), "white" if accuracy < 0.47 else "black"


def open_frame(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """No lines at the top and the right, faint ones behind what is drawn."""
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
