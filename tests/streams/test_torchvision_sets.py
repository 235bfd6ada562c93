"""MNIST as files on disk, filled with scikit-learn's digits: no test may download."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cil.errors import UserError
from cil.streams.torchvision_sets import torchvision_set


def write(path: Path, array: np.ndarray) -> None:
    """The format of MNIST's files: what is in it, the shape, the bytes."""
    shape = np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    digits = load_digits()
    images = np.kron(digits.images, np.ones((1, 3, 3))) * 15  # 24 px
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, part in (("train", slice(300)), ("t10k", slice(300, 400))):
        write(folder / f"{name}-images-idx3-ubyte", images[part])
        write(folder / f"{name}-labels-idx1-ubyte", digits.target[part])
    return tmp_path


def test_splits_are_its_own_with_a_share_held_out(root: Path) -> None:
    source = torchvision_set("mnist", root, 0.2, augment=True)
    assert [len(x) for x in (source.train, source.validation, source.test)] == [240, 60, 100]
    assert source.channels == 1
    assert source.class_names[3] == "3 - three"
    image, label = source.test[0]
    assert image.shape == (1, 32, 32)
    assert label == load_digits().target[300]
    # A border of two of its own and two more: background.
    assert image[:, :4].max() == image[:, :, :4].max() == -1
    assert image.max() > 0.5
    assert source.augment(image).shape == image.shape
    assert source.content == torchvision_set("mnist", root, 0.2, augment=False).content
    assert source.content != torchvision_set("mnist", root, 0.3, augment=False).content


def test_what_is_not_there_and_cannot_be_had_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=r"CIFAR10 is not in .* downloaded .*stream\.root"):
        torchvision_set("cifar10", tmp_path, 0.2, augment=False)
