"""The loop over experiences, the same for every method: learn, evaluate, record, resume."""

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from cil import drift, metrics, parallel, showing
from cil.config import SamplesConfig, TrainerConfig
from cil.explain import Explainable
from cil.methods.method import Generative, Lasting, Method
from cil.methods.scoring import score
from cil.methods.seeding import seed_all
from cil.methods.training import find_device
from cil.records import RunRecord
from cil.showing import group_name
from cil.streams.image_scan import named
from cil.streams.stream import Experience, Stream
from cil.tracking import Tracker

PACE = "cl/milliseconds_an_image"  # of the evaluation, all classes seen so far
Scored = list[Tensor]  # scores (N, classes) of each class group's images that will never change
# For sweeps: W&B takes the best value of a run for its result, and accuracy is best at first.
ACCUMULATED = "cl/accumulated_accuracy"


def run(
    build: Callable[[], Method],
    stream: Stream,
    record: RunRecord | None,
    tracker: Tracker,
    settings: TrainerConfig,
    seed: int,
    samples: SamplesConfig | None = None,
) -> None:
    """Take a method through the stream, from wherever `record` left off, to its summary.

    Of several devices the first holds the record, the others follow it with None. Every experience
    is seeded for itself, so that a run resumed between two of them draws the same random numbers as
    one that was never interrupted. Methods that can draw images do so after each experience, unless
    `samples` is None.
    """
    seed_all(seed)
    stream.mark_unreadable(())  # what another run met on the same stream is none of this one's
    method = build()
    scored: Scored = []
    learned, evaluated = parallel.broadcast(record and (record.learned, record.evaluated))
    if learned:
        method.load_state(parallel.broadcast(record and record.load_state()))
    for experience in stream.experiences[evaluated:]:
        if experience.index >= learned:
            seed_all(seed, experience.index)
            _learn(method, stream, experience, record, tracker)
        if samples is not None and samples.per_class and isinstance(method, Generative):
            index = experience.index
            showing.draw_samples(method, stream, index, record, tracker, settings, samples)
        scored = _evaluate(method, stream, experience.index, record, tracker, settings, scored)
    if record is not None:
        _finish(method, stream, record, tracker)


def _learn(
    method: Method,
    stream: Stream,
    experience: Experience,
    record: RunRecord | None,
    tracker: Tracker,
) -> None:
    last_step = 0

    def log(step: int, values: Mapping[str, float]) -> None:
        nonlocal last_step
        if record is None:
            return
        last_step = max(last_step, step)
        record.log(experience.index, record.steps + step, values)
        tracker.log_step(record.steps + step, values)

    began = time.perf_counter()
    saved = 0.0
    if method.distributed or parallel.is_first():
        saved = method.learn(experience, log)
    seconds = time.perf_counter() - began + saved
    _report_unreadable(stream, record, f"{method.name} learning {experience.index + 1}")
    if record is not None:
        record.save_learned(experience.index, method.state(), last_step + 1, seconds)
    if not method.distributed:
        _hand_on(method)


def _hand_on(method: Method) -> None:
    """The state of the first device's method to the others, where it did not learn."""
    if parallel.world() == 1:
        return
    state = parallel.broadcast(method.state() if parallel.is_first() else None)
    if not parallel.is_first():
        method.load_state(state)


def _evaluate(
    method: Method,
    stream: Stream,
    index: int,
    record: RunRecord | None,
    tracker: Tracker,
    settings: TrainerConfig,
    scored: Scored,
) -> Scored:
    """One row of the accuracy matrix: every class group seen, over all classes seen.

    `scored` is what the evaluation before it has returned: the scores that last.
    """
    results, seconds = _scores(method, stream.experiences[: index + 1], settings, scored)
    lasting = method.lasting if isinstance(method, Lasting) else 0
    scored = [scores[:, :lasting] for scores, _ in results] if lasting else []
    _report_unreadable(stream, record, f"{method.name} evaluation {index + 1}")
    if record is None:
        return scored
    row = [(scores.argmax(1) == labels).double().mean().item() for scores, labels in results]
    sizes = [len(labels) for _, labels in results]
    accuracy = sum(a * n for a, n in zip(row, sizes, strict=True)) / sum(sizes)
    values = {
        "cl/accuracy": accuracy,
        ACCUMULATED: _accumulated(record, accuracy, len(stream.experiences)),
        "cl/classes": float(method.classes_seen),
        PACE: 1000 * seconds,
    }
    values |= {f"cl/accuracy_group{i}": accuracy for i, accuracy in enumerate(row)}
    if isinstance(method, Explainable) and method.classes_seen > 1:
        probed = stream.experiences[0].test
        record.save_explanations(index, drift.reasons(method, probed, find_device(settings)))
        change = drift.change(record.explanations(), method.tokenizer.scales)
        if change is not None:
            values["explanations/drift"] = change
    record.log(index, record.steps - 1, values)
    if index == len(stream.experiences) - 1:
        record.save_predictions(_predictions(results, stream))
    record.save_evaluated(index, row, sizes)
    tracker.log_experience(index, values)
    return scored


