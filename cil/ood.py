"""Does a method know what it has not met yet: test images of seen against unseen classes.

After each experience every test image gets a score, higher for what looks familiar, and AUROC says
how often a seen class's image scores above an unseen one's. Of logits f_y of the C classes seen:

    msp        max_y softmax(f)_y                  Hendrycks & Gimpel 2017, arXiv 1610.02136
    max_logit  max_y f_y                           Hendrycks et al. 2022, arXiv 1911.11132
    energy     log sum_y exp f_y                   Liu et al. 2020, arXiv 2010.03759
    ratio      energy - log p(x | null class)      after Ren et al. 2019, arXiv 1906.02845

For a generative method f_y = log p(x | y), all tokens summed and the scales unweighted, so that the
energy is log p(x) but for a constant, and msp that of the posterior. (Of a diffusion method f_y is
minus its error.) A division by the number of tokens, the same for all images, would not change
AUROC. Its null class is what a trunk knows of images whatever their class: the ratio takes away
what makes an image likely under any class, such as having little on it. (With plasticity
scratch no trunk knows that, and there is no ratio.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cil import cache
from cil.config import TrainerConfig
from cil.errors import UserError
from cil.files import replacing
from cil.methods.registry import is_of, restore
from cil.methods.scoring import score
from cil.methods.training import find_device
from cil.records import RunView

SCORES = ("msp", "max_logit", "energy", "ratio")


def familiarity(logits_NC: Tensor, null_N: Tensor | None = None) -> dict[str, Tensor]:
    """The scores (N,) of `SCORES`, float64; without `null_N`, log p(x | null class), no ratio."""
    logits_NC = logits_NC.double()
    best, energy = logits_NC.max(1).values, logits_NC.logsumexp(1)
    # Minus what the other classes add to the best: a softmax would round to 1 for most images.
    others = (logits_NC - best[:, None]).scatter(1, logits_NC.argmax(1)[:, None], -torch.inf)
    scores = {"msp": -others.exp().sum(1), "max_logit": best, "energy": energy}
    return scores if null_N is None else scores | {"ratio": energy - null_N.double()}


def auroc(seen_N: Tensor, unseen_N: Tensor) -> float:
    """How often a seen image scores above an unseen one, in [0, 1]; a tie counts half."""
    from sklearn.metrics import roc_auc_score

    truth = np.r_[np.ones(len(seen_N)), np.zeros(len(unseen_N))]
    return float(roc_auc_score(truth, torch.cat([seen_N, unseen_N]).numpy()))


def evaluate(
    run: RunView,
    trainer: TrainerConfig,
    folder: Path,
    done: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """AUROC after each experience but the last: method, seed, experience, score, auroc.

    Where earlier classes never change, the finished method is asked once: what it will say of the
    classes seen so far is what it said then. Others are asked as they were after each experience,
    which their run must have kept. Logits that were computed before are read from `folder`, the
    cache. `done` is called after each experience.

    Raises:
        UserError: the run has one experience, it has not kept its checkpoints, its images are not
            there, or a checkpoint cannot be read.
    """
    experiences = run.stream["experiences"]
    last = len(experiences) - 1
    if last < 1:
        raise UserError(f"{run.folder} has one experience: there are no unseen classes in it.")
    logits = _Logits(run, trainer, folder)
    rows = []
    for t in range(last):
        seen_classes = sum(map(len, experiences[: t + 1]))
        values_NC, null_N = logits.after(t, seen_classes)
        images = sum(run.sizes[: t + 1])
        for name, score_N in familiarity(values_NC, null_N).items():
            value = auroc(score_N[:images], score_N[images:])
            rows.append((run.method, run.seed, t, name, value))
        done()
    return pd.DataFrame(rows, columns=["method", "seed", "experience", "score", "auroc"])


class _Logits:
    """What a run's method says of all test images of its stream, as it was at some time."""

    def __init__(self, run: RunView, trainer: TrainerConfig, folder: Path) -> None:
        self.run, self.trainer, self.folder = run, trainer, folder
        self.last = len(run.sizes) - 1
        self.frozen = earlier_classes_stay(run)
        missing = set(range(self.last)) - set(run.kept_states())
        if missing and not self.frozen:
            raise UserError(
                f"{run.folder} has kept its last checkpoint alone, but {run.method} changes "
                "earlier classes: run it with --fresh --trainer.keep_checkpoints=true."
            )
        self._opened: tuple[Any, Any] | None = None

    def after(self, experience: int, classes: int) -> tuple[Tensor, Tensor | None]:
        """(N, classes) and, where it is known, log p(x | null class) (N,)."""
        state = self.last if self.frozen else experience
        values = torch.from_numpy(self._cached(state))
        if not is_generative(self.run):
            return values, None
        return values[:, :classes], values[:, -1] if knows_null(self.run) else None

    def _cached(self, experience: int) -> NDArray[np.float32]:
        run = self.run
        key = {
            "run": run.checkpoint_hash(experience),
            "config": run.config,
            "stream": run.stream["fingerprint"],
            "evaluated_on": run.stream.get("evaluated_on"),
            "device": find_device(self.trainer).type,
            "precision": self.trainer.precision,
        }
        path = cache.place(self.folder / "ood", f"{run.method}-{experience}", key, ".npy")
        with cache.alone(path):
            if cache.find(path) is None:
                values = self._computed(experience)
                with replacing(path, cache.KEY) as file:
                    np.save(file, values)
                cache.keep(path, file.digest(), key, {})
            loaded: NDArray[np.float32] = np.load(path)
        return loaded

    def _computed(self, experience: int) -> NDArray[np.float32]:
        self._opened = self._opened or restore(self.run, self.trainer, self.folder)
        method, stream = self._opened
        if not self.frozen:
            method.load_state(self.run.state(experience))
        asked: Any = WithNull(method) if is_generative(self.run) else method
        tests = [e.test for e in stream.experiences]
        parts = score(asked, tests, self.trainer, f"{method.name} after {experience + 1}")
        return torch.cat([values for values, _ in parts]).float().numpy()


class WithNull:
    """A generative method whose scores have the null class as a last column."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def scores(self, images: Tensor) -> Tensor:
        values: Tensor = self.method.class_and_null_likelihoods(images)
        return values


def is_generative(run: RunView) -> bool:
    """Whether a run's method has likelihoods."""
    return is_of(run.config, "generative")


def earlier_classes_stay(run: RunView) -> bool:
    """Whether what a method says of a class is the same for ever once it has learned it."""
    if not is_generative(run):
        return False
    return _plasticity(run) != "trunk"


def knows_null(run: RunView) -> bool:
    """Whether its first trunk has learned what images are like, whatever their class."""
    return is_generative(run) and _plasticity(run) != "scratch"


def _plasticity(run: RunView) -> str:
    return str(run.config[run.method.partition("-")[0]]["plasticity"])
