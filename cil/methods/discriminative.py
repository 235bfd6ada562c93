"""The discriminative methods: Avalanche's own strategies on a convolutional network.

Which there are says `cil.methods.recipes`; nothing in this file knows one by name.
"""

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cil.config import DiscriminativeConfig, TrainerConfig
from cil.errors import DivergenceError, UserError
from cil.methods.avalanche_steps import following, without_noise
from cil.methods.avalanche_strategies import (
    answers,
    carried,
    carried_bytes,
    new_strategy,
    stored_images,
)
from cil.methods.checks import check_backbone, check_discriminative, check_memory
from cil.methods.groundwork import Groundwork
from cil.methods.loading import workers
from cil.methods.made_once import State
from cil.methods.method import MethodSize, StepLog
from cil.methods.pickling import dumps, loads
from cil.methods.recipes import BACKBONE, RECIPES, Recipe
from cil.methods.seeding import seed_all
from cil.methods.training import autocast, fitting
from cil.models.backbones import Features, backbone_name, build_backbone
from cil.models.macs import macs
from cil.streams.stream import Experience, Stream, View


class Discriminative:
    """One Avalanche strategy as a method of this project.

    Args:
        name: one of `RECIPES`.
        stream: what it will learn.
        settings: of all discriminative methods; it reads those that concern it.
        cache: the folder of what is made once: frozen backbones.
        device: where it learns and scores.
        trainer: the precision and the number of loading processes.
        show_progress: draw a progress bar while learning.

    Raises:
        UserError: a number is out of its range, the memory has no room for the classes, a class
            has fewer images than the method needs, or they are too small for the backbone.
    """

    pretrained_on = "nothing"
    distributed = False  # Avalanche's strategies are not

    def __init__(
        self,
        name: str,
        stream: Stream,
        settings: DiscriminativeConfig,
        cache: Path,
        *,
        device: torch.device,
        trainer: TrainerConfig | None = None,
        show_progress: bool = True,
    ) -> None:
        self.name = name
        self.recipe = RECIPES[name]
        self.stream = stream
        self.settings = settings
        self.cache = cache
        self.device = device
        self.backbone = backbone_name(settings.backbone, stream.image_size)
        self.trainer = trainer or TrainerConfig()
        self.show_progress = show_progress
        self.model: nn.Module | None = None
        self.strategy: Any = None
        self.experiences_learned = 0
        self.learning_macs = 0.0
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

        Returns the seconds that the cache has saved, of a backbone that is frozen.

        Raises:
            ValueError: `experience` is not the stream's next one.
            DivergenceError: its weights are no numbers any more.
            UserError: the GPU's memory is too small.
        """
        index = self.experiences_learned
        if experience.index != index:
            raise ValueError(f"{self.name} was given experience {experience.index}, not {index}")
        afresh, saved = self.recipe.afresh, 0.0
        with without_noise(), _tried_convolutions(self.device):
            strategy = self.strategy
            if afresh or strategy is None:
                network, width = build_backbone(
                    self.backbone, self.stream.channels, self.stream.image_size
                )
                backbone = Features(network, self._bf16())
                if self.recipe.frozen:
                    saved = self._learn_backbone(backbone, width, experience, log)
                strategy = self._new_strategy(self.recipe, self.settings, backbone, width)
            past = [seen.avalanche for seen in self.seen] if afresh else []
            if self.recipe.frozen:  # what comes on top takes few optimiser steps, or none
                log = _unlogged
            self._train(strategy, [*past, experience.avalanche], self.settings.epochs, log)
        self.model = strategy.model
        self.strategy = None if afresh else strategy
        self.experiences_learned = index + 1
        return saved

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) in [-1, 1] -> logits (B, classes seen), in label order.

        Raises:
            ValueError: nothing was learned yet.
        """
        return self.differentiable_scores(images)

    def differentiable_scores(self, images: Tensor) -> Tensor:
        """The same, where gradients are wanted with those of the pixels."""
        if self.model is None:
            raise ValueError(f"{self.name} has learned no experience yet")
        scores_BC = answers(self.model.eval(), self.strategy, images.to(self.device))
        return scores_BC[:, : self.classes_seen].to(images.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) in [-1, 1] -> what the last layer reads of them (B, D).

        Raises:
            ValueError: nothing was learned yet.
        """
        if self.model is None:
            raise ValueError(f"{self.name} has learned no experience yet")
        features_BD: Tensor = _features(self.model.eval())[0](images.to(self.device))
        return features_BD.to(images.device)

    def state(self) -> dict[str, Any]:
        """The strategy as a whole, its memory as indices; the model alone where learning is afresh.

        Plain values and a tensor, so that torch.load(weights_only=True) reads it.
        """
        return {
            "experiences_learned": self.experiences_learned,
            "device": self.device.type,
            "learning_macs": self.learning_macs,
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
            for network in [self.model, *self._old_networks()]:
                for features in _features(network):
                    features.bf16 = self._bf16()  # as asked for now
        except (pickle.UnpicklingError, AttributeError, ImportError, KeyError) as error:
            raise UserError(
                f"The checkpoint of {self.name} does not fit the installed packages ({error}): "
                "install those of its environment.json, or start over with --fresh."
            ) from error
        self.experiences_learned = state["experiences_learned"]
        self.learning_macs = state["learning_macs"]

    def size(self) -> MethodSize:
        if self.model is None:
            return MethodSize(0, 0, 0, likelihood_evaluations=0, learning_macs=0, prediction_macs=0)
        stored, image, kept = self._stored(), self._image(), 0
        if self.strategy is not None:
            kept = carried_bytes(self.strategy, self.model, self.recipe.carries)
        return MethodSize(
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            stored_images=stored,
            stored_bytes=stored * image.numel() + kept,  # an image as 8-bit values
            likelihood_evaluations=0,
            learning_macs=self.learning_macs,
            prediction_macs=macs(lambda: self.scores(image)),
        )

    def facts(self) -> dict[str, float]:
        return {}

    def _stored(self) -> int:
        """The training images it keeps at present, for learning from them again."""
        if self.recipe.afresh:
            return sum(len(past.avalanche.dataset) for past in self.seen)
        return 0 if self.strategy is None else stored_images(self.strategy)

    def _old_networks(self) -> list[nn.Module]:
        """Those that it keeps beside its own."""
        if self.model is None or self.strategy is None:
            return []
        kept = carried(self.strategy, self.model, self.recipe.carries)
        return [each for each in kept if isinstance(each, nn.Module)]

    def _image(self) -> Tensor:
        """One without content (1, channels, H, W)."""
        return torch.zeros(1, self.stream.channels, *2 * [self.stream.image_size])

    def _train(self, strategy: Any, experiences: Sequence[Any], epochs: int, log: StepLog) -> None:
        """Train on `experiences`, all of Avalanche's: on the last of them, or on all together."""
        count = len(self.stream.experiences)
        title = f"{self.name} experience {self.experiences_learned + 1}/{count}"
        reading = self._reading(epochs * sum(len(experience.dataset) for experience in experiences))
        attached = following(strategy, title, log, self.show_progress)
        backbone = _features(strategy.model)[0]
        before = backbone.passes.forwards()
        # Copies: a strategy may hold images out by taking them from the experience it is given.
        own = [copy.copy(experience) for experience in experiences]
        with fitting(title, "lower discriminative.batch_size"), attached:
            # No evaluation in between: the protocol evaluates, on images of its own choice.
            strategy.train(own, eval_streams=[], **reading)
        if not all(parameter.isfinite().all() for parameter in strategy.model.parameters()):
            raise DivergenceError(
                f"{title} diverged, its weights are no numbers any more: lower discriminative.lr, "
                "or what weighs its penalty; for it alone in a file for --config, such as "
                f"`tuned: {{{self.name}: {{discriminative.lr: {self.settings.lr / 5:g}}}}}`."
            )
        forwards = backbone.passes.forwards() - before
        strategy.model.eval()  # or the normalisation would learn from what only counts
        image = self._image().to(self.device)
        self.learning_macs += forwards * macs(lambda: backbone.network(image))

    def _reading(self, images: int) -> dict[str, Any]:
        """What Avalanche's loaders are told: processes that stay for all epochs, if any.

        `images` are those of all epochs.
        """
        count = workers(self.trainer, images, self.stream.image_size)
        return {"num_workers": count, "persistent_workers": True} if count else {}

    def _learn_backbone(
        self, backbone: Features, width: int, experience: Experience, log: StepLog
    ) -> float:
        """Teach `backbone` the first experience, or find it in the cache; it is frozen then.

        Returns the seconds that the cache has saved.
        """
        seed, epochs = torch.initial_seed(), self.settings.backbone_epochs
        settings = replace(self.settings, epochs=epochs)

        def make(log: StepLog) -> tuple[State, float]:
            # The draws go on from those of its weights, which are in the key.
            learner = self._new_strategy(BACKBONE, settings, backbone, width)
            self._train(learner, [experience.avalanche], epochs, log)
            return {"model": backbone.state_dict(), "macs": self.learning_macs}, 0.0

        values = {**asdict(settings), "backbone": self.backbone}
        key = {
            "settings": {name: values[name] for name in BACKBONE.settings(values)},
            "reading": self._reading(epochs * len(experience.avalanche.dataset)),
            "device": self.device.type,
            "avalanche": metadata.version("avalanche-lib"),
        }
        groundwork = Groundwork(
            self.name, self.stream, rotations=True, trainer=self.trainer, cache=self.cache
        )
        state, saved = groundwork.learn_once("backbone", backbone, key, make, experience, seed, log)
        backbone.eval().requires_grad_(False)
        self.learning_macs = state["macs"]
        seed_all(seed, 1)  # what follows is the same whether it was learned or found
        return saved

    def _new_strategy(
        self, recipe: Recipe, settings: DiscriminativeConfig, backbone: Features, width: int
    ) -> Any:
        return new_strategy(recipe, settings, self.stream, backbone, width, self.device)

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
        check_discriminative(self.settings)
        workers(self.trainer, 0, 1)  # refuses a bad number now, and not in training
        size = self.stream.image_size
        check_backbone(self.backbone, size, f"{self.stream.name} has {size} px")
        if self.recipe.memory:
            stored = self.settings.stored_images
            check_memory(self.name, stored, self._smallest_share(), self.stream)

    def _smallest_share(self) -> float:
        """Of the memory: bic keeps two kinds of images in it, and needs both of every class."""
        if "val_percentage" not in self.recipe.options:
            return 1.0
        return min(self.settings.bic_held_out, 1 - self.settings.bic_held_out)


def _unlogged(step: int, values: Mapping[str, float]) -> None:
    """Takes the place of a step log."""


def _features(model: nn.Module) -> list[Features]:
    return [module for module in model.modules() if isinstance(module, Features)]


@contextmanager
def _tried_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose each convolution by trial on a GPU: batches are of one or two sizes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
