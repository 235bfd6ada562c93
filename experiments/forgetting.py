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
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from cil.command_line import parse
from cil.run import exit_code, run
from cil.table import publish

DEFAULTS = ("--methods=[all]", "--seeds=[0,1,2]")


def main() -> None:
    parser = ArgumentParser(
        prog="python -m experiments.forgetting",
        usage="%(prog)s EXPERIMENT [--name=NAME] [--KEY=VALUE ...]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", help="one of those that `python -m cil.run` lists")
    parser.add_argument("--name", help="of the files in experiments/results, or a path")
    known, settings = parser.parse_known_args()
    config, fresh = parse(known.experiment, [*DEFAULTS, *settings])
    experiment = Path(known.experiment).stem
    runs = run(experiment, config, fresh)
    command = " ".join(["python -m experiments.forgetting", *sys.argv[1:]])
    if runs:  # of several processes the first one alone has them
        publish(runs, Path(__file__).parent / "results" / (known.name or experiment), command)


if __name__ == "__main__":
    sys.exit(exit_code(main))
