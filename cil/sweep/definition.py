"""A sweep file, as W&B defines it: what is tried, and by which command.

Of W&B's keys those are understood that a sweep on this machine needs; the keys of a parameter are
those of https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cil.command_line import near
from cil.errors import UserError
from cil.files import read_bytes

METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
STEPPED = ("int_uniform", "q_uniform", "q_log_uniform_values")
LOGARITHMIC = ("log_uniform_values", "q_log_uniform_values")
DISTRIBUTIONS = ("constant", "categorical", "uniform", *dict.fromkeys((*STEPPED, *LOGARITHMIC)))
DESCRIBED = ("name", "description", "project", "entity", "program", "command")
KEYS = (*DESCRIBED, "method", "metric", "parameters", "run_cap", "early_terminate")
COMMAND = '["${env}", "${interpreter}", "-m", "cil.run", "EXPERIMENT", "${args}"]'


@dataclass(frozen=True)
class Parameter:
    """What a setting may be: `values`, or, where there are none, the numbers from low to high.

    log: evenly spread on a logarithmic scale; step: multiples of it alone, 0 for all numbers.
    """

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float = 0.0

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1] of the way from the first to the last."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.step:  # half of it beyond the ends, so that these are as likely as the others
            half = 0.0 if self.log else self.step / 2
            number = _between(self.low - half, self.high + half, share, self.log)
            number = round(number / self.step) * self.step
            number = min(max(number, self.low), self.high)
            whole = float(self.step).is_integer() and float(number).is_integer()
            return int(number) if whole else _short(number)
        return min(max(_short(_between(self.low, self.high, share, self.log)), self.low), self.high)

    def position(self, value: Any) -> list[float]:
        """Coordinates in [0, 1] for a model of the results: one, or for `values` one each."""
        if self.values:
            return [float(value == other) for other in self.values] if len(self.values) > 1 else []
        ends = (self.low, self.high, float(value))
        low, high, number = (math.log(x) for x in ends) if self.log else ends
        return [(number - low) / (high - low)]

    def all(self) -> tuple[Any, ...] | None:
        """Every value, for a grid; None where they cannot be listed."""
        if self.values:
            return self.values
        if self.log or not self.step == 1 == self.low % 1 + self.high % 1 + 1:
            return None
        return tuple(range(int(self.low), int(self.high) + 1))


@dataclass(frozen=True)
class Definition:
    """A sweep: how it chooses (`method`), what it looks at, what it starts."""

    path: Path
    method: str
    metric: str
    goal: str
    experiment: str
    settings: tuple[str, ...]  # that the command gives to every trial, as --KEY=VALUE
    parameters: dict[str, Parameter]
    run_cap: int | None  # trials at most
    early_terminate: bool  # the server may end trials before their end
    content: dict[str, Any]  # of the file


def read(path: Path) -> Definition:
    """Read a sweep file.

    Raises:
        UserError: it is not there, or no sweep that can be run here.
    """
    if not path.is_file():
        raise UserError(f"There is no sweep file {path}: those of cil are in configs/sweeps.")
    try:
        content = yaml.safe_load(read_bytes(path))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold the keys of a W&B sweep.")
    for key in content:
        _choice(path, "the key", key, KEYS)
    method = _choice(path, "method", content.get("method"), METHODS)
    metric = content.get("metric")
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise UserError(f"{path} must name its metric: metric, and in it name and goal.")
    goal = _choice(path, "metric.goal", metric.get("goal", "minimize"), GOALS)
    experiment, settings = _command(path, content.get("command"))
    listed = content.get("parameters")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{path} must hold parameters, the settings that are tried.")
    parameters = {name: _parameter(path, name, given) for name, given in listed.items()}
    for name, parameter in parameters.items():
        if method == "grid" and parameter.all() is None:
            raise UserError(f"{path}: a grid needs a list of values of {name}, or a step.")
    cap = content.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise UserError(f"{path} gives run_cap as {cap}, but it must be a whole number from 1 on.")
    stops = "early_terminate" in content
    return Definition(
        path,
        method,
        metric["name"],
        goal,
        experiment,
        settings,
        parameters,
        cap,
        stops,
        content,
    )


def _command(path: Path, command: Any) -> tuple[str, tuple[str, ...]]:
    """The experiment and the settings that stand in the command."""
    words = [str(word) for word in command] if isinstance(command, list) else []
    if "cil.run" in words and words[-1] == "${args}":
        after = words[words.index("cil.run") + 1 : -1]
        if after and not any("${" in word for word in after):
            return after[0], tuple(after[1:])
    raise UserError(f"{path} must have the command {COMMAND}, in which settings may follow.")


def _number_or_itself(value: Any) -> Any:
    """YAML takes 1e-2 for a text, and a setting takes the text for a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _parameter(path: Path, name: str, given: Any) -> Parameter:
    place = f"{path}, parameter {name}"
    if not isinstance(given, Mapping):
        raise UserError(f"{place} must have a value, values, or min and max.")
    if "value" in given or "values" in given:
        values = given["values"] if "values" in given else [given["value"]]
        if not isinstance(values, list) or not values:
            raise UserError(f"{place} must have a list of values, and at least one.")
        _only(place, given, {"value", "values", "distribution"})
        meant = [_number_or_itself(value) for value in values]
        twice = [value for value, m in zip(values, meant, strict=True) if meant.count(m) > 1]
        if twice:
            raise UserError(f"{place} has {twice[0]} more than once: give each value once.")
        return Parameter(tuple(values))
    return _numbers(place, given)


def _numbers(place: str, given: Mapping[str, Any]) -> Parameter:
    """A parameter from `min` to `max`."""
    low, high = given.get("min"), given.get("max")
    if not all(isinstance(end, int | float) and type(end) is not bool for end in (low, high)):
        raise UserError(f"{place} must have a value, values, or numbers as min and max.")
    assert low is not None
    assert high is not None
    whole = isinstance(low, int) and isinstance(high, int)
    distribution = given.get("distribution", "int_uniform" if whole else "uniform")
    _choice(place, "distribution", distribution, DISTRIBUTIONS)
    log = distribution in LOGARITHMIC
    _only(place, given, {"min", "max", "distribution", *(["q"] if distribution in STEPPED else [])})
    step = given.get("q", 1) if distribution in STEPPED else 0
    if not low < high or (log and low <= 0):
        raise UserError(f"{place}: min must be below max, and above 0 on a logarithmic scale.")
    if type(step) not in (int, float) or (step <= 0 and distribution in STEPPED):
        raise UserError(f"{place} gives q as {step}, but it must be a number above 0.")
    return Parameter((), low, high, log, float(step))


def _only(place: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{place}: {key} is not known here, but {', '.join(sorted(known))}.")


def _choice(place: object, key: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        hint = near(str(value), known) or f"choose from {', '.join(known)}."
        raise UserError(f"{place} gives {key} as {value}: {hint}")
    return str(value)


def _between(low: float, high: float, share: float, log: bool) -> float:
    return low * (high / low) ** share if log else low + (high - low) * share


def _short(number: float) -> float:
    """Four digits: they tell trials apart, and can be read and typed."""
    return float(f"{number:.4g}")
