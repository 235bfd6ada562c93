"""Proposals follow from what was tried alone, and the Bayesian ones find what random ones miss."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cil.sweep.definition import Definition, Parameter
from cil.sweep.proposals import Result, expected_improvement, grid_size, propose

LR = Parameter((), 1e-4, 1.0, log=True)


def sweep(method: str, goal: str = "maximize", **parameters: Parameter) -> Definition:
    return Definition(Path("s"), method, "m", goal, "e", (), parameters, None, False, {})


def carried_out(definition: Definition, count: int, result: Any) -> list[Result]:
    done: list[Result] = []
    for _ in range(count):
        settings = propose(definition, done)
        assert settings is not None
        done.append((settings, result(settings)))
    return done


def test_a_grid_is_gone_through_once() -> None:
    grid = sweep(
        "grid", a=Parameter(("x", "y")), b=Parameter((), 1, 3, step=1.0), c=Parameter((7,))
    )
    done = carried_out(grid, 6, lambda _: None)  # failures do not hold it up
    assert [(s["a"], s["b"], s["c"]) for s, _ in done] == [
        *(("x", b, 7) for b in (1, 2, 3)),
        *(("y", b, 7) for b in (1, 2, 3)),
    ]
    assert propose(grid, done) is None
    assert grid_size(grid) == 6


def test_random_proposals_are_the_same_again_and_fill_their_range() -> None:
    definition = sweep("random", lr=LR, kind=Parameter(("x", "y")))
    done = carried_out(definition, 60, lambda _: 0.5)
    again = carried_out(definition, 60, lambda _: 0.1)
    assert [settings for settings, _ in done] == [settings for settings, _ in again]
    decades = [math.floor(math.log10(s["lr"])) for s, _ in done]
    assert all(decades.count(decade) > 6 for decade in (-4, -3, -2, -1))
    assert {s["kind"] for s, _ in done} == {"x", "y"}


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_bayes_nears_the_best_and_random_does_not(goal: str) -> None:
    """A peak a tenth of a decade wide at lr 0.02, kind y; 16 trials."""
    sign = 1 if goal == "maximize" else -1

    def result(settings: dict[str, Any]) -> float:
        off = math.log10(settings["lr"] / 0.02)
        return sign * ((settings["kind"] == "y") - off**2)

    parameters = {"lr": LR, "kind": Parameter(("x", "y")), "seed": Parameter((0,))}
    best = {
        method: max(
            sign * (v or 0) for _, v in carried_out(sweep(method, goal, **parameters), 16, result)
        )
        for method in ("bayes", "random")
    }
    assert best["bayes"] > 0.999 > best["random"]


def test_bayes_goes_on_with_what_was_tried_and_leaves_failures_out() -> None:
    definition = sweep("bayes", lr=LR)
    done = carried_out(definition, 6, lambda s: -abs(math.log10(s["lr"]) + 2))
    again = propose(definition, done)
    assert propose(definition, done) == again
    assert again not in [settings for settings, _ in done]
    failed: list[Result] = [(settings, None) for settings, _ in done]
    assert propose(definition, failed) == propose(sweep("random", lr=LR), failed)


def test_improvement_is_expected_beside_the_best_and_where_nothing_was_tried() -> None:
    tried = np.array([[0.0], [0.1], [0.2], [0.3]])
    results = np.array([0.0, 1.0, 2.0, 3.0])
    worst, best, beyond = expected_improvement(tried, results, np.array([[0.0], [0.3], [0.4]]))
    assert worst < best < beyond
    flat = expected_improvement(tried, np.ones(4), np.array([[0.5]]))
    assert np.isfinite(flat).all()
