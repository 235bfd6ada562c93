"""What a run draws after each experience: whose pixels they are, where they go, what they cost."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from cil import protocol
from cil.config import SamplesConfig
from cil.errors import UserError
from cil.methods.diffusion import DiffusionMethod
from cil.methods.drawing import as_bytes, drawn, seed_of
from cil.methods.method import Method, MethodSize
from cil.methods.registry import check_samples
from cil.methods.var import VARMethod
from cil.records import RunRecord
from cil.records.samples import read_samples, write_samples
from cil.tracking import Tracker

SAMPLES = SamplesConfig(per_class=3, guidance=1.0, steps=4)


class Told(Tracker):
    """Notes the figures and the numbers that it is told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.figures: list[tuple[str, int | None]] = []
        self.values: dict[int, dict[str, float]] = {}

    def log_figure(self, name: str, path: Path, experience: int | None = None) -> None:
        assert path.exists()
        self.figures.append((name, experience))

    def log_experience(self, experience: int, values: Mapping[str, float]) -> None:
        self.values.setdefault(experience, {}).update(values)


def recorded(folder: Path, stream, cls: type[RunRecord] = RunRecord) -> RunRecord:
    facts = {"name": stream.name, "fingerprint": stream.fingerprint}
    return cls.open(folder, {"seed": 0}, facts, {"commit": "unknown"})


METHODS = [f"{kind}-{p}" for kind in ("var", "diffusion") for p in ("adapter", "scratch", "trunk")]


@pytest.fixture(params=METHODS)
def build(
    request,
    tiny_stream,
    tiny_tokenizer_config,
    tiny_var_config,
    tiny_diffusion_config,
    quiet_cpu,
    tmp_path_factory,
):
    kind, plasticity = request.param.split("-")
    made, config = (VARMethod, tiny_var_config)
    if kind == "diffusion":
        made, config = (DiffusionMethod, tiny_diffusion_config)
    settings = replace(config, plasticity=plasticity)
    rest = (tiny_tokenizer_config, settings, quiet_cpu, tmp_path_factory.getbasetemp() / "shared")
    return lambda: made(request.param, tiny_stream, *rest)


@pytest.mark.integration
def test_the_same_seed_is_the_same_picture_as_long_as_its_group_is_frozen(
    build, tiny_stream, quiet_cpu, tmp_path
):
    told = Told()
    with recorded(tmp_path / "run", tiny_stream) as record:
        protocol.run(build, tiny_stream, record, told, quiet_cpu, 0, SAMPLES)
        sheets = [record.samples(t, 8) for t in range(3)]
        state = record.load_state()
    assert [sheet.shape for sheet in sheets] == [(2 * t, 3, 8, 8, 1) for t in (1, 2, 3)]
    first, _, last = sheets
    rows = pd.read_csv(tmp_path / "run" / "metrics.csv")
    drift = rows[rows["name"] == "samples/drift"].set_index("experience")["value"]
    assert drift.index.tolist() == [1, 2]
    method = build()
    if "trunk" not in method.name:
        assert np.array_equal(last[:2], first)
        assert np.array_equal(last[:4], sheets[1])
        assert drift.tolist() == [0, 0]
    else:
        assert (last[:2] != first).any((1, 2, 3, 4)).all()
        expected = [last[:2] - first.astype(float), last[2:4] - sheets[1][2:].astype(float)]
        assert drift[2] == pytest.approx(np.abs(np.concatenate(expected)).mean() / 255)
        assert drift[2] > 0
    # The record's method draws them once more.
    method.load_state(state)
    again = method.draw([4, 1], [seed_of(4, 2), seed_of(1, 0)], SAMPLES.guidance, SAMPLES.steps)
    kept = np.stack([last[4, 2], last[1, 0]])
    # (In another batch: rounding differs.)
    assert np.abs(as_bytes(again).astype(int) - kept).max() <= 1
    assert told.values[2]["samples/drift"] == drift[2]
    assert told.figures[:3] == [("samples", 0), ("samples", 1), ("samples", 2)]
    assert ("samples_over_experiences", None) in told.figures
    figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"samples_experience0.png", "samples_over_experiences.png"} <= figures


