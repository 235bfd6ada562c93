"""Figures, used alike by runs, W&B, notebooks and the report; `style` gives all of them one look.

They are built on matplotlib's objects alone: no pyplot, no global state, no window, so they can be
drawn in any thread and on a machine without a display.
"""

from matplotlib.figure import Figure

from cil.plots.curves import (
    accuracy_matrix,
    changing_pixels,
    confusion,
    forgetting_curves,
    small_multiples,
)
from cil.plots.pictures import heat_maps, sample_grid, signed_maps, tinted
from cil.plots.style import method_styles

__all__ = [
    "Figure",
    "accuracy_matrix",
    "changing_pixels",
    "confusion",
    "forgetting_curves",
    "heat_maps",
    "method_styles",
    "sample_grid",
    "signed_maps",
    "small_multiples",
    "tinted",
]
