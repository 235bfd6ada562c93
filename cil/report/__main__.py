"""Write the page of an experiment: `python -m cil.report runs/split_digits`."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from cil.errors import UserError

HELP = """Write the finished runs of an experiment as one page, FOLDER/report.html.

It needs no network and nothing beside it: the table, the forgetting curves, accuracy matrices,
samples, explanations, costs, and the configuration and environment of every run. Its numbers link
to the run folders. `python -m cil.run` writes it too, at its end.

  python -m cil.report runs/split_digits                 write runs/split_digits/report.html
  python -m cil.report runs/*                            a page for each experiment
  python -m cil.report runs/split_digits --output=a.html write it elsewhere
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 for bad input (one sentence)."""
    asked = _asked(arguments)
    try:
        for folder in asked.folders:
            _write(folder, asked.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _asked(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(
        prog="python -m cil.report",
        usage="%(prog)s FOLDER [FOLDER ...] [--output=FILE]",
        description=HELP,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of an experiment, as runs/NAME"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page of a single FOLDER")
    asked = parser.parse_args(arguments)
    if asked.output and len(asked.folders) > 1:
        parser.error("--output is for one FOLDER")
    return asked


def _write(folder: Path, output: Path | None) -> None:
    from cil.report.page import write_report  # pandas and matplotlib: seconds

    path = write_report(folder, output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in any browser")


if __name__ == "__main__":
    sys.exit(main())
