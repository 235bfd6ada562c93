"""What a prediction costs and loses, by schedule, for the VAR of a finished run.

    python -m experiments.efficiency runs/split_digits/var/seed0

Classifies the stream's test images over all its classes: one forward an image and class (naive),
every class on every scale (varc), the published stages (a_varc), and pruning after every scale by
margins fitted on held-out training images of all classes (adaptive; ours). For comparison, A-VARC
(arXiv 2510.12060) counts 14,105 G multiply-accumulates for varc and 4,649 G for a_varc at d16 with
100 classes. The rounds of all variants alternate in one process and the fastest of each counts, so
that ratios of times hold on a noisy machine.
"""

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from cil.classify.likelihood import by_scale, staged_scores
from cil.classify.schedule import Schedule, adaptive, class_cost, cost, fit_margins, schedule
from cil.config import TrainerConfig
from cil.environment import commit, device
from cil.errors import UserError
from cil.methods.registry import restore
from cil.methods.var import VARMethod
from cil.records import read_run, write_bytes
from cil.run import exit_code
from cil.streams.stream import Experience
from cil.streams.tokens import augmented_views

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Variant:
    """A way to classify; `stages` is None for the naive one."""

    name: str
    samples: int
    stages: Schedule | None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run of a var method")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest one counts (default: 3)")
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args()
    trainer = TrainerConfig(accelerator=options.accelerator, progress=False)
    method, stream = restore(read_run(options.run), trainer)
    if not isinstance(method, VARMethod):
        raise UserError(f"{options.run} is no run of a var method.")
    table = measure(method, stream.experiences, options.rounds, trainer)
    where = device(trainer)
    table.insert(0, "device", where)
    table.insert(1, "commit", commit())
    table.insert(2, "command", " ".join(["python -m experiments.efficiency", *sys.argv[1:]]))
    name = re.sub(r"\W+", "-", where).strip("-").lower()
    path = options.results / f"efficiency-{stream.name}-{name}.csv"
    write_bytes(path, table.to_csv(index=False).encode())
    show(table, f"{stream.name}, {method.classes_seen} classes, {where}")
    print(f"written to {path}")


def measure(
    method: VARMethod, experiences: tuple[Experience, ...], rounds: int, trainer: TrainerConfig
) -> pd.DataFrame:
    """One row a variant."""
    from cil.methods.training import find_device

    where, settings = find_device(trainer), method.settings
    images, labels = (x.to(where) for x in images_of(experiences, "test"))
    weights_K, scales = method.scale_weights_K.to(where), len(method.tokenizer.scales)
    margins = fitted_margins(method, experiences, where)
    variants = [Variant("naive", 1, None)]
    for samples in sorted({1, settings.smoothing_samples}):
        variants += [Variant(n, samples, schedule(n, scales, samples)) for n in ("varc", "a_varc")]
        variants.append(Variant("adaptive", samples, adaptive(margins, samples)))
    seconds: dict[Variant, float] = {}
    found: dict[Variant, tuple[Tensor, list[Tensor]]] = {}
    for variant in tqdm(variants * rounds, desc="rounds"):
        began = time.perf_counter()
        found[variant] = classify(method, images, weights_K, variant)
        if where.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - began
        seconds[variant] = min(elapsed, seconds.get(variant, elapsed))
    whole = class_cost(method.model.trunk(0), scales)
    rows = []
    for variant in variants:
        scores, reads = found[variant]
        macs = whole.times(method.classes_seen)
        if variant.stages is not None:
            mean = torch.cat(reads, 1).double().mean(1).tolist()
            macs = cost(variant.stages, method.model.trunk(0), method.classes_seen, reads=mean)
        rows.append(
            {
                "variant": variant.name,
                "copies": variant.samples,
                "images": len(images),
                "classes": method.classes_seen,
                "accuracy": (scores.argmax(1) == labels).double().mean().item(),
                "seconds": seconds[variant],
                "images_a_second": len(images) / seconds[variant],
                "macs": macs.layers,
                "attention_macs": macs.attention,
            }
        )
    table = pd.DataFrame(rows)
    table["time_against_naive"] = table["seconds"] / table["seconds"].iloc[0]
    table["macs_against_naive"] = table["macs"] / table["macs"].iloc[0]
    return table


def images_of(experiences: tuple[Experience, ...], split: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a split of all experiences."""
    parts = [augmented_views(getattr(e, split), views=1).tensors for e in experiences]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def fitted_margins(
    method: VARMethod, experiences: tuple[Experience, ...], where: torch.device
) -> list[float]:
    images, labels = images_of(experiences, "validation")
    values_BCK = method.scale_log_likelihoods(images.to(where)).cpu()
    return fit_margins(values_BCK * method.scale_weights_K, labels)


@torch.inference_mode()
def classify(
    method: VARMethod, images: Tensor, weights_K: Tensor, variant: Variant
) -> tuple[Tensor, list[Tensor]]:
    """Scores (B, C), and how many classes each stage read."""
    tokens_SBL, inputs_SBLZ = method.copies(images, variant.samples)
    if variant.stages is None:
        return naive(method, tokens_SBL[0], inputs_SBLZ[0], weights_K), []
    reads: list[Tensor] = []
    mean = method.settings.smoothing_mean
    scores_BC = staged_scores(
        method.model, tokens_SBL, inputs_SBLZ, weights_K, variant.stages, mean, reads=reads
    )
    return scores_BC, reads


def naive(method: VARMethod, tokens_BL: Tensor, inputs_BLZ: Tensor, weights_K: Tensor) -> Tensor:
    """One forward an image and class."""
    groups, rows = method.model.groups, []
    for tokens, inputs in zip(tokens_BL.split(1), inputs_BLZ.split(1), strict=True):
        for group in range(len(groups)):
            for label in groups.labels(group):
                wanted = torch.tensor([label], device=tokens.device)
                logits = method.model(inputs, wanted, group)[0].float()
                values_L = -F.cross_entropy(logits, tokens[0], reduction="none")
                rows.append(by_scale(values_L, method.tokenizer.scales) @ weights_K)
    return torch.stack(rows).view(len(tokens_BL), groups.classes)


def show(table: pd.DataFrame, title: str) -> None:
    shown = Table(title=title)
    for heading in ("variant", "copies", "accuracy", "images/s", "time", "MACs", "attention MACs"):
        shown.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in table.itertuples():
        shown.add_row(
            row.variant,
            str(row.copies),
            f"{row.accuracy:.1%}",
            f"{row.images_a_second:.1f}",
            f"{row.time_against_naive:.1%}",
            f"{row.macs_against_naive:.1%}",
            f"{row.attention_macs:.3g}",
        )
    Console().print(shown)
    print("time and MACs: against naive; MACs of layers, the encoder left out")


if __name__ == "__main__":
    sys.exit(exit_code(main))
