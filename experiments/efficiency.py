"""What classifying and learning cost: images a second, multiply-accumulates, memory.

    python -m experiments.efficiency runs/split_digits/var/seed0
    python -m experiments.efficiency d16 --condition_from 0 8 12

Of the VAR of a finished run, on the stream's test images over all its classes, with the accuracy;
or of a VAR of a published size at 256 px, on random weights and pixels. Images are read in batches,
from pixels to scores, by: one forward an image and class (naive; runs only), every class on every
scale (varc), the published stages (a_varc), and pruning after every scale by margins fitted on
held-out training images of all classes (adaptive; runs only). Then one optimiser step of the whole
trunk from cached tokens, for each batch size. The rounds of all variants of a model alternate in
one process and the fastest of each counts, so that ratios of times hold on a noisy machine; a
first round, which compiles, does not count.

The share of the matrix rate is what the layers' multiply-accumulates would take at the rate of a
large matrix product measured beside them (16 bits on a GPU, 32 on a CPU), over the time taken;
attention counts as overhead. In the literature (arXiv 2510.12060): d16 with 100 classes takes
14,105 G multiply-accumulates an image for varc and 4,649 G for a_varc.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from cil.classify.reading import by_scale
from cil.classify.schedule import (
    Cost,
    Schedule,
    adaptive,
    class_cost,
    common_cost,
    encoder_cost,
    schedule,
)
from cil.config import TokenizerConfig, TrainerConfig, VARConfig
from cil.environment import device
from cil.errors import UserError
from cil.files import check_writable
from cil.methods.registry import restore
from cil.methods.scoring import BATCH_SIZE
from cil.methods.training import autocast, find_device
from cil.methods.var import VARMethod
from cil.run import exit_code
from cil.streams.stream import Stream
from cil.streams.tokens import in_memory
from cil.table import show as show_table
from experiments.asking import RESULTS
from experiments.finished import named_run
from experiments.measuring import Timing, keep, matrix_rate, timed

CACHE = Path("cache")  # of what a method makes once; nothing is learned here
SIZES = {f"d{depth}": depth for depth in (16, 20, 24, 30)}
OFFICIAL_TOKENIZER = TokenizerConfig(
    channels=160,
    multipliers=[1, 1, 2, 2, 4],
    residual_blocks=2,
    latent_channels=32,
    vocabulary=4096,
    scales=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
)
OF_A_SIZE = {"classes": 100, "images": [BATCH_SIZE], "condition_from": [0], "batch_sizes": [64, 96]}
STEPS = 20  # of training that are timed, after as many that are not


@dataclass(frozen=True)
class Variant:
    """A way to classify; `stages` is None for the naive one."""

    name: str
    samples: int
    stages: Schedule | None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.efficiency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=f"folder of a finished var run, or {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest one counts (default: 3)")
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument(
        "--cache", type=Path, default=Path("cache"), help="as that of the run (default: cache)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    sizes = parser.add_argument_group("of a published size")
    sizes.add_argument("--classes", type=int, help="to tell apart (default: 100)")
    images = f"classified at once (default: {BATCH_SIZE})"
    sizes.add_argument("--images", type=int, nargs="+", metavar="N", help=images)
    first = "first block that sees the class (default: 0)"
    sizes.add_argument("--condition_from", type=int, nargs="+", metavar="BLOCK", help=first)
    batches = "of a step of training (default: 64 96)"
    sizes.add_argument("--batch_sizes", type=int, nargs="+", metavar="N", help=batches)
    options = parser.parse_args()
    for name, default in OF_A_SIZE.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.model not in SIZES:
            raise UserError(
                f"--{name} is for a published size alone, and {options.model} is none: leave it "
                "out, or name one of " + ", ".join(SIZES) + "."
            )
    counts = [options.classes, options.rounds, *options.images, *options.batch_sizes]
    if min(counts) < 1:
        raise UserError("--classes, --images, --rounds and --batch_sizes must be 1 or more.")
    check_writable(options.results, "--results")
    trainer = TrainerConfig(accelerator=options.accelerator, progress=False)
    if options.model in SIZES:
        table, name = of_a_size(options, trainer), options.model
    else:
        table, name = of_a_run(Path(options.model), options.rounds, trainer, options.cache)
    where = device(trainer)
    path = keep(table, "efficiency", name, where, options.results)
    show(table, f"{name}, {where}")
    print(f"written to {path}")


def of_a_run(
    folder: Path, rounds: int, trainer: TrainerConfig, cache: Path
) -> tuple[pd.DataFrame, str]:
    """The schedules and the training of a finished run, and its name."""
    run = named_run(folder)
    method, stream = restore(run, trainer, cache)
    if not isinstance(method, VARMethod):
        raise UserError(f"{folder} is no run of a var method.")
    (images, labels), held_out = images_of(stream, "test"), images_of(stream, "validation")
    scales, smoothed = len(method.tokenizer.scales), method.settings.smoothing_samples
    variants = [Variant("naive", 1, None)]
    for samples in sorted({1, smoothed}):
        variants += [Variant(n, samples, schedule(n, scales, samples)) for n in ("varc", "a_varc")]
        margins = method.fitted_margins(TensorDataset(*held_out), samples)
        variants.append(Variant("adaptive", samples, adaptive(margins, samples)))
    sizes = (method.tokenizer_settings, method.settings, method.trainer, method.groundwork.cache)
    fresh = VARMethod(method.name, stream, *sizes)
    rate = matrix_rate(find_device(trainer))
    rows = classifying(method, images, labels, variants, rounds, rate)
    rows += learning(fresh, method.classes_seen, [method.settings.batch_size], rate)
    return pd.DataFrame(rows), f"{run.experiment}-{run.method}-seed{run.seed}"


def of_a_size(options: argparse.Namespace, trainer: TrainerConfig) -> pd.DataFrame:
    """The same for random weights and pixels, for every first block that sees the class."""
    depth, rows = SIZES[options.model], []
    rate = matrix_rate(find_device(trainer))
    for first in options.condition_from:
        settings = VARConfig(
            plasticity="trunk", depth=depth, width=64 * depth, heads=depth, condition_from=first
        )
        sizes = (OFFICIAL_TOKENIZER, settings, trainer, CACHE)
        method = VARMethod(options.model, random_pixels(), *sizes)
        method.model.start(options.classes)
        method.model.eval()
        scales = len(OFFICIAL_TOKENIZER.scales)
        variants = [
            Variant(n, samples, schedule(n, scales, samples))
            for n, samples in (("varc", 1), ("a_varc", 3))
        ]
        for count in options.images:
            images = torch.rand(count, 3, 256, 256) * 2 - 1
            rows += classifying(method, images, None, variants, options.rounds, rate)
        rows += learning(method, options.classes, options.batch_sizes, rate)
    return pd.DataFrame(rows)


def random_pixels() -> Stream:
    """A stream of no images, of the size that the published tokenizer reads."""
    return Stream("random pixels", (), (), (), 256, 3, "", {}, (), None, None)


def classifying(
    method: VARMethod,
    images: Tensor,
    labels: Tensor | None,
    variants: Sequence[Variant],
    rounds: int,
    rate: float,
) -> list[dict[str, object]]:
    """One row a variant."""
    trunk, classes, rows = method.model.trunk(0), method.model.groups.classes, []
    where = find_device(method.trainer)
    timings: dict[Variant, Timing] = {}
    found: dict[Variant, tuple[Tensor, list[Tensor]]] = {}
    for turn in tqdm(range(len(variants) * (rounds + 1)), desc="classifying"):
        variant = variants[turn % len(variants)]

        def run(variant: Variant = variant) -> None:
            found[variant] = classify(method, images.to(where), variant)

        timing = timed(run, where)
        best = timings.get(variant, timing)
        if turn < 2 * len(variants) or timing.seconds < best.seconds:  # the first round compiles
            timings[variant] = timing
    for variant in variants:
        scores, reads = found[variant]
        if variant.stages is None:
            scales = len(method.tokenizer.scales)
            one = common_cost(trunk, scales) + class_cost(trunk, scales)
            macs = encoder_cost(method.tokenizer) + one.times(classes)
        else:
            mean = torch.cat(reads, 1).double().mean(1).tolist()
            macs = method.cost_of(variant.stages, mean)
        row = described(method, variant.name, variant.samples, len(images), timings[variant], macs)
        if labels is not None:
            right = scores.argmax(1).cpu() == labels
            row["accuracy"] = right.double().mean().item()
        rows.append(row | share(row, rate))
    for row in rows:
        row["time_against_first"] = row["seconds_an_image"] / rows[0]["seconds_an_image"]
        row["macs_against_first"] = row["macs"] / rows[0]["macs"]
    return rows


def learning(
    method: VARMethod, classes: int, batch_sizes: Sequence[int], rate: float
) -> list[dict[str, object]]:
    """One row a batch size: an optimiser step of the whole trunk on random token maps."""
    trunk, rows = method.model.trunks[0], []
    scales = len(method.tokenizer.scales)
    forward = common_cost(trunk, scales) + class_cost(trunk, scales)
    for batch_size in batch_sizes:
        method.settings.batch_size = batch_size
        if not method.model.starting:
            method.model.start(classes)
        tokens = torch.randint(
            method.tokenizer_settings.vocabulary, (1024, method.tokenizer.tokens)
        )
        data = TensorDataset(tokens.to(torch.int16), torch.randint(classes, (1024,)))
        times: list[float] = []
        peak = timed(
            lambda data=data, times=times: method.train_on(
                data, 2 * STEPS, "learning", lambda *_: times.append(time.perf_counter())
            ),
            find_device(method.trainer),
        ).peak_bytes
        # Every tenth step is logged, which waits for it. (In the first half it is compiled.)
        half = len(times) // 2 - 1
        seconds = (times[-1] - times[half]) / STEPS
        # A gradient costs as much as the forward pass for the inputs, and again for the weights.
        row = described(method, "learning", 1, batch_size, Timing(seconds, peak), forward.times(3))
        rows.append(row | share(row, rate))
    return rows


def described(
    method: VARMethod, name: str, copies: int, images: int, timing: Timing, macs: Cost
) -> dict[str, object]:
    settings, peak = method.settings, timing.peak_bytes
    return {
        "variant": name,
        "copies": copies,
        "depth": settings.depth,
        "condition_from": settings.condition_from,
        "images": images,
        "classes": method.model.groups.classes,
        "seconds": timing.seconds,
        "images_a_second": images / timing.seconds,
        "seconds_an_image": timing.seconds / images,
        "macs": macs.layers,
        "attention_macs": macs.attention,
        "peak_gib": None if peak is None else peak / 2**30,
    }


def share(row: dict, rate: float) -> dict[str, float]:
    return {
        "matrix_rate": rate,
        "share_of_rate": row["macs"] * row["images_a_second"] / rate,
    }


def images_of(stream: Stream, split: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a split of all experiences."""
    parts = [in_memory(getattr(e, split)) for e in stream.experiences]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def classify(method: VARMethod, images: Tensor, variant: Variant) -> tuple[Tensor, list[Tensor]]:
    """Scores (B, C), and how many classes each stage read."""
    reads: list[Tensor] = []
    if variant.stages is None:
        return naive(method, images), reads
    batches = images.split(BATCH_SIZE)
    return torch.cat(
        [method.scores(batch, stages=variant.stages, reads=reads) for batch in batches]
    ), reads


