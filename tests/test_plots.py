"""Figures: what stands in them, what keeps them legible, and that they draw anywhere."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from IPython.core.pylabtools import print_figure
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from cil.methods.registry import SETS
from cil.plots import (
    accuracy_matrices,
    accuracy_matrix,
    bars,
    cell_colours,
    confusion,
    costs,
    forgetting_curves,
    method_styles,
    note,
    over_experiences,
    sample_grid,
    small_multiples,
    tinted,
)
from cil.plots.curves import spread
from cil.plots.style import SPARE, STYLES

CURVES = {
    "var": [np.array([1.0, 0.98, 0.97]), np.array([1.0, 0.96, 0.95])],
    "finetune": [np.array([1.0, 0.5, 0.33])],
    "joint": [np.array([0.99, 0.97, 0.96])],
}


def drawn(figure: Figure) -> Figure:
    figure.savefig(io.BytesIO(), format="png")
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_forgetting_curves_show_the_mean_in_per_cent_of_every_method_in_order() -> None:
    axes = drawn(forgetting_curves(CURVES)).axes[0]
    assert len(axes.lines) == 3
    assert np.allclose(axes.lines[0].get_ydata(), [100, 97, 96])
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]  # type: ignore[union-attr]
    assert [line.get_color() for line in axes.lines] == [STYLES[name][0] for name in CURVES]
    assert axes.get_xlabel() == "Experiences learned"
    assert axes.get_ylabel() == "Accuracy on all classes seen (%)"
    assert axes.get_ylim() == (0, 100)


def test_the_band_spans_the_seeds_and_the_title_says_so() -> None:
    axes = forgetting_curves(CURVES).axes[0]
    (band,) = axes.collections
    ys = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert (ys.min(), ys.max()) == (95, 100)
    assert axes.get_title(loc="left") == "mean and range over up to 2 seeds"
    assert not forgetting_curves({"var": CURVES["var"][:1]}).axes[0].get_title(loc="left")


def test_the_confidence_band_is_students_and_every_seed_a_thin_line() -> None:
    seeds = [np.array([0.9, 0.5]), np.array([0.9, 0.6]), np.array([0.9, 0.7])]
    axes = forgetting_curves({"var": seeds, "joint": seeds[:1]}, band="confidence").axes[0]
    (band,) = axes.collections
    ys = np.asarray(band.get_paths()[0].vertices)[:, 1]
    # of 50, 60 and 70: a deviation of 10, and 4.3027 of the table for two degrees of freedom
    half = 4.3027 * 10 / np.sqrt(3)
    assert (ys.min(), ys.max()) == pytest.approx((60 - half, max(90, 60 + half)), abs=1e-3)
    assert sorted(line.get_linewidth() for line in axes.lines) == [0.6] * 3 + [1.8] * 2
    assert "95 % confidence band, up to 3 seeds" in axes.get_title(loc="left")


def test_a_seed_that_is_shorter_leaves_its_last_experiences_without_a_band() -> None:
    figure = drawn(forgetting_curves({"var": [[1.0, 0.9], [0.9]]}, band="confidence"))
    ys = np.asarray(figure.axes[0].collections[0].get_paths()[0].vertices)
    assert set(ys[ys[:, 0] == 2, 1]) == {90}


def test_shares_over_experiences_fill_their_axis_and_start_where_they_are_known() -> None:
    curves = {"var-trunk": [[np.nan, 0.02, 0.04]], "var": [[np.nan, 0.0, 0.0]]}
    axes = drawn(over_experiences(curves, "Images changed (%)")).axes[0]
    assert axes.get_ylabel() == "Images changed (%)"
    assert axes.get_ylim()[1] == pytest.approx(4.32)
    assert [line.get_xdata().tolist() for line in axes.lines] == [[2, 3], [2, 3]]  # type: ignore[union-attr]
    drawn(over_experiences({"var": [[np.nan, 0.0]]}, "Images changed (%)"))


def test_a_note_says_why_there_is_no_figure() -> None:
    figure = drawn(note("None of these runs has one."))
    assert texts(figure) == ["None of these runs has one."]
    assert not figure.axes[0].axison
    assert print_figure(figure)  # what a notebook shows: nothing of a figure without axes
    assert note("one\nanother").get_figheight() > figure.get_figheight()


def test_every_line_is_named_at_its_end_and_no_name_covers_another() -> None:
    close = {f"m{i}": [np.array([1.0, 0.96 + 0.002 * i])] for i in range(5)} | CURVES
    figure = drawn(forgetting_curves(close))
    assert set(texts(figure)) >= {"var  96.0", "finetune  33.0", "m0  96.0"}
    boxes = sorted(
        (text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0
    )
    # an annotation's extent holds its leader line too: compare the middles with the text height
    heights = [text.xyann[1] for text in figure.axes[0].texts]  # type: ignore[attr-defined]
    assert min(np.diff(sorted(heights))) > 4
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


def test_many_methods_are_drawn_family_by_family() -> None:
    many = {f"{kind}-{i}": [np.array([1.0, 0.9 - 0.01 * i])] for i in range(5) for kind in "ab"}
    families = {name: name[0] for name in many}
    figure = drawn(forgetting_curves(many, families))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"{kind}: grey: those of the other panels" for kind in "ab"
    ]
    for axes, kind in zip(figure.axes, "ab", strict=True):
        assert len(axes.lines) == 10  # the other family's are there, in grey
        assert {t.get_text()[0] for t in axes.texts} == {kind}
    few = {name: many[name] for name in list(many)[:9]}
    assert len(drawn(forgetting_curves(few, families)).axes) == 1
    assert all(method in STYLES for method in SETS["all"])


def test_a_diffusion_model_is_dashed_in_the_colour_of_its_plasticity() -> None:
    curves = {"var-copy": [[1.0, 0.9]], "diffusion-copy": [[1.0, 0.8]]}
    lines = forgetting_curves(curves).axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    assert lines[0].get_color() == lines[1].get_color()


def test_curves_of_unequal_length_and_none_at_all_draw() -> None:
    figure = drawn(forgetting_curves({"var": [[1.0, 0.9], [1.0]], "joint": [[0.9]]}))
    assert "var  90.0" in texts(figure)
    drawn(forgetting_curves({}))


def test_of_one_experience_the_axes_have_round_numbers_around_the_point() -> None:
    axes = drawn(forgetting_curves({"joint": [[0.5]]})).axes[0]
    assert axes.get_xlim() == (0.5, 1.5)
    assert axes.get_xticks().tolist() == [1]
    axes = drawn(bars({"Forgetting": {"joint": [0.0]}, "BWT": {"joint": [-1e-15]}})).axes[1]
    assert axes.get_xlim() == (-1, 1)
    axes = drawn(costs({"Seconds": {"joint": [(79.0, 0.5)]}}, "Accuracy (%)")).axes[0]
    shown = axes.xaxis.get_major_formatter().format_ticks(axes.get_xticks())
    low, high = axes.get_xlim()
    inside = [t for t, x in zip(shown, axes.get_xticks(), strict=True) if low < x < high]
    assert inside == ["50", "100", "200"]
    axes = drawn(costs({"Seconds": {"joint": [(0.4, 0.5)]}}, "Accuracy (%)")).axes[0]
    assert {"0.2", "0.5", "1"} <= {label.get_text() for label in axes.get_xticklabels()}
    assert "" in {label.get_text() for label in axes.get_xticklabels(minor=True)}


def test_accuracy_matrix_shows_numbers_up_to_the_diagonal() -> None:
    R = np.array([[0.9, np.nan], [0.25, 1.0]])
    figure = drawn(accuracy_matrix(R, ["0, 1", "2, 3"], "var, seed 0"))
    axes, bar = figure.axes
    assert sorted(texts(figure)) == ["100", "25", "90"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0, 1", "2, 3"]
    assert axes.get_title(loc="left") == "var, seed 0"
    assert bar.get_ylabel() == "Accuracy (%)"
    assert axes.images[0].get_clim() == (0, 100)


def test_a_large_matrix_keeps_its_size_and_drops_its_numbers() -> None:
    R = np.where(np.tri(50) > 0, 0.5, np.nan)
    figure = drawn(accuracy_matrix(R, [f"group {i}" for i in range(50)], "large"))
    assert max(figure.get_size_inches()) < 12
    assert texts(figure) == []


def test_small_matrices_share_their_colours_and_lie_in_rows() -> None:
    R = np.array([[0.9, np.nan], [0.25, 1.0]])
    figure = drawn(accuracy_matrices({f"m{i}": R for i in range(8)}))
    *panels, bar = figure.axes
    shown = [axes for axes in panels if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [f"m{i}" for i in range(8)]
    assert {axes.images[0].get_clim() for axes in shown} == {(0, 100)}
    assert sorted(texts(figure)) == ["100", "25", "90"]
    assert bar.get_ylabel() == "Accuracy (%)"
    drawn(accuracy_matrices({}))


def test_bars_are_sorted_by_the_first_panel_in_the_colours_of_the_methods() -> None:
    first = {"finetune": [90.0, 94.0], "diffusion-copy": [1.0], "joint": [0.5, -0.1]}
    figure = drawn(bars({"Forgetting (%)": first, "BWT (%)": {n: [-1.0] for n in first}}))
    for axes in figure.axes:
        assert [bar.get_y() for bar in axes.patches] == sorted(bar.get_y() for bar in axes.patches)  # type: ignore[attr-defined]
    axes = figure.axes[0]
    order = ["joint", "diffusion-copy", "finetune"]
    assert [label.get_text() for label in axes.get_yticklabels()] == order
    assert [to_hex(bar.get_edgecolor()).upper() for bar in axes.patches] == [
        STYLES[name][0] for name in order
    ]
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, True, False]
    assert [axes.get_xlabel() for axes in figure.axes] == ["Forgetting (%)", "BWT (%)"]
    assert texts(figure) == ["0.2", "1.0", "92.0"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    drawn(bars({}))


def test_costs_name_the_best_first_and_join_what_none_beats() -> None:
    points = {
        "finetune": [(1e6, 0.2), (3e6, 0.4)],
        "joint": [(2e6, 0.9)],
        "var": [(1e8, 0.8)],
        "diffusion": [(2e8, 0.95)],
    }
    figure = drawn(costs({"Multiply-accumulates": points}, "Accuracy (%)"))
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "diffusion  95.0",
        "joint  90.0",
        "var  80.0",
        "finetune  30.0",
    ]
    front = axes.lines[-1]
    assert np.asarray(front.get_xdata()).tolist() == [2e6, 2e8]
    assert np.allclose(front.get_ydata(), [90, 95])
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Multiply-accumulates", "Accuracy (%)")
    faces = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    assert faces == ["white", STYLES["var"][0]]  # diffusion is hollow
    drawn(costs({}, "Accuracy (%)"))


def test_methods_keep_their_style_and_never_share_one() -> None:
    alone = method_styles(["mine"])["mine"]
    assert method_styles(["var", "mine", "joint"])["var"] == STYLES["var"]
    assert alone in SPARE
    names = ["var", "finetune", "replay", "joint", "mine", "yours", "theirs", "ours"]
    styles = method_styles(names)
    assert list(styles) == names
    assert len(set(styles.values())) == len(names)
    drawn_alike = {"var", *(name for name in STYLES if name.startswith("diffusion"))}
    kept = [style for name, style in STYLES.items() if name not in drawn_alike]
    assert len(set(kept)) == len(kept)
    assert len(method_styles([f"m{i}" for i in range(30)])) == 30  # more than there are styles


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10.0, 50.0], [10.0, 50.0]),
        ([50.0, 50.0], [48.0, 52.0]),
        ([99.0, 100.0], [96.0, 100.0]),
        ([0.0, 0.0, 1.0], [0.0, 4.0, 8.0]),
        ([50.0, 52.0, 55.0], [48.333, 52.333, 56.333]),
        ([], []),
    ],
)
def test_spread_moves_labels_apart_and_no_further(
    values: list[float], expected: list[float]
) -> None:
    assert spread(values, 4.0, 0.0, 100.0) == pytest.approx(expected, abs=1e-3)


def test_no_pyplot_is_involved() -> None:
    program = (
        "import sys, io, cil.plots as p; p.forgetting_curves({'var': [[1, .5]]})"
        ".savefig(io.BytesIO(), format='svg'); print('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_small_multiples_share_axes_and_one_legend() -> None:
    some, others = {"var": [[1.0, 0.5]], "joint": [[1.0, 0.9], [0.8, 0.7]]}, {"var": [[0.6, 0.2]]}
    panels = {f"panel {i}": some for i in range(4)} | {"last": others}
    figure = drawn(small_multiples(panels, [0, 5], "Severity", "Accuracy (%)", chance=10))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == list(panels)
    assert {axes.get_ylim() for axes in shown} == {(0, 100)}
    var, joint, chance = shown[0].lines
    assert list(chance.get_ydata()) == [10, 10]
    assert np.allclose(var.get_ydata(), [100, 50])
    assert np.allclose(joint.get_ydata(), [90, 80])
    assert list(var.get_xdata()) == [0, 5]
    assert [line.get_color() for line in shown[4].lines[:-1]] == [STYLES["var"][0]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["var", "joint"]
    with warnings.catch_warnings(action="error"):  # nothing is known at the second severity
        partly = {"low": {"var": [[0.4, np.nan]]}}
        low = drawn(small_multiples(partly, [0, 5], "Severity", "Accuracy"))
    assert low.axes[0].get_ylim() == (0, 50)


def test_the_legend_of_few_small_multiples_stays_within_the_figure() -> None:
    names = ["diffusion-adapter", "diffusion-scratch", "var-adapter", "var-embedding"]
    names += ["joint", "replay", "slda", "cumulative"]
    methods = {name: [[1.0, 0.5]] for name in names}
    for count in (1, 2, 3, 4):
        panels = {f"panel {i}": methods for i in range(count)}
        figure = drawn(small_multiples(panels, [0, 5], "Severity", "Accuracy (%)"))
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_a_confusion_is_in_per_cent_of_each_class_and_parted_by_group() -> None:
    counts = np.array([[4, 0, 0], [1, 2, 1], [0, 0, 0]])
    figure = drawn(confusion(counts, ["a", "b", "c"], [1, 2], "var"))
    axes, _ = figure.axes
    assert np.array_equal(axes.images[0].get_array(), [[100, 0, 0], [25, 50, 25], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts] == ["100", "25", "50", "25"]
    lines = [path for part in axes.collections for path in part.get_segments()]
    assert sorted(line[0].tolist() for line in lines) == [[-0.5, 0.5], [0.5, -0.5]]
    many = drawn(confusion(np.eye(200), [f"class {i}" for i in range(200)], [100, 100], "var"))
    assert len(many.axes[0].get_xticklabels()) == 50


def test_a_grid_shows_every_pixel_of_every_image_beside_its_name() -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8, 1), dtype=np.uint8)
    axes = drawn(sample_grid(images, ["cat", "a name of many letters"], "drawn", ["1", "2", "3"]))
    (panel,) = axes.axes
    shown = np.asarray(panel.images[0].get_array())
    for row, column in np.ndindex(2, 3):
        tile = shown[9 * row : 9 * row + 8, 9 * column : 9 * column + 8]
        assert np.array_equal(tile, images[row, column, ..., 0])
    assert (shown[:, 8] == 255).all()
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["cat", "a name of many le…"]
    assert panel.get_yticks().tolist() == [3.5, 12.5]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "2", "3"]


def test_a_grid_of_a_hundred_classes_stands_in_four_parts() -> None:
    images = np.zeros((100, 8, 4, 4, 3), np.uint8)
    images[76, 1] = 200
    figure = drawn(sample_grid(images, [str(i) for i in range(100)], "drawn"))
    assert len(figure.axes) == 4
    labels = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert labels == [str(i) for i in range(75, 100)]
    shown = np.asarray(figure.axes[3].images[0].get_array())
    assert (shown[5:9, 5:9] == 200).all()
    width, height = figure.get_size_inches()
    assert 0.5 < width / height < 2
    few = drawn(sample_grid(images[:26], [str(i) for i in range(26)], "drawn"))
    assert [len(panel.get_yticklabels()) for panel in few.axes] == [13, 13]


def test_a_tint_leaves_the_rest() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    region = np.eye(4, dtype=bool)
    shown = tinted(image, region)
    assert (shown[~region] == 100).all()
    assert (shown[region] != 100).all()


def test_numbers_in_a_matrix_stand_out_at_every_accuracy() -> None:
    def light(colour: str) -> float:  # relative luminance, WCAG 2.1
        parts = [
            v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)
        ]
        return float(np.dot(parts, [0.2126, 0.7152, 0.0722]))

    for accuracy in np.linspace(0, 1, 101):
        low, high = sorted(light(colour) for colour in cell_colours(accuracy))
        assert (high + 0.05) / (low + 0.05) >= 4.5, accuracy
