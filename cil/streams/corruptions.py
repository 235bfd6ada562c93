"""The 15 corruptions of ImageNet-C at 5 severities (Hendrycks & Dietterich, arXiv 1903.12261).

Their strengths are the published ones: those of Tiny ImageNet-C (64 px) for images of less than
128 px, else those of ImageNet-C (224 px). Lengths in pixels grow and shrink with the side of the
image, to half of those of 64 px and no further: less than a pixel would blur nothing. At 64 and
224 px they are the published lengths.

What differs: frost lays a drawn picture over the image, where the paper takes photographs; glass
blur swaps pixels in another order; a disc covers the pixels at its rim in part.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cil.errors import UserError
from cil.streams import corruption_kinds as kinds

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL, _LARGE, _BETWEEN = 64, 224, 128  # px of the published images, and where theirs change


class Corrupted(Dataset):
    """A data set's images, corrupted; whoever reads them gets the same ones."""

    def __init__(self, images: Dataset, name: str, severity: int) -> None:
        check_corruption(name, severity)
        self.images, self.name, self.severity = images, name, severity

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        image, label = self.images[item]
        return corrupted(image, self.name, self.severity), label


def corrupted(image: Tensor, name: str, severity: int) -> Tensor:
    """image (C, H, W) in [-1, 1], C 1 or 3 -> the same shape, in the 256 values of a file.

    What is drawn at random depends on the image's pixels, the corruption and the severity alone.
    """
    values = np.clip((image.double().numpy() + 1) / 2, 0, 1).transpose(1, 2, 0)
    seed = zlib.crc32(kinds.to_bytes(values).tobytes())
    random = np.random.default_rng([seed, list(CORRUPTIONS).index(name), severity])
    corrupt, small, large = CORRUPTIONS[name]
    side = len(values)
    chosen, of = (small, _SMALL) if side < _BETWEEN else (large, _LARGE)
    result = corrupt(values, random, max(side / of, 0.5), *chosen[severity - 1])
    return torch.from_numpy(kinds.to_bytes(result).transpose(2, 0, 1).copy()).float() / 127.5 - 1


def check_corruption(name: str, severity: int) -> None:
    """Raises UserError when there is no such corruption or severity."""
    if name not in CORRUPTIONS:
        raise UserError(
            f"There is no corruption '{name}': choose from {', '.join(CORRUPTIONS)}, or all."
        )
    if severity not in SEVERITIES:
        raise UserError(f"There is no severity {severity}: choose from 1 (least) to 5.")


# Name -> how, and what it is told at severities 1 to 5 of Tiny ImageNet-C and of ImageNet-C.
# In the published order, which decides what is drawn at random.
_Strengths = Sequence[tuple[float, ...]]
CORRUPTIONS: dict[str, tuple[Callable[..., kinds.Image], _Strengths, _Strengths]] = {
    "gaussian_noise": (
        kinds.gaussian_noise,
        [(0.04,), (0.08,), (0.12,), (0.15,), (0.18,)],
        [(0.08,), (0.12,), (0.18,), (0.26,), (0.38,)],
    ),
    "shot_noise": (
        kinds.shot_noise,
        [(250,), (100,), (50,), (30,), (15,)],
        [(60,), (25,), (12,), (5,), (3,)],
    ),
    "impulse_noise": (
        kinds.impulse_noise,
        [(0.01,), (0.02,), (0.05,), (0.08,), (0.14,)],
        [(0.03,), (0.06,), (0.09,), (0.17,), (0.27,)],
    ),
    "defocus_blur": (
        kinds.defocus_blur,
        [(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    ),
    "glass_blur": (
        kinds.glass_blur,
        [(0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)],
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    ),
    "motion_blur": (
        kinds.motion_blur,
        [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    ),
    "zoom_blur": (
        kinds.zoom_blur,
        [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    ),
    "snow": (
        kinds.snow,
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ],
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
    ),
    "frost": (
        kinds.frost,
        [(1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)],
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    ),
    "fog": (
        kinds.fog,
        [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    ),
    "brightness": (
        kinds.brightness,
        [(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)],
        [(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)],
    ),
    "contrast": (
        kinds.contrast,
        [(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)],
        [(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)],
    ),
    "elastic_transform": (
        kinds.elastic_transform,
        [(0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)],
        # Published for 244 px, and laid over images of 224.
        [
            tuple(244 / 224 * share for share in shares)
            for shares in [
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            ]
        ],
    ),
    "pixelate": (
        kinds.pixelate,
        [(0.9,), (0.8,), (0.7,), (0.6,), (0.5,)],
        [(0.6,), (0.5,), (0.4,), (0.3,), (0.25,)],
    ),
    "jpeg_compression": (
        kinds.jpeg_compression,
        [(65,), (58,), (50,), (40,), (25,)],
        [(25,), (18,), (15,), (10,), (7,)],
    ),
}
