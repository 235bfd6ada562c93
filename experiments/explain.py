"""Pictures of what spoke for a class and against it, of a finished run of a VAR.

    python -m experiments.explain runs/split_digits/var/seed0
    python -m experiments.explain runs/split_digits/var/seed0 --images=12,40,7
    python -m experiments.explain runs/split_digits/var/seed0 --images=mine.png --label=7

Token-wise mutual information (arXiv 2510.12060): log p of an image's every token under its class
against the null class (no class at all), and under the best wrong class. Four panels an image: the
image; its class against null; the best wrong class against null; its class against the best wrong
one. What speaks for is orange; what speaks against is cut off. Right predictions and wrong ones
come apart, in RUN/figures/explanations_right.png and explanations_wrong.png, and beside them the
maps of the single scales, with what speaks against, in explanations_scales_right.png and so on.

--images takes numbers of test images (rows of predictions.csv, from 0) or files; without it the
first --each right and wrong ones are shown. Of a file --label names the class to explain; without
it the predicted one is. An explanation takes three likelihood evaluations an image; which class is
the best wrong one is known from classifying it.

--time=N draws nothing: it explains N test images, over again where there are fewer, and says how
long it took.
"""

import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cil import plots, table
from cil.drift import pictures
from cil.environment import device
from cil.errors import UserError
from cil.explain import (
    PASSES,
    Explainable,
    Explanation,
    best_wrong,
    combined,
    explain,
    heat_map,
    scale_maps,
    to_pixels,
)
from cil.records import write_figure
from cil.run import exit_code
from experiments.finished import (
    BATCH_SIZE,
    Finished,
    add_arguments,
    every_label_in_turn,
    finished,
    in_batches,
    picture,
)

MOST = 12  # rows of a figure
PANELS = [
    "class against\nnull class",
    "best wrong against\nnull class",
    "class against\nbest wrong",
]


@dataclass(frozen=True)
class Explained:
    """Some images with the reasons for their classes; all of one length."""

    names: list[str]
    images: Tensor
    scores_BC: Tensor
    found: Explanation

    def where(self, rows: Sequence[int]) -> "Explained":
        return Explained(
            [self.names[row] for row in rows],
            self.images[rows],
            self.scores_BC[rows],
            self.found.rows(rows),
        )


def main() -> None:
    parser = ArgumentParser(
        prog="python -m experiments.explain",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="folder of a finished run: .../METHOD/seedK")
    parser.add_argument("--images", help="numbers of test images or files, as 3,17 or a.png")
    parser.add_argument("--label", help="of files: name of the class to explain")
    parser.add_argument("--each", type=int, default=4, help="right and wrong ones (default: 4)")
    parser.add_argument("--time", type=int, metavar="N", help="explain so many and time it")
    parser.add_argument("--folder", type=Path, help="of the figures (default: RUN/figures)")
    add_arguments(parser)
    options = parser.parse_args()
    run = finished(options.run, options)
    if not isinstance(run.method, Explainable):
        raise UserError(f"{options.run} is no run of a var method: only its tokens explain.")
    if options.time is not None:
        timed(run, options.time)
        return
    explained = of_images(run, *asked_for(run, options))
    show(run, explained)
    folder = options.folder or run.run.folder / "figures"
    right_B = explained.scores_BC.argmax(1) == explained.found.labels_B
    for name, wanted_B in (("right", right_B), ("wrong", ~right_B)):
        rows = wanted_B.nonzero()[:MOST, 0].tolist()
        if rows:
            for path in draw(run, explained.where(rows), folder, name):
                print(f"written: {path}")
        else:
            print(f"no prediction of these is {name}")


def asked_for(run: Finished, options: Namespace) -> tuple[list[str], Tensor, Tensor | None]:
    """Names, images and labels; no labels where the predictions are to be explained.

    Raises:
        UserError: no such test image, no such file, an image of another size, an unknown class.
    """
    if options.images is None:
        numbers = right_and_wrong(run, options.each)
    else:
        words = [word.strip() for word in options.images.split(",") if word.strip()]
        if not words:
            raise UserError("--images names none: give numbers of test images or files.")
        below = [word for word in words if word[0] == "-" and word[1:].isdecimal()]
        if below:  # no file either
            raise UserError(f"There is no test image {below[0]}: they are numbered from 0.")
        if not all(word.isdecimal() for word in words):
            images = torch.stack([picture(Path(word), run.stream) for word in words])
            label = None if options.label is None else run.class_of(options.label)
            labels_B = None if label is None else torch.full((len(words),), label)
            return [Path(word).name for word in words], images, labels_B
        numbers = [int(word) for word in words]
    if options.label is not None:
        raise UserError("--label is of files: the class of a test image is known.")
    images = run.images(numbers)
    labels_B = torch.tensor([run.labels[number] for number in numbers])
    return [f"test image {number}" for number in numbers], images, labels_B


