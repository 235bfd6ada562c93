"""Seen against unseen: the scores worked by hand, and runs asked as they were in between."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TINY, folders
from torch import Tensor

from cil import ood, run
from cil.config import TrainerConfig
from cil.environment import commit
from cil.errors import UserError
from cil.methods.registry import restore
from cil.ood import SCORES, auroc, evaluate, familiarity
from cil.records import RunView, read_runs
from experiments import asking
from experiments import ood as command

TRAINER = TrainerConfig(accelerator="cpu", progress=False)
METHODS = "--methods=[var-adapter,var-trunk,var-scratch,diffusion-adapter,finetune]"


# --- the scores, by hand ---


def test_the_scores_of_two_images() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    scores = familiarity(logits, torch.tensor([math.log(2.0), math.log(4.0)]))
    assert tuple(scores) == SCORES
    # Minus the odds against the best class: 1/3 and 1; the softmax is 1 / (1 + odds).
    assert scores["msp"].tolist() == pytest.approx([-1 / 3, -1.0])
    assert scores["max_logit"].tolist() == pytest.approx([math.log(3.0), 0.0])
    assert scores["energy"].tolist() == pytest.approx([math.log(4.0), math.log(2.0)])
    assert scores["ratio"].tolist() == pytest.approx([math.log(2.0), -math.log(2.0)])
    assert "ratio" not in familiarity(logits)


def test_max_softmax_orders_images_that_a_softmax_rounds_to_one() -> None:
    logits = torch.tensor([[0.0, -400.0, -500.0], [-300.0, 0.0, -900.0], [0.0, -390.0, -390.0]])
    assert (logits.double().softmax(1).max(1).values == 1).all()
    assert familiarity(logits)["msp"].argsort().tolist() == [1, 2, 0]


def test_msp_is_in_the_order_of_the_softmax() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    softmax = logits.softmax(1).max(1).values
    assert torch.equal(familiarity(logits)["msp"].argsort(), softmax.double().argsort())


def test_auroc_counts_pairs() -> None:
    seen, unseen = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0, 3.0])
    # 3 beats 2 and 0 and ties with 3; 1 beats 0: 3.5 of 6 pairs.
    assert auroc(seen, unseen) == pytest.approx(3.5 / 6)


# --- runs ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny runs of digits, three class groups of two."""
    folder = tmp_path_factory.mktemp("ood") / "runs"
    options = [METHODS, "--tuned={}", "--stream.stop_after=3", "--trainer.keep_checkpoints=true"]
    assert run.main(["split_digits", *TINY, *folders(folder), *options]) == 0
    return folder


def view(trained: Path, method: str) -> RunView:
    return next(run for run in read_runs(trained) if run.method == method)


def logits_then(found: RunView, t: int, cache: Path) -> tuple[Tensor, int]:
    """The scores that a method gives all test images, as it was after experience t."""
    method, stream = restore(found, TRAINER, cache)
    method.load_state(found.state(t))
    images = [torch.stack([image for image, _ in e.test]) for e in stream.experiences]
    ask = getattr(method, "class_and_null_likelihoods", method.scores)
    return torch.cat([ask(part) for part in images]), sum(len(p) for p in images[: t + 1])


@pytest.mark.integration
@pytest.mark.parametrize(
    "method", ["var-adapter", "var-trunk", "var-scratch", "diffusion-adapter", "finetune"]
)
def test_a_run_is_asked_as_it_was_after_each_experience(
    trained: Path, method: str, tmp_path: Path
) -> None:
    found = view(trained, method)
    frame = evaluate(found, TRAINER, tmp_path)
    assert sorted(set(frame["experience"])) == [0, 1]  # after the third nothing is unseen
    for t, rows in frame.groupby("experience"):
        values, images = logits_then(found, int(t), tmp_path)
        null = values[:, -1] if "-" in method and method != "var-scratch" else None
        logits = values[:, :-1] if "-" in method else values
        expected = {
            name: auroc(score[:images], score[images:])
            for name, score in familiarity(logits, null).items()
        }
        assert dict(zip(rows["score"], rows["auroc"], strict=True)) == pytest.approx(
            expected, abs=0.003
        )


