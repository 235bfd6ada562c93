"""scikit-learn's bundled digits: 1,797 real grey images of 8 x 8 pixels, no download.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cil.streams.memory_images import MemoryImages
from cil.streams.splits import held_out
from cil.streams.stream import Source

_TEST_IMAGES = 450  # a quarter
_SPLIT_SEED = 0  # never a setting: every run is judged on the same test images
_BRIGHTEST = 16.0
_BACKGROUND = -1.0


class Jitter:
    """Rotates, shifts and scales an image, at random and so little that a digit stays one."""

    def __init__(self) -> None:
        from torchvision.transforms import InterpolationMode, v2

        # Without a fill, what comes in from outside is 0: the background, once that is moved there.
        # A fill of -1 would leave a grey rim (torchvision blends it in twice).
        self.affine = v2.RandomAffine(
            degrees=7,
            translate=(0.04, 0.04),
            scale=(0.95, 1.05),
            interpolation=InterpolationMode.BILINEAR,
            fill=None,
        )

    def __repr__(self) -> str:
        return f"Jitter({self.affine})"

    def __call__(self, image: Tensor) -> Tensor:
        """image (C, H, W) in [-1, 1] -> the same shape and range."""
        return self.affine(image - _BACKGROUND) + _BACKGROUND


def digits(validation: float, augment: bool, image_size: int = 16) -> Source:
    """The ten digits, upsampled bilinearly from 8 to `image_size` pixels.

    The test images are a fixed stratified quarter; the share `validation` of the others, stratified
    too, is kept for everything that is tuned or fitted.

    Raises:
        UserError: `validation` is not between 0 and 1.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, targets = data.images.astype(np.uint8), data.target
    splits = _split(targets, validation)
    images = _upsample(pixels, image_size)
    train, held_out, test = (MemoryImages(images[split], targets[split]) for split in splits)
    return Source(
        name="digits",
        class_names=tuple(str(name) for name in data.target_names),
        train=train,
        validation=held_out,
        test=test,
        image_size=image_size,
        channels=1,
        content=_content(pixels, targets, splits, image_size),
        augment=Jitter() if augment else None,
    )


def _split(targets: np.ndarray, validation: float) -> list[np.ndarray]:
    """Indices of the train, validation and test images, each in ascending order."""
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(
        np.arange(len(targets)),
        test_size=_TEST_IMAGES,
        stratify=targets,
        random_state=_SPLIT_SEED,
    )
    train, apart = held_out(targets[rest], validation)
    return [np.sort(indices) for indices in (rest[train], rest[apart], test)]


def _upsample(pixels: np.ndarray, image_size: int) -> Tensor:
    images = torch.from_numpy(pixels).float()[:, None] / _BRIGHTEST * 2 - 1
    return functional.interpolate(
        images, size=(image_size, image_size), mode="bilinear", align_corners=False
    )


def _content(
    pixels: np.ndarray, targets: np.ndarray, splits: Sequence[np.ndarray], image_size: int
) -> str:
    """Hashes what was read and how it was cut: upsampled floats may differ between processors."""
    digest = hashlib.sha256(f"bilinear {image_size}".encode())
    for array in (pixels, targets, *splits):
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()
