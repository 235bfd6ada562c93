"""Choose settings by method, on held-out training images of a stream's first experiences alone.

    python -m experiments.tune split_digits --methods=[ewc,lwf]
    python -m cil.run split_digits --methods=[ewc,lwf] --config=runs/split_digits-tuning/tuned.yaml

Every combination of a method's grid (configs/grids/EXPERIMENT.yaml or --grid=FILE) learns the first
two experiences (--experiences=N) and is judged by its accuracy on their held-out images, a mean
over --seeds; no test image is looked at, and no later class. At a tie the average over the
experiences decides, then the order of the grid. Every trial is a run with its record under
RUNS/EXPERIMENT-tuning; interrupted, the same line goes on where it stopped. The picks are written
to tuned.yaml there, and a table of all trials to trials.csv, each beside those of other methods
from before. A trial that diverges counts as the worst there is. All other settings are the
experiment's, what it has tuned for the method included, or as given by --KEY=VALUE.

A VAR fits its scale weights (a number a scale), and an adaptive schedule its margins, to the same
held-out images that judge it here: a little in its favour.

That hyper-parameters must be chosen on early experiences, as later ones are not there yet, is
argued by Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM" (arXiv 1812.00420).
"""

import itertools
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jsonargparse import get_loader

from cil.command_line import given, parse
from cil.config import Config
from cil.errors import DivergenceError, UserError
from cil.files import locked, read_bytes
from cil.learning import complete, left_to_learn, listed
from cil.methods.registry import build, check_names, expand
from cil.records import RunView, write_bytes
from cil.records.layout import read_table
from cil.run import exit_code
from cil.streams import open_stream

