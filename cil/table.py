"""The table and the figures at the end of an experiment, made from the records alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from cil import metrics, plots
from cil.records import RunView, figure_bytes, with_ending, write_bytes, write_figure
from cil.results import Run, check_seeds_alone_differ

# Number of the summary -> heading; these are shown in per cent, the others as they are.
PERCENT = {
    "last_accuracy": "last",
    "average_incremental_accuracy": "avg",
    "forgetting": "forget",
    "backward_transfer": "BWT",
}
COSTS = {
    "training_seconds": "train s",
    "learning_macs": "MACs",
    "prediction_macs": "MACs/img",
    "parameters": "params",
    "stored_images": "stored",
    "stored_bytes": "bytes",
}
CAPTION = (
    "last: accuracy on all classes after the last experience; avg: average incremental accuracy; "
    "forget: forgetting (Chaudhry et al. 2018); BWT: backward transfer (GEM); all in per cent of "
    "the images evaluated. train s: training seconds; MACs: multiply-accumulates of all learning, "
    "MACs/img: of classifying an image; stored: training images kept (*: none, exemplar-free); "
    "bytes: of those images and of what else is kept beside the parameters."
)


def report(experiment: str, runs: Sequence[RunView], folder: Path) -> None:
    """Print the table; write results.csv and the forgetting curves of all methods into `folder`.

    Raises:
        UserError: the folder cannot be written; the table is printed by then.
    """
    seeds = len({r.seed for r in runs})
    note = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    headings = ["method", *PERCENT.values(), *COSTS.values()]
    console = show(f"{experiment}{note}", headings, _rows(runs), CAPTION)
    for line in [*_streams(runs), *_unreadable(runs)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for r in runs:
        if "codebook_use" in r.summary:
            first, last = r.summary["codebook_use_first"], r.summary["codebook_use"]
            name = f"{r.method} seed {r.seed}"
            console.print(
                f"{name}: codebook use {first:.0%} on the first group, {last:.0%} on the last"
            )
    write_bytes(folder / "results.csv", results(runs).to_csv(index=False).encode())
    figure = write_figure(folder / "forgetting_curves.png", curves(runs))
    console.print(f"records and figures: {folder}/   forgetting curves: {figure}", soft_wrap=True)


def results(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run: experiment, method, seed and every stream-final number."""
    return pd.DataFrame(
        [
            {"experiment": r.experiment, "method": r.method, "seed": r.seed, **r.summary}
            for r in runs
        ]
    )


