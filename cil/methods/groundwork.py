"""What methods share: images encoded once, and what is learned before any group."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cil import parallel
from cil.cache import hashed, place
from cil.config import TokenizerConfig, TrainerConfig
from cil.methods.loading import workers
from cil.methods.made_once import Make, State, digest, made_once
from cil.methods.method import StepLog
from cil.methods.scoring import BATCH_SIZE, FEWER_COPIES
from cil.methods.seeding import seed_all
from cil.methods.tokenizer import TokenizerModule
from cil.methods.training import autocast, find_device, fit, fitting
from cil.models.tokenizer import MultiScaleTokenizer
from cil.streams.stream import Experience, Stream
from cil.streams.tokens import (
    EncodedImages,
    Encoding,
    Turned,
    Views,
    encode_once,
    in_order,
    shuffled_images,
)


class Groundwork:
    """The images of a stream as a method learns them, and the cache it shares.

    Tokenizer, trunk and frozen backbone follow from the seed they are given and do not depend on
    what comes after them, so they are kept for other methods and runs.
    """

    def __init__(
        self,
        name: str,
        stream: Stream,
        *,
        views: int = 1,
        rotations: bool,
        trainer: TrainerConfig,
        cache: Path,
    ) -> None:
        """`views` of every image are encoded; `cache` is the folder of what is made once."""
        self.name, self.stream, self.cache = name, stream, cache
        self.views, self.trainer = views, trainer
        self.turns = 4 if rotations else 1

    def learn_tokenizer(
        self,
        tokenizer: MultiScaleTokenizer,
        settings: TokenizerConfig,
        experience: Experience,
        seed: int,
        log: StepLog,
    ) -> float:
        """Train `tokenizer` on turned images, or find it; it is frozen then.

        Returns the seconds that the cache has saved.
        """
        images = self.turned(experience.train, len(experience.labels))
        loaded = settings.steps * settings.batch_size

        def make(log: StepLog) -> tuple[State, float]:
            seed_all(seed, 0)
            fit(
                TokenizerModule(
                    tokenizer, lr=settings.lr, steps=settings.steps, settings=self.trainer
                ),
                shuffled_images(images, settings.batch_size, self.workers(loaded)),
                steps=settings.steps,
                title=f"{self.name} tokenizer",
                settings=self.trainer,
                log=log,
                batch_key="tokenizer.batch_size",
            )
            return tokenizer.state_dict(), 0.0

        key = {
            "images": self._images_key(experience, self.turns),
            "settings": asdict(settings),
            "before": digest(tokenizer),
            "seed": seed,
            "computed": self._computed(),
        }
        state, saved = made_once(self.cache, "tokenizer", key, make, log)
        tokenizer.load_state_dict(state)
        tokenizer.eval().requires_grad_(False)
        return saved

    def learn_once(
        self,
        kind: str,
        model: nn.Module,
        key: Mapping[str, Any],
        make: Make,
        experience: Experience,
        seed: int,
        log: StepLog,
    ) -> tuple[State, float]:
        """What `make` returns of a trunk or backbone, or the cache; "model" in it is its state.

        `kind` names the folder of the cache; `key` is what decides it beside the model's present
        state, the images and the seed. Returns with it the seconds saved.
        """

        def noting(log: StepLog) -> tuple[State, float]:
            state, saved = make(log)
            return {**state, "unreadable": self.stream.unreadable()}, saved

        key = {
            **key,
            "images": self._images_key(experience, self.turns),
            "before": digest(model),
            "seed": seed,
            "computed": self._computed(),
        }
        state, saved = made_once(self.cache, kind, key, noting, log)
        model.load_state_dict(state["model"])
        self.stream.mark_unreadable({*self.stream.unreadable(), *state["unreadable"]})
        return state, saved

    def encoded(
        self,
        kind: str,
        encode: Callable[[Tensor], Tensor],
        content: np.dtype,
        experience: Experience,
        turns: int,
        seed: int,
        key: Mapping[str, Any],
    ) -> tuple[EncodedImages, dict[str, Any]]:
        """An experience's images, turned by up to so many quarters, and facts (`encode_once`).

        `kind` names the folder of the cache, `key` is what decides `encode`.
        """
        images = self.turned(experience.train, len(experience.labels), turns)
        processes = self.workers(self.views * len(images))  # type: ignore[arg-type]
        drawn = {"images": self._images_key(experience, turns), "views": self.views, "seed": seed}
        # Not from the tokenizer: rounding must not decide how images are varied.
        first_seed = int(hashed(drawn)[:15], 16)  # which leaves room for a row's number
        key = {**drawn, **key, "computed": self._computed()}
        path = place(self.cache / kind, f"{self.stream.name}-{experience.index}", key, ".npy")
        encoding = Encoding(
            encode,
            content,
            find_device(self.trainer),
            processes,
            self.trainer.progress,
            self.stream.unreadable,
        )
        with fitting(f"{self.name} {kind}", "free what other programs use of it"):
            rows, facts = encode_once(Views(images, self.views, first_seed), encoding, path, key)
        self.stream.mark_unreadable({*self.stream.unreadable(), *facts["unreadable"]})
        return rows, facts

    def turned(self, images: Dataset, classes: int, turns: int | None = None) -> Dataset:
        turns = self.turns if turns is None else turns
        return images if turns == 1 else Turned(images, turns, classes)

    def each(self, images: Dataset, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`value` (B, ...) of all images, and their labels (N,), both on the CPU.

        Several devices share the batches, and each gets the values of all.
        """
        processes = self.workers(len(images))  # type: ignore[arg-type]
        device = find_device(self.trainer)
        results = []
        with fitting(f"{self.name} on held-out images", FEWER_COPIES):
            for batch, labels in in_order(images, BATCH_SIZE, processes, dealt=True):
                results.append((value(batch.to(device, non_blocking=True)).cpu(), labels))
        values, labels_N = (
            torch.cat(part) for part in zip(*parallel.collect(results), strict=True)
        )
        return values, labels_N

    def workers(self, images: int) -> int:
        return workers(self.trainer, images, self.stream.image_size)

    def _images_key(self, experience: Experience, turns: int) -> dict[str, Any]:
        """What decides the images that are learned from, varied as they are."""
        augmentation = repr(self.stream.augment)
        return {
            "stream": self.stream.fingerprint,
            "experience": experience.index,
            "augmentation": augmentation,
            "turns": turns,
        }

    def _computed(self) -> dict[str, Any]:
        """On what, and how exactly: it decides the last bits."""
        device = find_device(self.trainer).type
        with autocast(self.trainer):
            precision = "bf16-mixed" if torch.is_autocast_enabled(device) else "32-true"
        return {"device": device, "precision": precision, "torch": torch.__version__}
