"""Small data sets on disk, in the formats in which the real ones come: no test may download.

All of them show scikit-learn's digits; a hundred classes are the numbers 00 to 99, two digits each.
"""

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = load_digits().images.astype(np.uint8) * 15
OF_DIGIT = [np.flatnonzero(load_digits().target == digit) for digit in range(10)]


def number(value: int, copy: int, side: int) -> np.ndarray:
    """The `copy`-th picture of a number of two digits, (side, side) uint8."""
    two = [DIGITS[OF_DIGIT[digit][copy]] for digit in (value // 10, value % 10)]
    return np.asarray(Image.fromarray(np.concatenate(two, 1)).resize((side, side)))


def image_folder(root: Path, names: Sequence[str], train: int, test: int, side: int) -> None:
    """train/ and val/ with so many JPEG files of `side` px in each class folder."""
    for split, copies in (("train", range(train)), ("val", range(train, train + test))):
        for value, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for copy in copies:
                picture = Image.fromarray(number(value, copy, side)).convert("RGB")
                picture.save(root / split / name / f"{name}_{copy}.JPEG")


def mnist(root: Path, kind: str = "MNIST") -> None:
    """MNIST or Fashion-MNIST: 300 training and 100 test images."""
    images = np.kron(DIGITS, np.ones((1, 3, 3), np.uint8))  # 24 px
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    for name, part in (("train", slice(300)), ("t10k", slice(300, 400))):
        _write_idx(folder / f"{name}-images-idx3-ubyte", images[part])
        _write_idx(folder / f"{name}-labels-idx1-ubyte", load_digits().target[part])


def _write_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST's files: what is in it, the shape, the bytes."""
    shape = np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes())


def cifar(root: Path, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 or CIFAR-100: 7 training images and a test image of a class.

    torchvision knows the real files by their MD5, so it is told those of these.
    """
    from torchvision import datasets

    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    copies = {"train_list": np.arange(7), "test_list": np.arange(7, 8)}
    for listed, every in copies.items():
        files = getattr(kind, listed)
        parts = np.array_split(every, len(files))
        md5s = [
            [name, _write_batch(folder / name, classes, part)]
            for (name, _), part in zip(files, parts, strict=True)
        ]
        monkeypatch.setattr(kind, listed, md5s)
    meta = kind.meta
    names = {meta["key"]: [f"number {value}" for value in range(classes)]}
    md5 = _write_pickle(folder / meta["filename"], names)
    monkeypatch.setattr(kind, "meta", meta | {"md5": md5})


def _write_batch(path: Path, classes: int, copies: np.ndarray) -> str:
    rows, labels = [], []
    for value in range(classes):
        for copy in copies:
            rows.append(np.repeat(number(value, copy, 32)[None], 3, 0).ravel())
            labels.append(value)
    key = "labels" if classes == 10 else "fine_labels"
    data = np.array(rows, np.uint8).reshape(-1, 3 * 32 * 32)
    return _write_pickle(path, {"data": data, key: labels})


def _write_pickle(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()
