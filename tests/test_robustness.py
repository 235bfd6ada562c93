"""Accuracy under shift: from finished runs alone, the same images for all, and nothing twice."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import written
from finished import finish
from tiny import TINY, folders

from cil import robustness, run
from cil.config import TrainerConfig
from cil.environment import commit
from cil.errors import UserError
from cil.methods.registry import asked_by, restore
from cil.records import RunView, read_runs
from cil.robustness import CLEAN, MEAN, Shift, by_method, corruptions, evaluate, shift_sets
from cil.streams.corruptions import corrupted
from cil.streams.shift_sets import ilsvrc_classes
from cil.streams.stream import first_of_each
from experiments import robustness as command
from experiments.finished import runs_of

TRAINER = TrainerConfig(accelerator="cpu", progress=False)
SHIFTS = corruptions(["impulse_noise", "contrast"], [1, 5])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny runs of digits, two class groups of two."""
    folder = tmp_path_factory.mktemp("robustness") / "runs"
    options = ["--methods=[var-adapter,joint]", "--stream.stop_after=2", "--seeds=[0,1]"]
    assert run.main(["split_digits", *TINY, *folders(folder), *options]) == 0
    return folder


def view(trained: Path, method: str) -> RunView:
    return next(run for run in read_runs(trained) if run.method == method)


# --- corruptions ---


@pytest.mark.integration
@pytest.mark.parametrize("method", ["var-adapter", "joint"])
def test_accuracy_is_that_of_the_finished_method(
    trained: Path, method: str, tmp_path: Path
) -> None:
    found = view(trained, method)
    frame = evaluate(found, SHIFTS, TRAINER, tmp_path)
    asked, stream = restore(found, TRAINER, tmp_path)
    right, clean = [], []
    for experience in stream.experiences:
        for image, label in experience.test:
            both = torch.stack([corrupted(image, "impulse_noise", 5), image])
            predicted = asked.scores(both).argmax(1)
            right.append(bool(predicted[0] == label))
            clean.append(bool(predicted[1] == label))
    values = frame.set_index(["shift", "severity"])
    assert values.loc[("impulse_noise", 5), "accuracy"] == pytest.approx(np.mean(right), abs=0.006)
    assert values.loc[(CLEAN, 0), "accuracy"] == pytest.approx(np.mean(clean), abs=0.006)
    assert set(frame["images"]) == {len(right)}
    assert set(frame["method"]) == {method}


