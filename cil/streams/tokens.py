"""An experience as cached token maps: the tokenizer is frozen, so every image is encoded once.

Shapes: N images (training images times views), L tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from cil.parallel import share

MOST_CODES = torch.iinfo(torch.int16).max + 1  # tokens are kept as 16-bit numbers


def augmented_views(dataset: Dataset, views: int, batch_size: int = 256) -> TensorDataset:
    """Pass `views` times over a dataset that augments its images -> (images, labels).

    images (N, channels, H, W) in [-1, 1], labels (N,).
    """
    loader = DataLoader(dataset, batch_size=batch_size)
    batches = [(images, labels) for _ in range(views) for images, labels in loader]
    images, labels = zip(*batches, strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


@torch.inference_mode()
def token_maps(
    images: TensorDataset,
    tokenize: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int = 256,
) -> TensorDataset:
    """Encode (images, labels) with a frozen tokenizer -> (tokens (N, L) int16, labels (N,)).

    `device` is the tokenizer's; the token maps stay on the CPU.
    """
    batches = images.tensors[0].split(batch_size)
    tokens = [tokenize(batch.to(device)).to("cpu", torch.int16) for batch in batches]
    return TensorDataset(torch.cat(tokens).clone(), images.tensors[1])


def shuffled_batches(data: TensorDataset, batch_size: int) -> DataLoader:
    """Batches of whole tensors in a new order each pass; indexed at once, not item by item.

    With several devices, this one's share of each batch.
    """
    sampler = BatchSampler(RandomSampler(data), min(batch_size, len(data)), drop_last=True)
    return DataLoader(_Rows(data), sampler=share(sampler), batch_size=None)


class _Rows(Dataset):
    """A TensorDataset that is asked for a list of rows at a time."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self.data[torch.tensor(rows)]
