"""The loop over experiences: what it records, and that an interrupted run ends like any other."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from cil import metrics, protocol
from cil.config import DiscriminativeConfig, TrainerConfig
from cil.methods.discriminative import Discriminative
from cil.methods.method import Method
from cil.methods.var import VARMethod
from cil.records import RunRecord
from cil.streams.stream import Stream
from cil.tracking import Tracker

pytestmark = pytest.mark.integration  # every test trains something

SEED = 3
TIMES = {"training_seconds", "milliseconds_an_image"}


@dataclass(frozen=True)
class Setup:
    """A stream, and what builds a method for it."""

    stream: Stream
    build: Callable[[], Method]
    trainer: TrainerConfig


class Interrupted(RunRecord):
    """Dies right after one of its saves, as a process does that is killed there."""

    dies_after: tuple[str, int]

    def save_learned(
        self, experience: int, state: Mapping[str, Any], steps: int, seconds: float
    ) -> None:
        super().save_learned(experience, state, steps, seconds)
        self._die("save_learned", experience)

    def save_evaluated(self, experience: int, row: Any, sizes: Any) -> None:
        super().save_evaluated(experience, row, sizes)
        self._die("save_evaluated", experience)

    def save_predictions(self, frame: pd.DataFrame) -> None:
        super().save_predictions(frame)
        self._die("save_predictions", 2)

    def save_figure(self, name: str, figure: Any) -> Path:
        path = super().save_figure(name, figure)
        self._die("save_figure", 2)
        return path

    def _die(self, where: str, experience: int) -> None:
        if self.dies_after == (where, experience):
            raise KeyboardInterrupt


class Listener(Tracker):
    """Notes what a tracker is told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.steps: list[int] = []
        self.experiences: list[int] = []
        self.summary: dict[str, Any] = {}

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def log_experience(self, experience: int, values: Mapping[str, float]) -> None:
        self.experiences.append(experience)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.summary = dict(summary)


def opened(folder: Path, stream: Stream, cls: type[RunRecord] = RunRecord) -> RunRecord:
    description = {"name": stream.name, "fingerprint": stream.fingerprint}
    return cls.open(folder, {"seed": SEED}, description, {"commit": "unknown"})


def run(setup: Setup, record: RunRecord, tracker: Tracker) -> None:
    protocol.run(setup.build, setup.stream, record, tracker, setup.trainer, SEED)


@dataclass(frozen=True)
class Result:
    folder: Path
    matrix: np.ndarray
    sizes: list[int]
    metrics: pd.DataFrame
    predictions: pd.DataFrame
    summary: dict[str, Any]
    listener: Listener


def result(folder: Path, setup: Setup, listener: Listener) -> Result:
    with opened(folder, setup.stream) as record:
        assert record.finished
        matrix, sizes, summary = record.matrix(), record.test_sizes, record.summary()
    tables = [pd.read_csv(folder / name) for name in ("metrics.csv", "predictions.csv")]
    return Result(folder, matrix, sizes, *tables, summary, listener)


@pytest.fixture(scope="module")
def setups(
    tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, tmp_path_factory
) -> dict[str, Setup]:
    cache = tmp_path_factory.mktemp("cache")

    def var() -> Method:
        sizes = (tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache)
        return VARMethod("var", tiny_stream, *sizes)

    builds: dict[str, Callable[[], Method]] = {
        "finetune": lambda: finetune(tiny_stream),
        "var": var,
    }
    return {name: Setup(tiny_stream, build, quiet_cpu) for name, build in builds.items()}


@pytest.fixture(scope="module")
def wholes(setups, tmp_path_factory) -> dict[str, Result]:
    """A run of each method from beginning to end."""
    results = {}
    for name, setup in setups.items():
        folder, listener = tmp_path_factory.mktemp("runs") / name, Listener()
        with opened(folder, setup.stream) as record:
            run(setup, record, listener)
        results[name] = result(folder, setup, listener)
    return results


@pytest.fixture(params=["finetune", "var"])
def name(request) -> str:
    return request.param


@pytest.fixture
def setup(setups, name) -> Setup:
    return setups[name]


@pytest.fixture
def whole(wholes, name) -> Result:
    return wholes[name]


def finetune(stream: Stream) -> Discriminative:
    return Discriminative(
        "finetune",
        stream,
        DiscriminativeConfig(epochs=2, batch_size=16, lr=5e-3),
        Path("cache"),  # which it does not use
        device=torch.device("cpu"),
        show_progress=False,
    )


def test_the_matrix_has_a_row_an_experience(whole):
    assert whole.matrix.shape == (3, 3)
    assert np.array_equal(np.isnan(whole.matrix), np.triu(np.ones((3, 3), bool), 1))
    assert whole.sizes == [40, 40, 40]
    seen = whole.matrix[~np.isnan(whole.matrix)]
    assert ((seen >= 0) & (seen <= 1)).all()
    assert len(set(seen)) > 1