def right_and_wrong(run: Finished, each: int) -> list[int]:
    """Numbers of images that the run predicted rightly, and of as many that it did wrongly.

    The first of each, spread evenly over the classes.
    """
    if not 1 <= each <= MOST:
        raise UserError(f"--each is {each}: give 1 to {MOST}.")
    table = run.run.predictions()
    hits = table["label"] == table["prediction"]
    numbers: list[int] = []
    for part in (table[hits], table[~hits]):
        if len(part):
            picks = every_label_in_turn(part["label"].tolist(), min(each, len(part)))
            numbers += part.index[picks].tolist()
    return numbers


def of_images(
    run: Finished, names: list[str], images: Tensor, labels_B: Tensor | None
) -> Explained:
    """Classify the images by every class, then explain them."""
    scores_BC = in_batches(lambda part: run.method.every_class(part.to(run.device)).cpu(), images)
    labels_B = scores_BC.argmax(1) if labels_B is None else labels_B
    rivals_B = best_wrong(scores_BC, labels_B)
    found = explain(run.method, images.to(run.device), labels_B, rivals_B)
    return Explained(names, images, scores_BC, found.cpu())


def draw(run: Finished, explained: Explained, folder: Path, name: str) -> list[Path]:
    """The four panels of every image, and the maps of the scales; returns the paths."""
    found, side, classes = explained.found, explained.images.shape[-1], run.stream.class_names
    panels = [found.label_BL, found.rival_BL, found.contrast()]
    heat = [to_pixels(heat_map(combined(values, found.scales)), side) for values in panels]
    of_class = [classes[label] for label in found.labels_B.tolist()]
    rivals = [classes[label] for label in found.rivals_B.tolist()]
    pairs = list(zip(of_class, rivals, strict=True))
    notes = [[own, other, f"{own},\nnot {other}"] for own, other in pairs]
    predicted = [classes[label] for label in explained.scores_BC.argmax(1).tolist()]
    rows = [
        f"{image}\n{own}" + ("" if own == other else f", taken for {other}")
        for image, own, other in zip(explained.names, of_class, predicted, strict=True)
    ]
    shown = pictures(explained.images)
    title = f"{run.run.method}, {name} predictions: "
    four = plots.heat_maps(
        shown,
        torch.stack(heat, 1).numpy(),
        rows,
        PANELS,
        notes,
        f"{title}orange speaks for a class",
    )
    maps = [part.numpy() for part in scale_maps(found.contrast(), found.scales)]
    single = plots.signed_maps(
        shown, maps, rows, f"{title}class against best wrong, by scale", "nats a token"
    )
    return [
        write_figure(folder / f"explanations_{name}.png", four),
        write_figure(folder / f"explanations_scales_{name}.png", single),
    ]


def show(run: Finished, explained: Explained) -> None:
    """One row an image: its classes and the nats between them."""
    found, classes = explained.found, run.stream.class_names
    texts = ["image", "class", "predicted", "best wrong"]
    headings, rows = [*texts, "for class", "for wrong", "margin"], []
    columns = zip(
        explained.names,
        found.labels_B.tolist(),
        explained.scores_BC.argmax(1).tolist(),
        found.rivals_B.tolist(),
        *(values.sum(1).tolist() for values in (found.label_BL, found.rival_BL, found.contrast())),
        strict=True,
    )
    for name, label, predicted, rival, *nats in columns:
        words = (classes[number] for number in (label, predicted, rival))
        rows.append([name, *words, *(f"{value:+.1f}" for value in nats)])
    title = f"{run.run.method} seed {run.run.seed}"
    table.show(title, headings, rows, texts=len(texts))
    print("nats, of all tokens together: log p(image | class) - log p(image | null class), without")
    print(f"the weights of the scales; {PASSES} likelihood evaluations an image")


def timed(run: Finished, count: int) -> None:
    """Explain so many test images, read and classified beforehand, and print what it took."""
    if count < 1:
        raise UserError(f"--time is {count}: give 1 or more.")
    few = min(count, len(run.labels))
    images = run.images(range(few)).to(run.device)
    labels_B = torch.tensor(run.labels[:few])
    scores_BC = in_batches(lambda part: run.method.every_class(part, 1).cpu(), images)
    rivals_B = best_wrong(scores_BC, labels_B)
    batches = torch.arange(count).remainder(few).split(BATCH_SIZE)
    explain(run.method, images[batches[0]], labels_B[batches[0]], rivals_B[batches[0]])  # warm up
    began = time.perf_counter()
    for rows in tqdm(batches, desc="explaining", disable=not run.trainer.progress):
        # On the CPU, so that a GPU has done its work.
        explain(run.method, images[rows], labels_B[rows], rivals_B[rows]).cpu()
    seconds = time.perf_counter() - began
    print(
        f"{count} images explained in {seconds:.1f} s, {1000 * seconds / count:.2f} ms and "
        f"{PASSES} likelihood evaluations each; {device(run.trainer)}"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