GRIDS = Path(__file__).parent.parent / "configs" / "grids"
Grid = Mapping[str, Mapping[str, Sequence[Any]]]  # method -> setting -> values
Trial = tuple[str, dict[str, Any]]  # a method and its values
JUDGED_BY = ["last_accuracy", "average_incremental_accuracy"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, as `cil.run` does."""
    return exit_code(partial(_command, sys.argv[1:] if arguments is None else list(arguments)))


def _command(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m experiments.tune",
        usage="%(prog)s EXPERIMENT [--grid=FILE] [--experiences=N] [--KEY=VALUE ...]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", help="one of those that `python -m cil.run` lists")
    grid = "of values to try (default: configs/grids/EXPERIMENT.yaml)"
    parser.add_argument("--grid", type=Path, metavar="FILE", help=grid)
    first = "learned and judged by, the first ones (default: 2)"
    parser.add_argument("--experiences", type=int, default=2, metavar="N", help=first)
    own, others = parser.parse_known_args(arguments)
    config, fresh = parse(own.experiment, others)
    stem = Path(own.experiment).stem
    trials = trials_of(config, read_grid(own.grid or GRIDS / f"{stem}.yaml"))
    check_given(others, trials)
    stream = replace(config.stream, evaluate="validation", stop_after=own.experiences)
    name = f"{stem}-tuning"
    table = tune(name, replace(config, stream=stream), trials, fresh)
    if table.empty:  # of several processes the first one alone has them
        return
    folder = Path(config.runs) / name
    command = " ".join(["python -m experiments.tune", *arguments])
    write_picks(folder / "tuned.yaml", table, command)
    shown = table.drop(columns="values")
    write_trials(folder / "trials.csv", shown)
    print(shown.to_string(index=False, float_format="{:.3f}".format))
    print(f"picks: --config={folder / 'tuned.yaml'}")


def read_grid(path: Path) -> Grid:
    """A file of grids: method, then setting, then a list of values.

    Raises:
        UserError: it is not there, or not made so.
    """
    if not path.is_file():
        raise UserError(f"There is no grid {path}: name a file of grids with --grid.")
    try:
        # As the settings themselves are read: 1e-3 is a number there, which YAML takes for a word.
        grid = get_loader("yaml")(read_bytes(path).decode()) or {}
        if grid and all(_is_grid(method, settings) for method, settings in grid.items()):
            return grid
    except (yaml.YAMLError, AttributeError, TypeError, UnicodeDecodeError):
        pass
    raise UserError(f"{path} must hold, for every method, settings with a list of values each.")


def _is_grid(method: Any, settings: Mapping[Any, Any]) -> bool:
    """Whether a method's name and its settings are such.

    Raises:
        AttributeError, TypeError: the settings are no mapping.
    """
    named = all(isinstance(name, str) for name in (method, *settings))
    return named and all(isinstance(values, list) and values for values in settings.values())


def trials_of(config: Config, grid: Grid) -> list[Trial]:
    """All combinations of the methods that are asked for.

    Raises:
        UserError: a method does not exist or has no grid, or none has.
    """
    wished = listed(config.methods)
    check_names(wished)
    by_set = [method for method in expand(wished) if method not in wished]
    methods = [method for method in expand(wished) if method in grid or method not in by_set]
    for method in by_set:
        if method not in grid:
            print(f"left out: {method}: the grid has no settings for it", file=sys.stderr)
    if not methods:
        raise UserError(
            f"The grid has settings for none of the methods: it has them for {', '.join(grid)}."
        )
    return [(method, values) for method in methods for values in combinations(method, grid)]


def check_given(arguments: Sequence[str], trials: Sequence[Trial]) -> None:
    """Raises UserError for a --KEY=VALUE whose place values of the grid would take."""
    keys = given(arguments)
    if "stream.evaluate" in keys or "stream.stop_after" in keys:
        raise UserError(
            "Trials are judged by held-out images of the first experiences alone: take "
            "--stream.evaluate and --stream.stop_after off the line; --experiences=N says how many."
        )
    for method, values in trials:
        for key in values:
            if key in keys:
                raise UserError(
                    f"The grid tries values of {key} for {method}: take --{key} off the line, or "
                    "the setting out of the grid."
                )


def tune(name: str, config: Config, trials: Sequence[Trial], fresh: bool = False) -> pd.DataFrame:
    """One row a trial: method, setting, seeds, numbers of `JUDGED_BY`, diverged, values, picked.

    One that diverged has accuracies of 0 and is never picked.

    Raises:
        UserError: a setting does not exist or is out of its range, or what `cil.run` refuses.
    """
    check(name, config, trials, fresh)
    rows = []
    for trial in trials:
        row = _tried(name, config, trial, fresh)
        rows += [] if row is None else [row]
    table = pd.DataFrame(rows)
    if rows:
        learned = table[~table["diverged"]]
        table["picked"] = table.index.isin([_best(part) for _, part in learned.groupby("method")])
        for method in dict.fromkeys(table["method"]):
            if method not in set(learned["method"]):
                print(f"nothing is picked for {method}: every trial diverged", file=sys.stderr)
    return table


def check(name: str, config: Config, trials: Sequence[Trial], fresh: bool = False) -> None:
    """Raises UserError for mistakes of any trial that is not finished, before one is trained."""
    left = [
        (method, own)
        for method, values in trials
        if left_to_learn(f"{name}/{label(values)}", own := _laid(config, method, values), fresh)
    ]
    if left:
        stream = open_stream(config.stream, Path(config.cache))
        for method, own in left:
            build(method, own, stream)


def _laid(config: Config, method: str, values: dict[str, Any]) -> Config:
    return replace(config, methods=[method], tuned={method: config.tuned.get(method, {}) | values})


def _tried(name: str, config: Config, trial: Trial, fresh: bool) -> dict[str, Any] | None:
    """A trial's row; None on all processes but the first one."""
    method, values = trial
    try:
        views = complete(f"{name}/{label(values)}", _laid(config, method, values), fresh)
    except DivergenceError as error:
        print(f"{method} with {label(values)} counts as the worst: {error}", file=sys.stderr)
        judged, seconds = dict.fromkeys(JUDGED_BY, 0.0), math.nan
        row = {"method": method, "settings": label(values), "seeds": len(listed(config.seeds))}
        return row | judged | {"training_seconds": seconds, "diverged": True, "values": values}
    return _row(method, values, views) if views else None


def combinations(method: str, grid: Grid) -> Iterator[dict[str, Any]]:
    """Every combination of a method's values, those first in their lists first.

    Raises:
        UserError: the grid has no settings for it.
    """
    if method not in grid:
        raise UserError(
            f"The grid has no settings for {method}: it has them for {', '.join(grid)}."
        )
    for values in itertools.product(*grid[method].values()):
        yield dict(zip(grid[method], values, strict=True))


def label(values: Mapping[str, Any]) -> str:
    """A trial's folder: lr=0.005,ewc_lambda=100.0"""
    return ",".join(f"{key.partition('.')[2]}={value}" for key, value in values.items())


def _row(method: str, values: dict[str, Any], views: Sequence[RunView]) -> dict[str, Any]:
    means = {key: sum(v.summary[key] for v in views) / len(views) for key in JUDGED_BY}
    seconds = sum(v.summary["training_seconds"] for v in views)
    row = {"method": method, "settings": label(values), "seeds": len(views), **means}
    return row | {"training_seconds": seconds, "diverged": False, "values": values}


def _best(trials: pd.DataFrame) -> Any:
    """The index of the best row, of equal ones the first."""
    ordered = trials.sort_values(JUDGED_BY, ascending=False, kind="stable")
    return ordered.index[0]


def write_picks(path: Path, trials: pd.DataFrame, command: str) -> None:
    """Write what `--config` takes; picks of other methods that the file holds are kept.

    Raises:
        UserError: the file cannot be read or written, or holds something else.
    """
    with locked(path.with_name(f".{path.name}.lock")):  # another search may end just now
        before = _picked_before(path)
        picked = trials[trials.picked]
        picks = dict(zip(picked["method"], picked["values"], strict=True))
        text = yaml.safe_dump({"tuned": before | picks}, sort_keys=False)
        write_bytes(path, f"# Picked on held-out images, last by: {command}\n\n{text}".encode())


def write_trials(path: Path, trials: pd.DataFrame) -> None:
    """Write the table of trials; rows of other methods that the file holds are kept.

    Raises:
        UserError: the file cannot be read or written, or holds something else.
    """
    with locked(path.with_name(f".{path.name}.lock")):
        before = _tried_before(path) if path.exists() else trials.head(0)
        if list(before.columns) != list(trials.columns):
            raise UserError(f"{path} holds no trials: move it away; every trial is recorded.")
        others = before[~before["method"].isin(trials["method"])]
        whole = pd.concat([others, trials]) if len(others) else trials
        write_bytes(path, whole.to_csv(index=False).encode())


def _tried_before(path: Path) -> pd.DataFrame:
    try:
        return read_table(path)
    except UserError:
        return pd.DataFrame()  # which has other columns


def _picked_before(path: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(read_bytes(path))["tuned"]) if path.exists() else {}
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} holds no picks: move it away; every trial is recorded.") from None


if __name__ == "__main__":
    sys.exit(main())