@torch.inference_mode()
def naive(method: VARMethod, images: Tensor) -> Tensor:
    """One forward an image and class."""
    tokens_SBL, inputs_SBLZ = method.copies(images, 1)
    groups, rows, weights_K = method.model.groups, [], method.scale_weights_K.to(images.device)
    for tokens, inputs in zip(tokens_SBL[0].split(1), inputs_SBLZ[0].split(1), strict=True):
        for group in range(len(groups)):
            for label in groups.labels(group):
                wanted = torch.tensor([label], device=tokens.device)
                with autocast(method.trainer):
                    logits = method.model(inputs, wanted, group)[0].float()
                values_L = -F.cross_entropy(logits, tokens[0], reduction="none")
                rows.append(by_scale(values_L, method.tokenizer.scales) @ weights_K)
    return torch.stack(rows).view(len(images), groups.classes)


def show(table: pd.DataFrame, title: str) -> None:
    columns = {
        "variant": ("", "{}"),
        "copies": ("copies", "{}"),
        "condition_from": ("class from", "{}"),
        "images": ("images", "{}"),
        "accuracy": ("accuracy", "{:.1%}"),
        "images_a_second": ("img/s", "{:.1f}"),
        "macs": ("MACs", "{:.3g}"),
        "peak_gib": ("GiB", "{:.1f}"),
        "share_of_rate": ("rate", "{:.0%}"),
        "time_against_first": ("time", "{:.1%}"),
    }
    columns = {n: c for n, c in columns.items() if n in table and table[n].notna().any()}
    if not table["condition_from"].any():
        del columns["condition_from"]
    rows = [
        ["" if pd.isna(row[n]) else form.format(row[n]) for n, (_, form) in columns.items()]
        for _, row in table.iterrows()
    ]
    show_table(title, [heading for heading, _ in columns.values()], rows)
    tera = 2 * table["matrix_rate"].iloc[0] / 1e12
    print(f"rate: of {tera:.3g} TFLOP/s in a large matrix product; time: an image's, against")
    print("the first variant of the model; MACs: of layers, the encoder's included")


if __name__ == "__main__":
    sys.exit(exit_code(main))
