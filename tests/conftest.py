"""What the model, method and protocol tests share: few real digits and models that learn in ms."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

# Before torch is there, and for the commands that tests start: every core has its worker already.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a shell runs in its background is deaf to interrupts, and so would be all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from torch import Tensor, nn

from cil import parallel
from cil.config import DiffusionConfig, TokenizerConfig, TrainerConfig, VARConfig
from cil.launch import launch
from cil.streams.digits import digits
from cil.streams.memory_images import MemoryImages
from cil.streams.stream import Stream, build_stream

CLASSES = 6
PRELOADED = [
    "cil.protocol",
    "cil.methods.var",
    "cil.methods.diffusion",
    "cil.methods.discriminative",
    "avalanche.benchmarks",
    "avalanche.training.supervised",
]


def first_of_each(split: MemoryImages, count: int) -> MemoryImages:
    """The first `count` images of each of the first classes."""
    of_class = [[i for i, t in enumerate(split.targets) if t == c] for c in range(CLASSES)]
    kept = [i for indices in of_class for i in indices[:count]]
    return MemoryImages(split.images[kept], [split.targets[i] for i in kept])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run whole things come first: at the end one worker would be left with them."""
    slow = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_stream() -> Stream:
    """Six real digits in three experiences: 30 training images of each, 12 held out, 20 to test."""
    source = digits(validation=0.15, augment=True, image_size=8)
    splits = {"train": 30, "validation": 12, "test": 20}
    images = {name: first_of_each(getattr(source, name), n) for name, n in splits.items()}
    source = replace(source, class_names=source.class_names[:CLASSES], content="tiny", **images)
    return build_stream(source, "b0-2", (3, 0, 5, 1, 4, 2))


@pytest.fixture(scope="session")
def tiny_images(tiny_stream: Stream) -> Tensor:
    """Test images of the first two classes (40, 1, 8, 8)."""
    return torch.stack([image for image, _ in tiny_stream.experiences[0].test])


@pytest.fixture(scope="session")
def tiny_tokenizer_config() -> TokenizerConfig:
    # For digits at their native 8 px. A step's time is its number of convolutions.
    return TokenizerConfig(
        channels=8,
        multipliers=[1, 1],
        residual_blocks=0,
        latent_channels=4,
        vocabulary=16,
        steps=15,
        batch_size=16,
        lr=5e-3,
    )


@pytest.fixture(scope="session")
def tiny_var_config() -> VARConfig:
    return VARConfig(
        depth=2,
        width=16,
        heads=2,
        adapter_rank=2,
        views=1,
        first_steps=15,
        steps=12,  # no multiple of the logging interval
        batch_size=16,
        lr=1e-2,
    )


@pytest.fixture(scope="session")
def tiny_diffusion_config() -> DiffusionConfig:
    return DiffusionConfig(
        depth=2,
        width=16,
        heads=2,
        patch=2,
        adapter_rank=2,
        views=1,
        first_steps=15,
        steps=12,  # no multiple of the logging interval
        batch_size=16,
        lr=1e-2,
        schedule=[[4, 1]],
    )


@pytest.fixture(scope="session")
def quiet_cpu() -> TrainerConfig:
    return TrainerConfig(accelerator="cpu", progress=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder of what is made once, empty: nothing is shared between tests."""
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def shake() -> Callable[..., None]:
    """Moves every parameter off its start, where gates are closed, and adapters and biases zero."""

    @torch.no_grad()
    def move(module: nn.Module, amount: float = 0.2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += amount * noise

    return move


@pytest.fixture(scope="module")
def quick_starts() -> Iterator[None]:
    """Processes forked from a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cil.launch.CONTEXT", context)
        two = TrainerConfig(accelerator="cpu", devices=2, progress=False)
        launch(two, parallel.barrier)  # imports, and warns of packages that Avalanche misses
        yield
