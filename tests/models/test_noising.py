"""Noising: the published schedules, and that noise and data can be told from a right prediction."""

import math

import pytest
import torch

from cil.models.noising import TIMES, Noising

KINDS = [("noise", "linear"), ("noise", "cosine"), ("flow", "linear")]


@pytest.fixture(params=KINDS, ids="-".join)
def noising(request) -> Noising:
    return Noising(*request.param)


def test_schedules_are_the_published_ones():
    def kept(schedule):  # a_t^2
        times = torch.arange(TIMES).float()
        return Noising("noise", schedule).coefficients(times)[0].flatten().square()

    product, linear = 1.0, kept("linear")
    for t in range(TIMES):  # DDPM, section 4
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert linear[t].item() == pytest.approx(product, rel=1e-4)
    cosine = kept("cosine")
    for t in range(0, 990, 9):  # equation 17 of arXiv 2102.09672
        f = [math.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2 for x in ((t + 1) / TIMES, 0)]
        assert cosine[t].item() == pytest.approx(f[0] / f[1], rel=1e-3)
    assert (cosine[1:] / cosine[:-1] >= 0.001 - 1e-6).all()


def test_data_becomes_noise(noising):
    clean, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    descent = noising.descent(7)
    assert len(descent) == 8
    assert (descent[1:] < descent[:-1]).all()
    start, end = (noising.noised(clean, noise, t.expand(3)) for t in descent[[0, -1]])
    torch.testing.assert_close(start, noise, atol=0.05, rtol=0)
    assert torch.equal(end, clean)
    every = noising.even_times(50)
    a, s = noising.coefficients(every)
    assert (a[1:] < a[:-1]).all()
    assert (s[1:] > s[:-1]).all()
    if noising.objective == "noise":  # which keeps the variance
        torch.testing.assert_close(a.square() + s.square(), torch.ones_like(a))


def test_a_right_prediction_tells_data_from_noise(noising):
    clean, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    times = torch.tensor([20.0, 300.0, 600.0, 900.0])
    noised, target = noising.noised(clean, noise, times), noising.target(clean, noise)
    found = noising.parts(noised, target, times)
    torch.testing.assert_close(found, (clean, noise), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 7, 25, 250, 1000])
def test_even_times_are_the_middles_of_equal_parts(noising, count):
    times = noising.even_times(count)
    assert len(times.unique()) == count
    part = TIMES / count
    middles = torch.tensor([(i + 0.5) * part for i in range(count)])
    assert (middles - times).abs().max() < (1 if noising.objective == "noise" else 1e-3)
    assert times.min() >= 0
    assert times.max() < TIMES
    for none in (0, TIMES + 1):
        with pytest.raises(ValueError, match="1 to 1000"):
            noising.even_times(none)


def test_random_times_cover_all_of_them(noising):
    torch.manual_seed(0)
    times = noising.random_times(20_000, torch.device("cpu"))
    assert (times == times.floor()).all() == (noising.objective == "noise")
    shares = times.histc(10, 0, TIMES) / len(times)
    assert (shares - 0.1).abs().max() < 0.01
    assert noising.coefficients(times)[1].min() >= 0
