"""Evaluation goes through Lightning's Trainer too, so that it runs wherever training does."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from cil import parallel
from cil.config import TrainerConfig
from cil.methods.loading import workers
from cil.methods.method import Lasting, Method
from cil.methods.training import fitting, new_trainer

BATCH_SIZE = 64  # images
FEWER_COPIES = (
    "free what other programs use of it, or let a VAR score fewer copies of an image with "
    "--var.smoothing_samples"
)


class Scorer(LightningModule):
    """Batches (images, labels) -> (scores (B, C), labels (B,)), both on the CPU.

    Of all classes seen but those below `first`.
    """

    def __init__(self, method: Method, first: int) -> None:
        super().__init__()
        # Where there are fewer batches than devices. (Lightning sets it to false for every object.)
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.method, self.first = method, first

    def predict_step(self, batch: list[Tensor], *_: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if not self.first:
            return self.method.scores(images).cpu(), labels.cpu()
        assert isinstance(self.method, Lasting)
        return self.method.scores(images, self.first).cpu(), labels.cpu()


class BatchesWithin(Sampler[list[int]]):
    """Indices of a concatenation of data sets, in batches none of which spans two of them.

    Of several devices each gets whole batches: those that one device would score, to the last bit.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.batches: list[list[int]] = []
        first = 0
        for size in sizes:
            rows = list(range(first, first + size))
            self.batches += [rows[i : i + BATCH_SIZE] for i in range(0, size, BATCH_SIZE)]
            first += size
        self.batches = parallel.deal(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def score(
    method: Method,
    datasets: Sequence[Dataset],
    settings: TrainerConfig,
    title: str,
    first: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Score every image of each dataset -> (scores (N, classes seen), labels (N,)) a dataset.

    Several devices share the batches, and all of them return the scores of all. Of a `Lasting`
    method the classes below `first` can be left out.

    Raises:
        UserError: the GPU's memory is too small.
    """
    sizes = [len(dataset) for dataset in datasets]  # type: ignore[arg-type]
    together: ConcatDataset = ConcatDataset(datasets)
    processes = workers(settings, len(together), together[0][0].shape[-1])
    loader = DataLoader(
        together,
        batch_sampler=BatchesWithin(sizes),
        num_workers=processes,
        generator=torch.Generator(),  # or devices without a batch draw less than the others
    )
    trainer = new_trainer(settings, title=title, logger=False)
    with fitting(title, FEWER_COPIES):
        own: Any = trainer.predict(Scorer(method, first), loader) or []
    batches = parallel.collect(own)
    scores, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return list(zip(scores.split(sizes), labels.split(sizes), strict=True))