def test_the_matrix_is_what_the_scores_say(setup, whole):
    """The last row, from the method's state and plain scores in other batches."""
    with opened(whole.folder, setup.stream) as record:
        state = record.load_state()
    method = setup.build()
    method.load_state(state)
    for group, experience in enumerate(setup.stream.experiences):
        images = torch.stack([image for image, _ in experience.test])
        predicted = torch.cat([method.scores(part).argmax(1) for part in images.split(7)])
        hits = predicted == torch.tensor(experience.test.targets)
        accuracy = hits.double().mean().item()
        assert accuracy == pytest.approx(whole.matrix[2, group], abs=0.026)  # one near-tie


def test_predictions_are_those_of_the_last_row(setup, whole):
    table = whole.predictions
    hits = (table["label"] == table["prediction"]).groupby(table["group"]).mean()
    assert hits.tolist() == pytest.approx(whole.matrix[2].tolist(), abs=1e-12)
    names = setup.stream.class_names
    assert [names[label] for label in table["label"]] == table["class"].astype(str).tolist()
    predicted = table["predicted_class"].astype(str)
    assert [names[label] for label in table["prediction"]] == predicted.tolist()
    for group, experience in enumerate(setup.stream.experiences):
        rows = table[table["group"] == group]
        assert rows["label"].tolist() == list(experience.test.targets)
        assert rows["image"].tolist() == list(range(len(rows)))


def test_the_summary_is_that_of_the_matrix(setup, whole):
    expected = metrics.summarise(whole.matrix, whole.sizes)
    assert {name: whole.summary[name] for name in expected} == expected
    method = setup.build()
    assert whole.summary["pretrained_on"] == method.pretrained_on == "nothing"
    assert whole.summary["parameters"] > 1000
    assert whole.summary["stored_images"] == 0
    evaluations = {"finetune": 0, "var": 6 * 4}[method.name]  # classes, copies
    assert whole.summary["likelihood_evaluations"] == evaluations
    assert whole.summary["training_seconds"] > 0
    assert whole.listener.summary == whole.summary
    figures = {path.stem for path in (whole.folder / "figures").glob("*.png")}
    assert {"accuracy_matrix", "confusion"} <= figures


def test_steps_count_along_the_stream(setup, whole):
    with opened(whole.folder, setup.stream) as record:
        steps = record.steps
    trained = whole.metrics[~whole.metrics["name"].str.startswith("cl/")]
    assert trained["step"].is_monotonic_increasing
    for metric, rows in trained.groupby("name"):
        assert rows["step"].is_unique, metric
    ends = trained.groupby("experience")["step"].max().tolist()
    begins = trained.groupby("experience")["step"].min().tolist()
    # 60 images in batches of 16, twice; or the tokenizer's and the trunk's steps, then a group's.
    expected = {"finetune": [8, 16, 24], "var": [42, 54, 66]}[setup.build().name]
    assert [end + 1 for end in ends] == expected
    assert begins[1:] == expected[:-1]
    assert steps == expected[-1]
    assert whole.listener.steps == sorted(whole.listener.steps)
    assert set(whole.listener.steps) == set(trained["step"])


def test_every_evaluation_is_logged_at_the_last_step_learned(setup, whole):
    evaluated = whole.metrics[whole.metrics["name"].str.startswith("cl/")]
    ends = whole.metrics[~whole.metrics["name"].str.startswith("cl/")]
    ends = ends.groupby("experience")["step"].max()
    values = evaluated.set_index(["experience", "name"])["value"]
    for t in range(3):
        assert set(evaluated[evaluated["experience"] == t]["step"]) == {ends[t]}
        row = whole.matrix[t, : t + 1]
        assert [values[t, f"cl/accuracy_group{i}"] for i in range(t + 1)] == row.tolist()
        assert values[t, "cl/accuracy"] == pytest.approx(row.mean())  # groups of one size
        assert values[t, "cl/classes"] == 2 * t + 2
        assert values[t, protocol.PACE] > 0
        accuracies = [values[k, "cl/accuracy"] for k in range(t + 1)]
        assert values[t, protocol.ACCUMULATED] == pytest.approx(sum(accuracies) / 3)
    final = whole.summary["average_incremental_accuracy"]
    assert values[2, protocol.ACCUMULATED] == pytest.approx(final)
    assert whole.summary["milliseconds_an_image"] == values[2, protocol.PACE]
    assert whole.listener.experiences == [0, 1, 2]


