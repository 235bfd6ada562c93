"""What a run shows of itself: images it draws after each experience, figures at its end.

Files go into the record, before what they belong to is committed, and to W&B.
"""

import time
from pathlib import Path

import numpy as np

from cil import drift, plots, records
from cil.config import SamplesConfig, TrainerConfig
from cil.explain import Explainable
from cil.methods.drawing import as_bytes, drawn
from cil.methods.method import Generative, Method
from cil.records import Images, RunRecord
from cil.streams.stream import Experience, Stream
from cil.tracking import Tracker


def draw_samples(
    method: Generative,
    stream: Stream,
    index: int,
    record: RunRecord | None,
    tracker: Tracker,
    settings: TrainerConfig,
    samples: SamplesConfig,
) -> None:
    """Images of every class seen, the same seeds each time.

    Their seconds stand apart, neither learning's nor the evaluation's.
    """
    began = time.perf_counter()
    groups = [e.labels for e in stream.experiences[: index + 1]]
    images = as_bytes(
        drawn(
            method,
            groups,
            samples.per_class,
            guidance=samples.guidance,
            steps=samples.steps,
            title=f"{method.name} samples {index + 1}",
            progress=settings.progress,
        )
    )
    seconds = time.perf_counter() - began
    if record is None:
        return
    record.save_samples(index, images)
    title = f"{method.name}: drawn after experience {index + 1}, guidance {samples.guidance:g}"
    figure = plots.sample_grid(images, stream.class_names[: len(images)], title)
    path = record.save_figure(f"samples_experience{index}", figure, vector=False)
    values = {"samples/seconds": seconds}
    change = _drift(images, stream, index, record)
    if change is not None:
        values["samples/drift"] = change
    record.log(index, record.steps - 1, values)
    tracker.log_experience(index, values)
    tracker.log_figure("samples", path, index)


def _drift(images: Images, stream: Stream, index: int, record: RunRecord) -> float | None:
    """How far the images of earlier classes are from what was drawn when these were new.

    The mean absolute difference of all pixels, as a share of their range; None for the first
    experience, or where an earlier sitting drew others or none.
    """
    change, values = 0, 0
    for earlier in stream.experiences[:index]:
        before, labels = record.samples(earlier.index, stream.image_size), list(earlier.labels)
        if before is None or before.shape[1:] != images.shape[1:]:
            return None
        now, then = images[labels].astype(np.int16), before[labels]
        change += int(np.abs(now - then).sum())
        values += now.size
    return change / values / 255 if values else None


def final_figures(method: Method, stream: Stream, record: RunRecord) -> dict[str, Path]:
    """Draw the figures of a run that has seen its whole stream; returns their files by name."""
    names, matrix = [group_name(stream, e) for e in stream.experiences], record.matrix()
    title = f"{method.name}: accuracy on each class group"
    figures = {"accuracy_matrix": plots.accuracy_matrix(matrix, names, title)}
    predictions, classes = record.predictions(), method.classes_seen
    counts_CC = np.zeros((classes, classes), np.int64)
    np.add.at(counts_CC, (predictions["label"], predictions["prediction"]), 1)
    figures["confusion"] = plots.confusion(
        counts_CC,
        stream.class_names[:classes],
        [len(e.labels) for e in stream.experiences],
        f"{method.name}: which class is taken for which",
    )
    reasons = record.explanations()
    if isinstance(method, Explainable) and not reasons.empty:
        figures["explanations"] = drift.figure(
            reasons,
            stream.experiences[0].test,
            stream.class_names,
            method.tokenizer.scales,
            matrix[:, 0].tolist(),
            f"{method.name}: what speaks for a class after each experience",
        )
    paths = {name: record.save_figure(name, figure) for name, figure in figures.items()}
    over = _samples_over_experiences(method.name, stream, record)
    return paths if over is None else paths | {"samples_over_experiences": over}


def _samples_over_experiences(name: str, stream: Stream, record: RunRecord) -> Path | None:
    """One image of every class as it was drawn after each experience, where that was done."""
    sheets = [record.samples(e.index, stream.image_size) for e in stream.experiences]
    last = sheets[-1]
    if last is None or any(sheet is None for sheet in sheets):
        return None
    images = np.full((len(last), len(sheets), *last.shape[2:]), 255, np.uint8)
    for t, sheet in enumerate(sheets):
        assert sheet is not None
        images[: len(sheet), t] = sheet[:, 0]
    title = f"{name}: one seed, after each experience"
    after = [str(t + 1) for t in range(len(sheets))]
    figure = plots.sample_grid(images, stream.class_names[: len(last)], title, after)
    return record.save_figure("samples_over_experiences", figure, vector=False)


def group_name(stream: Stream, experience: Experience) -> str:
    """The names of a group's classes, shortened to the first and last when there are many."""
    return records.group_name([stream.class_names[label] for label in experience.labels])
