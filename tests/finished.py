"""Finished runs on disk in milliseconds, through the real record: what pages and tables read."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cil import metrics
from cil.records import RunRecord

CLASSES = ["zero", "<script>alert(1)</script>", "two & two", "three"]
SIZES = [50, 50]


def stream(**changes: Any) -> dict[str, Any]:
    facts = {
        "name": "digits",
        "fingerprint": "0123456789abcdef",
        "evaluated_on": "test",
        "class_list": None,
        "class_list_hash": "fedcba",
        "class_names": CLASSES,
        "experiences": [[0, 1], [2, 3]],
        "image_size": 8,
        "reproducibility": {"n_experiences": 2},
    }
    return {**facts, **changes}


def begin(folder: Path, facts: dict[str, Any], settings: dict[str, Any] | None = None) -> RunRecord:
    method, seed = folder.parent.name, int(folder.name.removeprefix("seed"))
    config = {"seed": seed, "method": method, "stream": {"source": "digits"}, **(settings or {})}
    environment = {"commit": "c0ffee", "device": "CPU", "created": "2026-01-02T03:04:05"}
    return RunRecord.open(folder, config, facts, environment)


def finish(
    folder: Path,
    kept: float,
    facts: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **numbers: Any,
) -> Path:
    """A run of which `kept` in [0, 1] of every earlier group's accuracy was left after each next.

    `settings` stand in its config, `numbers` in its summary.
    """
    facts = facts or stream()
    T = len(facts["experiences"])
    sizes = [50] * T
    with begin(folder, facts, settings) as record:
        for t in range(T):
            record.log(t, t, {"loss": 1.0, "samples/drift": 0.125})
            record.save_learned(t, {}, 1, 2.0)
            record.save_evaluated(t, [kept ** (t - i) for i in range(t + 1)], sizes[: t + 1])
        record.save_predictions(pd.DataFrame({"label": [0, 1, 1, 2], "prediction": [0, 3, 3, 1]}))
        costs = {
            "training_seconds": 10.0,
            "milliseconds_an_image": 0.5,
            "likelihood_evaluations": 0.0,
            "learning_macs": 1e9,
            "prediction_macs": 1e6,
            "parameters": 1000,
            "stored_images": 0,
            "stored_bytes": 0,
            "unreadable_images": 0,
            "pretrained_on": "nothing",
        }
        record.finish({**metrics.summarise(record.matrix(), sizes), **costs, **numbers})
    return folder


def picture(run: Path, name: str, width: int = 60, noise: bool = False) -> None:
    """A PNG among a run's figures: grey, or of noise, which no compression makes small."""
    pixels = np.full((width // 2, width, 3), 128, np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    (run / "figures").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(run / "figures" / f"{name}.png")


def experiment(runs: Path) -> Path:
    """runs/some_digits: two methods of two seeds, one of one, pictures, and a run cut short."""
    folder = runs / "some_digits"
    for seed in (0, 1):
        kept = 0.9 + 0.02 * seed
        var = finish(folder / "var-adapter" / f"seed{seed}", kept, training_seconds=100.0 + seed)
        for name in (
            "samples_experience0",
            "samples_experience1",
            "explanations",
            "confusion",
            "odd",
        ):
            picture(var, name)
        finish(folder / "finetune" / f"seed{seed}", 0.1, training_seconds=9.0 + seed)
    finish(folder / "joint" / "seed0", 0.99, stored_images=100, training_seconds=20.0)
    with begin(folder / "joint" / "seed1", stream()) as record:
        record.save_learned(0, {}, 1, 2.0)
    return folder
