"""Sweep files are read as W&B means them, and what is wrong with one is said in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cil.errors import UserError
from cil.sweep.definition import Parameter, read

GOOD: dict[str, Any] = {
    "program": "cil/run.py",
    "command": ["${env}", "python", "-m", "cil.run", "split_digits", "--var.depth=1", "${args}"],
    "method": "random",
    "metric": {"name": "last_accuracy", "goal": "maximize"},
    "run_cap": 7,
    "parameters": {
        "methods": {"value": "var"},
        "seeds": {"values": [0, 1]},
        "var.depth": {"min": 1, "max": 4},
        "var.drop_path": {"min": 0.0, "max": 0.5},
        "var.lr": {"min": 1e-3, "max": 1e-1, "distribution": "log_uniform_values"},
        "var.width": {"min": 32, "max": 96, "q": 32, "distribution": "q_uniform"},
    },
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_file_is_understood(tmp_path: Path) -> None:
    sweep = read(written(tmp_path, GOOD))
    assert (sweep.method, sweep.metric, sweep.goal) == ("random", "last_accuracy", "maximize")
    assert (sweep.experiment, sweep.settings) == ("split_digits", ("--var.depth=1",))
    assert (sweep.run_cap, sweep.early_terminate) == (7, False)
    assert list(sweep.parameters) == list(GOOD["parameters"])
    shares = [0.0, 0.25, 0.49, 0.51, 0.75, 1.0]
    values = {name: [p.at(share) for share in shares] for name, p in sweep.parameters.items()}
    assert values["methods"] == ["var"] * 6
    assert values["seeds"] == [0, 0, 0, 1, 1, 1]
    assert values["var.depth"] == [1, 2, 2, 3, 4, 4]
    assert values["var.drop_path"] == [0.0, 0.125, 0.245, 0.255, 0.375, 0.5]
    assert values["var.lr"] == [0.001, 0.003162, 0.009550, 0.01047, 0.03162, 0.1]
    assert values["var.width"] == [32, 32, 64, 64, 96, 96]


def test_the_goal_is_to_minimize_where_none_is_given(tmp_path: Path) -> None:
    assert read(written(tmp_path, GOOD | {"metric": {"name": "forgetting"}})).goal == "minimize"


def test_values_of_a_stepped_range_are_equally_likely() -> None:
    whole = Parameter((), 1, 4, step=1.0)
    drawn = [whole.at((k + 0.5) / 400) for k in range(400)]
    assert {value: drawn.count(value) for value in set(drawn)} == dict.fromkeys((1, 2, 3, 4), 100)
    assert all(type(value) is int for value in drawn)
    assert whole.all() == (1, 2, 3, 4)
    assert Parameter((), 0.5, 2.0, step=0.5).at(0.0) == 0.5
    assert Parameter((), 1, 64, log=True, step=1.0).at(0.5) == 8  # the geometric mean


def test_positions_are_coordinates_of_the_unit_cube() -> None:
    assert Parameter(("a", "b", "c")).position("b") == [0.0, 1.0, 0.0]
    assert Parameter(("a",)).position("a") == []
    assert Parameter((), 1.0, 3.0).position(1.5) == [0.25]
    assert Parameter((), 0.01, 1.0, log=True).position(0.1) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "byes"}, "gives method as byes: did you mean bayes"),
        ({"metric": None}, "must name its metric"),
        ({"metric": {"name": "last_accuracy", "goal": "max"}}, "metric.goal as max"),
        ({"command": None}, "must have the command"),
        ({"command": ["python", "-m", "cil.run", "${args}"]}, "must have the command"),
        ({"command": ["-m", "cil.run", "digits", "${args_no_hyphens}"]}, "must have the command"),
        ({"parameters": {}}, "must hold parameters"),
        ({"run_cap": 0}, "run_cap as 0"),
        ({"parameters": {"seeds": 3}}, "parameter seeds must have a value"),
        ({"parameters": {"seeds": {"values": []}}}, "a list of values"),
        ({"parameters": {"seeds": {"values": [0, 1, 0]}}}, "has 0 more than once: give each value"),
        ({"parameters": {"var.lr": {"values": ["1e-2", 0.01]}}}, "has 1e-2 more than once"),
        ({"parameters": {"seeds": {"values": [1], "probabilities": [1]}}}, "probabilities is not"),
        ({"run_capp": 1}, "gives the key as run_capp: did you mean run_cap?"),
        ({"parameters": {"var.depth": {"min": 1, "max": 3, "q": 2.0, "mu": 1}}}, "mu is not known"),
        (
            {"parameters": {"x": {"min": 0, "max": 1, "q": 0, "distribution": "q_uniform"}}},
            "q as 0, but it must be",
        ),
        ({"parameters": {"var.lr": {"mu": 1.0}}}, "numbers as min and max"),
        ({"parameters": {"var.lr": {"min": 1, "max": 1}}}, "min must be below max"),
        (
            {"parameters": {"var.lr": {"min": 0.0, "max": 1.0, "distribution": "beta"}}},
            "gives distribution as beta: choose from",
        ),
        (
            {"parameters": {"x": {"min": 0.0, "max": 1.0, "distribution": "log_uniform_values"}}},
            "above 0 on a logarithmic scale",
        ),
        ({"method": "grid"}, "a grid needs a list of values of var.drop_path"),
    ],
)
def test_mistakes_are_one_sentence(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(written(tmp_path, GOOD | change))


@pytest.mark.parametrize("text", ["", "- 1\n", "a: {", "\x00"])
def test_what_is_no_sweep_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must hold the keys of a W&B sweep"):
        read(written(tmp_path, text))
    with pytest.raises(UserError, match="There is no sweep file"):
        read(tmp_path / "none.yaml")
