"""What commands that write a table are asked: an experiment, its settings, a name of the table."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cil.command_line import parse
from cil.config import Config

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Asked:
    """A command line as it was understood."""

    experiment: str
    config: Config
    fresh: bool
    name: str | None  # of the files in experiments/results, or a path
    line: str  # as it was typed, to stand in the table


def asked(module: str, explanation: str | None, defaults: Sequence[str]) -> Asked:
    """Read the command line of `python -m experiments.MODULE`; `defaults` are settings.

    Raises:
        UserError: unknown experiment, unknown key or a value of the wrong type.
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
    line = " ".join([f"python -m experiments.{module}", *sys.argv[1:]])
    return Asked(Path(known.experiment).stem, config, fresh, known.name, line)
