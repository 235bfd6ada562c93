"""The diffusion baseline: a DiT learns one class group at a time and classifies by its error.

Latents are encoded once into a file, as token maps are. At 256 px the published encoder takes 107 G
multiply-accumulates an image and a step of learning 66 G for DiT-B on its 256 latents, so encoding
anew would more than double the work; a row of 16 x 16 x 32 numbers in 16 bits is 16 KiB. (Pixels
would need no encoder, but are drawn and varied as costly; they are kept in the same way.)
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cil.classify.diffusion import diffusion_scores
from cil.classify.schedule import (
    Cost,
    Timesteps,
    denoising_cost,
    diffusion_cost,
    diffusion_schedule,
)
from cil.classify.smoothing import image_seeds
from cil.config import DiffusionConfig, TokenizerConfig, TrainerConfig
from cil.generate import denoise
from cil.methods.diffusion_module import DiffusionModule
from cil.methods.diffusion_parts import build_latents, build_model, build_noising, check_settings
from cil.methods.groundwork import Groundwork
from cil.methods.learning_cost import encoding_macs, steps_macs, tokenizer_macs
from cil.methods.made_once import State, digest
from cil.methods.method import MethodSize, StepLog
from cil.methods.seeding import seed_all
from cil.methods.training import autocast, find_device, fit, pays_to_compile
from cil.models.class_groups import Incremental
from cil.models.compiling import eagerly
from cil.streams.stream import Experience, Stream
from cil.streams.tokens import EncodedImages, floats_of, shuffled

# Settings of what comes after the trunk, on which it does not depend.
_AFTER_THE_TRUNK = ("plasticity", "adapter_rank", "adapter_layers", "steps", "schedule")


class DiffusionMethod:
    """Diffusion classifier over class groups (see `Incremental` for the plasticities)."""

    pretrained_on = "nothing"
    distributed = True

    def __init__(
        self,
        name: str,
        stream: Stream,
        tokenizer: TokenizerConfig,
        diffusion: DiffusionConfig,
        trainer: TrainerConfig,
        cache: Path,
    ) -> None:
        """`cache` is the folder of what is made once: latents, tokenizers, trunks."""
        check_settings(stream, tokenizer, diffusion)
        self.name = name
        self.settings, self.tokenizer_settings, self.trainer = diffusion, tokenizer, trainer
        self.experiences = len(stream.experiences)
        views, rotations = diffusion.views, diffusion.rotations
        self.groundwork = Groundwork(
            name, stream, views=views, rotations=rotations, trainer=trainer, cache=cache
        )
        self.latents = build_latents(stream, tokenizer, diffusion)
        if self.latents.tokenizer is not None:
            self.latents.tokenizer.compiled = pays_to_compile(self.latents.tokenizer, trainer)
        self.noising = build_noising(diffusion)
        self.model = self._new_model()
        self.learning_macs = 0.0

    @property
    def classes_seen(self) -> int:
        return self.model.groups.classes

    @property
    def lasting(self) -> int:
        """See `Lasting`: a trunk that learns on, or classes left out by others, change scores."""
        alone = len(self.stages()) == 1 and self.settings.plasticity != "trunk"
        return self.classes_seen if alone else 0

    def learn(self, experience: Experience, log: StepLog) -> float:
        """Learn one class group; the first one teaches the tokenizer and the trunk beforehand.

        Returns the seconds that a cache has saved.
        """
        seed, saved, steps_before = torch.initial_seed(), 0.0, 0
        if experience.index == 0:
            if self.latents.tokenizer is not None:
                saved += self.groundwork.learn_tokenizer(
                    self.latents.tokenizer, self.tokenizer_settings, experience, seed, log
                )
                steps_before = self.tokenizer_settings.steps
                self.learning_macs += tokenizer_macs(
                    self.latents.tokenizer, self.tokenizer_settings
                )
            if self.model.learns_trunk:
                saved += self._learn_trunk(experience, seed, log, steps_before)
                self.learning_macs += self._macs(self.settings.first_steps)
                steps_before += self.settings.first_steps
        rows, facts = self._encoded(experience, 1, seed)
        if experience.index == 0 and not self.model.learns_trunk:
            self.latents.standardise(*rows.moments())
        seed_all(seed, 2)
        self.model.grow(len(experience.labels))
        if self.latents.tokenizer is not None:
            also_for_trunk = experience.index == 0 and self.model.learns_trunk
            encoded = len(rows) * (2 if also_for_trunk else 1)
            self.learning_macs += encoding_macs(self.latents.tokenizer, encoded)
        self.learning_macs += self._macs(self.settings.steps)
        title = f"{self.name} experience {experience.index + 1}/{self.experiences}"
        self.train_on(rows, self.settings.steps, title, log, steps_before)
        return saved + float(facts["saved"])

    def scores(self, images: Tensor, first: int = 0) -> Tensor:
        """Classes that an early stage of the schedule leaves out score -inf (see `Lasting`)."""
        return self._scores(images, self.stages(), first=first)

    def class_and_null_likelihoods(self, images: Tensor) -> Tensor:
        """The scores of all classes at the first stage's timesteps, and in a last column that of
        the null class (B, classes seen + 1).
        """
        return self._scores(images, self.stages()[:1], with_null=True)

    @torch.inference_mode()
    def _scores(
        self,
        images: Tensor,
        stages: Sequence[Timesteps],
        with_null: bool = False,
        first: int = 0,
    ) -> Tensor:
        self._move(images.device)
        models = [self.model, self.model.null_alone()] if with_null else [self.model]
        noised = self.noising, self.latents.encode(images), image_seeds(images)
        with autocast(self.trainer):
            # A seed draws the same noise for both.
            parts = [diffusion_scores(m, *noised, stages, first=first) for m in models]
        return torch.cat(parts, 1)

    def draw(
        self, labels: Sequence[int], seeds: Sequence[int], guidance: float, steps: int
    ) -> Tensor:
        """See `Generative`."""
        self._move(find_device(self.trainer))
        parts = (self.model, self.latents, self.noising)
        with autocast(self.trainer), eagerly(self.model.trunks):
            return denoise(*parts, labels, seeds, guidance=guidance, steps=steps).cpu()

    @torch.inference_mode()
    def reconstructed(self, images: Tensor) -> Tensor:
        """See `Generative`."""
        device = find_device(self.trainer)
        self._move(device)
        return self.latents.decode(self.latents.encode(images.to(device))).cpu()

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # whose parameters could not be trained any more
            for part in (self.latents, self.noising, self.model):
                part.to(device)

    def stages(self) -> tuple[Timesteps, ...]:
        """The configured schedule."""
        return diffusion_schedule(self.settings.schedule)

    def state(self) -> dict[str, Any]:
        return {
            "groups": self.model.groups.sizes,
            "model": self.model.state_dict(),
            "latents": self.latents.state_dict(),
            "learning_macs": self.learning_macs,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Grow to the recorded class groups, then load their weights."""
        self.model = self._new_model()
        for classes in state["groups"]:
            self.model.grow(classes)
        self.model.load_state_dict(state["model"])
        self.latents.load_state_dict(state["latents"])
        self.learning_macs = state["learning_macs"]
        self.latents.eval().requires_grad_(False)
        self.model.eval()

    def size(self) -> MethodSize:
        """Its likelihood evaluations are predictions: of one class at one timestep."""
        modules = (self.latents, self.model)
        parameters = sum(p.numel() for m in modules for p in m.parameters())
        trunk = self.model.trunk(0)
        staged = diffusion_cost(self.stages(), trunk, self.classes_seen)
        asked = self._asked()
        return MethodSize(
            parameters=parameters,
            stored_images=0,
            stored_bytes=0,
            likelihood_evaluations=staged.layers / denoising_cost(trunk).layers,
            learning_macs=self.learning_macs,
            prediction_macs=asked.layers + asked.attention,
        )

    def facts(self) -> dict[str, float]:
        """How much of `prediction_macs` is attention's."""
        return {"prediction_attention_macs": self._asked().attention}

    def _asked(self) -> Cost:
        """What classifying an image costs."""
        trunk, tokenizer = self.model.trunk(0), self.latents.tokenizer
        return diffusion_cost(self.stages(), trunk, self.classes_seen, tokenizer)

    def _macs(self, steps: int) -> float:
        """Of so many optimiser steps."""
        trunk: Any = self.model.trunks[0]
        return steps_macs(steps, self.settings.batch_size, denoising_cost(trunk))

    def _learn_trunk(
        self, experience: Experience, seed: int, log: StepLog, steps_before: int
    ) -> float:
        """Teach the trunk by the first group's turned images, whose latents set the units."""

        def make(log: StepLog) -> tuple[State, float]:
            rows, facts = self._encoded(experience, self.groundwork.turns, seed)
            self.latents.standardise(*rows.moments())
            seed_all(seed, 1)
            self.model.start(self.groundwork.turns * len(experience.labels))
            title = f"{self.name} trunk"
            self.train_on(rows, self.settings.first_steps, title, log, steps_before)
            self.model.end_start()
            units = {"mean": self.latents.mean_Z11, "std": self.latents.std_Z11}
            return {"model": self.model.state_dict(), **units}, facts["saved"]

        settings = {k: v for k, v in asdict(self.settings).items() if k not in _AFTER_THE_TRUNK}
        key = {"settings": settings, "latents": digest(self.latents)}
        state, saved = self.groundwork.learn_once(
            "trunk", self.model, key, make, experience, seed, log
        )
        self.latents.standardise(state["mean"].flatten(), state["std"].flatten())
        return saved

    def _encoded(
        self, experience: Experience, turns: int, seed: int
    ) -> tuple[EncodedImages, dict[str, Any]]:
        """An experience's raw latents, of images turned by up to so many quarters, and facts."""
        latents = self.latents.to(find_device(self.trainer))
        tokenizer = latents.tokenizer
        key = {"tokenizer": None if tokenizer is None else digest(tokenizer)}
        content = floats_of(latents.shape)
        return self.groundwork.encoded(
            "latents", latents.raw, content, experience, turns, seed, key
        )

    def train_on(
        self, rows: EncodedImages, steps: int, title: str, log: StepLog, first_step: int = 0
    ) -> None:
        """Train what the model lets learn now."""
        self.model.train()  # Lightning leaves the mode of a module as it finds it
        settings = self.settings
        fit(
            DiffusionModule(self.model, self.latents, self.noising, settings, self.trainer, steps),
            shuffled(rows, settings.batch_size),
            steps=steps,
            title=title,
            settings=self.trainer,
            log=log,
            batch_key="diffusion.batch_size",
            first_step=first_step,
            clip=2.0,
        )
        self.model.eval()

    def _new_model(self) -> Incremental:
        model = build_model(self.latents, self.settings)
        trunk: Any = model.trunks[0]
        trunk.compiled = pays_to_compile(trunk, self.trainer)
        return model
