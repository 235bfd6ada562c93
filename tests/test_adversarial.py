"""Under attack: images stay within reach, gradients lower accuracy, cells are what they say."""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TINY, folders
from torch import Tensor

from cil import run
from cil.adversarial import LEVEL, log_odds_against, perturbed, prepare
from experiments import adversarial as command
from experiments.attributions import Model
from experiments.finished import Finished, finished

METHODS = "--methods=[diffusion-adapter,joint,slda,var-adapter]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny runs of digits, two class groups of two; the networks learn a little."""
    folder = tmp_path_factory.mktemp("adversarial") / "runs"
    epochs = ["--discriminative.epochs=5", "--discriminative.backbone_epochs=5"]
    options = [METHODS, "--tuned={}", "--stream.stop_after=2", *epochs]
    assert run.main(["split_digits", *TINY, *folders(folder), *options]) == 0
    return folder / "split_digits"


def opened(trained: Path, method: str) -> Finished:
    cache = Path(f"{trained.parent}-cache")
    options = Namespace(accelerator="cpu", cache=cache, no_progress=True)
    return finished(trained / method / "seed0", options)


def images_of(found: Finished) -> tuple[Tensor, Tensor]:
    numbers = range(0, len(found.labels), 3)
    return found.images(numbers), torch.tensor([found.labels[n] for n in numbers])


def attack(found: Finished, eps: float) -> tuple[Tensor, Tensor]:
    """Images as they were, and as the run's own gradients change them."""
    images, labels = images_of(found)
    assert prepare(found.method, images[0])
    model = Model(found)
    made = perturbed(model.differentiable, images, labels, eps, 3, model.at_once)
    return images, made


# --- the attack ---


