"""The corruptions of ImageNet-C: what each does, at any size, and the same for every reader."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.utils.data import TensorDataset

from cil.errors import UserError
from cil.streams.corruptions import CORRUPTIONS, SEVERITIES, Corrupted, corrupted

NAMES = list(CORRUPTIONS)
# Of how much an image changes; these two blur and bend by random amounts.
UNORDERED = {"elastic_transform", "glass_blur"}


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """A flower (3, 64, 64)."""
    pixels = load_sample_image("flower.jpg")[:420, 100:520].astype(np.float32)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    return torch.nn.functional.interpolate(image, 64, mode="area")[0]


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def test_there_are_the_fifteen_of_the_paper() -> None:
    assert len(NAMES) == 15
    for _, small, large in CORRUPTIONS.values():
        assert len(small) == len(large) == len(SEVERITIES) == 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 64, 64), (3, 200, 200)])
def test_any_size_and_channels(name: str, shape: tuple[int, ...]) -> None:
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for severity in (1, 5):
        result = corrupted(image, name, severity)
        assert result.shape == image.shape
        assert result.dtype == torch.float32
        assert -1 <= result.min() <= result.max() <= 1
        eight_bits = (result + 1) * 127.5
        assert torch.allclose(eight_bits, eight_bits.round(), atol=1e-3)
        assert distance(result, image) > 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNORDERED])
def test_a_higher_severity_takes_more_away(name: str, photograph: Tensor) -> None:
    changes = [
        distance(corrupted(photograph, name, severity), photograph) for severity in (1, 3, 5)
    ]
    assert changes == sorted(changes)
    assert changes[2] > 1.1 * changes[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_corrupted_alike_for_whoever_reads_it(name: str, photograph: Tensor) -> None:
    images = torch.stack([photograph, photograph.flip(1), photograph.flip(2)])
    data = Corrupted(TensorDataset(images, torch.arange(3)), name, 3)
    turned = Corrupted(TensorDataset(images.flip(0), torch.arange(3).flip(0)), name, 3)
    torch.manual_seed(1)
    first = [data[i][0] for i in range(3)]
    torch.manual_seed(2)
    again = [turned[2 - i][0] for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [turned[i][1] for i in range(3)] == [2, 1, 0]


def test_images_and_severities_do_not_share_their_noise(photograph: Tensor) -> None:
    grey = torch.zeros(1, 32, 32)
    other = grey.clone()
    other[0, 0, 0] = 0.5
    noises = [corrupted(grey, "gaussian_noise", s) for s in (1, 2)]
    correlation = torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))[0, 1]
    assert abs(correlation) < 0.15
    both = [corrupted(image, "gaussian_noise", 1)[0, 1:].flatten() for image in (grey, other)]
    assert abs(torch.corrcoef(torch.stack(both))[0, 1]) < 0.15


# --- worked by hand ---


def test_the_strengths_of_noise_are_those_of_its_size() -> None:
    for side, sigma in ((64, 0.18), (224, 0.38)):
        grey = torch.zeros(3, side, side)  # 0.5 of 1
        noise = (corrupted(grey, "gaussian_noise", 5) + 1) / 2 - 0.5
        expected = np.clip(np.random.default_rng(0).normal(0, sigma, 200_000), -0.5, 0.5).std()
        assert noise.std().item() == pytest.approx(expected, rel=0.05)
    salt = corrupted(torch.zeros(1, 64, 64), "impulse_noise", 5)
    assert (salt == 1).float().mean().item() == pytest.approx(0.07, abs=0.015)
    assert (salt == -1).float().mean().item() == pytest.approx(0.07, abs=0.015)


def test_contrast_and_brightness() -> None:
    image = torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]]]).repeat(1, 8, 8)
    low = corrupted(image, "contrast", 1)  # 0.4 of the distance from the mean 0.5: 0.3 and 0.7
    assert torch.allclose(low, 0.4 * image, atol=0.005)
    red = torch.full((3, 16, 16), -1.0)
    red[0], red[1] = 0.0, -0.5  # 0.5, 0.25, 0: V is 0.5
    bright = (corrupted(red, "brightness", 5) + 1) / 2  # V is 1
    assert torch.allclose(bright[:, 0, 0], torch.tensor([1.0, 0.5, 0.0]), atol=0.005)


def test_a_defocused_point_is_a_disc() -> None:
    point = torch.full((1, 64, 64), -1.0)
    point[0, 32, 32] = 1.0
    disc = (corrupted(point, "defocus_blur", 5)[0] + 1) / 2  # radius 3
    rows, columns = torch.meshgrid(torch.arange(64) - 32, torch.arange(64) - 32, indexing="ij")
    away = (rows**2 + columns**2).sqrt()
    inside = disc[away < 2]
    assert inside.min().item() == pytest.approx(round(255 / (np.pi * 9)) / 255, abs=1e-4)
    assert inside.max() == inside.min()
    assert disc[away > 4].max() == 0


def test_pixels_of_glass_change_places() -> None:
    lines = torch.arange(64).float().mul(2 / 63).sub(1).expand(1, 64, 64)  # brighter to the right
    glass = corrupted(lines, "glass_blur", 1)  # the blur is too light to be seen
    assert torch.allclose(glass.flatten().sort().values, lines.flatten().sort().values, atol=0.01)
    moved = (glass - lines).abs()[0] / (2 / 63)
    assert 1 < moved.max() < 12  # a pixel may be swapped again, and so wander on
    assert moved.mean() > 0.3


def test_motion_draws_a_line() -> None:
    point = torch.full((1, 64, 64), -1.0)
    point[0, 32, 32] = 1.0
    line = (corrupted(point, "motion_blur", 5)[0] > -1).nonzero().float()
    across = torch.linalg.svdvals(line - line.mean(0))
    assert across[0] > 4 * across[1]


def test_large_blocks_and_few_bits() -> None:
    image = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blocks = corrupted(image, "pixelate", 5)[0]  # half as many pixels a side
    assert torch.equal(blocks[::2, ::2], blocks[1::2, 1::2])
    expected = torch.nn.functional.avg_pool2d(image, 2)[0]
    assert torch.allclose(blocks[::2, ::2], expected, atol=0.02)
    smooth = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    assert distance(corrupted(smooth, "jpeg_compression", 1), smooth) < 0.03


# --- bad input ---


@pytest.mark.parametrize(("name", "severity"), [("gaussian", 1), ("fog", 0), ("fog", 6)])
def test_what_there_is_not_is_named(name: str, severity: int) -> None:
    with pytest.raises(UserError, match="choose from"):
        Corrupted(TensorDataset(torch.zeros(1, 1, 8, 8)), name, severity)