def over_seeds(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a method in order of appearance; columns (number, "mean" | "std" | "count").

    Raises:
        UserError: there are no runs, or those of a method differ in more than their seed.
    """
    check_seeds_alone_differ(runs)
    numbers = [*PERCENT, *COSTS]
    grouped = results(runs).groupby("method", sort=False)[numbers]
    return grouped.agg(["mean", "std", "count"])


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """The table's cells as they are shown, a row a method; raises as `over_seeds` does."""
    columns = ["method", *PERCENT.values(), *COSTS.values()]
    return pd.DataFrame(_rows(runs), columns=columns).set_index("method")


def curves(runs: Sequence[Run], band: plots.Band = "range", columns: int = 2) -> plots.Figure:
    """The forgetting curves of all methods; many stand in panels, `columns` beside each other."""
    by_method: dict[str, list] = {}
    for r in runs:
        by_method.setdefault(r.method, []).append(metrics.accuracy_curve(r.matrix, r.sizes))
    families = {r.method: _family(r) for r in runs}
    return plots.forgetting_curves(by_method, families, band, columns)


def _family(run: Run) -> str:
    """What a figure of many methods shows together."""
    kind = run.method.partition("-")[0]
    if kind in ("var", "diffusion"):
        return {"var": "VAR", "diffusion": "diffusion"}[kind]
    stores = run.summary["stored_images"] > 0
    return "discriminative, images stored" if stores else "discriminative, nothing stored"


def show(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str | None = None,
    texts: int = 1,
) -> Console:
    """Print a table whose first `texts` columns are text and whose others are numbers.

    Returns what printed it, wide enough for all of it.
    """
    table = Table(title=title, caption=caption, box=SIMPLE, padding=(0, 0, 0, 1))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    wide = console.options.update(width=1000)
    # Lines that break can still be read; numbers cut short cannot, and a log file has no width.
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)
    return console


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells of the table, a list a method."""
    return [
        [
            _marked(str(name), row),
            *(percent(row[k]) for k in PERCENT),
            *(quantity(row[k]["mean"]) for k in COSTS),
        ]
        for name, row in over_seeds(runs).iterrows()
    ]


def _marked(name: str, row: pd.Series) -> str:
    return f"{name}*" if row["stored_images"]["mean"] == 0 else name


def percent(number: pd.Series) -> str:
    """A share in [0, 1], given by mean, std and count over seeds, in per cent."""
    text = f"{100 * number['mean']:.1f}"
    return f"{text}±{100 * number['std']:.1f}" if number["count"] > 1 else text


def quantity(number: float) -> str:
    """A cost with a letter for its size: 56.6 k, 195.78 M."""
    for unit, size in {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}.items():
        if number >= size:
            return f"{number / size:.2f} {unit}"
    if number >= 1e4:
        return f"{number / 1e3:.1f} k"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.2f}"


def _streams(runs: Sequence[RunView]) -> list[str]:
    """What was learned: there are three lists of classes called ImageNet-100, so name and hash."""
    return list(dict.fromkeys(_stream(r.stream) for r in runs))


def _stream(facts: Mapping[str, Any]) -> str:
    chosen = facts.get("class_list")
    parts = [
        f"stream {facts['name']}: {len(facts['class_names'])} classes",
        f"class list {chosen}" if chosen else "all there are",
    ]
    if "class_list_hash" in facts:
        parts.append(f"sha256 of the list {facts['class_list_hash']}")
    if facts.get("evaluated_on") == "validation":
        parts.append("evaluated on held-out training images, and not on the test images")
    return f"{', '.join(parts)}; fingerprint {facts['fingerprint']}"


def _unreadable(runs: Sequence[RunView]) -> list[str]:
    """A line for every run in which images could not be decoded."""
    counts = [(r, r.summary.get("unreadable_images", 0)) for r in runs]
    return [
        f"{r.method} seed {r.seed}: images that could not be decoded: {count} of training or test, "
        "all named in its progress.json; others of their class stood in"
        for r, count in counts
        if count
    ]


def publish(runs: Sequence[RunView], path: Path, command: str) -> None:
    """Write `path`.csv (one row a run), .md (the table, and what it was measured on) and .svg.

    Raises:
        UserError: the folder cannot be written.
    """
    numbers = results(runs)
    numbers.insert(3, "commit", [" ".join(_of_sittings(r, "commit")) for r in runs])
    write_bytes(with_ending(path, ".csv"), numbers.to_csv(index=False).encode(), "--name")
    write_bytes(with_ending(path, ".svg"), figure_bytes(curves(runs), "svg"), "--name")
    headings = ["method", *PERCENT.values(), *COSTS.values()]
    lines = [*provenance(runs, command), CAPTION, markdown(headings, _rows(runs))]
    write_bytes(with_ending(path, ".md"), ("\n\n".join(lines) + "\n").encode(), "--name")


def provenance(runs: Sequence[RunView], command: str) -> list[str]:
    """Where the numbers of a table come from, in paragraphs."""
    return [
        f"Written by `{command}`.",
        *(f"{line[0].upper()}{line[1:]}." for line in _streams(runs)),
        f"Seeds {sorted({r.seed for r in runs})}.",
        *(
            f"{key}: {', '.join(sorted({value for r in runs for value in _of_sittings(r, key)}))}"
            for key in ("commit", "device")
        ),
        f"Pretrained on: {', '.join(sorted({r.summary['pretrained_on'] for r in runs}))}.",
        *_unreadable(runs),
    ]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    ruled = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def _of_sittings(run: RunView, key: str) -> list[str]:
    """Every value that a sitting of this run was made with, the first one's first."""
    sittings = (run.environment, *run.environment.get("resumed", []))
    return list(dict.fromkeys(str(sitting[key]) for sitting in sittings if key in sitting))
