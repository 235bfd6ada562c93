"""How good the images are that a finished run draws: FID, precision, recall, and recognition.

    python -m experiments.sample_quality runs/split_digits/var-adapter/seed0
    python -m experiments.sample_quality RUN OTHER_RUN --guidance 0 1.5 --judge=runs/.../joint/seed0

Of one or several runs of var or diffusion methods on one stream, as they are after their last
experience. Where Inception's weights are not at hand, and digits mean nothing to it, the features
are those before the last layer of a discriminative network that learned the stream's own training
images: `joint` of the same experiment and seed, unless --judge names another run, which may have
learned the same classes in other groups. Its accuracy on drawn images, against the classes that
they were asked for, is a simple cousin of the classification accuracy score (arXiv 1905.10887).

Everything is compared with test images, which neither side has learned from: training images and
held-out ones show what real images reach, training images through a run's encoder and decoder what
these cost. FID (arXiv 1706.08500) falls with the number of images, so that only rows of as many
compare. Precision and recall (arXiv 1904.06991) have k = 3. Seeds are fixed: image i of a class is
the i-th of the grids that the run drew itself. The table goes to experiments/results/NAME.{md,csv},
NAME being sample_quality_EXPERIMENT unless --name gives another.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from tqdm import tqdm

from cil.config import SamplesConfig, TrainerConfig
from cil.environment import commit, device
from cil.errors import UserError
from cil.methods.discriminative import Discriminative
from cil.methods.drawing import drawn
from cil.methods.method import Generative
from cil.methods.registry import check_samples, restore
from cil.methods.scoring import BATCH_SIZE
from cil.methods.training import find_device
from cil.records import RunView, with_ending, write_bytes
from cil.run import exit_code
from cil.sample_metrics import NEIGHBOURS, frechet_distance, precision_recall
from cil.showing import group_name
from cil.streams.stream import Stream, first_of_each
from cil.streams.tokens import in_order
from cil.table import markdown, provenance, show
from experiments.asking import place_of, typed
from experiments.finished import add_arguments, named_run, trainer_of

HEADINGS = ["images", "classes", "number", "FID", "precision", "recall", "recognised"]
ALL = "all"


@dataclass(frozen=True)
class Read:
    """Images as the judge sees them: features (N, D), and whether it recognises each (N,)."""

    features_ND: Tensor
    hits_N: Tensor
    labels_N: Tensor

    def of(self, labels: Sequence[int]) -> "Read":
        rows = torch.isin(self.labels_N, torch.tensor(labels))
        return Read(self.features_ND[rows], self.hits_N[rows], self.labels_N[rows])


def main() -> None:
    options = _asked()
    trainer = trainer_of(options)
    views = [named_run(folder) for folder in options.runs]
    for guidance in options.guidance:
        check_samples(SamplesConfig(1, guidance, options.steps))
    judged_by = named_run(options.judge or _joint(views[0]))
    judge, _ = restore(judged_by, trainer, options.cache)
    opened = [_opened(view, judged_by, trainer, options.cache) for view in views]
    methods, stream = [method for method, _ in opened], opened[0][1]
    if len({view.stream["fingerprint"] for view in views}) > 1:
        raise UserError("The runs learned different streams: compare those of one.")
    _check_judge(judge, judged_by, methods)
    count = _number(stream, options.images)
    default = f"sample_quality_{views[0].experiment}"
    path = place_of(options.name, default, typed("sample_quality"))
    reference = read(judge, of_each(stream, "test", count))
    table = pd.DataFrame(
        [
            {"images": name, **row}
            for name, images in _sources(judge, stream, methods, views, count, options)
            for row in compared(reference, images, stream)
        ]
    )
    accuracy = reference.hits_N.double().mean().item()
    network = (
        f"Features: the {reference.features_ND.shape[1]} values before the last layer of "
        f"{judge.backbone} of {judged_by.method} seed {judged_by.seed}, which is right for "
        f"{100 * accuracy:.1f} % of the {len(reference.labels_N)} test images compared with."
    )
    _publish(table, path, [*views, judged_by], network, trainer)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sample_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = SamplesConfig()
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished generative runs")
    parser.add_argument("--judge", type=Path, help="folder of a finished discriminative run")
    parser.add_argument("--images", type=int, metavar="N", help="of a class (default: as to test)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[defaults.guidance])
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of a diffusion model")
    parser.add_argument("--name", help="of the files in experiments/results, or a path")
    add_arguments(parser)
    return parser.parse_args()


def _joint(view: RunView) -> Path:
    """Where the run that judges is, unless told otherwise."""
    folder = view.folder.parent.parent / "joint" / view.folder.name
    if not (folder / "summary.json").exists():
        raise UserError(
            f"There is no finished run {folder} to judge by: make it with `python -m cil.run "
            f"{view.experiment} --methods=[joint] --seeds=[{view.seed}]`, or name another "
            "discriminative run with --judge."
        )
    return folder


def _opened(
    view: RunView, judged_by: RunView, trainer: TrainerConfig, cache: Path
) -> tuple[Any, Stream]:
    same = view.stream["fingerprint"] == judged_by.stream["fingerprint"]
    if not same and _images(view) != _images(judged_by):
        raise UserError(
            f"{view.folder} and {judged_by.folder} learned different streams: judge a run by one "
            "of its own stream."
        )
    method, stream = restore(view, trainer, cache)
    if not isinstance(method, Generative):
        raise UserError(f"{view.folder} is a run of {view.method}, which draws no images.")
    return method, stream


def _images(view: RunView) -> tuple[Any, ...]:
    """What a run learned, in whatever groups; the streams' fingerprints know the groups as well."""
    otherwise = ("protocol", "stop_after", "augment")
    same = {k: v for k, v in view.config["stream"].items() if k not in otherwise}
    return view.stream["class_names"], same


