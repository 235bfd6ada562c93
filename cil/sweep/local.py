"""A sweep on this machine: one trial after the other, each a run with its record.

RUNS/sweeps/NAME/ holds `sweep.json`, the trials that were begun, and a folder for each of them. A
trial is written there before it begins, so that after an interruption it goes on; its result is
that of its record.
"""

import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cil import parallel, trial
from cil.command_line import near, parse
from cil.config import Config
from cil.errors import UserError, is_interrupt
from cil.files import damaged, explained, lock, read_json, write_json
from cil.learning import complete
from cil.methods.registry import check_names, check_seeds, expand
from cil.records import RunView
from cil.records.resume import changed_keys, plain
from cil.sweep.definition import Definition
from cil.sweep.metric_names import check_metric
from cil.sweep.proposals import Settings, grid_size, propose

STATE, LOCK = "sweep.json", ".lock"
PATIENCE = 3  # trials that may fail one after the other
# Of an experiment's settings those that decide no result.
OF_THE_MACHINE = ("methods", "seeds", "runs", "cache", "trainer", "wandb")


@dataclass(frozen=True)
class Outcome:
    """A trial that was run; without `view` it failed."""

    name: str
    settings: Settings
    view: RunView | None = None
    value: float | None = None  # of the metric


def folder_of(config: Config, name: str) -> Path:
    return Path(config.runs) / "sweeps" / name


def run(
    definition: Definition,
    name: str,
    arguments: Sequence[str],
    count: int | None = None,
    fresh: bool = False,
) -> list[Outcome]:
    """Run trials until there are `count` in all, or the grid is done; what was begun comes first.

    arguments: settings of every trial, laid over those of the sweep, as --KEY=VALUE; fresh: start
    over.

    Raises:
        UserError: settings that do not exist, a name that is no folder's, another sweep under the
            same name, a record that is damaged, a disk that is full, or trials that fail one after
            the other.
    """
    if Path(name).name != name or name == "..":
        raise UserError(f"--name is {name}: give the name of one folder, without a path.")
    count = _trials(definition, count)
    config = _check(definition, arguments)
    folder = folder_of(config, name)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder / LOCK)
    if held is None:
        raise UserError(f"Another process runs the sweep in {folder}: choose another --name.")
    with held:
        state = _begin(folder, definition, config, fresh)
        outcomes: list[Outcome] = []
        for settings in _settings(definition, folder, state, outcomes, count):
            done = len(outcomes)
            shown = " ".join(flags(settings))
            print(f"\ntrial {done + 1} of {count}: {shown}", file=sys.stderr)
            outcomes.append(_run(definition, folder, f"trial{done}", settings, arguments))
            last = outcomes[-PATIENCE:]
            if len(last) == PATIENCE and all(outcome.view is None for outcome in last):
                raise UserError(
                    f"{PATIENCE} trials of {definition.path} failed one after the other, as said "
                    "above: once that is mended, the same line goes on."
                )
    return outcomes


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as W&B's agent gives them to a command."""
    return [f"--{name}={value}" for name, value in settings.items()]


def _trials(definition: Definition, count: int | None) -> int:
    """How many there are to be in all."""
    if count is not None and count < 1:
        raise UserError(f"--count is {count}: give 1 or more; a grid needs none.")
    limits = [count, definition.run_cap]
    if definition.method == "grid":
        limits.append(grid_size(definition))
    given = [limit for limit in limits if limit is not None]
    if not given:
        raise UserError(f"{definition.path} has no end of its own: give --count=N, 1 or more.")
    return min(given)


def _check(definition: Definition, arguments: Sequence[str]) -> Config:
    """The settings that all trials share.

    Raises:
        UserError: what no trial could be run with, before any of them begins.
    """
    for argument in arguments:
        key = argument.partition("=")[0].removeprefix("--")
        if key in definition.parameters:
            raise UserError(f"{definition.path} tries values of {key}: take --{key} off the line.")
    check_metric(definition)
    _parse_file(definition, definition.settings)
    config, _ = parse(definition.experiment, [*definition.settings, *arguments])
    if parallel.place_given(config.trainer) is not None:
        raise UserError("A local sweep starts its processes by itself: start it without torchrun.")
    first = {name: p.at(0.0) for name, p in definition.parameters.items()}
    others = [
        first | {name: value}
        for name, parameter in definition.parameters.items()
        for value in (parameter.values[1:] if parameter.values else [parameter.high])
    ]
    for settings in [first, *others]:
        chosen = _parse_file(definition, _arguments(definition, settings, arguments))
        methods = chosen.methods if isinstance(chosen.methods, list) else [chosen.methods]
        seeds = chosen.seeds if isinstance(chosen.seeds, list) else [chosen.seeds]
        check_names(methods)
        check_seeds(seeds)
        trial.check_single(expand(methods), seeds)
    return config


