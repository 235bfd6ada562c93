"""Condition contrastive alignment (CCA, arXiv 2410.09347): a VAR learns what tells classes apart.

Shapes: B images, P = 2 B pairs of an image and a class, L tokens.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cil import parallel
from cil.config import TrainerConfig, VARConfig
from cil.methods.training import LoggedModule, autocast, one_cycle
from cil.models.class_groups import NULL_CLASS, Incremental
from cil.models.tokenizer import MultiScaleTokenizer

PUBLISHED_TOKENS = 680  # of the maps that the published beta is for; it weighs a sum over tokens


class CCAModule(LoggedModule):
    """Aligns the newest class group of `model` on batches (cached tokens (B, L), labels (B,)).

    With r_y = log p(x | y) - log q(x | y), q being the model as it was given, and y' the class of
    another image of the batch, the loss of an image x of class y is

        (-log sigmoid(beta r_y) - lambda log sigmoid(-beta r_y')) / max(lambda, 1).

    A y' that is y counts as another y, and so does either where the null class takes its place.
    Nothing but what the newest group may change learns.
    """

    def __init__(
        self,
        model: Incremental,
        tokenizer: MultiScaleTokenizer,
        settings: VARConfig,
        trainer: TrainerConfig,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings, self.trainer_settings, self.steps = settings, trainer, settings.cca_steps
        self.beta = settings.cca_beta * PUBLISHED_TOKENS / tokenizer.tokens
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        reference = deepcopy(model, memo=frozen).requires_grad_(False)  # shares what is frozen
        # Behind a tuple Lightning does not see them as parts of this module.
        self._frozen = (tokenizer, reference)

    def on_fit_start(self) -> None:
        for part in self._frozen:
            part.to(self.device)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        tokens_BL, labels_B = batch[0].long(), batch[1]
        tokenizer, reference = self._frozen
        with torch.no_grad():
            inputs_PLZ = tokenizer.var_input(tokens_BL).repeat(2, 1, 1)
        tokens_PL = tokens_BL.repeat(2, 1)
        labels_P = torch.cat([labels_B, labels_B.roll(1)])
        own_P = labels_P == labels_B.repeat(2)
        if self.model.trains_null:
            draws = torch.rand(len(labels_P) * parallel.world(), device=self.device)
            dropped_P = draws[parallel.rank() :: parallel.world()] < self.settings.condition_dropout
            labels_P, own_P = labels_P.masked_fill(dropped_P, NULL_CLASS), own_P | dropped_P
        asked = inputs_PLZ, labels_P, tokens_PL, len(self.model.groups) - 1
        with autocast(self.trainer_settings):
            values_P = self.model.log_likelihoods(*asked).sum(1)
            with torch.no_grad():
                before_P = reference.log_likelihoods(*asked).sum(1)
        ratios_P = values_P - before_P
        weight = self.settings.cca_lambda
        wanted_P = torch.where(own_P, ratios_P, -ratios_P)
        losses_P = -F.logsigmoid(self.beta * wanted_P) * torch.where(own_P, 1.0, weight)
        loss = losses_P.sum() / (len(labels_B) * max(weight, 1))
        own, other = ratios_P.chunk(2)
        self.record({"cca/loss": loss, "cca/nats_apart": (own - other).mean()}, "cca/nats_apart")
        return loss

    def configure_optimizers(self) -> Any:
        settings = self.settings
        return one_cycle(
            self.model, lr=settings.cca_lr, steps=self.steps, weight_decay=settings.weight_decay
        )
