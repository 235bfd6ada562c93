"""What stands in the files of a run folder: names, formats, and how damage is noticed.

runs/<experiment>/<method>/seed<k>/ holds
    config.yaml          the resolved settings that this method depends on
    environment.json     commit, versions, device; under "resumed" the ones that differed later
    stream.json          the stream's name, fingerprint, class list and classes
    progress.json        what is committed: everything else counts only as far as it says
    metrics.csv          experience,step,name,value; step counts along the whole stream
    accuracy_matrix.csv  row t: accuracy on each class group's test images after experience t
    samples/             experience<t>.png: what was drawn of every class, a row of tiles for each
    explanations/        experience<t>.csv: what each token of a few test images said after it
    predictions.csv, figures/, summary.json (the run is finished)
    checkpoints/         experience<t>.pt, the newest alone unless trainer.keep_checkpoints is true

Numbers are written with repr, so that they are read back as the same bits.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cil.errors import UserError
from cil.files import damaged, read_bytes, read_json

if TYPE_CHECKING:
    import pandas as pd

CONFIG, ENVIRONMENT, STREAM = "config.yaml", "environment.json", "stream.json"
PROGRESS, METRICS, MATRIX = "progress.json", "metrics.csv", "accuracy_matrix.csv"
PREDICTIONS, SUMMARY, CHECKPOINTS = "predictions.csv", "summary.json", "checkpoints"
EXPLANATIONS, FIGURES = "explanations", "figures"

# What tables need of every summary.json; `pretrained_on` is a word beside these numbers.
NUMBERS = (
    "last_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "training_seconds",
    "learning_macs",
    "prediction_macs",
    "parameters",
    "stored_images",
    "stored_bytes",
)
PRETRAINED_ON = "pretrained_on"
MORE_NUMBERS = ("unreadable_images", "codebook_use", "codebook_use_first")  # of some alone

MetricRow = tuple[int, int, str, float]  # experience, step, name, value
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Progress:
    """The commit point of a run: experiences learned and evaluated, and what their files hash to.

    steps: optimiser steps of all learned experiences; seconds: training time of each of them;
    test_sizes: test images of each evaluated class group; sha256: by file name, `METRICS` for its
    first metrics_bytes bytes and `MATRIX` for its first `evaluated` rows; unreadable: image files
    that could not be decoded.
    """

    learned: int
    evaluated: int
    steps: int
    seconds: list[float]
    test_sizes: list[int]
    metrics_bytes: int
    sha256: dict[str, str]
    unreadable: list[str] = field(default_factory=list)
    format: int = 1


def read_progress(folder: Path) -> Progress:
    """Read progress.json; UserError when it is damaged or of another version of cil."""
    path = folder / PROGRESS
    content = read_json(path)
    if content.get("format") not in (None, 1):
        raise UserError(f"{path} was written by another version of cil; start over with --fresh.")
    try:
        progress = Progress(**content)
        consistent = (
            _typed(progress)
            and 0 <= progress.evaluated <= progress.learned <= progress.evaluated + 1
            and len(progress.seconds) == progress.learned
            and len(progress.test_sizes) == progress.evaluated
            and progress.steps >= 0 <= progress.metrics_bytes
            and {CONFIG, STREAM} <= progress.sha256.keys()
            and (not progress.learned or newest_checkpoint(progress) in progress.sha256)
        )
    except (TypeError, AttributeError) as error:
        raise damaged(path) from error
    if not consistent:
        raise damaged(path)
    return progress


def _typed(progress: Progress) -> bool:
    """Whether its numbers are numbers and its words are words."""
    lists = (progress.seconds, progress.test_sizes, progress.unreadable)
    whole = (progress.learned, progress.evaluated, progress.steps, progress.metrics_bytes)
    return (
        all(isinstance(value, list) for value in lists)
        and all(isinstance(number, int) for number in (*whole, *progress.test_sizes))
        and all(isinstance(number, int | float) for number in progress.seconds)
        and all(isinstance(word, str) for word in progress.unreadable)
        and all(isinstance(word, str) for word in progress.sha256.values())
    )


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json; UserError when it is damaged or of another version of cil."""
    path = folder / SUMMARY
    summary = read_json(path)
    for key in (*NUMBERS, PRETRAINED_ON):
        if key not in summary:
            raise UserError(
                f"{path} lacks {key}, as another version of cil wrote it; use that, move the run "
                "elsewhere, or start it over with --fresh."
            )
    numbers = [summary[key] for key in (*NUMBERS, *MORE_NUMBERS) if key in summary]
    if not all(isinstance(number, int | float) for number in numbers):
        raise damaged(path)
    if not isinstance(summary[PRETRAINED_ON], str):
        raise damaged(path)
    return summary