class Painter:
    """A method that learns nothing and paints every class its label, slowly."""

    name, pretrained_on, distributed = "painter", "nothing", True

    def __init__(self, pause: float) -> None:
        self.pause, self.classes_seen = pause, 0
        self.asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def learn(self, experience: Any, log: Any) -> float:
        log(0, {"train/loss": torch.rand(()).item()})
        self.classes_seen += len(experience.labels)
        return 0.0

    def scores(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), self.classes_seen)

    def draw(self, labels: Any, seeds: Any, guidance: float, steps: int) -> Tensor:
        time.sleep(self.pause)
        self.asked.append((tuple(labels), tuple(seeds)))
        return torch.tensor(labels).float()[:, None, None, None].expand(-1, 1, 8, 8) / 10

    def reconstructed(self, images: Tensor) -> Tensor:
        return images

    def state(self) -> dict[str, Any]:
        return {"classes": self.classes_seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.classes_seen = state["classes"]

    def size(self) -> MethodSize:
        return MethodSize(0, 0, 0, 0, 0, 0)

    def facts(self) -> dict[str, float]:
        return {}


def painter() -> Painter:
    return Painter(0)


def run(method: Method, stream, trainer, folder: Path, samples: SamplesConfig | None) -> None:
    with recorded(folder, stream) as record:
        protocol.run(lambda: method, stream, record, Tracker(None), trainer, 0, samples)


def test_drawing_is_no_learning_and_no_evaluation(tiny_stream, quiet_cpu, tmp_path):
    pause = 0.5
    run(Painter(pause), tiny_stream, quiet_cpu, tmp_path / "run", SAMPLES)
    with recorded(tmp_path / "run", tiny_stream) as record:
        seconds, summary = record.seconds, record.summary()
    rows = pd.read_csv(tmp_path / "run" / "metrics.csv")
    spent = rows[rows["name"] == "samples/seconds"]["value"]
    assert spent.min() >= pause  # of experience 0; a batch a group
    assert spent.max() >= 3 * pause
    assert sum(seconds) < pause
    assert summary["training_seconds"] == sum(seconds)
    evaluated = summary["milliseconds_an_image"] * 120 / 1000
    assert evaluated < 3 * pause


def test_it_changes_nothing_else_that_a_run_draws(tiny_stream, quiet_cpu, tmp_path):
    """The loss of the painter is a random number."""
    losses = []
    for name, samples in {"with": SAMPLES, "without": None}.items():
        run(Painter(0), tiny_stream, quiet_cpu, tmp_path / name, samples)
        rows = pd.read_csv(tmp_path / name / "metrics.csv")
        losses.append(rows[rows["name"] == "train/loss"]["value"].tolist())
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    assert (tmp_path / "with" / "samples" / "experience2.png").exists()
    assert not (tmp_path / "without" / "samples").exists()


def test_none_are_drawn_where_none_are_wished(tiny_stream, quiet_cpu, tmp_path):
    method = Painter(0)
    run(method, tiny_stream, quiet_cpu, tmp_path / "run", SamplesConfig(per_class=0))
    assert not method.asked
    assert not (tmp_path / "run" / "samples").exists()


def test_cut_short_before_an_evaluation_it_is_drawn_again(tiny_stream, quiet_cpu, tmp_path):
    class Dies(RunRecord):
        def save_evaluated(self, experience: int, row: Any, sizes: Any) -> None:
            if experience == 1:
                (self.folder / "samples" / "experience1.png").unlink()  # as if it came too soon
                raise KeyboardInterrupt
            super().save_evaluated(experience, row, sizes)

    folder = tmp_path / "run"
    with recorded(folder, tiny_stream, Dies) as record, pytest.raises(KeyboardInterrupt):
        protocol.run(painter, tiny_stream, record, Tracker(None), quiet_cpu, 0, SAMPLES)
    run(Painter(0), tiny_stream, quiet_cpu, folder, SAMPLES)
    with recorded(folder, tiny_stream) as record:
        sheets = [record.samples(t, 8) for t in range(3)]
    assert [len(sheet) for sheet in sheets] == [2, 4, 6]
    assert (folder / "figures" / "samples_over_experiences.png").exists()


def test_more_images_than_before_say_nothing_of_drift(tiny_stream, quiet_cpu, tmp_path):
    class Dies(RunRecord):
        def save_learned(self, experience: int, *rest: Any) -> None:
            super().save_learned(experience, *rest)
            if experience == 2:
                raise KeyboardInterrupt

    folder = tmp_path / "run"
    with recorded(folder, tiny_stream, Dies) as record, pytest.raises(KeyboardInterrupt):
        protocol.run(painter, tiny_stream, record, Tracker(None), quiet_cpu, 0, SAMPLES)
    run(Painter(0), tiny_stream, quiet_cpu, folder, replace(SAMPLES, per_class=4))
    rows = pd.read_csv(folder / "metrics.csv")
    assert rows[rows["name"] == "samples/drift"]["experience"].tolist() == [1]


def test_a_batch_is_of_one_group_and_each_class_has_seeds_of_its_own(monkeypatch):
    monkeypatch.setattr("cil.methods.drawing.BATCH_SIZE", 4)
    few, many = Painter(0), Painter(0)
    for painter, groups in ((few, [(0, 1)]), (many, [(0, 1), (2,)])):
        images = drawn(painter, groups, 3, guidance=0, steps=1, title="", progress=False)
        classes = sum(map(len, groups))
        assert images.shape == (classes, 3, 1, 8, 8)
        expected = torch.arange(classes)[:, None].expand(-1, 3) / 10
        assert torch.equal(images[..., 0, 0, 0], expected)
    assert [labels for labels, _ in many.asked] == [(0, 0, 0, 1), (1, 1), (2, 2, 2)]
    assert many.asked[:2] == few.asked
    seeds = [seed for _, batch in many.asked for seed in batch]
    # torch reads 32 bits of a seed.
    noise = {torch.rand((), generator=torch.Generator().manual_seed(s)).item() for s in seeds}
    assert len(noise) == 9


def test_a_sheet_is_read_back_to_the_pixel(tmp_path):
    generator = np.random.default_rng(0)
    for channels in (1, 3):
        images = generator.integers(0, 256, (5, 2, 8, 8, channels), dtype=np.uint8)
        write_samples(tmp_path / "sheet.png", images)
        assert np.array_equal(read_samples(tmp_path / "sheet.png", 8), images)
        tile = np.asarray(Image.open(tmp_path / "sheet.png"))[24:32, 8:16]
        assert np.array_equal(tile.reshape(8, 8, channels), images[3, 1])
    assert read_samples(tmp_path / "none.png", 8) is None
    with pytest.raises(UserError, match="is damaged"):
        read_samples(tmp_path / "sheet.png", 7)
    (tmp_path / "sheet.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="is damaged"):
        read_samples(tmp_path / "sheet.png", 8)


def test_pixels_are_rounded_to_the_nearest():
    images = torch.tensor([-1.0, -0.999, 0.0, 1.0])[:, None, None, None]
    assert as_bytes(images).ravel().tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize(
    "wrong", [{"per_class": -1}, {"guidance": -0.5}, {"guidance": float("nan")}, {"steps": 0}]
)
def test_numbers_that_nothing_can_be_drawn_with_are_refused(wrong):
    (key,) = wrong
    with pytest.raises(UserError, match=f"samples.{key} is"):
        check_samples(replace(SAMPLES, **wrong))
