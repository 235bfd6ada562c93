"""The table and the figures at the end of an experiment, made from the records alone."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from cil import metrics, plots
from cil.records import RunView, write_bytes, write_figure

# Column of the summary -> heading, and how many decimals; accuracies are shown in per cent.
PERCENT = {
    "last_accuracy": "last\nacc. %",
    "average_incremental_accuracy": "avg. inc.\nacc. %",
    "forgetting": "forgetting\n(Chaudhry) %",
    "backward_transfer": "BWT\n(GEM) %",
}
COSTS = {
    "training_seconds": "training\ns",
    "milliseconds_an_image": "evaluation\nms/image",
    "parameters": "parameters",
    "stored_images": "stored\nimages",
    "likelihood_evaluations": "likelihood\nevals/image",
}


def report(experiment: str, runs: Sequence[RunView], folder: Path) -> None:
    """Print the table; write results.csv and the forgetting curves of all methods into `folder`.

    Raises:
        UserError: the folder cannot be written.
    """
    write_bytes(folder / "results.csv", results(runs).to_csv(index=False).encode())
    figure = write_figure(folder / "forgetting_curves.png", curves(runs))
    console = Console()
    console.print(_table(experiment, runs))
    console.print(f"records and figures: {folder}/   forgetting curves: {figure}", soft_wrap=True)


def results(runs: Sequence[RunView]) -> pd.DataFrame:
    """One row a run: experiment, method, seed and every stream-final number."""
    return pd.DataFrame(
        [
            {"experiment": r.experiment, "method": r.method, "seed": r.seed, **r.summary}
            for r in runs
        ]
    )


def over_seeds(runs: Sequence[RunView]) -> pd.DataFrame:
    """One row a method in order of appearance; columns (number, "mean" | "std" | "count")."""
    numbers = [*PERCENT, *COSTS]
    grouped = results(runs).groupby("method", sort=False)[numbers]
    return grouped.agg(["mean", "std", "count"])


def curves(runs: Sequence[RunView]) -> "plots.Figure":
    by_method: dict[str, list] = {}
    for r in runs:
        by_method.setdefault(r.method, []).append(metrics.accuracy_curve(r.matrix, r.sizes))
    return plots.forgetting_curves(by_method)


def _table(experiment: str, runs: Sequence[RunView]) -> Table:
    seeds = len({r.seed for r in runs})
    note = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    table = Table(title=f"{experiment}{note}")
    table.add_column("method")
    for heading in [*PERCENT.values(), *COSTS.values()]:
        table.add_column(heading, justify="right")
    for name, row in over_seeds(runs).iterrows():
        percents = [_cell(row[key], 100, 1) for key in PERCENT]
        costs = [_cell(row[key], 1, 1 if key == "milliseconds_an_image" else 0) for key in COSTS]
        table.add_row(str(name), *percents, *costs)
    return table


def _cell(number: pd.Series, scale: float, decimals: int) -> str:
    text = f"{scale * number['mean']:,.{decimals}f}"
    return f"{text} ± {scale * number['std']:.{decimals}f}" if number["count"] > 1 else text