def read_verified(folder: Path, name: str, progress: Progress) -> bytes:
    """The bytes of a file that must still be what progress.json says; else a UserError."""
    data = read_bytes(folder / name)
    if hashlib.sha256(data).hexdigest() != progress.sha256.get(name):
        raise damaged(folder / name)
    return data


def read_config(folder: Path, progress: Progress) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(read_verified(folder, CONFIG, progress))
    return config


def read_stream(folder: Path, progress: Progress) -> dict[str, Any]:
    read_verified(folder, STREAM, progress)
    return read_json(folder / STREAM)


def config_bytes(config: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode()


def metrics_bytes(rows: Iterable[MetricRow]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows((e, step, name, repr(value)) for e, step, name, value in rows)
    return text.getvalue().encode()


METRICS_HEADER = b"experience,step,name,value\n"


def read_metrics(folder: Path, progress: Progress) -> bytes:
    """The committed part of metrics.csv; rows written by a save that was cut short are left out."""
    if progress.metrics_bytes == 0:
        return METRICS_HEADER
    data = read_bytes(folder / METRICS)[: progress.metrics_bytes]
    if hashlib.sha256(data).hexdigest() != progress.sha256.get(METRICS):
        raise damaged(folder / METRICS)
    return data


def matrix_bytes(R: FloatArray) -> bytes:
    """R (T, T) as a table of T rows; cells above the diagonal stay empty."""
    lines = ["experience," + ",".join(f"group{i}" for i in range(len(R)))]
    for t, row in enumerate(R):
        cells = [repr(float(value)) for value in row[: t + 1]] + [""] * (len(R) - t - 1)
        lines.append(",".join([str(t), *cells]))
    return ("\n".join(lines) + "\n").encode()


def read_matrix(folder: Path, progress: Progress) -> FloatArray:
    """The committed rows of accuracy_matrix.csv -> (evaluated, evaluated), NaN above the diagonal.

    A save that was cut short may have left one row more; the committed rows alone are hashed.
    """
    T = progress.evaluated
    R = np.full((T, T), np.nan)
    if T == 0:
        return R
    path = folder / MATRIX
    try:
        rows = read_bytes(path).decode().splitlines()[1 : T + 1]
        for t in range(T):
            R[t, : t + 1] = [float(cell) for cell in rows[t].split(",")[1 : t + 2]]
    except (ValueError, IndexError) as error:
        raise damaged(path) from error
    if hashlib.sha256(matrix_bytes(R)).hexdigest() != progress.sha256.get(MATRIX):
        raise damaged(path)
    return R


def checkpoint(experience: int) -> str:
    """The name, within the run folder, of what was saved after an experience."""
    return f"{CHECKPOINTS}/experience{experience}.pt"


def newest_checkpoint(progress: Progress) -> str:
    """Its name within the run folder; ValueError before the first experience is learned."""
    if not progress.learned:
        raise ValueError("no experience has been learned yet")
    return checkpoint(progress.learned - 1)


def read_explanations(folder: Path) -> "pd.DataFrame":
    """explanations/ as one table with the column experience; empty where there is none."""
    import pandas as pd

    paths = sorted((folder / EXPLANATIONS).glob("*.csv"), key=lambda path: (len(path.name), path))
    return pd.concat([read_table(path) for path in paths]) if paths else pd.DataFrame()


def read_table(path: Path) -> "pd.DataFrame":
    """A CSV file; UserError when it is missing or damaged."""
    import pandas as pd

    try:
        return pd.read_csv(io.BytesIO(read_bytes(path)))
    except ValueError as error:
        raise damaged(path) from error
