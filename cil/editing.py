"""Edits by a finished VAR run, and their picture: a part of an image drawn anew."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cil import plots
from cil.config import SamplesConfig, TrainerConfig
from cil.edit import HALF, Edited, edit
from cil.errors import UserError
from cil.methods.drawing import as_bytes
from cil.methods.registry import restore
from cil.methods.training import autocast, find_device
from cil.methods.var import VARMethod
from cil.records import RunView
from cil.results import Run
from cil.streams.stream import Stream


def edited(
    method: VARMethod,
    image: Tensor,
    region: Tensor,
    pairs: Sequence[tuple[int, int]],
    guidance: float,
    cover: float = 0.0,
) -> Edited:
    """An edit of the image (channels, H, W) in [-1, 1] for each (label, seed), on the CPU.

    region (H, W) is true where it is drawn anew; `cover` and errors are those of `cil.edit.edit`.
    """
    where = find_device(method.trainer)
    method.tokenizer.to(where)
    method.model.to(where)
    images = image.to(where).expand(len(pairs), -1, -1, -1)
    labels, seeds = zip(*pairs, strict=True)
    with autocast(method.trainer):
        found = edit(
            method.model,
            method.tokenizer,
            images,
            region,
            labels,
            seeds,
            guidance=guidance,
            cover=cover,
        )
    return Edited(found.images.cpu(), found.raw.cpu(), found.drawn_L.cpu())


def figure(
    image: Tensor, region: Tensor, shown: Tensor, names: Sequence[str], seeds: Sequence[int]
) -> plots.Figure:
    """A row for each name: the image, the region, and of `shown` an edit a seed."""
    rows = as_bytes(shown.unflatten(0, (len(names), len(seeds))).expand(-1, -1, 3, -1, -1))
    whole = as_bytes(image.expand(3, -1, -1))
    tinted = plots.tinted(whole, region.numpy())
    before = np.broadcast_to(np.stack([whole, tinted]), (len(names), 2, *whole.shape))
    columns = ["image", "region", *(f"seed {seed}" for seed in seeds)]
    return plots.sample_grid(np.concatenate([before, rows], 1), names, "", columns, tile=0.9)


def edits(
    runs: Sequence[Run], image: int = 0, seeds: int = 5, cache: str | Path = "cache"
) -> plots.Figure:
    """The right half of a test image of the first class group drawn anew, by every run of a VAR.

    Two rows a run: as of the image's own class, and as of the class that was learned last. It takes
    the models, which are in run folders alone; where none can be read the figure says why, and a
    line on stderr where only some cannot. image: its number in the group; cache: as that of the
    runs, and like a relative `stream.root` of theirs it is looked for from the current folder.
    """
    names: list[str] = []
    shown: list[Tensor] = []
    failed: list[str] = []
    for run in runs:
        if not isinstance(run, RunView) or run.method.partition("-")[0] != "var":
            continue
        try:
            method, stream = restore(run, TrainerConfig(progress=False), Path(cache))
        except UserError as error:
            failed.append(f"{run.method} seed {run.seed}: {error}")
            continue
        whole, own, region = _halved(stream, image)
        for label, cover in ((own, HALF), (method.classes_seen - 1, 0.0)):
            pairs = [(label, seed) for seed in range(seeds)]
            guidance = SamplesConfig().guidance
            shown.append(edited(method, whole, region, pairs, guidance, cover).images)
            names.append(f"{run.method}: {stream.class_names[label]}")
    if not shown:
        none = "Edits take a model: none of these is a run of var in a run folder."
        return plots.note("\n".join(failed) or none)
    for line in failed:
        print(f"left out: {line}", file=sys.stderr)
    return figure(whole, region, torch.cat(shown), names, range(seeds))


def _halved(stream: Stream, number: int) -> tuple[Tensor, int, Tensor]:
    """A test image of the first class group, its label, and the region (H, W) of its right half."""
    images = stream.experiences[0].test
    count = len(images.targets)  # type: ignore[attr-defined]
    if not 0 <= number < count:
        raise UserError(f"There is no test image {number}: the first class group has {count}.")
    whole, label = images[number]
    region = torch.zeros(whole.shape[-2:], dtype=torch.bool)
    region[:, whole.shape[-1] // 2 :] = True
    return whole, int(label), region
