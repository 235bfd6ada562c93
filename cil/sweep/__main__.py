"""Run a sweep on this machine: `python -m cil.sweep configs/sweeps/forgetting.yaml --local`.

The same files are W&B's: `wandb sweep FILE` makes one on its server, `wandb agent ID` runs it.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cil.command_line import parse
from cil.errors import UserError
from cil.run import exit_code

HELP = """Propose and run the trials of a sweep, one after the other, without a W&B server.

  python -m cil.sweep configs/sweeps/forgetting.yaml --local              the whole grid
  python -m cil.sweep configs/sweeps/var_lr_bayes.yaml --local --count=12 twelve trials in all
  python -m cil.sweep FILE --local --experiment=split_cifar10             on other images
  python -m cil.sweep FILE --local --trainer.progress=false               any setting of cil.run

Every trial is a run of its own. The records are in RUNS/sweeps/NAME, and in W&B the trials are one
group of that name. Interrupted, the same line goes on with the trial that it was at; a finished
sweep shows its table at once. A trial that failed is tried again by the next call.

With an account, `wandb sweep FILE` and `wandb agent ID` run the same file on as many machines as
there are agents."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, as `cil.run` does."""
    return exit_code(partial(_command, sys.argv[1:] if arguments is None else list(arguments)))


def _command(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="python -m cil.sweep",
        usage="%(prog)s FILE --local [--count=N] [--KEY=VALUE ...]",
        description=HELP,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="a sweep file, such as those of configs/sweeps")
    parser.add_argument("--local", action="store_true", help="run it here, without a server")
    parser.add_argument("--count", type=int, help="trials in all, those run before included")
    parser.add_argument("--experiment", help="another experiment than that of the file's command")
    parser.add_argument("--name", help="of the sweep, and its folder (default: that of the file)")
    parser.add_argument(
        "--fresh", action="store_true", help="delete the trials of this name and start over"
    )
    own, settings = parser.parse_known_args(arguments)
    if not own.local:
        raise UserError(
            f"Without --local a sweep is W&B's to run: `wandb sweep {own.file}` gives it an ID for "
            "`wandb agent ID`."
        )
    _run(own.file, own.count, own.experiment, own.name or own.file.stem, own.fresh, settings)


def _run(
    file: Path,
    count: int | None,
    experiment: str | None,
    name: str,
    fresh: bool,
    settings: Sequence[str],
) -> None:
    from cil.sweep import local  # with what it imports a second, that --help need not wait for
    from cil.sweep.definition import read
    from cil.sweep.result import report

    definition = read(file)
    if experiment is not None:
        definition = replace(definition, experiment=experiment)
    if definition.early_terminate:
        print("early_terminate is W&B's server's: here every trial runs to its end.")
    outcomes = local.run(definition, name, settings, count, fresh)
    config, _ = parse(definition.experiment, [*definition.settings, *settings])
    report(definition, name, outcomes, settings, local.folder_of(config, name))


if __name__ == "__main__":
    sys.exit(main())