@pytest.mark.integration
def test_what_was_evaluated_is_not_evaluated_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = view(trained, "joint")
    calls: list[str] = []
    score = robustness.score

    def counted(*arguments: object, **options: object) -> object:
        calls.append(str(arguments[-1]))
        return score(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(robustness, "score", counted)
    first = evaluate(found, SHIFTS[:1], TRAINER, tmp_path)
    evaluate(found, SHIFTS, TRAINER, tmp_path)
    again = evaluate(found, SHIFTS, TRAINER, tmp_path)
    assert calls == ["joint impulse_noise 1", "joint impulse_noise 5", "joint contrast 1",
                     "joint contrast 5"]  # fmt: skip
    pd.testing.assert_frame_equal(again.iloc[:2], first)


@pytest.mark.integration
def test_some_images_can_be_read_by_another_schedule(trained: Path, tmp_path: Path) -> None:
    found = view(trained, "var-adapter")
    asked = asked_by(found, {"var.smoothing_samples": 1, "diffusion.schedule": [[2, 1]]})
    assert asked.config["var"]["smoothing_samples"] == 1
    assert "diffusion" not in asked.config
    shifts = [Shift(CLEAN, per_class=3), *corruptions(["contrast"], [5], per_class=3)]
    frame = evaluate(asked, shifts, TRAINER, tmp_path)
    assert list(zip(frame["shift"], frame["images"], strict=True)) == [
        (CLEAN, 12),
        ("contrast", 12),
    ]
    method, stream = restore(asked, TRAINER, tmp_path)
    assert method.settings.smoothing_samples == 1
    right = []
    for experience in stream.experiences:
        for row in first_of_each(experience.test.targets, 3):  # type: ignore[attr-defined]
            image, label = experience.test[row]
            right.append(int(method.scores(image[None]).argmax(1)) == label)
    assert frame["accuracy"][0] == pytest.approx(np.mean(right))
    joint = view(trained, "joint")
    assert asked_by(joint, {"var.schedule": "a_varc"}).config == joint.config


@pytest.mark.integration
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"var.schedul": "a_varc"}, "did you mean var.schedule"),
        ({"var.depth": 3}, "no setting of classification"),
        ({"var.schedule": "a_var"}, "must be one of varc, a_varc, adaptive"),
        ({"var.schedule": "adaptive"}, "cannot be adaptive"),
        ({"var.schedule": ["varc"]}, "--set gives var.schedule as"),
        ({"var.smoothing_samples": "two"}, "must be int"),
    ],
)
def test_what_is_no_setting_of_classification_is_refused(
    trained: Path, values: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        asked_by(view(trained, "var-adapter"), values)


def test_the_table_is_the_mean_over_severities_then_over_seeds() -> None:
    rows = [
        ("joint", seed, shift, severity, accuracy, 10)
        for seed, accuracies in enumerate([(1.0, 0.8, 0.4, 0.2, 0.3), (0.9, 0.6, 0.4, 0.4, 0.5)])
        for (shift, severity), accuracy in zip(
            [(CLEAN, 0), ("fog", 1), ("fog", 5), ("contrast", 1), ("imagenet-r", 0)],
            accuracies,
            strict=True,
        )
    ]
    columns = ["method", "seed", "shift", "severity", "accuracy", "images"]
    table = by_method(pd.DataFrame(rows, columns=columns))
    assert list(table.columns.get_level_values(0).unique()) == [
        CLEAN,
        "fog",
        "contrast",
        MEAN,
        "imagenet-r",
    ]
    means = table.loc["joint"].xs("mean", level=1)
    # Seed 0: fog 0.6, contrast 0.2, mean 0.4; seed 1: 0.5, 0.4, 0.45.
    assert means.tolist() == pytest.approx([0.95, 0.55, 0.3, 0.425, 0.4])
    assert table.loc["joint", (MEAN, "std")] == pytest.approx(np.std([0.4, 0.45], ddof=1))


# --- other test sets ---


@pytest.fixture(scope="module")
def of_wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four of ImageNet's classes, and sets of three of them."""
    folder = tmp_path_factory.mktemp("sets")
    names = [ilsvrc_classes()[i] for i in (3, 40, 300, 999)]
    written.image_folder(folder / "pictures", names, train=5, test=2, side=16)
    written.image_folder(folder / "imagenet-r", names[1:], train=0, test=2, side=16)
    written.image_folder(folder / "c" / "fog", names[:1], train=0, test=2, side=16)
    (folder / "c" / "fog" / "val").rename(folder / "c" / "fog" / "2")
    options = [f"--stream.root={folder / 'pictures'}", "--stream.validation=0.2",
               "--stream.image_size=16", "--methods=[finetune]"]  # fmt: skip
    line = ["split_image_folder", *TINY, *folders(folder / "runs"), *options]
    assert run.main(line) == 0
    return folder


@pytest.mark.integration
def test_a_set_is_restricted_to_the_classes_of_the_run(of_wordnet: Path, tmp_path: Path) -> None:
    (found,) = read_runs(of_wordnet / "runs")
    kinds = {"imagenet-r": of_wordnet / "imagenet-r" / "val", "imagenet-c": of_wordnet / "c"}
    shifts = shift_sets(kinds, found, tmp_path)
    assert [(shift.name, shift.severity) for shift in shifts] == [
        ("imagenet-r", 0),
        ("imagenet-c/fog", 2),
    ]
    assert shifts[0].found is not None
    assert shifts[0].found.missing == (ilsvrc_classes()[3],)
    frame = evaluate(found, shifts, TRAINER, tmp_path)
    assert frame["images"].tolist() == [8, 6, 2]
    # Its images are those that the run was tested on, so that the predictions must agree.
    known = found.predictions()
    known = known[known["class"] != ilsvrc_classes()[3]]
    expected = (known["label"] == known["prediction"]).mean()
    assert frame.loc[1, "accuracy"] == pytest.approx(expected)


# --- the command ---


def ask(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["robustness", *map(str, words)])
    return run.exit_code(command.main)


@pytest.mark.integration
def test_the_table_is_written_from_the_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cache = tmp_path / "table", f"--cache={tmp_path / 'cache'}"
    options = ["--corruptions", "contrast", "fog", "--severities", "1", "5"]
    assert ask(monkeypatch, trained / "split_digits", *options, cache, f"--name={place}") == 0
    numbers = pd.read_csv(place.with_suffix(".csv"))
    assert len(numbers) == 2 * 2 * 5  # methods, seeds, clean and two corruptions at two severities
    text = place.with_suffix(".md").read_text()
    assert f"Evaluated at commit {commit()}" in text
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    assert cells[0] == ["method", CLEAN, "contrast", "fog", MEAN]
    values = numbers[(numbers["method"] == "joint") & (numbers["shift"] == "fog")]
    seeds = values.groupby("seed")["accuracy"].mean()
    (joint,) = [row for row in cells if row[0] == "joint"]
    assert joint[3] == f"{100 * seeds.mean():.1f}±{100 * seeds.std():.1f}"
    assert "Severities [1, 5]." in text
    assert "<svg" in place.with_suffix(".svg").read_text()


@pytest.mark.integration
def test_a_set_alone_is_a_table_and_names_what_it_lacks(
    of_wordnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = f"imagenet-r={of_wordnet / 'imagenet-r' / 'val'}"
    words = ["--corruptions", "--sets", sets, f"--cache={tmp_path}", f"--name={tmp_path / 'table'}"]
    assert ask(monkeypatch, of_wordnet / "runs", *words) == 0
    text = (tmp_path / "table.md").read_text()
    assert f"imagenet-r has no image of 1 of the classes: {ilsvrc_classes()[3]}." in text
    assert not (tmp_path / "table.svg").exists()


# --- bad input ---


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--corruptions", "rain"], "There is no corruption 'rain'"),
        (["--severities", "6"], "There is no severity 6"),
        (["--corruptions"], "Nothing to evaluate"),
        (["--sets", "imagenet-r"], "sets are written KIND=FOLDER"),
        (["--sets", "imagenet-r=nowhere"], "There is no folder nowhere for imagenet-r"),
        (["--sets", "imagenet-r=."], "known by their WordNet ids"),
        (["--methods", "none"], "no finished run of 'none': there are those of joint, var-adapter"),
        (["--methods", "joint", "var-adaptor"], "of 'var-adaptor': did you mean var-adapter?"),
        (["--set", "var.schedule"], "settings are written KEY=VALUE"),
        (["--set", "var.depth=3"], "var.depth is no setting of classification"),
        (["--set", "var.schedule=2024-99-99"], "settings are written KEY=VALUE"),
        (["--set", "var.schedule=varc", "--set", "var.schedule=a_varc"], "var.schedule twice"),
        (["--per_class", "0"], "--per_class is 0"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str],
    sentence: str,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ask(monkeypatch, trained / "split_digits", *words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said


@pytest.mark.integration
def test_runs_of_several_experiments_are_refused(trained: Path, of_wordnet: Path) -> None:
    both = [*read_runs(trained), *read_runs(of_wordnet / "runs")]
    with pytest.raises(UserError, match="several experiments"):
        robustness.check_one_experiment(both, trained)


def test_runs_of_two_settings_are_no_seeds_of_one_method(tmp_path: Path) -> None:
    for seed, lr in ((0, 0.1), (1, 0.2)):
        folder = tmp_path / "split_digits" / "finetune" / f"seed{seed}"
        finish(folder, 0.5, settings={"discriminative": {"lr": lr}})
    with pytest.raises(UserError, match=r"finetune differ in discriminative\.lr, which is 0\.1 in"):
        runs_of(Namespace(runs=tmp_path, methods=[]))


@pytest.mark.integration
@pytest.mark.parametrize("fact", ["experiences", "evaluated_on"])
def test_runs_of_other_lengths_or_images_are_refused(trained: Path, fact: str) -> None:
    one, *others = read_runs(trained)
    robustness.check_one_experiment([one, *others], trained)
    other = replace(one, method="other", stream={**one.stream, fact: one.stream[fact][:1]})
    with pytest.raises(UserError, match=f"other seed 0 has not learned .* that {one.method} has"):
        robustness.check_one_experiment([one, *others, other], trained)
