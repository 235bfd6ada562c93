"""Images held in memory as bytes: a quarter of what floats take."""

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset


class ByteImages(Dataset):
    """(N, C, H, W) uint8; items are (float image (C, H, W) in [-1, 1], original class id)."""

    def __init__(self, images: Tensor, targets: Sequence[int]) -> None:
        self.images = images
        self.targets = [int(target) for target in targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return self.images[item] / 127.5 - 1, self.targets[item]
