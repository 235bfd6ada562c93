"""How much faster several GPUs learn and classify than one.

    python -m experiments.scaling --devices 1 2 4

For each number of devices, one after the other: a VAR of a published size at 256 px, on random
weights, tokens and pixels, through the same Trainers as every run. It learns at the same batch a
device, the whole trunk from token maps in a file; then it classifies the same images over all
classes by the published stages (a_varc, arXiv 2510.12060) with three copies. Steps and images that
come first, and are compiled for, do not count. Scaling is against the first number of devices.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

from cil import parallel
from cil.config import TrainerConfig, VARConfig
from cil.environment import device
from cil.errors import UserError
from cil.files import check_writable
from cil.launch import launch
from cil.methods.scoring import score
from cil.methods.seeding import seed_all
from cil.methods.var import VARMethod
from cil.run import exit_code
from cil.streams.memory_images import MemoryImages
from cil.streams.tokens import EncodedImages, tokens_of
from cil.table import show
from experiments.asking import RESULTS
from experiments.efficiency import OFFICIAL_TOKENIZER, SIZES, random_pixels
from experiments.measuring import keep

STEPS = 60  # of learning that are timed, after half as many that are not
ROWS = 4096  # token maps
HEADINGS = ["devices", "learning", "scaling", "classifying", "scaling"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=list(SIZES), default="d16")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--images", type=int, default=1024, help="to classify (default: 1024)")
    parser.add_argument("--batch_size", type=int, default=96, help="a device (default: 96)")
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args()
    if min(*options.devices, options.classes, options.images, options.batch_size) < 1:
        raise UserError("--devices, --classes, --images and --batch_size must be 1 or more.")
    check_writable(options.results, "--results")
    rows = []
    with TemporaryDirectory() as folder:
        for count in options.devices:
            rows.append(measured(count, options, Path(folder)))
    table = pd.DataFrame(rows)
    for kind in ("learning", "classifying"):
        table[f"{kind}_scaling"] = table[kind] / table[kind].iloc[0]
    where = device(TrainerConfig(accelerator=options.accelerator))
    path = keep(table, "scaling", options.size, where, options.results)
    rows = [
        [
            str(row.devices),
            f"{row.learning:.1f}",
            f"{row.learning_scaling:.2f}",
            f"{row.classifying:.1f}",
            f"{row.classifying_scaling:.2f}",
        ]
        for row in table.itertuples()
    ]
    show(f"{options.size}, {where}: images a second", HEADINGS, rows)
    print(f"written to {path}")


def measured(devices: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images a second on so many devices."""
    trainer = TrainerConfig(accelerator=options.accelerator, devices=devices, progress=False)
    found = folder / f"{devices}.json"
    arguments = (trainer, vars(options), folder, found)
    if devices == 1:
        work(*arguments)
    else:
        launch(trainer, work, *arguments)
    result: dict[str, float] = {"devices": devices, **json.loads(found.read_text())}
    return result


def work(trainer: TrainerConfig, options: dict, folder: Path, found: Path) -> None:
    """On every device: learn, classify; the first one writes down what it took."""
    seed_all(0)
    depth, batch = SIZES[options["size"]], options["batch_size"] * trainer.devices
    settings = VARConfig(
        plasticity="trunk",
        depth=depth,
        width=64 * depth,
        heads=depth,
        batch_size=batch,
        schedule="a_varc",
        smoothing_samples=3,
    )
    stream = random_pixels()
    method = VARMethod(options["size"], stream, OFFICIAL_TOKENIZER, settings, trainer, folder)
    method.model.start(options["classes"])
    rates = {
        "learning": learning(method, options["classes"], batch, folder / "tokens.npy"),
        "classifying": classifying(method, options["images"], options["classes"]),
    }
    if parallel.is_first():
        found.write_text(json.dumps(rates))
        print(f"{trainer.devices} devices: {rates}")


def learning(method: VARMethod, classes: int, batch: int, path: Path) -> float:
    """Images a second."""
    maps = parallel.in_turns(lambda: token_maps(method, classes, path))
    times: list[float] = []
    method.train_on(maps, STEPS * 3 // 2, "learning", lambda *_: times.append(time.perf_counter()))
    # Every tenth step is logged, which waits for it.
    return STEPS * batch / (times[-1] - times[-1 - STEPS // 10])


def token_maps(method: VARMethod, classes: int, path: Path) -> EncodedImages:
    if not path.exists():
        kind = np.dtype([("label", "<i4"), ("content", tokens_of(method.tokenizer.tokens))])
        rows, draws = np.empty(ROWS, kind), np.random.default_rng(0)
        rows["label"] = draws.integers(classes, size=ROWS)
        rows["content"] = draws.integers(
            method.tokenizer_settings.vocabulary, size=rows["content"].shape
        )
        np.save(path, rows)
    return EncodedImages(path)


def classifying(method: VARMethod, count: int, classes: int) -> float:
    """Images a second."""
    method.model.eval()
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 256, 256), generator=draws, dtype=torch.uint8)
    images = MemoryImages(pixels, torch.randint(classes, (count,), generator=draws).tolist())
    parts = [images] if count < 256 else [MemoryImages(pixels[:256], images.targets[:256]), images]
    for part in parts:  # the first one compiles
        parallel.barrier()
        began = time.perf_counter()
        score(method, [part], method.trainer, "classifying")
        seconds = time.perf_counter() - began
    return count / seconds


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
