"""What goes along with every step of an Avalanche strategy: its size, its values, a progress bar.

Avalanche asks its plugins for methods by name, so these need no base class and no import of it.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from cil import parallel
from cil.methods.method import StepLog

_LOG_EVERY = 5  # optimiser steps; reading the loss off an accelerator waits for it


class DecayPlugin:
    """Lets the lr fall to zero along half a cosine within every experience (arXiv 1608.03983).

    At a constant lr, batch normalisation leaves the last accuracy to chance: it moved by six points
    between seeds on the digits.
    """

    supports_distributed = True

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.step, self.steps = 0, _steps(strategy)

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        share = (1 + math.cos(math.pi * self.step / self.steps)) / 2
        for group in strategy.optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])
        self.step += 1


class SharePlugin:
    """Lets a last batch of fewer images count for as much less than the other batches of a pass.

    Two images alone at the lr of 128 undo what a ResNet18 learns in a pass. The gradient is made
    smaller and not the lr, since the momentum keeps it for the steps that follow. Where the
    strategy's own loader adds stored images to every batch, they are counted too.
    """

    supports_distributed = True

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.most = 0  # images of a batch: fewer than batch_size where there are not as many

    def before_update(self, strategy: Any, **_: Any) -> None:
        self.most = max(self.most, len(strategy.mb_y))
        self.share = len(strategy.mb_y) / self.most
        self._scale_gradients(strategy, self.share)

    def after_update(self, strategy: Any, **_: Any) -> None:
        self._scale_gradients(strategy, 1 / self.share)  # si asks for them after the step

    def _scale_gradients(self, strategy: Any, factor: float) -> None:
        if factor == 1:
            return
        for group in strategy.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad *= factor


class StepPlugin:
    """Logs train/loss, first and last step included, and draws a progress bar."""

    supports_distributed = False

    def __init__(self, title: str, log: StepLog, show_progress: bool) -> None:
        self.log = log
        self.bar = tqdm(desc=title, unit="step", leave=False, disable=not show_progress)
        self.step = 0

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.steps = _steps(strategy)
        self.bar.reset(total=self.steps)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        if self.step % _LOG_EVERY == 0 or self.step == self.steps - 1:
            loss = strategy.loss.item()
            self.log(self.step, {"train/loss": loss})
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.step += 1
        self.bar.update()


@contextmanager
def following(strategy: Any, title: str, log: StepLog, show_progress: bool) -> Iterator[None]:
    """Attach the plugins while `strategy` trains, and take them off: a state must not hold them."""
    steps = StepPlugin(title, log, show_progress)
    plugins = list(strategy.plugins)
    decay = [] if strategy.optimizer is None else [DecayPlugin(), SharePlugin()]
    # At the end, so that a memory has its own data loader in place before the steps are counted.
    strategy.plugins = [*plugins, *decay, steps]
    try:
        yield
    finally:
        strategy.plugins = plugins
        steps.bar.close()


def _steps(strategy: Any) -> int:
    return int(strategy.train_epochs * len(strategy.dataloader))


# No loggers are wanted; growing layers are written to by an index that torch is to refuse one day.
_NOISE = (
    "No loggers specified",
    "Using a non-tuple sequence for multidimensional indexing",
    "cov(): degrees of freedom is <= 0",  # of a class's single image: BatchedFeCAM sees to it
)


@contextmanager
def without_noise() -> Iterator[None]:
    """Drop the warnings that say nothing to a user: Avalanche deprecating itself, and no loggers.

    And let it see no other device: its strategies learn on one.

    A filter of its own forces their display, so all are caught here and the others passed on.
    """
    with warnings.catch_warnings(record=True) as caught, parallel.unseen():
        warnings.simplefilter("always")
        yield
    for warning in caught:
        said = str(warning.message).startswith(_NOISE)
        if not said and not issubclass(warning.category, DeprecationWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
