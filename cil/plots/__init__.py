"""Figures, used alike by runs, W&B, notebooks and the report; `style` gives all of them one look.

They are built on matplotlib's objects alone: no pyplot, no global state, no window, so they can be
drawn in any thread and on a machine without a display.
"""

from matplotlib.figure import Figure

from cil.plots.curves import (
    Band,
    changing_pixels,
    forgetting_curves,
    over_experiences,
    small_multiples,
)
from cil.plots.matrices import accuracy_matrices, accuracy_matrix, confusion
from cil.plots.methods import bars, costs
from cil.plots.pictures import heat_maps, note, sample_grid, signed_maps, tinted
from cil.plots.style import cell_colours, method_styles

__all__ = [
    "Band",
    "Figure",
    "accuracy_matrices",
    "accuracy_matrix",
    "bars",
    "cell_colours",
    "changing_pixels",
    "confusion",
    "costs",
    "forgetting_curves",
    "heat_maps",
    "method_styles",
    "note",
    "over_experiences",
    "sample_grid",
    "signed_maps",
    "small_multiples",
    "tinted",
]
