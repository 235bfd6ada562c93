"""A part of an image drawn anew by a finished VAR run, as if it were of some class; nothing learns.

    python -m experiments.edit runs/split_digits/var-adapter/seed0 --image=7 --box=0,8,16,16
    python -m experiments.edit RUN --image=cat.png --mask=mask.png --to=dog --to=wolf
    python -m experiments.edit RUN --image=7 --box=4,4,12,12 --outside

--image is a picture file of the run's size, or the number of a test image: its row in the run's
predictions.csv, counted from 0. What is drawn anew is a box (pixels from x0 up to x1, from y0 up to
y1, counted from 0 at the top left) or the white of a mask; --outside draws all but that. Without
--to the part is drawn as of the class that the run takes the image for: in-painting and, with
--outside, out-painting. Coarse tokens that the region covers by half at most are given then, so
that the new part fits the old; with --to all that it touches are drawn, or the class asked for
would hardly show. --cover sets this share of a token; how it is done cil/edit.py says.

Each class asked for is a row of the picture: the image, the region, and an edit for every seed. It
goes to figures/edit.png of the run unless --out gives another name. The table says what class the
run takes each edit for, and how far the model's own picture is from the kept pixels, which --raw
shows instead of them.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cil.config import SamplesConfig
from cil.edit import HALF, Edited
from cil.editing import edited
from cil.editing import figure as picture_of_edits
from cil.errors import UserError
from cil.methods.registry import check_samples
from cil.methods.training import find_device
from cil.methods.var import VARMethod
from cil.records import write_figure
from cil.run import exit_code
from cil.streams.stream import Stream
from cil.table import show
from experiments.finished import add_arguments, finished, picture, pixels

SEEDS = 2**32  # that there are


def main() -> None:
    options = _asked()
    run = finished(options.run, options)
    view, method, stream = run.run, run.method, run.stream
    if not isinstance(method, VARMethod):
        raise UserError(
            f"{options.run} is a run of {view.method}: only a VAR has tokens to keep: name a run "
            "of var."
        )
    if options.image.isdecimal():
        image = run.images([int(options.image)])[0]
    else:
        image = picture(Path(options.image), stream)
    region = box(options.box, stream) if options.box else mask(options.mask, stream)
    region = ~region if options.outside else region
    learned = stream.class_names
    labels = [run.class_of(name) for name in options.to] or [_read(method, image[None])[0]]
    seeds = list(range(options.seed, options.seed + options.copies))
    pairs = [(label, seed) for label in labels for seed in seeds]
    cover = (0.0 if options.to else HALF) if options.cover is None else options.cover
    results = edited(method, image, region, pairs, options.guidance, cover)
    shown = results.raw if options.raw else results.images
    figure = picture_of_edits(image, region, shown, [learned[label] for label in labels], seeds)
    place = options.out or view.folder / "figures" / "edit.png"
    path = write_figure(place, figure, vector=False)
    _show(method, results, region, image, pairs, learned)
    print(f"written: {path}")


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.edit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a finished var run")
    parser.add_argument("--image", required=True, help="a picture file, or a test image's number")
    region = parser.add_mutually_exclusive_group(required=True)
    region.add_argument("--box", metavar="x0,y0,x1,y1", help="what is drawn anew")
    region.add_argument("--mask", type=Path, help="a picture that is white there")
    parser.add_argument("--outside", action="store_true", help="draw all but the box or the mask")
    parser.add_argument("--to", action="append", default=[], metavar="CLASS", help="by its name")
    parser.add_argument("--copies", type=int, default=6, help="edits of each class (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them (default: 0)")
    parser.add_argument(
        "--cover",
        type=float,
        help="share of a token beyond which it is drawn (default: 0.5; with --to: 0)",
    )
    parser.add_argument("--guidance", type=float, default=SamplesConfig().guidance)
    parser.add_argument("--raw", action="store_true", help="the model's picture of kept pixels too")
    parser.add_argument("--out", type=Path, help="the picture's file, a .png")
    add_arguments(parser)
    options = parser.parse_args()
    if options.copies < 1 or not 0 <= options.seed <= SEEDS - options.copies:
        raise UserError(
            f"--copies must be 1 or more, and --seed 0 or more and the last of them {SEEDS - 1} at "
            "most."
        )
    if options.cover is not None and not 0 <= options.cover < 1:
        raise UserError(f"--cover is {options.cover}: give a share of a token, from 0 to below 1.")
    if options.out is not None and options.out.suffix != ".png":
        raise UserError(f"--out is {options.out}: give a name that ends in .png.")
    check_samples(SamplesConfig(1, options.guidance))
    return options


def mask(path: Path, stream: Stream) -> Tensor:
    """The region (H, W) that a picture shows white; raises as `picture` does."""
    return torch.from_numpy(pixels(path, "L", stream) >= 128)


def box(text: str, stream: Stream) -> Tensor:
    """The region (H, W) of x0,y0,x1,y1; UserError if it is none within the image."""
    side = stream.image_size
    match = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", text)
    corners = [int(number) for number in match.groups()] if match else [0] * 4
    x0, y0, x1, y1 = corners
    if not (x0 < x1 <= side and y0 < y1 <= side):
        raise UserError(
            f"--box is {text}: give x0,y0,x1,y1 with x0 below x1, y0 below y1 and none above "
            f"{side}."
        )
    region = torch.zeros(side, side, dtype=torch.bool)
    region[y0:y1, x0:x1] = True
    return region


def _read(method: VARMethod, images: Tensor) -> list[int]:
    labels: list[int] = method.scores(images.to(find_device(method.trainer))).argmax(1).tolist()
    return labels


def _show(
    method: VARMethod,
    results: Edited,
    region: Tensor,
    image: Tensor,
    pairs: Sequence[tuple[int, int]],
    learned: Sequence[str],
) -> None:
    scales = method.tokenizer.scales
    shares = [part.double().mean() for part in results.drawn_L.split([p * p for p in scales])]
    drawn = ", ".join(f"{p}x{p} {100 * s:.0f} %" for p, s in zip(scales, shares, strict=True))
    kept, rows = ~region, []
    found = _read(method, results.images)
    for (label, seed), reading, raw in zip(pairs, found, results.raw, strict=True):
        away = (raw - image)[:, kept].abs().mean() / 2 if kept.any() else torch.tensor(0.0)
        rows.append([learned[label], str(seed), learned[reading], f"{100 * away:.1f}"])
    show(
        "edits",
        ["drawn as", "seed", "read as", "kept pixels"],
        rows,
        f"Tokens drawn of each scale: {drawn}. kept pixels: mean absolute difference of the "
        "model's own picture from them, in per cent of the range.",
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
