"""What to try next, given what was tried: grid, random and Bayesian search.

Every proposal follows from the definition and the results so far alone, so that a sweep that was
interrupted goes on with the trials that it would have had anyway. They are our own since W&B's
library for it (`sweeps` 0.3) cannot be installed beside numpy 2.
"""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from cil.sweep.definition import Definition

Settings = dict[str, Any]  # parameter -> value
Result = tuple[Settings, float | None]  # what was tried and its metric, None where it failed

RANDOM_FIRST = 4  # results before a model of them says anything
CANDIDATES = 1000  # among which the most promising is looked for


def propose(definition: Definition, results: Sequence[Result]) -> Settings | None:
    """The settings of the next trial; None when the grid has been gone through."""
    if definition.method == "grid":
        return _of_grid(definition, len(results))
    draws = np.random.default_rng(len(results))
    known = [(settings, value) for settings, value in results if value is not None]
    if definition.method == "random" or len(known) < RANDOM_FIRST:
        return _random(definition, draws)
    candidates = [_random(definition, draws) for _ in range(CANDIDATES)]
    tried = [settings for settings, _ in results]
    candidates = [c for c in candidates if c not in tried] or candidates
    sign = 1.0 if definition.goal == "maximize" else -1.0
    improvement = expected_improvement(
        np.array([_position(definition, settings) for settings, _ in known]),
        np.array([sign * value for _, value in known]),
        np.array([_position(definition, settings) for settings in candidates]),
    )
    return candidates[int(improvement.argmax())]


def grid_size(definition: Definition) -> int:
    """The number of trials of a grid."""
    return int(np.prod([len(p.all() or ()) for p in definition.parameters.values()]))


def expected_improvement(
    tried: np.ndarray, results: np.ndarray, candidates: np.ndarray
) -> np.ndarray:
    """By how much each candidate (M, D) is expected to exceed the best result so far -> (M,).

    tried (N, D) with results (N,), greater is better. A Gaussian process with a Matern-5/2 kernel
    and a length scale for every coordinate, and noise of its own: Snoek et al. 2012, "Practical
    Bayesian optimization of machine learning algorithms" (arXiv 1206.2944). The best result is the
    highest that the model expects at a place that was tried, since single results are noisy.
    """
    from scipy.stats import norm
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    centred = (results - results.mean()) / max(results.std(), 1e-12)
    kernel = Matern(np.ones(tried.shape[1]), (0.05, 20.0), nu=2.5) + WhiteKernel(0.1, (1e-6, 1.0))
    process = GaussianProcessRegressor(kernel, n_restarts_optimizer=4, random_state=0)
    with warnings.catch_warnings():  # a length scale at the end of its range is an answer too
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(tried, centred)
    mean, deviation = process.predict(candidates, return_std=True)
    noise = process.kernel_.k2.noise_level  # of a result; what is asked for is the mean of many
    deviation = np.sqrt(np.maximum(deviation**2 - noise, 1e-12))
    gain = mean - process.predict(tried).max()
    ratio = gain / deviation
    return np.asarray((gain * norm.cdf(ratio) + deviation * norm.pdf(ratio)) * results.std())


def _of_grid(definition: Definition, index: int) -> Settings | None:
    """The last parameter changes first."""
    lists = [parameter.all() or () for parameter in definition.parameters.values()]
    values = next(itertools.islice(itertools.product(*lists), index, None), None)
    return None if values is None else dict(zip(definition.parameters, values, strict=True))


def _random(definition: Definition, draws: np.random.Generator) -> Settings:
    return {name: p.at(float(draws.random())) for name, p in definition.parameters.items()}


def _position(definition: Definition, settings: Settings) -> list[float]:
    """Where settings lie in the cube of all that are possible."""
    by_name = definition.parameters.items()
    return [x for name, parameter in by_name for x in parameter.position(settings[name])]
