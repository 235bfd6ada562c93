"""CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST, read and if need be downloaded by torchvision."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cil.errors import UserError
from cil.streams.image_folder import ShiftAndMirror
from cil.streams.memory_images import MemoryImages
from cil.streams.splits import held_out
from cil.streams.stream import Source

# Name -> torchvision's class, the side it is shown at, and whether a mirror image is one of it.
SETS = {
    "cifar10": ("CIFAR10", 32, True),
    "cifar100": ("CIFAR100", 32, True),
    "mnist": ("MNIST", 32, False),
    "fashion_mnist": ("FashionMNIST", 32, True),
}


def torchvision_set(name: str, root: Path, validation: float, augment: bool) -> Source:
    """One of `SETS`, below `root`; a stratified share of its training images is held out.

    MNIST's 28 pixels get a border of two, which makes their side a power of two.

    Raises:
        UserError: it is not there and cannot be downloaded, or the share is not between 0 and 1.
    """
    kind, side, mirror = SETS[name]
    train, test = _load(kind, root, train=True), _load(kind, root, train=False)
    images, targets = _bytes(train, side), np.asarray(train.targets)
    kept, apart = held_out(targets, validation)
    digest = hashlib.sha256(f"{name} {validation}".encode())
    digest.update(images.numpy().tobytes())
    return Source(
        name=name,
        class_names=tuple(train.classes),
        train=MemoryImages(images[kept], targets[kept].tolist()),
        validation=MemoryImages(images[apart], targets[apart].tolist()),
        test=MemoryImages(_bytes(test, side), np.asarray(test.targets).tolist()),
        image_size=side,
        channels=images.shape[1],
        content=digest.hexdigest(),
        augment=ShiftAndMirror(mirror) if augment else None,
    )


def _load(kind: str, root: Path, train: bool) -> Any:
    from torchvision import datasets

    try:
        return getattr(datasets, kind)(root, train=train, download=True)
    except (OSError, RuntimeError, ValueError) as error:  # no network, no disk, a damaged archive
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{kind} is not in {root} and could not be downloaded ({detail[:120]}): copy it there "
            "from another machine, or say with stream.root where it is."
        ) from error


def _bytes(dataset: Any, side: int) -> Tensor:
    """(N, C, side, side), uint8."""
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    border = (side - images.shape[-1]) // 2
    return torch.nn.functional.pad(images, 4 * [border]).contiguous()
