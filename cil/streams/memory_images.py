"""Images held in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cil.errors import UserError


class MemoryImages(Dataset):
    """(N, C, H, W), floats in [-1, 1] or, at a quarter of the size, bytes.

    Items are (float image (C, H, W) in [-1, 1], original class id).
    """

    def __init__(self, images: Tensor, targets: Sequence[int]) -> None:
        """Raises UserError unless every image has a target."""
        if len(images) != len(targets):
            raise UserError(
                f"MemoryImages was given {len(images)} images and {len(targets)} targets: give "
                "every image one."
            )
        self.images = images
        self.targets = [int(target) for target in targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        image = self.images[item]
        return (image / 127.5 - 1 if image.dtype == torch.uint8 else image), self.targets[item]