def _parse_file(definition: Definition, settings: Sequence[str]) -> Config:
    """The experiment with settings of the sweep's file, to which a mistake in them is put down."""
    try:
        return parse(definition.experiment, settings)[0]
    except UserError as error:
        said = str(error).replace("the command line", str(definition.path), 1)
        raise UserError(said) from error


def _begin(folder: Path, definition: Definition, config: Config, fresh: bool) -> dict[str, Any]:
    """What sweep.json holds, of the sweep that was begun before if it is this one."""
    own = {key: value for key, value in asdict(config).items() if key not in OF_THE_MACHINE}
    tried = {key: definition.content.get(key) for key in ("method", "metric", "parameters")}
    meant = plain({"sweep": tried, "experiment": definition.experiment, "settings": own})
    path = folder / STATE
    trials = [left for left in folder.glob("trial[0-9]*") if left.is_dir()]
    if trials and not path.exists() and not fresh:
        raise damaged(path, "is missing")
    if path.exists() and not fresh:
        state = read_json(path)
        if not isinstance(state.get("trials"), list) or "meant" not in state:
            raise damaged(path)
        changed = changed_keys(state["meant"], meant)
        if definition.method != "bayes":  # no result decides what else is tried
            changed = {k: v for k, v in changed.items() if not k.startswith("sweep.metric.")}
        if changed:
            key, (old, new) = next(iter(changed.items()))
            raise UserError(
                f"{folder} was begun with {key} = {old} and now it is {new}; set it back, start "
                "over with --fresh, or give the sweep another --name."
            )
        state["meant"] = meant
    else:
        for left in trials:
            with explained(left):
                shutil.rmtree(left)
        state = {"meant": meant, "trials": []}
    write_json(path, state)
    return state


def _settings(
    definition: Definition,
    folder: Path,
    state: dict[str, Any],
    outcomes: Sequence[Outcome],
    count: int,
) -> Iterator[Settings]:
    """Of every trial in turn: those begun before, then new ones, `outcomes` being those so far."""
    yield from list(state["trials"])[:count]
    while len(outcomes) < count:
        proposed = propose(definition, [(o.settings, o.value) for o in outcomes])
        if proposed is None:
            return
        state["trials"].append(proposed)
        write_json(folder / STATE, state)
        yield proposed


def _run(
    definition: Definition, folder: Path, name: str, settings: Settings, arguments: Sequence[str]
) -> Outcome:
    """Run a trial, go on with it, or read its result; what fails is said on stderr."""
    try:
        config, _ = parse(definition.experiment, _arguments(definition, settings, arguments))
        with trial.running(folder.name, name):
            (view,) = complete(
                Path(definition.experiment).stem, replace(config, runs=str(folder / name))
            )
    except UserError as error:
        print(f"{name} failed: {error}", file=sys.stderr)
        return Outcome(name, settings)
    except (Exception, SystemExit) as error:
        if is_interrupt(error):
            raise
        traceback.print_exc()
        print(f"{name} failed, as shown above.", file=sys.stderr)
        return Outcome(name, settings)
    return Outcome(name, settings, view, _value(view, definition))


def _arguments(definition: Definition, settings: Settings, arguments: Sequence[str]) -> list[str]:
    """Of the command of a trial, what follows the experiment."""
    return [*definition.settings, *flags(settings), *arguments]


def _value(view: RunView, definition: Definition) -> float:
    """The sweep's metric of a finished run: of its summary, or what was logged last."""
    logged = view.metrics().groupby("name", sort=False)["value"].last()
    numbers = {**logged, **{k: v for k, v in view.summary.items() if isinstance(v, int | float)}}
    metric = definition.metric
    if metric not in numbers:
        hint = near(metric, numbers) or f"choose from {', '.join(sorted(view.summary))}."
        raise UserError(f"{definition.path} looks at {metric}, which {view.folder} lacks: {hint}")
    return float(numbers[metric])
