"""Does a method know what it has not met yet: AUROC of seen against unseen classes.

    python -m cil.run split_digits --methods=[var-adapter,replay] --trainer.keep_checkpoints=true
    python -m experiments.ood runs/split_digits

After each experience but the last the test images of the classes seen are told from those of the
classes to come, by max-softmax, largest logit and energy, which of a generative method are those of
log p(x|y), and by its likelihood ratio to the null class (cil/ood.py). Finished runs are read; the
last checkpoint is enough for methods whose earlier classes never change, others must have kept that
of every experience, as the first line asks for. The table goes to experiments/results/
ood_EXPERIMENT.md, with a CSV file of every experience and a figure beside it; interrupted, the same
line goes on after the last checkpoint.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cil import plots
from cil.config import TrainerConfig
from cil.environment import commit, device
from cil.errors import UserError
from cil.methods.registry import asked_by
from cil.ood import SCORES, evaluate
from cil.records import RunView, figure_bytes, with_ending, write_bytes
from cil.run import exit_code
from cil.table import markdown, percent, provenance, show
from experiments.asking import place_of, typed
from experiments.finished import add_experiment, add_set, runs_of, settings_of

HEADINGS = {"msp": "MSP", "max_logit": "max logit", "energy": "energy", "ratio": "ratio"}
CAPTION = (
    "AUROC of test images of seen against unseen classes, the mean over all experiences but the "
    "last, in per cent; 50 is chance. MSP: max-softmax; of a generative method logits are "
    "log p(x|y), so that the energy is log p(x); ratio: log p(x) - log p(x|null class)."
)


def main() -> None:
    asked = _arguments()
    settings = settings_of(asked)
    if strange := [key for key in settings if key != "diffusion.schedule"]:
        raise UserError(
            f"--set {strange[0]} would change nothing: a VAR is asked without schedule and "
            "smoothing, so that diffusion.schedule alone, whose first stage is read, can be set."
        )
    runs = [asked_by(run, settings) for run in runs_of(asked)]
    path = place_of(asked.name, f"ood_{runs[0].experiment}", typed("ood"), runs)
    trainer = TrainerConfig(accelerator=asked.accelerator, progress=False)
    frame, used = evaluated(runs, trainer, asked.cache)
    _report(frame, used, trainer, path)


def evaluated(
    runs: Sequence[RunView], trainer: TrainerConfig, cache: Path
) -> tuple[pd.DataFrame, list[RunView]]:
    """The rows of `cil.ood.evaluate` of all runs that have kept what it needs, and those runs.

    Raises:
        UserError: no run has.
    """
    frames, used, reasons = [], [], []
    experiences = len(runs[0].sizes) - 1
    with tqdm(total=len(runs) * experiences, unit=" experiences") as bar:
        for run in runs:
            bar.set_description(f"{run.method} seed {run.seed}")
            try:
                frames.append(evaluate(run, trainer, cache, bar.update))
                used.append(run)
            except UserError as error:
                reasons.append(error)
                bar.total -= experiences
    if not frames:
        raise reasons[0]
    for error in reasons:
        print(f"left out: {error}", file=sys.stderr)
    return pd.concat(frames, ignore_index=True), used


def _arguments() -> Namespace:
    parser = ArgumentParser(
        prog="python -m experiments.ood",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_experiment(parser)
    add_set(parser, "diffusion.schedule=[[4,1]], whose first stage is read of every class")
    return parser.parse_args()


def _report(
    frame: pd.DataFrame, runs: Sequence[RunView], trainer: TrainerConfig, path: Path
) -> None:
    """Write the table, the CSV file and the figure, and print the table."""
    headings, rows = ["method", *HEADINGS.values()], table(frame)
    where = f"Evaluated at commit {commit()}, on {device(trainer)}."
    text = [*provenance(runs, typed("ood")), where, CAPTION, markdown(headings, rows)]
    write_bytes(with_ending(path, ".csv"), frame.to_csv(index=False).encode())
    write_bytes(with_ending(path, ".svg"), figure_bytes(figure(frame), "svg"))
    write_bytes(with_ending(path, ".md"), ("\n\n".join(text) + "\n").encode())
    show(f"{runs[0].experiment}: seen against unseen classes", headings, rows, CAPTION)
    print(f"written: {with_ending(path, '.md')}   figure: {with_ending(path, '.svg')}")


def table(frame: pd.DataFrame) -> list[list[str]]:
    """A row a method: its name and every score's AUROC, over its seeds; empty where it has none."""
    each = frame.pivot_table("auroc", ["method", "seed"], "score", "mean", sort=False)
    means = each.reindex(columns=list(SCORES)).groupby("method", sort=False)
    return [
        [str(name), *("" if row[s]["count"] == 0 else percent(row[s]) for s in SCORES)]
        for name, row in means.agg(["mean", "std", "count"]).iterrows()
    ]


def figure(frame: pd.DataFrame) -> plots.Figure:
    """AUROC against the experiences learned, a panel a score."""
    learned = sorted(set(frame["experience"]))
    panels: dict[str, dict[str, list[np.ndarray]]] = {HEADINGS[s]: {} for s in SCORES}
    for (name, method, _), rows in frame.groupby(["score", "method", "seed"], sort=False):
        values = rows.set_index("experience")["auroc"].reindex(learned).to_numpy()
        panels[HEADINGS[name]].setdefault(method, []).append(values)
    drawn = {title: curves for title, curves in panels.items() if curves}
    return plots.small_multiples(
        drawn, [t + 1 for t in learned], "Experiences learned", "AUROC (%)", chance=50
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