def test_it_climbs_what_cross_entropy_climbs_and_does_not_round_to_zero() -> None:
    labels = torch.tensor([1, 0, 2])
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    entropy = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    odds = log_odds_against(scores, labels)
    torch.testing.assert_close(torch.nn.functional.softplus(odds), entropy)
    (by_entropy,) = torch.autograd.grad(entropy.sum(), scores)
    (by_odds,) = torch.autograd.grad(odds.sum(), scores)
    assert torch.equal(by_entropy.sign(), by_odds.sign())
    certain = torch.tensor([[0.0, -300.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_odds_against(certain, torch.tensor([0])).sum(), certain)
    assert gradient.tolist() == [[-1.0, 1.0]]


@pytest.mark.integration
@pytest.mark.parametrize("method", ["joint", "var-adapter"])
@pytest.mark.parametrize("eps", [8, 60])
def test_images_stay_within_eps_and_within_the_range_of_pixels(
    trained: Path, method: str, eps: float
) -> None:
    images, made = attack(opened(trained, method), eps)
    assert made.shape == images.shape
    assert (made - images).abs().max() <= eps * LEVEL + 1e-6
    assert (made - images).abs().amax((1, 2, 3)).min() > 0.9 * eps * LEVEL  # all are attacked
    assert made.abs().max() <= 1
    assert not made.requires_grad


@pytest.mark.integration
def test_the_same_images_are_made_again(trained: Path) -> None:
    found = opened(trained, "joint")
    _, first = attack(found, 8)
    torch.rand(5)  # what was drawn before does not matter
    _, again = attack(found, 8)
    assert torch.equal(first, again)
    state = torch.get_rng_state()
    attack(found, 8)
    assert torch.equal(torch.get_rng_state(), state), "and it draws from no one else's"


@pytest.mark.integration
@pytest.mark.parametrize("method", ["joint", "var-adapter"])
def test_gradients_lower_the_probability_of_labels_more_than_noise(
    trained: Path, method: str
) -> None:
    found = opened(trained, method)
    images, made = attack(found, 32)
    _, labels = images_of(found)
    signs = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
    noisy = (images + 32 * LEVEL * signs).clamp(-1, 1)
    log_p = [Model(found).log_probabilities(x) for x in (images, made, noisy)]
    before, after, noise = (p.gather(1, labels[:, None]).double().mean() for p in log_p)
    assert after < before
    assert after < noise


@pytest.mark.integration
def test_who_prepare(trained: Path) -> None:
    for method, expected in {"joint": True, "slda": False, "diffusion-adapter": False}.items():
        found = opened(trained, method)
        assert prepare(found.method, found.images([0])[0]) is expected


# --- the command ---


def ask(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["adversarial", *map(str, words)])
    return run.exit_code(command.main)


def options(trained: Path, place: Path) -> list[str]:
    cache = f"--cache={trained.parent}-cache"
    return [str(trained), cache, f"--name={place}", "--accelerator=cpu"]


def cells(text: str) -> dict[str, list[str]]:
    """The rows of the first table of a file, by their first cell."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    named = [[cell.strip() for cell in row] for row in rows]
    return {row[0]: row[1:] for row in named if len(row) == len(named[0])}


@pytest.mark.integration
def test_the_tables_are_written_from_the_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "table"
    words = [*options(trained, place), "--eps", "64", "8", "--steps=3", "--per_class=5"]
    assert ask(monkeypatch, *words) == 0
    text = place.with_suffix(".md").read_text()
    assert f"python -m experiments.adversarial {' '.join(words)}" in text
    assert "No gradients, so no white box: diffusion-adapter, slda." in text
    assert "images made against joint, seed 0" in text
    frame = pd.read_csv(place.with_suffix(".csv")).set_index(["method", "attack", "eps"])
    accuracy, found = frame["accuracy"], cells(text)
    assert found["method"] == [
        *("clean", "white box 8", "white box 64", "transfer 8", "transfer 64"),
    ]
    assert found["diffusion-adapter"][1:3] == found["slda"][1:3] == ["", ""]
    assert found["joint"][3:] == ["", ""], "its own images are no transfer"
    assert found["var-adapter"][2] == f"{100 * accuracy['var-adapter', 'white box', 64]:.1f}"
    assert found["slda"][4] == f"{100 * accuracy['slda', 'transfer', 64]:.1f}"
    assert accuracy["joint", "white box", 64] < accuracy["joint", "clean", 0]
    noticed = frame.drop(index="clean", level="attack")[["msp", "energy"]]
    assert np.isfinite(noticed.to_numpy()).all()
    assert noticed.to_numpy().min() >= 0
    assert noticed.to_numpy().max() <= 1
    assert "<svg" in place.with_suffix(".svg").read_text()


@pytest.mark.integration
def test_the_clean_accuracy_is_that_of_the_images_asked_about(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "table"
    words = ["--eps", "8", "--steps=1", "--per_class=1000", "--methods", "joint", "var-adapter"]
    assert ask(monkeypatch, *options(trained, place), *words, "--source=var-adapter") == 0
    frame = pd.read_csv(place.with_suffix(".csv"))
    for method in ("joint", "var-adapter"):
        clean = frame[(frame["method"] == method) & (frame["attack"] == "clean")]
        recorded = opened(trained, method).run.summary["last_accuracy"]
        assert clean["accuracy"].item() == pytest.approx(recorded, abs=0.008)
    assert set(frame[frame["attack"] == "transfer"]["method"]) == {"joint"}


# --- bad input ---


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eps", "8", "0"], "--eps is 0: give numbers above 0"),
        (["--eps", "nan"], "--eps is nan"),
        (["--eps=-4"], "--eps is -4"),
        (["--eps", "256"], "--eps is 256"),
        (["--steps=0"], "--steps is 0: give 1 or more"),
        (["--per_class=0"], "--per_class is 0"),
        (["--source=replay"], "--source is one of diffusion-adapter, joint, slda, var-adapter"),
        (["--source=slda"], "slda gives no gradients"),
        (
            ["--methods", "slda", "diffusion-adapter"],
            "give no gradients: var does",
        ),
    ],
)
def test_bad_input_ends_in_one_sentence(
    trained: Path,
    tmp_path: Path,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert ask(monkeypatch, *options(trained, tmp_path / "table"), *words) == 2
    errors = capsys.readouterr().err.splitlines()
    assert said in errors[-1]
    assert not any("Traceback" in line for line in errors)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_without_captum_it_says_how_to_get_it(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "captum.robust", None)
    assert ask(monkeypatch, *options(trained, tmp_path / "table")) == 2
    assert "pip install -e '.[explain]'" in capsys.readouterr().err


def test_no_runs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(monkeypatch, tmp_path) == 2
    assert "holds no finished run" in capsys.readouterr().err
