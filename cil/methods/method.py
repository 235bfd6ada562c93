"""What the protocol asks of a method. It knows no method by any other name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cil.streams.stream import Experience


class StepLog(Protocol):
    """Takes the values of one optimiser step; steps count from 0 within one `learn` call."""

    def __call__(self, step: int, values: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class MethodSize:
    """What a method costs to keep and to ask, at its present number of classes."""

    parameters: int
    stored_images: int
    stored_bytes: int  # beside the parameters: of images (8 bits a value), logits, old networks
    likelihood_evaluations: float  # log p(x|y) evaluations an image
    learning_macs: float  # multiply-accumulates of all learning so far: a step is 3 forward passes
    prediction_macs: float  # to classify one image


class Method(Protocol):
    """Learns class group by class group; scores images over all classes seen so far."""

    name: str
    pretrained_on: str
    distributed: bool  # learns on all devices; else on the first, which hands its state on

    @property
    def classes_seen(self) -> int: ...

    def learn(self, experience: Experience, log: StepLog) -> float:
        """Learn one class group from `experience.train`, seeing no other experience.

        Returns the seconds of learning that a cache has saved: they count as training.
        """

    def scores(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) in [-1, 1] -> scores (B, classes seen), higher is likelier."""

    def state(self) -> dict[str, Any]:
        """Everything needed to go on after the experience learned last."""

    def load_state(self, state: dict[str, Any]) -> None: ...

    def size(self) -> MethodSize: ...

    def facts(self) -> dict[str, float]:
        """Other numbers worth keeping of the finished method, such as its codebook's use."""
