"""The generative method: a VAR learns one class group at a time and classifies by likelihood."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cil import parallel
from cil.classify.likelihood import fit_scale_weights, staged_scores, token_log_likelihoods
from cil.classify.pairs import pair_log_likelihoods
from cil.classify.reading import by_scale
from cil.classify.schedule import Cost, Schedule, Stage, adaptive, cost, fit_margins, schedule
from cil.classify.smoothing import image_seeds, noisy_copies, varied_copies
from cil.classify.straight_through import straight_through_scores
from cil.config import TokenizerConfig, TrainerConfig, VARConfig
from cil.generate import sample
from cil.methods.cca_module import CCAModule
from cil.methods.groundwork import Groundwork
from cil.methods.learning_cost import encoding_macs, steps_macs, tokenizer_macs
from cil.methods.made_once import State, digest
from cil.methods.method import MethodSize, StepLog
from cil.methods.seeding import seed_all
from cil.methods.training import LoggedModule, autocast, find_device, fit, pays_to_compile
from cil.methods.var_module import VARModule
from cil.methods.var_parts import build_model, build_tokenizer, check_settings
from cil.models.class_groups import Incremental
from cil.models.compiling import eagerly
from cil.streams.stream import Experience, Stream
from cil.streams.tokens import EncodedImages, Views, shuffled, tokens_of

# Settings of what comes after the trunk, on which it does not depend.
_AFTER_THE_TRUNK = (
    *("plasticity", "adapter_rank", "adapter_layers", "steps"),
    *("cca_steps", "cca_lr", "cca_beta", "cca_lambda"),
    *("schedule", "smoothing", "smoothing_samples", "smoothing_mean", "smoothing_sigma"),
)


class VARMethod:
    """Generative classifier over class groups (see `Incremental` for the plasticities)."""

    pretrained_on = "nothing"
    distributed = True

    def __init__(
        self,
        name: str,
        stream: Stream,
        tokenizer: TokenizerConfig,
        var: VARConfig,
        trainer: TrainerConfig,
        cache: Path,
    ) -> None:
        """`cache` is the folder of what is made once: token maps, tokenizers, trunks."""
        check_settings(stream, tokenizer, var)
        self.name, self.stream = name, stream
        self.groundwork = Groundwork(
            name, stream, views=var.views, rotations=var.rotations, trainer=trainer, cache=cache
        )
        self.settings, self.tokenizer_settings, self.trainer = var, tokenizer, trainer
        self.experiences = len(stream.experiences)
        self.tokenizer = build_tokenizer(tokenizer, stream.channels)
        self.tokenizer.compiled = pays_to_compile(self.tokenizer, trainer)
        self.model = self._new_model()
        self.scale_weights_K = torch.ones(len(tokenizer.scales))
        self.margins_K: list[float] = []  # of the adaptive schedule
        self.reads: list[float] = []  # classes its stages read of the newest held-out images
        self.codebook_use: list[float] = []  # share of the codes met in each experience
        self.learning_macs = 0.0

    @property
    def classes_seen(self) -> int:
        return self.model.groups.classes

    @property
    def lasting(self) -> int:
        """See `Lasting`: a trunk that learns on, or classes left out by others, change scores."""
        alone = self.settings.schedule == "varc" and self.settings.plasticity != "trunk"
        return self.classes_seen if alone else 0

    def learn(self, experience: Experience, log: StepLog) -> float:
        """Learn one class group; the first one teaches the tokenizer and the trunk beforehand.

        Returns the seconds that a cache has saved.
        """
        seed, saved, steps_before = torch.initial_seed(), 0.0, 0
        if experience.index == 0:
            saved += self.groundwork.learn_tokenizer(
                self.tokenizer, self.tokenizer_settings, experience, seed, log
            )
            self.learning_macs = tokenizer_macs(self.tokenizer, self.tokenizer_settings)
            steps_before = self.tokenizer_settings.steps
            if self.model.learns_trunk:
                saved += self._learn_trunk(experience, seed, log)
                self.learning_macs += self._macs(self.settings.first_steps)
                steps_before += self.settings.first_steps
        tokens, facts = self._token_maps(experience, 1, seed)
        use = facts["codes"] / self.tokenizer_settings.vocabulary
        log(steps_before, {"tokenizer/codebook_use": use})
        self.codebook_use.append(use)
        seed_all(seed, 2)
        self.model.grow(len(experience.labels))
        also_for_trunk = experience.index == 0 and self.model.learns_trunk
        encoded = len(tokens) * (2 if also_for_trunk else 1)
        self.learning_macs += encoding_macs(self.tokenizer, encoded)
        self.learning_macs += self._macs(self.settings.steps)
        title = f"{self.name} experience {experience.index + 1}/{self.experiences}"
        self.train_on(tokens, self.settings.steps, title, log, steps_before)
        if self.settings.cca_steps and len(experience.labels) > 1:
            self._align(tokens, f"{title}, alignment", log, steps_before + self.settings.steps)
        if self.settings.schedule == "adaptive":
            self._fit_margins(experience.validation)
        return saved + float(facts["saved"])

    def scale_log_likelihoods(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) -> log p(scale's tokens | coarser ones, class) (B, C, K)."""
        tokens_SBL, inputs_SBLZ = self.copies(images, samples=1)
        with autocast(self.trainer):
            values_BCL = token_log_likelihoods(self.model, tokens_SBL[0], inputs_SBLZ[0])
        return by_scale(values_BCL, self.tokenizer.scales)

    def log_likelihood(self, images: Tensor) -> Tensor:
        """log p(image's tokens | class), neither weighted nor smoothed -> (B, classes seen)."""
        return self.scale_log_likelihoods(images).sum(-1)

    def class_and_null_likelihoods(self, images: Tensor) -> Tensor:
        """`log_likelihood`, and in a last column that of the null class (B, classes seen + 1)."""
        tokens_SBL, inputs_SBLZ = self.copies(images, samples=1)
        with torch.inference_mode(), autocast(self.trainer):
            models = (self.model, self.model.null_alone())
            parts = [token_log_likelihoods(m, tokens_SBL[0], inputs_SBLZ[0]) for m in models]
        return torch.cat(parts, 1).sum(-1)

    def scores(
        self,
        images: Tensor,
        first: int = 0,
        *,
        stages: Schedule | None = None,
        reads: list[Tensor] | None = None,
    ) -> Tensor:
        """Classes that an early stage of the schedule leaves out score -inf (see also `Lasting`).

        `stages` stands in for the configured schedule; `reads` takes in how many classes each of
        them read for each image (stages, B).
        """
        stages = self.stages() if stages is None else stages
        samples = max(stage.samples for stage in stages)
        tokens_SBL, inputs_SBLZ = self.copies(images, samples)
        with autocast(self.trainer):
            return staged_scores(
                self.model,
                tokens_SBL,
                inputs_SBLZ,
                self.scale_weights_K.to(images.device),
                stages,
                self.settings.smoothing_mean,
                reads=reads,
                first=first,
            )

    def draw(
        self, labels: Sequence[int], seeds: Sequence[int], guidance: float, steps: int = 0
    ) -> Tensor:
        """See `Generative`."""
        self._move(find_device(self.trainer))
        with autocast(self.trainer), eagerly(self.model.trunks):
            return sample(self.model, self.tokenizer, labels, seeds, guidance=guidance).images.cpu()

    @torch.inference_mode()
    def reconstructed(self, images: Tensor) -> Tensor:
        """See `Generative`."""
        device = find_device(self.trainer)
        self._move(device)
        return self.tokenizer.decode(self.tokenizer.tokenize(images.to(device))).cpu()

    def every_class(self, images: Tensor, samples: int | None = None) -> Tensor:
        """Scores with no class left out, whatever the schedule, over so many copies (B, C).

        None: over as many as configured.
        """
        samples = samples or self.settings.smoothing_samples
        return self.scores(images, stages=schedule("varc", len(self.tokenizer.scales), samples))

    def pair_log_likelihoods(self, images: Tensor, labels_BP: Tensor) -> Tensor:
        """log p of every token of an image under classes of its own (B, P, L), NULL_CLASS too."""
        tokens_SBL, inputs_SBLZ = self.copies(images, samples=1)
        labels_BP = labels_BP.to(images.device)
        with autocast(self.trainer):
            return pair_log_likelihoods(self.model, tokens_SBL[0], inputs_SBLZ[0], labels_BP)

    def differentiable_scores(self, images: Tensor) -> Tensor:
        """Scores (B, C) of the images alone, through which gradients reach the pixels.

        Straight through the quantiser (see `straight_through_scores`).
        """
        self._move(images.device)
        weights_K = self.scale_weights_K.to(images.device)
        with autocast(self.trainer):
            return straight_through_scores(self.model, self.tokenizer, images, weights_K)

    @torch.inference_mode()
    def copies(self, images: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Tokens (S, B, L) of each image and its other copies, and what the transformer reads."""
        self._move(images.device)
        latents_SBZhw = self._latents(images, samples)
        tokens, inputs = self.tokenizer.read(latents_SBZhw.flatten(0, 1))
        copies = latents_SBZhw.shape[:2]
        return tokens.unflatten(0, copies), inputs.unflatten(0, copies)

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # whose parameters could not be trained any more
            self.tokenizer.to(device)
            self.model.to(device)

    def _latents(self, images: Tensor, samples: int) -> Tensor:
        """Latents (S, B, Z, h, w) of so many copies of each image, the clean one first."""
        encode = self.tokenizer.encode
        if samples == 1:
            return encode(images)[None]
        seeds = image_seeds(images)
        if self.settings.smoothing == "noise":
            return noisy_copies(encode(images), seeds, samples, self.settings.smoothing_sigma)
        # One copy of all at a time: many large images would not fit in memory together.
        vary = self.stream.augment
        assert vary is not None  # check_settings saw to it
        copies = varied_copies(images, seeds, samples, vary)
        return torch.stack([encode(copy) for copy in copies])

    def stages(self) -> Schedule:
        """The configured schedule."""
        settings, scales = self.settings, len(self.tokenizer.scales)
        if settings.schedule == "adaptive":
            return adaptive(self.margins_K, settings.smoothing_samples)
        return schedule(settings.schedule, scales, settings.smoothing_samples)

    def state(self) -> dict[str, Any]:
        return {
            "groups": self.model.groups.sizes,
            "model": self.model.state_dict(),
            "tokenizer": self.tokenizer.state_dict(),
            "scale_weights": self.scale_weights_K,
            "margins": self.margins_K,
            "reads": self.reads,
            "codebook_use": self.codebook_use,
            "learning_macs": self.learning_macs,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Grow to the recorded class groups, then load their weights."""
        self.model = self._new_model()
        for classes in state["groups"]:
            self.model.grow(classes)
        self.model.load_state_dict(state["model"])
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.scale_weights_K = state["scale_weights"]
        self.margins_K, self.reads = list(state["margins"]), list(state["reads"])
        self.codebook_use = list(state["codebook_use"])
        self.learning_macs = state["learning_macs"]
        self.tokenizer.eval().requires_grad_(False)
        self.model.eval()

    def size(self) -> MethodSize:
        modules = (self.tokenizer, self.model)
        parameters = sum(p.numel() for m in modules for p in m.parameters())
        trunk, stages = self.model.trunk(0), self.stages()
        one_class = (Stage(len(self.tokenizer.scales), 1, 1),)
        whole = cost(one_class, trunk, classes=1)
        staged = cost(stages, trunk, self.classes_seen, reads=self.reads or None)
        evaluations = staged.layers / whole.layers
        asked = self._asked()
        return MethodSize(
            parameters=parameters,
            stored_images=0,
            stored_bytes=0,
            likelihood_evaluations=evaluations,
            learning_macs=self.learning_macs,
            prediction_macs=asked.layers + asked.attention,
        )

    def facts(self) -> dict[str, float]:
        """Codebook use in the first and the last experience, the weight of each scale, and how much
        of `prediction_macs` is attention's.
        """
        weights = {f"scale_weight_{k}": w for k, w in enumerate(self.scale_weights_K.tolist())}
        use = {"codebook_use_first": self.codebook_use[0], "codebook_use": self.codebook_use[-1]}
        return use | weights | {"prediction_attention_macs": self._asked().attention}

    def _asked(self) -> Cost:
        """What classifying an image costs."""
        return self.cost_of(self.stages(), self.reads or None)

    def cost_of(self, stages: Schedule, reads: Sequence[float] | None = None) -> Cost:
        """What classifying an image by these stages costs; see `cil.classify.schedule.cost`."""
        views = self.settings.smoothing == "views"
        return cost(
            stages,
            self.model.trunk(0),
            self.classes_seen,
            self.tokenizer,
            reads=reads,
            encodings=max(stage.samples for stage in stages) if views else 1,
        )

    def _macs(self, steps: int) -> float:
        """Of so many optimiser steps."""
        one_class, trunk = (Stage(len(self.tokenizer.scales), 1, 1),), self.model.trunks[0]
        return steps_macs(steps, self.settings.batch_size, cost(one_class, trunk, classes=1))  # type: ignore[arg-type]

    def _learn_trunk(self, experience: Experience, seed: int, log: StepLog) -> float:
        """Teach the trunk by the first group's turned images, then fit the scale weights."""
        classes, groundwork = len(experience.labels), self.groundwork

        def make(log: StepLog) -> tuple[State, float]:
            tokens, facts = self._token_maps(experience, groundwork.turns, seed)
            seed_all(seed, 1)
            self.model.start(groundwork.turns * classes)
            title, steps = f"{self.name} trunk", self.settings.first_steps
            self.train_on(tokens, steps, title, log, self.tokenizer_settings.steps)
            held_out = Views(groundwork.turned(experience.validation, classes), 1, seed=0)
            weights_K = self._fitted_scale_weights(held_out)
            self.model.end_start()
            return {"model": self.model.state_dict(), "scale_weights": weights_K}, facts["saved"]

        settings = {k: v for k, v in asdict(self.settings).items() if k not in _AFTER_THE_TRUNK}
        key = {"settings": settings, "tokenizer": digest(self.tokenizer)}
        state, saved = groundwork.learn_once("trunk", self.model, key, make, experience, seed, log)
        self.scale_weights_K = state["scale_weights"]
        return saved

    def _token_maps(
        self, experience: Experience, turns: int, seed: int
    ) -> tuple[EncodedImages, dict[str, Any]]:
        """An experience's token maps, of images turned by up to so many quarters, and facts."""
        tokenizer = self.tokenizer.to(find_device(self.trainer))
        return self.groundwork.encoded(
            "tokens",
            tokenizer.tokenize,
            tokens_of(tokenizer.tokens),
            experience,
            turns,
            seed,
            {"tokenizer": digest(tokenizer)},
        )

    def train_on(
        self, tokens: EncodedImages, steps: int, title: str, log: StepLog, first_step: int = 0
    ) -> None:
        """Train what the model lets learn now."""
        module = VARModule(self.model, self.tokenizer, self.settings, self.trainer, steps)
        self.model.train()  # Lightning leaves the mode of a module as it finds it
        self._fit(module, tokens, title, log, first_step)
        self.model.eval()

    def _align(self, tokens: EncodedImages, title: str, log: StepLog, first_step: int) -> None:
        """Teach the newest group what tells its classes apart (see `CCAModule`).

        Without stochastic depth: a ratio of likelihoods is of two models that read alike.
        """
        module = CCAModule(self.model, self.tokenizer, self.settings, self.trainer)
        self._fit(module, tokens, title, log, first_step)
        # Of a step's usual three forward passes an image eight: three under each of two classes,
        # and one under each by the model as it was.
        self.learning_macs += self._macs(module.steps) * 8 / 3

    def _fit(
        self, module: LoggedModule, tokens: EncodedImages, title: str, log: StepLog, first_step: int
    ) -> None:
        fit(
            module,
            shuffled(tokens, self.settings.batch_size),
            steps=module.steps,
            title=title,
            settings=self.trainer,
            log=log,
            batch_key="var.batch_size",
            first_step=first_step,
            clip=2.0,
        )

    def _fitted_scale_weights(self, held_out: Dataset) -> Tensor:
        if not self.settings.scale_weights:
            return self.scale_weights_K
        values, labels = self.groundwork.each(held_out, self.scale_log_likelihoods)
        # Devices of one kind may still round differently, and all must classify alike.
        weights_K: Tensor = parallel.broadcast(fit_scale_weights(values, labels))
        return weights_K

    def fitted_margins(self, held_out: Dataset, samples: int) -> list[float]:
        """Margins of an adaptive schedule of so many copies, from held-out images."""
        every = schedule("varc", len(self.tokenizer.scales), samples)
        values_BCK, labels = self.groundwork.each(held_out, self.scale_log_likelihoods)
        final_BC = None  # a single copy's score is the sum of its values
        if samples > 1:
            final_BC, _ = self.groundwork.each(
                held_out, lambda images: self.scores(images, stages=every)
            )
        return fit_margins(values_BCK * self.scale_weights_K, labels, final_BC)

    def _fit_margins(self, held_out: Dataset) -> None:
        """Margins for the newest group's images among all classes, or those before if larger."""
        fitted = self.fitted_margins(held_out, self.settings.smoothing_samples)
        # Infinite: not one of these images was classified rightly, which says nothing.
        known = [m for m in (self.margins_K, fitted) if m and math.isfinite(m[0])]
        margins = [max(both) for both in zip(*known, strict=True)] if known else fitted
        self.margins_K = parallel.broadcast(margins)
        reads_NS, _ = self.groundwork.each(held_out, self._reads)
        self.reads = reads_NS.double().mean(0).tolist()
        read = self._asked()
        for samples in {1, self.settings.smoothing_samples}:
            read += self.cost_of(schedule("varc", len(self.tokenizer.scales), samples))
        self.learning_macs += len(reads_NS) * (read.layers + read.attention)

    def _reads(self, images: Tensor) -> Tensor:
        """How many classes each stage of the schedule reads (B, stages)."""
        reads: list[Tensor] = []
        self.scores(images, reads=reads)
        return torch.cat(reads, 1).T

    def _new_model(self) -> Incremental:
        model = build_model(self.tokenizer_settings, self.settings)
        trunk: Any = model.trunks[0]
        trunk.compiled = pays_to_compile(trunk, self.trainer)
        return model
