"""Run an experiment: `python -m cil.run split_digits`.

Its methods learn its stream one class group at a time; one table, the records and the figures come
out. The same line resumes what was interrupted and shows what is finished.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cil import parallel, trial
from cil.command_line import USAGE, describe, experiments, parse
from cil.config import Config
from cil.errors import DivergenceError, UserError, is_interrupt, readers_missed
from cil.learning import complete, finished
from cil.records import RunView

HELP = f"""usage: {USAGE}

Run the methods of an experiment over its stream of class groups and print one table.
Everything lands in runs/EXPERIMENT/METHOD/seedK and in Weights & Biases (offline without an
account). Interrupted at any moment, the same line goes on where it stopped.

  python -m cil.run split_digits                          run it, resume it, or show its table
  python -m cil.run split_digits --help                   every setting with its value
  python -m cil.run split_digits --methods=[var,joint]    some methods only
  python -m cil.run split_digits --var.depth=6            any setting, as --KEY=VALUE
  python -m cil.run split_digits --seeds=[0,1,2]          several seeds: mean and deviation
  python -m cil.run split_digits --trainer.jobs=2         two methods or seeds at a time
  python -m cil.run split_digits --trainer.devices=4      four GPUs share the work
  python -m cil.run split_digits --print_config           the resulting configuration
  python -m cil.run split_digits --fresh                  start over
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see `exit_code`)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(partial(_command, arguments))


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0, 2 for bad input (one sentence), 130 when interrupted."""
    try:
        with readers_missed():
            command()
    except UserError as error:
        if not parallel.is_echo():
            print(f"error: {error}", file=sys.stderr)
        return parallel.abandon(2)
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, SystemExit) as end:
        if not is_interrupt(end):
            raise
        if parallel.is_first():
            print("\ninterrupted: the same line goes on from the last experience", file=sys.stderr)
        return parallel.abandon(130)
    return 0


def _command(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP if arguments else f"usage: {USAGE}\n")
        _list_experiments()
        return
    config, fresh = parse(arguments[0], arguments[1:])
    own = trial.current()
    if own is not None and not any(a.partition("=")[0] == "--runs" for a in arguments):
        config = replace(config, runs=str(own.folder(config.runs)))
    run(Path(arguments[0]).stem, config, fresh)


def run(experiment: str, config: Config, fresh: bool = False) -> list[RunView]:
    """All runs (see `complete`), then the table, the figures and the page.

    Raises:
        DivergenceError: as `complete` does; the table is shown then without what diverged.
        UserError: what `complete` refuses, or a disk that is full or cannot be written.
    """
    from cil.table import report  # pandas and matplotlib: half a second that --help need not wait

    folder = Path(config.runs) / experiment
    try:
        views = complete(experiment, config, fresh)
    except DivergenceError:
        if parallel.is_first() and (views := finished(experiment, config)):
            report(experiment, views, folder)
        raise
    if parallel.is_first():
        report(experiment, views, folder)
        _write_page(folder)
    return views


def _write_page(folder: Path) -> None:
    """The page of all finished runs of an experiment; whatever fails costs a warning alone."""
    try:
        from cil.report.page import write_report

        print(f"report: {write_report(folder)}")
    except Exception as error:
        print(f"warning: the report was not written: {error}", file=sys.stderr)


def _list_experiments() -> None:
    print("Experiments:")
    for name, path in experiments().items():
        print(f"  {name:20} {describe(path)}")
    print(f"\nStart one with `{USAGE}`; `--help` after its name shows the settings.")


if __name__ == "__main__":
    sys.exit(main())
