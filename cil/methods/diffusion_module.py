"""Training a diffusion model: the newest class group's squared error, from cached latents."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cil import parallel
from cil.config import DiffusionConfig, TrainerConfig
from cil.methods.training import LoggedModule, autocast, one_cycle
from cil.models.class_groups import NULL_CLASS, Incremental
from cil.models.latents import Latents
from cil.models.noising import Noising


class DiffusionModule(LoggedModule):
    """Fits the newest class group of `model` on batches (raw latents (B, Z, h, w), labels (B,))."""

    def __init__(
        self,
        model: Incremental,
        latents: Latents,
        noising: Noising,
        settings: DiffusionConfig,
        trainer: TrainerConfig,
        steps: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings, self.trainer_settings, self.steps = settings, trainer, steps
        # Behind a tuple Lightning does not see what is frozen as a part of this module.
        self._frozen = (latents, noising)

    def on_fit_start(self) -> None:
        for part in self._frozen:
            part.to(self.device)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        latents, noising = self._frozen
        clean_BZhw, labels_B = latents.standardised(batch[0]), batch[1]
        # Drawn for the batch of all devices, as on one.
        everyone = len(labels_B) * parallel.world()
        own = slice(parallel.rank(), None, parallel.world())
        times_B = noising.random_times(everyone, self.device)[own]
        noise_BZhw = torch.randn(everyone, *clean_BZhw.shape[1:], device=self.device)[own]
        if self.model.trains_null:
            dropped = torch.rand(everyone, device=self.device) < self.settings.condition_dropout
            labels_B = labels_B.masked_fill(dropped[own], NULL_CLASS)
        noised_BZhw = noising.noised(clean_BZhw, noise_BZhw, times_B)
        group = len(self.model.groups) - 1
        with autocast(self.trainer_settings):
            predicted = self.model.predictions(noised_BZhw, times_B, labels_B, group)
        loss = F.mse_loss(predicted, noising.target(clean_BZhw, noise_BZhw))
        self.record({"diffusion/squared_error": loss}, show="diffusion/squared_error")
        return loss

    def configure_optimizers(self) -> Any:
        settings = self.settings
        return one_cycle(
            self.model, lr=settings.lr, steps=self.steps, weight_decay=settings.weight_decay
        )
