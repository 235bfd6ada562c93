"""Two tasks of five classes, one after the other, nothing stored: the table of A-VARC.

    python -m experiments.two_tasks split_digits
    python -m experiments.two_tasks split_cifar10 --methods=[finetune,cwr,var-adapter]
    python -m experiments.two_tasks split_tiny_imagenet --stream.stop_after=2

The name of an experiment with ten classes, then any setting of `python -m cil.run`; of an
experiment with more, --stream.stop_after=2 keeps the first ten. Accuracy on the test images of each
task after both, a class being chosen among all ten; mean and standard deviation over the seeds. The
table goes to experiments/results/NAME.md, NAME being two_tasks_EXPERIMENT unless --name gives
another; interrupted, the same line goes on.

The paper (arXiv 2510.12060) has, in per cent of task 1, task 2 and both: nothing against forgetting
0.0, 82.4, 41.2; CWR 83.2, 61.6, 72.4; a diffusion classifier 78.4, 73.6, 76.0; A-VARC+ 72.4, 82.4,
77.4. On other images and with other models only the pattern compares: finetune keeps nothing of
task 1, the generative methods most.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cil.errors import UserError
from cil.learning import complete, left_to_learn
from cil.records import RunView, with_ending, write_bytes
from cil.run import exit_code
from cil.streams import open_stream
from cil.table import markdown, provenance, show
from experiments.asking import Asked, asked, place_of

DEFAULTS = (
    "--methods=[finetune,cwr,diffusion-adapter,var-adapter]",
    "--seeds=[0,1,2]",
    "--stream.protocol=b0-5",
)
HEADINGS = ["method", "task 1", "task 2", "average"]
CAPTION = (
    "Accuracy after both tasks on the test images of each, in per cent; a class is chosen among "
    "all of both. average: of the two."
)


def main() -> None:
    what = asked("two_tasks", __doc__, DEFAULTS)
    name = f"two_tasks_{what.experiment}"
    if left_to_learn(name, what.config, what.fresh):  # finished runs need no images
        stream = open_stream(what.config.stream, Path(what.config.cache))
        _check_two(len(stream.experiences), what)
    path = with_ending(place_of(what.name, name, what.line), ".md")
    runs = complete(name, what.config, what.fresh)
    if not runs:  # of several processes the first one alone has them
        return
    for run in runs:
        _check_two(len(run.sizes), what)
    rows = table(runs)
    show(name, HEADINGS, rows, CAPTION)
    lines = [*provenance(runs, what.line), CAPTION, markdown(HEADINGS, rows)]
    write_bytes(path, ("\n\n".join(lines) + "\n").encode(), "--name")
    print(f"written: {path}")


def table(runs: Sequence[RunView]) -> list[list[str]]:
    """A row a method: its name, and the accuracies over its seeds in per cent."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        ends = np.array([run.matrix[-1] for run in runs if run.method == method])
        each = np.column_stack([ends, ends.mean(1)])  # seeds x (task 1, task 2, average)
        rows.append([method, *(_percent(column) for column in each.T)])
    return rows


def _check_two(groups: int, what: Asked) -> None:
    """Raises UserError unless there are two class groups."""
    stream = what.config.stream
    if groups != 2 and stream.stop_after is not None:
        raise UserError(
            f"stream.stop_after is {stream.stop_after}, which leaves {_counted(groups)} of "
            f"{what.experiment}: give 2, or null where stream.protocol makes two."
        )
    if groups != 2:
        raise UserError(
            f"stream.protocol is {stream.protocol}, which makes {groups} class groups of "
            f"{what.experiment}: choose one that makes two, such as b0-5 of ten classes."
        )


def _counted(groups: int) -> str:
    return "one class group" if groups == 1 else f"{groups} class groups"


def _percent(values: np.ndarray) -> str:
    text = f"{100 * values.mean():.1f}"
    return f"{text}±{100 * values.std(ddof=1):.1f}" if len(values) > 1 else text


if __name__ == "__main__":
    sys.exit(exit_code(main))