@pytest.mark.parametrize("plasticity", ["adapter", "trunk"])
def test_scores_that_last_are_computed_once(
    plasticity, setups, tiny_var_config, tiny_tokenizer_config, quiet_cpu, tmp_path, monkeypatch
):
    stream, asked = setups["var"].stream, []

    class Noting(VARMethod):
        def scores(self, images, first=0, **options):
            if len(images) == 40:  # a group's test images; fewer of them are explained as well
                asked.append((self.classes_seen, first))
            return super().scores(images, first, **options)

    class Forgetful(Noting):
        lasting = 0

    sizes = (tiny_tokenizer_config, replace(tiny_var_config, plasticity=plasticity), quiet_cpu)
    matrices, answers = [], []
    for cls in (Noting, Forgetful):
        asked.clear()
        setup = Setup(stream, lambda cls=cls: cls("var", stream, *sizes, tmp_path), quiet_cpu)
        with opened(tmp_path / cls.__name__, stream) as record:
            run(setup, record, Tracker(None))
            matrices.append(record.matrix())
            answers.append(record.predictions())
        counts = Counter(asked)
        every = {(2, 0): 1, (4, 0): 2, (6, 0): 3}
        once = {(2, 0): 1, (4, 0): 1, (4, 2): 1, (6, 0): 1, (6, 4): 2}
        lasts = cls is Noting and plasticity == "adapter"
        assert counts == (once if lasts else every)
    assert np.array_equal(*matrices, equal_nan=True)
    pd.testing.assert_frame_equal(*answers)


def timeless(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["name"] != protocol.PACE].reset_index(drop=True)


COMMITS = [
    ("finetune", "save_learned", 0),
    ("finetune", "save_evaluated", 0),
    ("finetune", "save_learned", 1),
    ("finetune", "save_evaluated", 1),
    ("finetune", "save_learned", 2),
    ("finetune", "save_predictions", 2),
    ("finetune", "save_evaluated", 2),
    ("var", "save_learned", 0),
    ("var", "save_evaluated", 1),
    ("var", "save_figure", 2),
]


@pytest.mark.parametrize(("name", "save", "experience"), COMMITS, indirect=["name"])
def test_a_run_cut_short_ends_with_the_same_numbers(setup, whole, tmp_path, save, experience):
    folder, listener = tmp_path / "cut", Listener()
    with opened(folder, setup.stream, Interrupted) as record:
        record.dies_after = (save, experience)
        with pytest.raises(KeyboardInterrupt):
            run(setup, record, listener)
        assert not record.finished
        assert record.learned == experience + 1
    torch.manual_seed(99)  # another process knows nothing of the first one's generators
    with opened(folder, setup.stream) as record:
        run(setup, record, listener)
    resumed = result(folder, setup, listener)
    assert np.array_equal(resumed.matrix, whole.matrix, equal_nan=True)
    assert resumed.predictions.equals(whole.predictions)
    pd.testing.assert_frame_equal(
        timeless(resumed.metrics), timeless(whole.metrics), check_exact=True
    )
    assert {k: v for k, v in resumed.summary.items() if k not in TIMES} == {
        k: v for k, v in whole.summary.items() if k not in TIMES
    }
    assert listener.steps == whole.listener.steps  # nothing learned was learned again


def test_a_run_that_dies_while_learning_learns_that_experience_again(setup, whole, tmp_path):
    class Dies(Listener):
        def log_step(self, step: int, values: Mapping[str, float]) -> None:
            super().log_step(step, values)
            if step >= max(whole.listener.steps) - 5:
                raise OSError("the power went")

    folder = tmp_path / "cut"
    with opened(folder, setup.stream) as record, pytest.raises(OSError, match="power"):
        run(setup, record, Dies())
    with opened(folder, setup.stream) as record:
        assert (record.learned, record.evaluated) == (2, 2)
        run(setup, record, Listener())
    resumed = result(folder, setup, whole.listener)
    assert np.array_equal(resumed.matrix, whole.matrix, equal_nan=True)
    pd.testing.assert_frame_equal(
        timeless(resumed.metrics), timeless(whole.metrics), check_exact=True
    )


def test_another_seed_gives_another_run(setups, wholes, tmp_path):
    setup = setups["finetune"]
    with opened(tmp_path / "run", setup.stream) as record:
        protocol.run(setup.build, setup.stream, record, Tracker(None), setup.trainer, seed=SEED + 1)
    tables = timeless(pd.read_csv(tmp_path / "run" / "metrics.csv")), wholes["finetune"].metrics
    one, other = (table[table["name"] == "train/loss"]["value"].tolist() for table in tables)
    assert len(one) == len(other)
    assert not set(one) & set(other)


def test_group_names_are_shortened_when_there_are_many(tiny_stream):
    experience = tiny_stream.experiences[1]
    assert tiny_stream.class_names == ("3", "0", "5", "1", "4", "2")
    assert protocol.group_name(tiny_stream, experience) == "5, 1"
    wide = replace(experience, labels=(0, 2, 3, 5))
    assert protocol.group_name(tiny_stream, wide) == "3 … 2"
