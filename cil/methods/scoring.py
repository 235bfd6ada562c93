"""Evaluation goes through Lightning's Trainer too, so that it runs wherever training does."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cil.config import TrainerConfig
from cil.methods.method import Method
from cil.methods.training import new_trainer

BATCH_SIZE = 64  # images


class Scorer(LightningModule):
    """Batches (images, labels) -> (scores (B, classes seen), labels (B,)), both on the CPU."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def predict_step(self, batch: list[Tensor], *_: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return self.method.scores(images).cpu(), labels.cpu()


def score(
    method: Method, datasets: Sequence[Dataset], settings: TrainerConfig, title: str
) -> list[tuple[Tensor, Tensor]]:
    """Score every image of each dataset -> (scores (N, classes seen), labels (N,)) a dataset."""
    loaders = [DataLoader(dataset, batch_size=BATCH_SIZE) for dataset in datasets]
    trainer = new_trainer(settings, title=title, logger=False)
    predictions: Any = trainer.predict(Scorer(method), loaders)
    batches = predictions if len(loaders) > 1 else [predictions]
    return [
        (torch.cat([scores for scores, _ in group]), torch.cat([labels for _, labels in group]))
        for group in batches
    ]
