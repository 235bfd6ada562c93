"""What came out of a sweep: trials that differ in their seed alone are one row, the best first."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cil.records import write_bytes
from cil.sweep.definition import Definition
from cil.sweep.local import Outcome, flags
from cil.table import COSTS, PERCENT, percent, quantity, show

METRIC = "metric"  # the column of the sweep's own
SHARES = (*PERCENT, "cl/accuracy", "cl/accumulated_accuracy")
COLUMNS = ("last_accuracy", "average_incremental_accuracy", "prediction_macs", "training_seconds")
# What a trial has for the sweep's sake, or for this machine's, and a run of its own has not.
OF_TRIALS = ("seeds", "stream.evaluate", "stream.stop_after", "fresh", "runs", "cache")


def report(
    definition: Definition,
    name: str,
    outcomes: Sequence[Outcome],
    arguments: Sequence[str],
    folder: Path,
) -> None:
    """Print the table and the best settings; write trials.csv into `folder`.

    Raises:
        UserError: the folder cannot be written.
    """
    trials = pd.DataFrame([_row(outcome) for outcome in outcomes])
    write_bytes(folder / "trials.csv", trials.to_csv(index=False).encode())
    varied = [key for key, p in definition.parameters.items() if len(p.values) != 1]
    tried = [key for key in varied if key != "seeds"]
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, outcome in enumerate(outcomes):
        if outcome.view is not None:
            label = tuple(str(outcome.settings[key]) for key in tried)
            groups.setdefault(label, []).append(index)
    if not groups:
        print(f"{name}: none of {len(outcomes)} trials has a result.")
        return
    columns = [METRIC, *(c for c in COLUMNS if c != definition.metric)]
    numbers = {
        label: trials.loc[rows, columns].agg(["mean", "std", "count"])
        for label, rows in groups.items()
    }
    highest_first = definition.goal == "maximize"
    ranked = sorted(groups, key=lambda x: numbers[x][METRIC]["mean"], reverse=highest_first)
    named = {c: definition.metric if c == METRIC else c for c in columns}
    show(
        f"{name}: {len(outcomes)} trials of {definition.experiment}",
        [*(tried or ["settings"]), *map(_heading, named.values()), "trials"],
        [
            [
                *(label or ["all"]),
                *(_cell(named[c], numbers[label][c]) for c in columns),
                str(len(groups[label])),
            ]
            for label in ranked
        ],
        _caption(definition, outcomes, "seeds" in varied),
        texts=max(1, len(tried)),
    )
    best = outcomes[groups[ranked[0]][0]]
    print(f"best: {_command(definition, best, arguments)}")
    print(f"records: {folder}/   all trials: {folder / 'trials.csv'}")


def _row(outcome: Outcome) -> dict[str, object]:
    numbers = {} if outcome.view is None else outcome.view.summary
    return {
        "trial": outcome.name,
        **outcome.settings,
        METRIC: outcome.value,
        **{key: numbers.get(key) for key in (*PERCENT, *COSTS)},
    }


def _caption(definition: Definition, outcomes: Sequence[Outcome], over_seeds: bool) -> str:
    views = [outcome.view for outcome in outcomes if outcome.view is not None]
    failed = len(outcomes) - len(views)
    parts = [
        f"Best first: the {definition.goal.removesuffix('imize')}imum of {definition.metric}",
        "accuracies in per cent of the "
        + (
            "held-out training images, no test image was looked at"
            if views[0].stream.get("evaluated_on") == "validation"
            else "test images"
        ),
        *(["mean ± standard deviation over the seeds"] if over_seeds else []),
        *([f"{failed} of the trials failed"] if failed else []),
    ]
    return "; ".join(parts) + "."


def _heading(number: str) -> str:
    return {**PERCENT, **COSTS}.get(number, number.removeprefix("cl/").replace("_", " "))


def _cell(name: str, number: pd.Series) -> str:
    if name in SHARES:
        return percent(number)
    return quantity(number["mean"]) if name in COSTS else f"{number['mean']:.4g}"


def _command(definition: Definition, best: Outcome, arguments: Sequence[str]) -> str:
    """A run with these settings, on the images and experiences that runs have otherwise."""
    given = [*definition.settings, *flags(best.settings), *arguments]
    kept = [a for a in given if a.partition("=")[0].removeprefix("--") not in OF_TRIALS]
    return shlex.join(["python", "-m", "cil.run", definition.experiment, *kept])
