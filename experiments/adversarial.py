"""How methods stand up to images made to be misread, and whether log p(x) notices them.

    python -m experiments.adversarial runs/split_digits
    python -m experiments.adversarial runs/split_digits --source var-adapter --eps 16 --steps 40

Finished runs are asked about test images that projected gradient descent (arXiv 1706.06083) has
changed by up to eps / 255 of the range of a pixel, in steps of 2.5 eps / steps (see
cil/adversarial.py). White box: each method is attacked by its own gradients. A VAR's are straight
through its quantiser, an approximation; diffusion, and what answers by statistics of classes (ncm,
slda, fecam, icarl, scr), give none and have an empty cell. Transfer: images made against one run,
--source, are shown to all the others.

The first table has accuracies. The second has AUROC, of images as they were against attacked ones
of the largest eps, by max-softmax and by energy, which of a generative method is log p(x). Both go
to experiments/results/adversarial_EXPERIMENT.md, with a CSV file of every eps and a figure beside
it. captum is needed (pip install -e '.[explain]').
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from cil import plots
from cil.adversarial import (
    CLEAN,
    NOTICED_BY,
    TRANSFER,
    WHITE_BOX,
    Budget,
    Shown,
    evaluate,
    perturbed,
    prepare,
)
from cil.environment import commit, device
from cil.errors import UserError
from cil.ood import is_generative
from cil.records import RunView, figure_bytes, with_ending, write_bytes
from cil.run import exit_code
from cil.streams.stream import first_of_each
from cil.table import markdown, percent, provenance, show
from experiments.asking import place_of, typed
from experiments.attributions import Model
from experiments.finished import Finished, add_experiment, finished, runs_of
from experiments.robustness import check_per_class

HEADINGS = {"msp": "MSP", "energy": "energy"}
AUROC = (
    "AUROC of the same images as they were against attacked ones (eps {:g}), in per cent: 50 is "
    "not noticed, and below it attacked ones look more familiar. MSP: max-softmax; energy: of a "
    "generative method log p(x)."
)


def main() -> None:
    asked = _arguments()
    budget = Budget(tuple(sorted(set(asked.eps))), asked.steps)
    budget.check()
    check_per_class(asked.per_class)
    runs = runs_of(asked)
    source = source_of(runs, asked)
    path = place_of(asked.name, f"adversarial_{runs[0].experiment}", typed("adversarial"), runs)
    frame = evaluated(runs, source, budget, asked)
    _report(frame, runs, source, budget, asked, path)


def _arguments() -> Namespace:
    parser = ArgumentParser(
        prog="python -m experiments.adversarial",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_experiment(parser)
    add = parser.add_argument
    eps = "1/255 of the range of a pixel (default: 8 16 32)"
    add("--eps", nargs="+", type=float, default=[8, 16, 32], metavar="E", help=eps)
    add("--steps", type=int, default=10, help="of every attack (default: 10)")
    add("--per_class", type=int, default=20, metavar="N", help="test images (default: 20)")
    source = "whose images are shown to all (default: the first discriminative one with gradients)"
    add("--source", metavar="METHOD", help=source)
    parser.set_defaults(no_progress=True)  # one bar for all runs instead
    return parser.parse_args()


def source_of(runs: Sequence[RunView], asked: Namespace) -> Finished:
    """The run that --source names, or the first that gives gradients, discriminative ones before.

    Raises:
        UserError: there is none.
    """
    names = list(dict.fromkeys(run.method for run in runs))
    if asked.source not in (None, *names):
        raise UserError(
            f"{asked.runs} holds no finished run of '{asked.source}' that is asked: --source is "
            f"one of {', '.join(names)}."
        )
    for name in sorted(names, key=lambda name: is_generative(_first(runs, name))):
        if asked.source in (None, name):
            found = finished(_first(runs, name).folder, asked)
            if attackable(found):
                return found
    who = f"{asked.source} gives" if asked.source else f"The methods in {asked.runs} give"
    raise UserError(
        f"{who} no gradients: var does, and discriminative methods that do not answer by "
        "statistics of classes."
    )


def _first(runs: Sequence[RunView], method: str) -> RunView:
    return next(run for run in runs if run.method == method)


def attackable(run: Finished) -> bool:
    return prepare(run.method, run.images([0])[0].to(run.device))


@dataclass(frozen=True, eq=False)
class Attacked:
    """The images (N, channels, H, W) that all runs are asked about, and how far they may change."""

    images: Tensor
    labels_N: Tensor
    budget: Budget

    def by(self, run: Finished) -> Iterator[Tensor]:
        """The images as a run's own gradients change them, for each eps."""
        model = Model(run)
        own, eps = (model.differentiable, self.images, self.labels_N), self.budget.eps
        return (perturbed(*own, e, self.budget.steps, model.at_once) for e in eps)


