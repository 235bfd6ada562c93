"""Insertion and deletion against cases worked by hand, and against what must not matter."""

import pytest
import torch
from torch import Tensor

from cil.errors import UserError
from cil.insertion_deletion import Protocol, blur, curves, ranks

BY_ONE = Protocol(step=1, baseline=-1.0, kernel=1, sigma=1.0)


def upper_left(images: Tensor) -> Tensor:
    """A classifier of 2 x 2 images: class 1 is as probable as the upper left pixel is bright."""
    p = (images[:, 0, 0, 0] + 1) / 2
    return torch.stack([1 - p, p], 1)


def brightness(images: Tensor) -> Tensor:
    p = (images.mean((1, 2, 3)) + 1) / 2
    return torch.stack([1 - p, p], 1)


WHITE = torch.ones(1, 1, 2, 2)
ONE = torch.tensor([1])


def test_the_pixel_that_decides_going_first_or_last() -> None:
    """Deleted first, the probability is 1, 0, 0, 0, 0: areas 1/8, 0, 0, 0 by the trapezoid rule."""
    first = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    found = curves(WHITE, first, ONE, upper_left, BY_ONE)
    assert found.fractions_S.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.deletion_BS.tolist() == [[1, 0, 0, 0, 0]]
    assert found.deletion_auc().tolist() == [0.125]
    last = curves(WHITE, -first, ONE, upper_left, BY_ONE)
    assert last.deletion_BS.tolist() == [[1, 1, 1, 1, 0]]
    assert last.deletion_auc().tolist() == [0.875]


def test_insertion_starts_from_the_blurred_image_and_ends_with_the_image() -> None:
    """A white pixel between black ones, blurred by [1/4, 1/2, 1/4], about: it comes back at once.

    Along a row with mirrored borders 1, -1, -1 blurs to other values than it had, and the class
    is the first pixel's brightness.
    """
    weights = torch.tensor([-0.5, 0.0, -0.5]).exp()
    weights = weights / weights.sum()
    image = torch.tensor([[[[1.0, -1.0, -1.0]] * 3]])
    protocol = Protocol(step=3, baseline=0.0, kernel=3, sigma=1.0)
    # The border is mirrored: left of the first pixel stands the second.
    expected = (weights[1] - weights[0] - weights[2]).item()
    importance = torch.tensor([[[9.0, 8.0, 7.0], [0.0] * 3, [0.0] * 3]])
    found = curves(image, importance, ONE, upper_left, protocol)
    start = (expected + 1) / 2
    assert found.insertion_BS[0].tolist() == pytest.approx([start, 1, 1, 1])
    assert found.deletion_BS[0].tolist() == pytest.approx([1, 0.5, 0.5, 0.5])
    area = ((start + 1) / 2 + 1 + 1) / 3
    assert found.insertion_auc().item() == pytest.approx(area)


def test_a_last_step_may_be_smaller_and_counts_for_less() -> None:
    """Three of four pixels, then one: brightness 1, 1/4, 0 at 0, 3/4, 1."""
    protocol = Protocol(step=3, baseline=-1.0, kernel=1, sigma=1.0)
    found = curves(WHITE, torch.rand(1, 2, 2), ONE, brightness, protocol)
    assert found.fractions_S.tolist() == [0, 0.75, 1]
    assert found.deletion_BS[0].tolist() == pytest.approx([1, 0.25, 0])
    expected = 0.75 * (1 + 0.25) / 2 + 0.25 * 0.25 / 2
    assert found.deletion_auc().item() == pytest.approx(expected)


def test_of_equal_pixels_the_first_goes_first() -> None:
    assert ranks(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])).tolist() == [[[2, 0], [1, 3]]]


def test_batches_and_the_other_images_do_not_matter() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 8, 8, generator=draws) * 2 - 1
    importance = torch.rand(5, 8, 8, generator=draws)
    labels, protocol = torch.tensor([0, 1, 1, 0, 1]), Protocol(step=7, kernel=5, sigma=2.0)
    whole = curves(images, importance, labels, brightness, protocol)
    parts = curves(images, importance, labels, brightness, protocol, at_once=1)
    torch.testing.assert_close(whole.insertion_BS, parts.insertion_BS)
    torch.testing.assert_close(whole.deletion_BS, parts.deletion_BS)
    assert whole.insertion_BS.std(0).min() > 0.001  # the images do differ


def test_blur_keeps_what_is_even_and_spreads_a_point_evenly() -> None:
    flat = torch.full((1, 2, 8, 8), 0.3)
    torch.testing.assert_close(blur(flat, 5, 2.0), flat)
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1
    spread = blur(point, 3, 1.0)
    assert spread.sum().item() == pytest.approx(1)
    assert torch.equal(spread, spread.mT)
    ratio = spread[0, 0, 4, 3] / spread[0, 0, 4, 4]
    assert ratio.item() == pytest.approx(torch.tensor(-0.5).exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        (Protocol(step=0), "step is 0: change one pixel or more"),
        (Protocol(step=1, baseline=2.0), "baseline is 2.0: give a value from -1 to 1"),
        (Protocol(step=1, kernel=4), "kernel is 4: give an odd number below 16"),
        (Protocol(step=1, kernel=17), "kernel is 17: give an odd number below 16"),
        (Protocol(step=1, sigma=0.0), "sigma is 0.0: give a number above 0"),
        (Protocol(step=1, sigma=float("nan")), "sigma is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(protocol: Protocol, said: str) -> None:
    with pytest.raises(UserError, match=said):
        curves(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8), ONE, brightness, protocol)


def test_importance_of_another_shape_is_refused() -> None:
    images = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UserError, match=r"shape \(1, 4, 4\), but the images need \(1, 8, 8\)"):
        curves(images, torch.zeros(1, 4, 4), ONE, brightness, Protocol(step=1))
