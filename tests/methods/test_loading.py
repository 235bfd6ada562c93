"""Who reads images: this process, or others beside it."""

import os

import pytest

from cil.config import TrainerConfig
from cil.errors import UserError
from cil.methods.loading import check_workers, workers


@pytest.mark.parametrize(("images", "expected"), [(0, 0), (9_999, 0), (10_000, 5), (10**6, 5)])
def test_many_images_are_read_by_all_cores_of_this_process(images, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7, 9}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert workers(TrainerConfig(), images, side=64) == expected
    assert workers(TrainerConfig(), 16 * images, side=16) == expected
    assert workers(TrainerConfig(devices=2), images, side=64) == expected // 2


def test_where_a_process_cannot_be_bound_all_cores_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert workers(TrainerConfig(), 10_000, side=64) == 64


@pytest.mark.parametrize("wanted", [0, 1, 7])
@pytest.mark.parametrize("images", [1, 10**6])
def test_a_number_that_was_given_holds(wanted, images):
    assert workers(TrainerConfig(workers=wanted), images, side=64) == wanted


@pytest.mark.parametrize(("cores", "most"), [(2, 64), (32, 128)])
def test_fewer_than_none_and_more_than_a_machine_starts_are_refused(cores, most, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    check_workers(TrainerConfig(workers=most))
    for wanted in (-2, most + 1):
        with pytest.raises(UserError, match=rf"trainer\.workers is {wanted}: give 0 to {most} "):
            check_workers(TrainerConfig(workers=wanted))
    with pytest.raises(UserError, match=r"trainer\.workers is -2"):
        workers(TrainerConfig(workers=-2), 1, side=64)
