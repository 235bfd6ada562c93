"""MNIST as files on disk, filled with scikit-learn's digits: no test may download."""

from pathlib import Path

import pytest
import written
from sklearn.datasets import load_digits

from cil.errors import UserError
from cil.streams.torchvision_sets import torchvision_set


@pytest.fixture
def root(tmp_path: Path) -> Path:
    written.mnist(tmp_path)
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
