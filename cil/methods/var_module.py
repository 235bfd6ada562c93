"""Training a VAR: the newest class group's log-likelihood, from cached token maps."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cil import parallel
from cil.config import TrainerConfig, VARConfig
from cil.methods.training import LoggedModule, autocast, one_cycle
from cil.models.class_groups import NULL_CLASS, Incremental
from cil.models.tokenizer import MultiScaleTokenizer


class VARModule(LoggedModule):
    """Fits the newest class group of `model` on batches (cached tokens (B, L), labels (B,))."""

    def __init__(
        self,
        model: Incremental,
        tokenizer: MultiScaleTokenizer,
        settings: VARConfig,
        trainer: TrainerConfig,
        steps: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings, self.trainer_settings, self.steps = settings, trainer, steps
        # Behind a tuple Lightning does not see the frozen tokenizer as a part of this module.
        self._frozen = (tokenizer,)

    def on_fit_start(self) -> None:
        self._frozen[0].to(self.device)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        tokens_BL, labels_B = batch[0].long(), batch[1]
        with torch.no_grad():
            inputs_BLZ = self._frozen[0].var_input(tokens_BL)
        if self.model.trains_null:
            # Drawn for the batch of all devices, as on one.
            draws = torch.rand(len(labels_B) * parallel.world(), device=self.device)
            dropped = draws[parallel.rank() :: parallel.world()] < self.settings.condition_dropout
            labels_B = labels_B.masked_fill(dropped, NULL_CLASS)
        group = len(self.model.groups) - 1
        drops = self.settings.drop_path > 0
        draws_of = parallel.own_draws(self.device) if drops else nullcontext()
        with autocast(self.trainer_settings), draws_of:
            loss = -self.model.log_likelihoods(inputs_BLZ, labels_B, tokens_BL, group).mean()
        self.record({"var/nats_a_token": loss}, show="var/nats_a_token")
        return loss

    def configure_optimizers(self) -> Any:
        settings = self.settings
        return one_cycle(
            self.model, lr=settings.lr, steps=self.steps, weight_decay=settings.weight_decay
        )
