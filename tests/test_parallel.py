"""Two processes on a CPU against one: the same bits, the same records, one end for all of them."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CLASSES, first_of_each
from tiny import TINY

from cil import parallel, run
from cil.config import Config, DiscriminativeConfig, TokenizerConfig, TrainerConfig, VARConfig
from cil.errors import UserError
from cil.launch import launch
from cil.methods.registry import build
from cil.methods.seeding import seed_all
from cil.protocol import run as run_protocol
from cil.protocol import score_groups
from cil.records import RunRecord, read_run
from cil.streams.digits import digits
from cil.streams.stream import Stream, build_stream
from cil.tracking import Tracker

ROOT = Path(__file__).parent.parent
TWO = TrainerConfig(accelerator="cpu", devices=2, progress=False)
ONE = replace(TWO, devices=1)
LEARNERS = ("var-embedding", "var-adapter", "var-trunk", "var-copy", "replay")


def few_digits() -> Stream:
    source = digits(validation=0.15, augment=True, image_size=8)
    splits = {"train": 30, "validation": 12, "test": 70}  # two batches a group
    images = {name: first_of_each(getattr(source, name), n) for name, n in splits.items()}
    source = replace(source, class_names=source.class_names[:CLASSES], content="few", **images)
    return build_stream(source, "b0-3", (3, 0, 5, 1, 4, 2))


def configured(name: str, trainer: TrainerConfig) -> Config:
    # More phis than scales, a block without the class, drops of all kinds; of ten codes in a
    # hundred none is met in a step, so that codes restart.
    tokenizer = TokenizerConfig(
        channels=8, multipliers=[1, 1], latent_channels=4, vocabulary=100, phis=6, steps=90,
        batch_size=16, lr=5e-3,
    )  # fmt: skip
    var = VARConfig(
        depth=2, width=16, heads=2, adapter_rank=2, views=1, first_steps=6, steps=4, batch_size=16,
        condition_from=1, drop_path=0.1 if name == "var-copy" else 0.0, smoothing_samples=2,
    )  # fmt: skip
    cnn = DiscriminativeConfig(epochs=1, stored_images=20)
    return Config(tokenizer=tokenizer, var=var, discriminative=cnn, trainer=trainer)


def learn_all(folder: Path, trainer: TrainerConfig) -> None:
    """Every kind of method learns two experiences; what each process then holds goes to a file."""
    stream = few_digits()
    for name in LEARNERS:
        build_method = lambda name=name: build(name, configured(name, trainer), stream)  # noqa: E731
        built: list[Any] = []

        def building(make: Callable[[], Any] = build_method, kept: list[Any] = built) -> Any:
            kept.append(make())
            return kept[0]

        place = folder / name / "seed0"
        record = None
        if parallel.is_first():
            facts = {"name": stream.name, "fingerprint": stream.fingerprint}
            record = RunRecord.open(place, {"seed": 0}, facts, {"commit": "unknown"})
        run_protocol(building, stream, record, Tracker(None), trainer, seed=0)
        scores = [scores for scores, _ in score_groups(built[0], stream.experiences, trainer)]
        kept = {"state": built[0].state(), "scores": scores, "draw": torch.rand(1)}
        torch.save(kept, folder / f"{name}-{parallel.rank()}.pt")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of what one process has learned, and of what two have."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    learn_all(one, ONE)
    launch(TWO, learn_all, two, TWO)
    return one, two


def tensors(state: Any) -> list[torch.Tensor]:
    """All tensors of a state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    nested = [tensors(p) for p in parts if isinstance(p, dict | list | torch.Tensor)]
    return [tensor for part in nested for tensor in part]


@pytest.mark.integration
@pytest.mark.parametrize("name", LEARNERS)
def test_all_processes_hold_the_same_bits(name: str, learned: tuple[Path, Path]) -> None:
    first, second = (torch.load(learned[1] / f"{name}-{rank}.pt") for rank in (0, 1))
    assert first["draw"] == second["draw"], "they would draw other batches from here on"
    for a, b in zip(first["scores"], second["scores"], strict=True):
        assert torch.equal(a, b)
    if name.startswith("var"):
        ours, theirs = tensors(first["state"]), tensors(second["state"])
        assert len(ours) > 50
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.integration
@pytest.mark.parametrize("name", LEARNERS)
def test_one_process_scores_the_same_model_alike(name: str, learned: tuple[Path, Path]) -> None:
    kept = torch.load(learned[1] / f"{name}-0.pt")
    stream = few_digits()
    method = build(name, configured(name, ONE), stream)
    method.load_state(kept["state"])
    results = score_groups(method, stream.experiences, ONE)
    for (scores, labels), shared in zip(results, kept["scores"], strict=True):
        assert torch.equal(scores, shared)
        assert len(labels) == 3 * 70 - int(labels[0] == 0) * 0


@pytest.mark.integration
@pytest.mark.parametrize("name", LEARNERS)
def test_what_they_learn_is_what_one_learns(name: str, learned: tuple[Path, Path]) -> None:
    alone, shared = (read_run(folder / name / "seed0") for folder in learned)
    assert abs(alone.matrix - shared.matrix)[alone.matrix >= 0].max() < 0.1
    one, two = alone.metrics(), shared.metrics()
    assert one[["experience", "step", "name"]].equals(two[["experience", "step", "name"]])
