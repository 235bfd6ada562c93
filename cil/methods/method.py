"""What the protocol asks of a method. It knows no method by any other name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
    pretrained_on: str = "nothing"
    distributed: bool = False  # learns on all devices; else on the first, which hands its state on

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
        return {}


@runtime_checkable
class Lasting(Protocol):
    """What a method has besides if learning a class group leaves the scores of earlier ones alone.

    Then they need not be computed again after every experience: with C classes in groups of g,
    evaluation costs C scores of an image in all and not about C^2 / 2g.
    """

    @property
    def lasting(self) -> int:
        """Of how many classes, from label 0 on, the scores will stay as they are, to the bit."""

    def scores(self, images: Tensor, first: int = 0) -> Tensor:
        """Of the classes from label `first` on, where a group begins (B, classes seen - first)."""


@runtime_checkable
class Generative(Protocol):
    """What a method has besides if it can draw images of the classes it has seen."""

    name: str

    def draw(
        self, labels: Sequence[int], seeds: Sequence[int], guidance: float, steps: int
    ) -> Tensor:
        """One image for each label, from the seed beside it, on the CPU.

        (B, channels, H, W) in [-1, 1]. `guidance` is classifier-free, 0: none; `steps` are those of
        a diffusion model, and a VAR does not read them.
        """

    def reconstructed(self, images: Tensor) -> Tensor:
        """The images as its encoder and decoder give them back, on the CPU."""