def evaluated(
    runs: Sequence[RunView], source: Finished, budget: Budget, asked: Namespace
) -> pd.DataFrame:
    """The rows of `cil.adversarial.evaluate` of all runs."""
    numbers = first_of_each(source.labels, asked.per_class)
    labels_N = torch.tensor([source.labels[n] for n in numbers], device=source.device)
    attacked = Attacked(source.images(numbers).to(source.device), labels_N, budget)
    frames, each = [], 1 + 2 * len(budget.eps)
    with tqdm(total=len(runs) * each, unit=" evaluations") as bar:
        bar.set_description(f"images against {source.run.method}")
        made = list(attacked.by(source))
        for view in runs:
            bar.set_description(f"{view.method} seed {view.seed}")
            run = finished(view.folder, asked)
            shown = all_shown(run, source, made, attacked)
            frames.append(evaluate(view, run.method, shown, labels_N, run.trainer, bar.update))
            bar.update(each - len(frames[-1]))  # what it has none of
    return pd.concat(frames, ignore_index=True)


def all_shown(
    run: Finished, source: Finished, made: Sequence[Tensor], attacked: Attacked
) -> Iterator[Shown]:
    """Images as they are, as the run's own gradients change them, and as the source's did."""
    yield Shown(CLEAN, 0, attacked.images)
    is_source = run.run.folder == source.run.folder  # to which its own are no transfer
    if is_source or attackable(run):
        own = made if is_source else attacked.by(run)
        yield from map(Shown, repeat(WHITE_BOX), attacked.budget.eps, own)
    if not is_source:
        yield from map(Shown, repeat(TRANSFER), attacked.budget.eps, made)


def _report(
    frame: pd.DataFrame,
    runs: Sequence[RunView],
    source: Finished,
    budget: Budget,
    asked: Namespace,
    path: Path,
) -> None:
    """Write the tables, the CSV file and the figure, and print the tables."""
    text = provenance(runs, typed("adversarial"))
    text.append(f"Attacked at commit {commit()}, on {device(source.trainer)}.")
    for caption, columns in (
        (accuracy_caption(frame, source.run, budget, asked), accuracies(frame, budget)),
        (AUROC.format(budget.eps[-1]), aurocs(frame, budget.eps[-1])),
    ):
        names = dict.fromkeys(frame["method"])
        rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
        text += [caption, markdown(["method", *columns], rows)]
        show(f"{runs[0].experiment} under attack", ["method", *columns], rows, caption)
    write_bytes(with_ending(path, ".csv"), frame.to_csv(index=False).encode())
    write_bytes(with_ending(path, ".svg"), figure_bytes(figure(frame, budget), "svg"))
    write_bytes(with_ending(path, ".md"), ("\n\n".join(text) + "\n").encode())
    print(f"written: {with_ending(path, '.md')}   figure: {with_ending(path, '.svg')}")


def accuracy_caption(frame: pd.DataFrame, source: RunView, budget: Budget, asked: Namespace) -> str:
    attacked = set(frame[frame["attack"] == WHITE_BOX]["method"])
    without = [name for name in dict.fromkeys(frame["method"]) if name not in attacked]
    said = [
        "Accuracy after the last experience over all classes, in per cent, on the first "
        f"{asked.per_class} test images of each class, or all there are. PGD, number of steps: "
        f"{budget.steps}, each of {2.5 / budget.steps:g} eps; eps in 1/255 of a pixel's range.",
        f"Transfer: images made against {source.method}, seed {source.seed}, which is not asked "
        "about them.",
        "White box: by each method's own gradients, a VAR's straight through its quantiser.",
        f"No gradients, so no white box: {', '.join(without)}." if without else "",
    ]
    return " ".join(filter(None, said))


Columns = dict[str, dict[str, str]]  # heading -> method -> number


def accuracies(frame: pd.DataFrame, budget: Budget) -> Columns:
    attacks = [(attack, eps) for attack in (WHITE_BOX, TRANSFER) for eps in budget.eps]
    columns = {
        f"{attack} {eps:g}": cells(frame, attack, eps, "accuracy") for attack, eps in attacks
    }
    return {CLEAN: cells(frame, CLEAN, 0, "accuracy")} | columns


def aurocs(frame: pd.DataFrame, eps: float) -> Columns:
    kinds = [(attack, score) for attack in (WHITE_BOX, TRANSFER) for score in NOTICED_BY]
    return {f"{a} {HEADINGS[score]}": cells(frame, a, eps, score) for a, score in kinds}


def cells(frame: pd.DataFrame, attack: str, eps: float, value: str) -> dict[str, str]:
    """Method -> mean and deviation over its seeds, in per cent; of those that have any."""
    chosen = frame[(frame["attack"] == attack) & (frame["eps"] == eps)]
    numbers = chosen.groupby("method")[value].agg(["mean", "std", "count"])
    return {str(name): percent(row) for name, row in numbers.iterrows()}


def figure(frame: pd.DataFrame, budget: Budget) -> plots.Figure:
    """Accuracy against eps, a panel an attack; 0 is none."""
    panels: dict[str, dict[str, list[np.ndarray]]] = {}
    for attack in (WHITE_BOX, TRANSFER):
        both = frame[frame["attack"].isin([CLEAN, attack])]
        for (method, _), own in both.groupby(["method", "seed"], sort=False):
            if len(own) > 1:
                values = own.set_index("eps")["accuracy"].to_numpy()
                panels.setdefault(attack, {}).setdefault(str(method), []).append(values)
    return plots.small_multiples(
        panels, [0, *budget.eps], "eps, in 1/255 (0: as it is)", "Accuracy (%)"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
