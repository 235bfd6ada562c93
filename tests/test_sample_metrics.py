"""Distances between sets of features, against cases worked by hand and Gaussians' own formula."""

import numpy as np
import pytest
import torch

from cil.errors import UserError
from cil.sample_metrics import frechet_distance, precision_recall


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_the_distance_of_two_gaussians_on_a_line() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2, with s over N - 1."""
    assert frechet_distance(column(0, 2, 4), column(3, 7, 11)) == pytest.approx(25 + 4)
    assert frechet_distance(column(0, 2, 4), column(4, 0, 2)) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_correlated_features() -> None:
    """Equal means, covariances that commute: the squared distance of their roots' eigenvalues."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((500, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T)).T)  # covariance 1
    turn, _ = np.linalg.qr(generator.standard_normal((3, 3)))
    one, other = ((x * np.array(scales)) @ turn for scales in ([1, 2, 3], [2, 2, 7]))
    found = frechet_distance(torch.from_numpy(one), torch.from_numpy(other))
    assert found == pytest.approx(1 + 0 + 16)


def test_precision_and_recall_by_hand() -> None:
    """With k = 1 the real balls reach 1 (around 0 and 1) and 4 (around 5): -1 to 2, and 1 to 9."""
    real, drawn = column(0, 1, 5), column(-1, 8.5, 9.5, 20)
    # The balls around drawn ones reach 9.5 (around -1), 1, 1 and 10.5.
    assert precision_recall(real, drawn, k=1) == (2 / 4, 3 / 3)
    far = column(100, 101, 102, 103)
    assert precision_recall(real, far, k=1) == (0, 0)
    assert precision_recall(real, real, k=1) == (1, 1)


def test_one_image_again_and_again_has_precision_and_no_recall() -> None:
    real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_recall(real, real[:1].expand(200, 4))
    assert precision == 1
    assert recall == 1 / 200


def test_many_images_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    real, drawn = (torch.randn(50, 3, generator=generator) for _ in range(2))
    whole = precision_recall(real, drawn + 0.5)
    monkeypatch.setattr("cil.sample_metrics.ROWS", 7)
    assert precision_recall(real, drawn + 0.5) == whole
    assert 0 < whole[0] < 1


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="there are 1 images"):
        frechet_distance(column(0), column(0, 1))
    with pytest.raises(UserError, match="take 4 or more"):
        precision_recall(column(0, 1, 2, 3), column(0, 1, 2))
