"""Does a generative classifier forget less? One stream, many methods and seeds, one table.

    python -m experiments.forgetting split_digits
    python -m experiments.forgetting split_digits --methods=[var-adapter,joint] --name=two_methods

The name of an experiment, then any setting of `python -m cil.run`; all methods and the seeds 0, 1
and 2 unless told otherwise. Interrupted, the same line goes on where it stopped. The table (mean
and standard deviation over the seeds), the numbers of every run and the forgetting curves go to
experiments/results/NAME.{md,csv,svg}; NAME is the experiment's own unless --name gives another.

Expected on split_digits: last accuracy near 97 % for var-adapter and var-copy with no image stored,
near 20 % for finetune, near 99 % for joint. The setting (class-incremental, generative against
discriminative, nothing stored) is that of van de Ven et al. 2021, "Class-incremental learning with
generative classifiers".
"""

import sys

from cil.run import exit_code, run
from cil.table import publish
from experiments.asking import asked, place_of

DEFAULTS = ("--methods=[all]", "--seeds=[0,1,2]")


def main() -> None:
    what = asked("forgetting", __doc__, DEFAULTS)
    path = place_of(what.name, what.experiment, what.line)
    runs = run(what.experiment, what.config, what.fresh)
    if runs:  # of several processes the first one alone has them
        publish(runs, path, what.line)


if __name__ == "__main__":
    sys.exit(exit_code(main))
