"""The discriminative methods: Avalanche's own strategies on a convolutional network.

A strategy is one entry of `_RECIPES`; nothing else in this file knows one by name.
"""

import difflib
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cil.config import TrainerConfig
from cil.errors import UserError
from cil.methods.avalanche_steps import following, without_noise
from cil.methods.loading import workers
from cil.methods.method import MethodSize, StepLog
from cil.methods.pickling import dumps, loads
from cil.methods.training import autocast, fitting
from cil.models.backbones import (
    SMALLEST_FOR_RESNET,
    Classifier,
    backbone_name,
    build_backbone,
)
from cil.streams.stream import Experience, Stream, View


@dataclass(frozen=True)
class Recipe:
    """How a method is made from one of Avalanche's strategies."""

    strategy: str  # its class in avalanche.training.supervised
    memory: str | None = None  # its argument that bounds the stored images, if it stores any
    afresh: bool = False  # it learns all experiences so far anew, and carries nothing over


_RECIPES = {
    "finetune": Recipe("Naive"),
    "replay": Recipe("Replay", memory="mem_size"),
    "joint": Recipe("JointTraining", afresh=True),
}


class Discriminative:
    """One Avalanche strategy as a method of this project.

    Args:
        name: finetune, replay or joint.
        stream: what it will learn.
        epochs: passes over the training images of an experience (`joint`: of all so far).
        batch_size: images of the experience in a step; a memory adds as many of its own.
        lr: the optimiser's step size at the start of an experience.
        stored_images: the size of the memory, for strategies that have one.
        device: where it learns and scores.
        backbone: auto, cnn, resnet18 or resnet50.
        optimizer: adam or sgd.
        weight_decay: of all parameters, added to their gradients.
        momentum: of sgd.
        trainer: the precision and the number of loading processes.
        show_progress: draw a progress bar while learning.

    Raises:
        UserError: there is no such method, a number is out of its range, the memory has no room
            for an image of every class, or the images are too small for the backbone.
    """

    pretrained_on = "nothing"
    distributed = False  # Avalanche's strategies are not

    def __init__(
        self,
        name: str,
        stream: Stream,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        stored_images: int,
        device: torch.device,
        backbone: str = "auto",
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trainer: TrainerConfig | None = None,
        show_progress: bool = True,
    ) -> None:
        self.name = name
        self.recipe = _recipe(name)
        self.stream = stream
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.stored_images = stored_images
        self.device = device
        self.backbone = backbone_name(backbone, stream.image_size)
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.trainer = trainer or TrainerConfig()
        self.show_progress = show_progress
        self.model: nn.Module | None = None
        self.strategy: Any = None
        self.experiences_learned = 0
        self._check()

    @property
    def seen(self) -> tuple[Experience, ...]:
        """The experiences learned so far."""
        return self.stream.experiences[: self.experiences_learned]

    @property
    def classes_seen(self) -> int:
        return sum(len(experience.labels) for experience in self.seen)

    def learn(self, experience: Experience, log: StepLog) -> float:
        """Train the strategy on the next experience; `joint` starts afresh on all so far.

        Nothing is cached: returns 0.

        Raises:
            ValueError: `experience` is not the stream's next one.
            UserError: it diverged, or the GPU's memory is too small.
        """
        index = self.experiences_learned
        if experience.index != index:
            raise ValueError(f"{self.name} was given experience {experience.index}, not {index}")
        afresh = self.recipe.afresh
        with without_noise(), _tried_convolutions(self.device):
            strategy = self._new_strategy() if afresh or self.strategy is None else self.strategy
            past = [seen.avalanche for seen in self.seen] if afresh else []
            self._train(strategy, [*past, experience.avalanche], log)
        self.model = strategy.model
        self.strategy = None if afresh else strategy
        self.experiences_learned = index + 1
        return 0.0

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) in [-1, 1] -> logits (B, classes seen), in label order.

        Raises:
            ValueError: nothing was learned yet.
        """
        if self.model is None:
            raise ValueError(f"{self.name} has learned no experience yet")
        logits = self.model.eval()(images.to(self.device))
        return logits[:, : self.classes_seen].to(images.device)

    def state(self) -> dict[str, Any]:
        """The strategy as a whole, its memory as indices; the model alone where learning is afresh.

        Plain values and a tensor, so that torch.load(weights_only=True) reads it.
        """
        return {
            "experiences_learned": self.experiences_learned,
            "device": self.device.type,
            "pickled": dumps((self.model, self.strategy), self._references()),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same method on the same stream.

        Raises:
            UserError: it was written on the CPU and this is another device, or it does not fit the
                installed Avalanche.
        """
        if state["device"] == "cpu" != self.device.type:
            raise UserError(
                f"{self.name} learned on the CPU so far and cannot move to {self.device.type}: "
                "choose the CPU, or start over with --fresh."
            )
        try:
            with without_noise():
                self.model, self.strategy = loads(state["pickled"], self._references(), self.device)
                self.model.bf16 = self._bf16()  # as asked for now
        except (pickle.UnpicklingError, AttributeError, ImportError, KeyError) as error:
            raise UserError(
                f"The checkpoint of {self.name} does not fit the installed packages ({error}): "
                "install those of its environment.json, or start over with --fresh."
            ) from error
        self.experiences_learned = state["experiences_learned"]

    def size(self) -> MethodSize:
        model = nn.Module() if self.model is None else self.model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return MethodSize(parameters, self._stored(), likelihood_evaluations=0)

    def facts(self) -> dict[str, float]:
        return {}

    def _stored(self) -> int:
        """The training images it keeps at present, for learning from them again."""
        if self.recipe.afresh:
            return sum(len(past.avalanche.dataset) for past in self.seen)
        plugins = [] if self.strategy is None else self.strategy.plugins
        policies = [
            plugin.storage_policy for plugin in plugins if hasattr(plugin, "storage_policy")
        ]
        return sum(len(policy.buffer) for policy in policies)

    def _train(self, strategy: Any, experiences: Sequence[Any], log: StepLog) -> None:
        """Train on `experiences`, all of Avalanche's: on the last of them, or on all together."""
        count = len(self.stream.experiences)
        title = f"{self.name} experience {self.experiences_learned + 1}/{count}"
        reading = self._reading(sum(len(experience.dataset) for experience in experiences))
        attached = following(strategy, title, log, self.show_progress)
        with fitting(title, "lower discriminative.batch_size"), attached:
            # No evaluation in between: the protocol evaluates, on images of its own choice.
            strategy.train(experiences, eval_streams=[], **reading)
        if not all(parameter.isfinite().all() for parameter in strategy.model.parameters()):
            raise UserError(
                f"{title} diverged, its weights are no numbers any more: lower discriminative.lr."
            )

    def _reading(self, images: int) -> dict[str, Any]:
        """What Avalanche's loaders are told: processes that stay for all epochs, if any."""
        count = workers(self.trainer, self.epochs * images, self.stream.image_size)
        return {"num_workers": count, "persistent_workers": True} if count else {}

    def _new_strategy(self) -> Any:
        from avalanche.training import supervised
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.storage_policy import (
            ClassBalancedBuffer,
            ExperienceBalancedBuffer,
        )

        model = self._new_model()
        arguments = {
            "model": model,
            "optimizer": self._new_optimizer(model),
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": self.batch_size,
            "train_epochs": self.epochs,
            "device": self.device,
            "evaluator": EvaluationPlugin(loggers=[]),  # the default one prints
        }
        if self.recipe.memory is not None:
            arguments[self.recipe.memory] = self.stored_images
        strategy = getattr(supervised, self.recipe.strategy)(**arguments)
        for plugin in strategy.plugins:
            # By default each group gets as much of the memory, whatever its number of classes;
            # the literature since iCaRL (arXiv 1611.07725) gives as much to each class.
            if isinstance(getattr(plugin, "storage_policy", None), ExperienceBalancedBuffer):
                plugin.storage_policy = ClassBalancedBuffer(plugin.mem_size)
        return strategy

    def _new_model(self) -> Classifier:
        from avalanche.models import IncrementalClassifier

        stream = self.stream
        backbone, features = build_backbone(self.backbone, stream.channels, stream.image_size)
        model = Classifier(backbone, IncrementalClassifier(features, 1), self._bf16())
        if self.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        return model.to(self.device)

    def _new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), momentum=self.momentum, **options)
        return torch.optim.Adam(model.parameters(), **options)

    def _bf16(self) -> bool:
        """Whether `trainer.precision` means 16 bits on this device."""
        with autocast(self.trainer):
            return torch.is_autocast_enabled(self.device.type)

    def _references(self) -> dict[str, Any]:
        """What a strategy holds on to of the stream's source: it never goes into a state."""
        train = self.stream.experiences[0].train  # every experience views the same images
        assert isinstance(train, View)
        parts = {"training images": train.base, "augmentation": train.augment}
        return {name: part for name, part in parts.items() if part is not None}

    def _check(self) -> None:
        for key in ("epochs", "batch_size", "lr", "stored_images"):
            if getattr(self, key) <= 0:
                raise UserError(f"discriminative.{key} is {getattr(self, key)}: give it above 0.")
        if self.weight_decay < 0:
            raise UserError(f"discriminative.weight_decay is {self.weight_decay}: give 0 or more.")
        if not 0 <= self.momentum < 1:
            raise UserError(f"discriminative.momentum is {self.momentum}: give 0 to below 1.")
        workers(self.trainer, 0, 1)  # refuses a bad number now, and not in training
        size = self.stream.image_size
        if self.backbone != "cnn" and size < SMALLEST_FOR_RESNET:
            raise UserError(
                f"discriminative.backbone is {self.backbone}, which needs images of "
                f"{SMALLEST_FOR_RESNET} px or more, but {self.stream.name} has {size} px: choose "
                "cnn."
            )
        classes = len(self.stream.class_names)
        if self.recipe.memory and self.stored_images < classes:
            raise UserError(
                f"discriminative.stored_images is {self.stored_images}, too few for {self.name}: "
                f"{self.stream.name} has {classes} classes, so give it {classes} or more."
            )


@contextmanager
def _tried_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose each convolution by trial on a GPU: batches are of one or two sizes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _recipe(name: str) -> Recipe:
    if name in _RECIPES:
        return _RECIPES[name]
    near = difflib.get_close_matches(name, _RECIPES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(_RECIPES)}."
    raise UserError(f"There is no discriminative method '{name}': {hint}")
