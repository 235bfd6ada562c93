"""Every shipped YAML parses, explains each of its keys, and the experiment's leaves none out."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cil.command_line import describe, parse
from cil.config import Config
from cil.methods.diffusion_parts import check_settings as check_diffusion
from cil.methods.registry import check_names, check_seeds
from cil.methods.var_parts import check_settings
from cil.streams.torchvision_sets import SETS

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(CONFIGS.glob("**/*.yaml"))
# W&B reads a sweep file, not we: its keys are theirs, and only its parameters are ours. A grid has
# methods for its keys (test_tune.py reads it).
EXPERIMENTS = [path for path in SHIPPED if not {"sweeps", "grids"} & {*path.parts}]


def leaves(content: Any, prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def unexplained(text: str) -> list[str]:
    """Lines that set a value without a comment directly above that is a sentence."""
    lines = text.splitlines()
    values = re.compile(r"\s*[\w.]+:\s+\S")  # a section's name alone needs no sentence
    return [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if values.match(line) and not re.fullmatch(r"\s*# \S.{4,}\.", above)
    ]


def test_something_is_shipped() -> None:
    assert CONFIGS / "split_digits.yaml" in EXPERIMENTS


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_it_parses_to_values_that_exist(path: Path) -> None:
    config, fresh = parse(str(path), [])  # types and choices are checked here
    methods, seeds = config.methods, config.seeds
    check_names(methods if isinstance(methods, list) else [methods])
    check_seeds(seeds if isinstance(seeds, list) else [seeds])
    assert not fresh


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_key_carries_its_sentence(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert unexplained(text) == []
    assert len(describe(path)) > 20
    described, blank = text.splitlines()[:2]
    assert described.startswith("# ")
    assert blank == "", "the first comment is the experiment's, not the first key's"


# Side of the images of the sources that have one of their own.
SIDES = {"digits": 16, "glyphs100": 32, **{name: side for name, (_, side, _) in SETS.items()}}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_its_generative_models_fit_its_images(path: Path) -> None:
    config, _ = parse(str(path), [])
    source = config.stream.source
    side = SIDES.get(source, config.stream.image_size)
    stream: Any = SimpleNamespace(name=source, image_size=side, augment=str)
    check_settings(stream, config.tokenizer, config.var)
    check_diffusion(stream, config.tokenizer, config.diffusion)


def test_a_key_without_a_sentence_is_noticed() -> None:
    good = "# One experiment.\n\nvar:\n  # Transformer blocks.\n  depth: 4\n"
    assert unexplained(good) == []
    assert unexplained(good + "  width: 96\n") == ["  width: 96"]
    assert unexplained("# Blocks\ndepth: 4\n") == ["depth: 4"]
    assert unexplained("# Blocks.\n\ndepth: 4\n") == ["depth: 4"]


def test_the_experiment_shows_every_setting_there_is() -> None:
    shown = yaml.safe_load((CONFIGS / "split_digits.yaml").read_text(encoding="utf-8"))
    assert list(leaves(shown | {"tuned": {}})) == list(leaves(asdict(Config())))