def _accumulated(record: RunRecord, accuracy: float, experiences: int) -> float:
    """The accuracies so far as a share of the stream: it grows to the average incremental one."""
    if record.evaluated:
        accuracy += metrics.accuracy_curve(record.matrix(), record.test_sizes).sum()
    return accuracy / experiences


def _report_unreadable(stream: Stream, record: RunRecord | None, occasion: str) -> None:
    """Note and say which images could not be decoded, on whichever device."""
    names = list(dict.fromkeys(itertools.chain(*parallel.gather(stream.unreadable()))))
    stream.mark_unreadable(())
    if names and record is not None:
        record.note_unreadable(names)
        print(
            f"warning: {occasion}: images that could not be decoded: {len(names)} "
            f"({named(names)}); others of their class stood in.",
            file=sys.stderr,
        )


def score_groups(
    method: Method, experiences: Sequence[Experience], settings: TrainerConfig
) -> list[tuple[Tensor, Tensor]]:
    """(scores (N, classes seen), labels (N,)) on the test images of each class group.

    Each group is scored in batches of its own, so that a later group cannot change even the
    rounding of an earlier one's scores.
    """
    return _scores(method, experiences, settings, [])[0]


def _scores(
    method: Method, experiences: Sequence[Experience], settings: TrainerConfig, scored: Scored
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """The same, and the seconds an image took under all classes.

    Images of the first groups are scored under the classes alone that `scored` does not hold.
    """
    title = f"{method.name} evaluation {len(experiences)}"
    earlier, others = experiences[: len(scored)], experiences[len(scored) :]
    began = time.perf_counter()
    whole = score(method, [e.test for e in others], settings, title)
    seconds = (time.perf_counter() - began) / sum(len(labels) for _, labels in whole)
    if not scored:
        return whole, seconds
    first = scored[0].shape[1]
    newer = score(method, [e.test for e in earlier], settings, title, first)
    known = [(torch.cat([a, b], 1), y) for a, (b, y) in zip(scored, newer, strict=True)]
    return known + whole, seconds


def _finish(method: Method, stream: Stream, record: RunRecord, tracker: Tracker) -> None:
    """The stream-final numbers and the figures."""
    matrix, size = record.matrix(), method.size()
    summary = {
        **metrics.summarise(matrix, record.test_sizes),
        "training_seconds": sum(record.seconds),
        "milliseconds_an_image": record.latest(PACE),
        "parameters": size.parameters,
        "stored_images": size.stored_images,
        "stored_bytes": size.stored_bytes,
        "learning_macs": size.learning_macs,
        "prediction_macs": size.prediction_macs,
        "likelihood_evaluations": size.likelihood_evaluations,
        "unreadable_images": len(record.unreadable),
        "pretrained_on": method.pretrained_on,
        **method.facts(),
    }
    names = [group_name(stream, e) for e in stream.experiences]
    tracker.log_matrix(matrix, record.test_sizes, names)
    predictions = record.predictions()
    labels, predicted = predictions["label"].tolist(), predictions["prediction"].tolist()
    tracker.log_confusion(labels, predicted, stream.class_names[: method.classes_seen])
    for name, path in showing.final_figures(method, stream, record).items():
        tracker.log_figure(name, path)
    tracker.finish(summary)
    record.finish(summary)


def _predictions(results: Sequence[tuple[Tensor, Tensor]], stream: Stream) -> pd.DataFrame:
    """One row a test image: its class group, its place there, its label and the prediction."""
    frames = []
    for group, (scores, labels) in enumerate(results):
        frame = pd.DataFrame({"label": labels.numpy(), "prediction": scores.argmax(1).numpy()})
        frame.insert(0, "image", range(len(frame)))
        frame.insert(0, "group", group)
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    table["class"] = [stream.class_names[label] for label in table["label"]]
    table["predicted_class"] = [stream.class_names[label] for label in table["prediction"]]
    return table
