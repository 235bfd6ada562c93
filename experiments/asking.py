"""What commands that write a table are asked: an experiment, its settings, a name of the table."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cil.command_line import parse
from cil.config import Config
from cil.errors import UserError
from cil.files import check_writable, read_bytes, with_ending
from cil.learning import check
from cil.records import RunView
from cil.records.layout import read_table

RESULTS = Path(__file__).parent / "results"
SILENT = ("--fresh", "--trainer.", "--wandb.")  # arguments that begin so decide no number


@dataclass(frozen=True)
class Asked:
    """A command line as it was understood."""

    experiment: str
    config: Config
    fresh: bool
    name: str | None  # of the files in experiments/results, or a path
    line: str  # as it was typed, to stand in the table


def typed(module: str) -> str:
    """The line that began this command, as a table has it."""
    return " ".join([f"python -m experiments.{module}", *sys.argv[1:]])


def place_of(name: str | None, default: str, line: str, runs: Sequence[RunView] = ()) -> Path:
    """Where a table goes, its ending aside; `default` is its name where `name` gives none.

    Raises:
        UserError: nothing can be written there, or no name is given, and what is there was written
            by another line, or has numbers of runs that are not among `runs`.
    """
    path = RESULTS / (name or default)
    check_writable(path.parent, "--name")
    written = with_ending(path, ".md")
    if name or not written.exists():
        return path
    first = read_bytes(written).decode(errors="replace").partition("\n")[0]
    if _telling(first.partition("`")[2].rpartition("`")[0]) != _telling(line):
        raise UserError(
            f"{written} was written by another line, which it begins with: type that line, or give "
            "this table another --name."
        )
    lost = _runs_in(with_ending(path, ".csv")) - {(run.method, run.seed) for run in runs}
    if runs and lost:  # without `runs` the line names them
        method, seed = min(lost)
        raise UserError(
            f"{written} has numbers of {method} seed {seed}, which this table would not have: give "
            "it another --name."
        )
    return path


def _telling(line: str) -> list[str]:
    """The words of a command that decide a table's numbers."""
    return [word for word in line.split() if not word.startswith(SILENT)]


def _runs_in(path: Path) -> set[tuple[str, int]]:
    """The methods and seeds of a table's CSV file."""
    if not path.exists():
        return set()
    table = read_table(path)
    if not {"method", "seed"} <= {*table.columns}:
        return set()
    return set(zip(table["method"], table["seed"], strict=True))


def asked(module: str, explanation: str | None, defaults: Sequence[str]) -> Asked:
    """Read the command line of `python -m experiments.MODULE`; `defaults` are settings.

    Raises:
        UserError: unknown experiment, unknown key, a value of the wrong type or out of range.
    """
    parser = ArgumentParser(
        prog=f"python -m experiments.{module}",
        usage="%(prog)s EXPERIMENT [--name=NAME] [--KEY=VALUE ...]",
        description=explanation,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", help="one of those that `python -m cil.run` lists")
    parser.add_argument("--name", help="of the files in experiments/results, or a path")
    known, settings = parser.parse_known_args()
    config, fresh = parse(known.experiment, [*defaults, *settings])
    check(config)
    return Asked(Path(known.experiment).stem, config, fresh, known.name, typed(module))