def _check_judge(judge: Any, judged_by: RunView, methods: Sequence[Any]) -> None:
    if not isinstance(judge, Discriminative):
        raise UserError(
            f"{judged_by.folder} is a run of {judged_by.method}: judge by a discriminative one, "
            "such as joint."
        )
    if any(method.classes_seen != judge.classes_seen for method in methods):
        raise UserError(f"{judged_by.folder} has learned other classes than the runs it judges.")


def _number(stream: Stream, wished: int | None) -> int:
    """Images of a class: as many as there are of every one to test, or fewer if wished."""
    targets = torch.cat([torch.tensor(e.test.targets) for e in stream.experiences])  # type: ignore[attr-defined]
    most = int(targets.bincount().min())
    if wished is None:
        return most
    if not 1 <= wished <= most:
        raise UserError(
            f"--images is {wished}: there are {most} test images of a class to compare with, so "
            "give at most as many."
        )
    return wished


def _sources(
    judge: Discriminative,
    stream: Stream,
    methods: Sequence[Any],
    views: Sequence[RunView],
    count: int,
    options: argparse.Namespace,
) -> Iterator[tuple[str, Read]]:
    """Names of kinds of images, and these as the judge sees them: real ones first."""
    yield "real: training", read(judge, of_each(stream, "train_plain", count))
    if not stream.on_validation:
        yield "real: held out", read(judge, of_each(stream, "validation", count))
    groups = [e.labels for e in stream.experiences]
    for view, method in zip(views, methods, strict=True):
        name = f"{view.method} seed {view.seed}"
        training = of_each(stream, "train_plain", count)
        yield f"{name}: decoder", read(judge, training, method.reconstructed)
        for guidance in options.guidance:
            images = drawn(
                method,
                groups,
                count,
                guidance=guidance,
                steps=options.steps,
                title=f"{name}, guidance {guidance:g}",
                progress=True,
            )
            labels = torch.arange(len(images)).repeat_interleave(count)
            pairs = TensorDataset(images.flatten(0, 1), labels)
            yield f"{name}: guidance {guidance:g}", read(judge, pairs)


def of_each(stream: Stream, split: str, count: int) -> Dataset:
    """The first `count` images of each class, or all there are, group by group."""
    views = [getattr(experience, split) for experience in stream.experiences]
    return ConcatDataset([Subset(view, first_of_each(view.targets, count)) for view in views])


def read(judge: Discriminative, images: Dataset, through: Any = None) -> Read:
    """Images as the judge sees them, or sees what `through` makes of them."""
    where, parts = find_device(judge.trainer), []
    for batch, labels in tqdm(in_order(images, BATCH_SIZE), desc="judging", leave=False):
        shown = (batch if through is None else through(batch)).to(where)
        hits = judge.scores(shown).argmax(1).cpu() == labels
        parts.append((judge.features(shown).cpu(), hits, labels))
    return Read(*(torch.cat(part) for part in zip(*parts, strict=True)))


def compared(reference: Read, images: Read, stream: Stream) -> list[dict[str, Any]]:
    """A row of numbers over all classes, and one for each class group."""
    rows = []
    named = [(group_name(stream, e), e.labels) for e in stream.experiences]
    everything = tuple(range(sum(len(labels) for _, labels in named)))
    for name, labels in [(ALL, everything), *named]:
        real, shown = reference.of(labels), images.of(labels)
        row = {"classes": name, "number": len(shown.labels_N)}
        if name == ALL or min(len(real.labels_N), len(shown.labels_N)) > NEIGHBOURS:
            row |= _distances(real.features_ND, shown.features_ND)
        else:  # one small group is no reason to say nothing of the others
            row |= dict.fromkeys(("fid", "precision", "recall"), math.nan)
        rows.append(row | {"recognised": shown.hits_N.double().mean().item()})
    return rows


def _distances(real_ND: Tensor, shown_ND: Tensor) -> dict[str, float]:
    precision, recall = precision_recall(real_ND, shown_ND)
    fid = frechet_distance(real_ND, shown_ND)
    return {"fid": fid, "precision": precision, "recall": recall}


def _written(value: float, form: str) -> str:
    """Nothing for what could not be measured."""
    return "" if math.isnan(value) else format(value, form)


def _publish(
    table: pd.DataFrame, path: Path, runs: Sequence[RunView], network: str, trainer: TrainerConfig
) -> None:
    """Show the table; write it as .md, and as .csv every digit."""
    line = typed("sample_quality")
    caption = (
        "FID, and precision and recall (k = 3) in per cent, against test images; recognised: the "
        "network's accuracy on the images, in per cent; decoder: training images through the "
        "run's decoder. FID is larger for fewer images."
    )
    rows = [
        [*map(str, row[:3]), _written(row[3], ".3g"), *(_written(100 * s, ".1f") for s in row[4:])]
        for row in map(list, table.itertuples(index=False))
    ]
    show(path.name, HEADINGS, rows, f"{caption} {network}", texts=2)
    where = f"Measured at commit {commit()} on {device(trainer)}."
    lines = [
        *provenance(runs, line),
        where,
        network,
        caption,
        markdown(HEADINGS, rows),
    ]
    write_bytes(with_ending(path, ".csv"), table.to_csv(index=False).encode())
    write_bytes(with_ending(path, ".md"), ("\n\n".join(lines) + "\n").encode())
    print(f"written: {with_ending(path, '.md')}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