@pytest.mark.integration
def test_what_was_computed_is_not_computed_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = view(trained, "finetune")
    first = evaluate(found, TRAINER, tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(ood, "score", never)
    pd.testing.assert_frame_equal(evaluate(found, TRAINER, tmp_path), first)


@pytest.mark.integration
def test_the_null_class_is_the_trunk_without_adapter(trained: Path, tmp_path: Path) -> None:
    method, stream = restore(view(trained, "var-adapter"), TRAINER, tmp_path)
    images = torch.stack([stream.experiences[0].test[i][0] for i in range(5)])
    values = method.class_and_null_likelihoods(images)
    assert values.shape == (5, 7)
    assert torch.allclose(values[:, :-1], method.log_likelihood(images), atol=1e-3)
    tokens, inputs = method.copies(images, 1)
    trunk, null = method.model.trunks[0], method.model.groups.null
    with torch.inference_mode():
        features = trunk.features(inputs[0], null.expand(5, -1), None, null)
        expected = trunk.log_likelihoods(features, null.expand(5, -1), tokens[0], None).sum(1)
    assert torch.allclose(values[:, -1], expected, atol=1e-3)


# --- the command ---


def ask(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["ood", *map(str, words)])
    return run.exit_code(command.main)


@pytest.mark.integration
def test_the_table_is_written_from_the_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "table"
    cache = f"--cache={tmp_path / 'cache'}"
    words = [str(trained / "split_digits"), f"--name={place}", cache]
    assert ask(monkeypatch, *words, "--methods", "var-adapter", "finetune") == 0
    assert ask(monkeypatch, *words, "--set", "var.schedule=a_varc") == 2  # would change nothing
    text = place.with_suffix(".md").read_text()
    assert f"python -m experiments.ood {' '.join(words)} --methods var-adapter finetune" in text
    assert f"Evaluated at commit {commit()}" in text
    numbers = pd.read_csv(place.with_suffix(".csv"))
    cells = {
        row[0]: row[1:]
        for line in text.splitlines()
        if line.startswith("| ")
        and len(row := [cell.strip() for cell in line.strip("|").split("|")]) == 5
    }
    means = numbers.groupby(["method", "score"])["auroc"].mean()
    assert cells["var-adapter"] == [f"{100 * means['var-adapter', s]:.1f}" for s in SCORES]
    assert cells["finetune"][-1] == "", "it has no likelihood ratio"
    assert "<svg" in place.with_suffix(".svg").read_text()
    assert np.isfinite(numbers["auroc"]).all()


@pytest.mark.integration
def test_a_table_that_is_there_is_kept_from_other_lines_and_fewer_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(asking, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    runs = Path("runs") / "split_digits"
    for method in ("var-adapter", "finetune"):
        shutil.copytree(trained / "split_digits" / method, runs / method)
    assert ask(monkeypatch, str(runs)) == 0
    path = tmp_path / "ood_split_digits.md"
    before = path.read_bytes()
    assert ask(monkeypatch, str(runs), "--methods", "finetune") == 2
    assert f"{path} was written by another line" in capsys.readouterr().err
    path.write_bytes(before + b"more")
    assert ask(monkeypatch, str(runs)) == 0
    assert path.read_bytes() == before, "the same line and runs: it is written again"
    shutil.rmtree(runs / "finetune")
    assert ask(monkeypatch, str(runs)) == 2
    assert f"{path} has numbers of finetune seed 0" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert ask(monkeypatch, str(runs), "--name=ood_split_digits") == 0
    assert path.read_bytes() != before


# --- bad input ---


@pytest.mark.integration
def test_a_run_that_kept_too_little_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    options = ["--methods=[joint,finetune]", "--stream.stop_after=2"]
    assert run.main(["split_digits", *TINY, *folders(runs), *options]) == 0
    with pytest.raises(UserError, match=r"--fresh --trainer\.keep_checkpoints=true"):
        evaluate(view(runs, "finetune"), TRAINER, tmp_path)
    capsys.readouterr()
    assert ask(monkeypatch, str(runs), f"--cache={tmp_path}", f"--name={tmp_path / 'x'}") == 2
    assert "keep_checkpoints" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.integration
def test_one_experience_has_nothing_unseen(tmp_path: Path) -> None:
    options = ["--methods=[finetune]", "--stream.stop_after=1", "--trainer.keep_checkpoints=true"]
    assert run.main(["split_digits", *TINY, *folders(tmp_path / "runs"), *options]) == 0
    with pytest.raises(UserError, match="there are no unseen classes"):
        evaluate(view(tmp_path / "runs", "finetune"), TRAINER, tmp_path)


def test_no_runs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(monkeypatch, str(tmp_path)) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert ask(monkeypatch, str(tmp_path / "nowhere")) == 2
    assert "There is no folder" in capsys.readouterr().err
