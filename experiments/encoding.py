"""How fast images become token maps: loading them, the tokenizer, and both at once.

    python -m experiments.encoding split_tiny_imagenet --stream.root=FOLDER

Of the first experience of a stream, as a VAR learns it: `var.views` of every image, varied. Loading
is to read and vary them, by as many processes as a run has, and nothing else (and to decode them,
where they are too large to be kept decoded); the tokenizer, of random weights, encodes one batch
that stays on the device as often as there are batches; both at once is what a run does, into a
file. The rounds alternate and the fastest of each counts; what a first time alone costs, reading
from the disk and compiling, is done before them. The share is the rate of both at once in
that of the slower part: at 100 % the device, or the cores, never wait. Any setting may follow, as
of `python -m cil.run`.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from tqdm import tqdm

from cil.command_line import parse
from cil.config import Config
from cil.environment import device
from cil.errors import UserError
from cil.files import check_writable
from cil.methods.registry import build
from cil.methods.seeding import seed_all
from cil.methods.training import find_device
from cil.methods.var import VARMethod
from cil.run import exit_code
from cil.streams import open_stream
from cil.streams.stream import Experience, Stream
from cil.streams.tokens import Views, encoding_batch, in_order, tokens_of
from cil.table import show
from experiments.asking import RESULTS
from experiments.measuring import keep, timed

PARTS = ("loading", "tokenizer", "both")
HEADINGS = ["images", "processes", *PARTS, "share", "slower part"]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.encoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment")
    parser.add_argument("--rounds", type=int, default=2, help="the fastest one counts (default: 2)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    options, settings = parser.parse_known_args()
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}: give 1 or more.")
    config, _ = parse(options.experiment, settings)
    check_writable(options.results, "--results")
    stream = open_stream(config.stream, Path(config.cache))
    with TemporaryDirectory() as folder:
        row = measured(config, stream, options.rounds, folder)
    where = device(config.trainer)
    shown = [f"{row[key]:,.0f}" for key in ("images", "processes", *PARTS)]
    title = f"{stream.name}, {stream.image_size} px, {where}: images a second"
    show(title, HEADINGS, [[*shown, f"{row['share']:.0%}", str(row["slower_part"])]])
    name = f"{Path(options.experiment).stem}-{stream.image_size}px"
    print(f"written to {keep(pd.DataFrame([row]), 'encoding', name, where, options.results)}")


def measured(config: Config, stream: Stream, rounds: int, folder: str) -> dict[str, object]:
    """Images a second of each of `PARTS`, and what is said of them; files go to `folder`."""
    seed_all(0)
    method = build("var", replace(config, cache=folder), stream)
    images = method.groundwork.views * len(stream.experiences[0].train)
    parts = jobs(method, stream.experiences[0])
    where, seconds = find_device(config.trainer), dict.fromkeys(PARTS, math.inf)
    for part in ("loading", "tokenizer"):  # a first time, which reads from the disk and compiles
        parts[part](0)
    turns = [(seed, part) for seed in range(rounds) for part in PARTS]
    for seed, part in tqdm(turns, "rounds", leave=False, disable=not config.trainer.progress):
        timing = timed(partial(parts[part], seed), where)
        seconds[part] = min(seconds[part], timing.seconds)
    rates = {part: images / seconds[part] for part in PARTS}
    slower = min("loading", "tokenizer", key=rates.__getitem__)
    facts = {"images": images, "processes": method.groundwork.workers(images), **rates}
    return {**facts, "share": rates["both"] / rates[slower], "slower_part": slower}


def jobs(method: VARMethod, experience: Experience) -> dict[str, Callable[[int], object]]:
    """What is timed, by its name in `PARTS`; every round gives it another seed."""
    groundwork, where = method.groundwork, find_device(method.trainer)
    tokenizer = method.tokenizer.eval().requires_grad_(False).to(where)
    views = Views(experience.train, groundwork.views, seed=0)
    batch_size = encoding_batch(views)
    pixels = torch.rand(batch_size, *views[0][0].shape, device=where) * 2 - 1

    def load(seed: int) -> None:
        again = Views(experience.train, groundwork.views, seed)
        for _ in in_order(again, batch_size, groundwork.workers(len(views))):
            pass

    @torch.inference_mode()
    def encode(seed: int) -> None:
        for first in range(0, len(views), batch_size):
            tokenizer.tokenize(pixels[: len(views) - first])

    def both(seed: int) -> None:
        kind = tokens_of(tokenizer.tokens)
        groundwork.encoded("tokens", tokenizer.tokenize, kind, experience, 1, seed, {})

    return dict(zip(PARTS, (load, encode, both), strict=True))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
