"""Explanations inside a run, and the commands that explain a finished one, on tiny settings."""

import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import TINY, folders

from cil import drift, run
from cil.records import RunView, read_run
from cil.streams.memory_images import MemoryImages

pytestmark = pytest.mark.integration

METHODS = ["var-adapter", "var-trunk", "finetune", "diffusion"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment of three experiences."""
    runs = tmp_path_factory.mktemp("explaining") / "runs"
    options = [f"--methods=[{','.join(METHODS)}]", "--stream.stop_after=3"]
    assert run.main(["split_digits", *TINY, *folders(runs), *options]) == 0
    return runs / "split_digits"


def view(ran: Path, method: str) -> RunView:
    return read_run(ran / method / "seed0")


Command = Callable[..., int]


@pytest.fixture
def command(ran: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `python -m experiments.NAME` and returns its exit code."""

    def call(name: str, *words: str) -> int:
        from experiments import explain, insertion_deletion

        main = {"explain": explain.main, "insertion_deletion": insertion_deletion.main}[name]
        shared = [f"--cache={ran.parent}-cache", "--accelerator=cpu", "--no_progress"]
        monkeypatch.setattr(sys, "argv", [name, *words, *shared])
        return run.exit_code(main)

    return call


# --- inside a run ---


def test_a_run_explains_the_same_images_after_each_experience(ran: Path) -> None:
    table = view(ran, "var-adapter").explanations()
    assert table["experience"].unique().tolist() == [0, 1, 2]
    of_each = [part.reset_index(drop=True) for _, part in table.groupby("experience")]
    for part in of_each:
        assert part[["image", "label", "token"]].equals(of_each[0][["image", "label", "token"]])
        assert len(part) == drift.IMAGES * 30
        assert (part["rival"] != part["label"]).all()
    assert sorted(of_each[0].groupby("image")["label"].first()) == [0, 0, 1, 1]
    assert table["rival"].max() < 6
    figure = ran / "var-adapter" / "seed0" / "figures" / "explanations"
    assert figure.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in figure.with_suffix(".svg").read_text()


def test_frozen_groups_give_the_same_reasons_to_the_last_bit_and_a_learning_trunk_others(
    ran: Path,
) -> None:
    def reasons(method: str) -> list[list[float]]:
        table = view(ran, method).explanations()
        return [part["label_nats"].tolist() for _, part in table.groupby("experience")]

    frozen, learning = reasons("var-adapter"), reasons("var-trunk")
    assert frozen[0] == frozen[1] == frozen[2]
    assert learning[0] != learning[1] != learning[2]


def test_methods_without_tokens_leave_no_explanations(ran: Path) -> None:
    for method in ("finetune", "diffusion"):
        assert view(ran, method).explanations().empty
        assert not (ran / method / "seed0" / "figures" / "explanations.png").exists()


def test_images_are_chosen_evenly_over_the_classes() -> None:
    images = MemoryImages(torch.zeros(7, 1, 8, 8), [3, 3, 3, 5, 3, 5, 7])
    assert drift.chosen(images, 5) == [0, 3, 6, 1, 5]
    assert drift.chosen(images, 99) == [0, 3, 6, 1, 5, 2, 4]


# --- of a finished run ---


def test_four_panels_of_right_and_of_wrong_predictions(
    ran: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran / "var-adapter" / "seed0"
    predictions = view(ran, "var-adapter").predictions()
    right = predictions["label"] == predictions["prediction"]
    numbers = [*np.flatnonzero(right)[:2], *np.flatnonzero(~right)[:3]]
    words = [f"--images={','.join(map(str, numbers))}", f"--folder={tmp_path}"]
    assert command("explain", str(folder), *words) == 0
    names = ("explanations_right", "explanations_wrong")
    scales = ("explanations_scales_right", "explanations_scales_wrong")
    assert {path.stem for path in tmp_path.glob("*.png")} == {*names, *scales}
    out = capsys.readouterr().out
    for number in numbers:
        assert f"test image {number}" in out
    assert "3 likelihood evaluations an image" in out


def test_without_numbers_it_takes_the_first_right_and_wrong_ones(
    ran: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(ran / "var-adapter" / "seed0")
    assert command("explain", folder, "--each=2", f"--folder={tmp_path}") == 0
    assert capsys.readouterr().out.count("test image") == 4
    assert (tmp_path / "explanations_wrong.png").exists()


def test_a_file_is_explained_as_the_class_that_is_named(
    ran: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(ran / "var-adapter" / "seed0")
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / "mine.png")
    name = view(ran, "var-adapter").stream["class_names"][4]
    words = [f"--images={tmp_path / 'mine.png'}", f"--folder={tmp_path}"]
    assert command("explain", folder, *words, f"--label={name}") == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "mine.png" in line][:1]
    assert row.split()[1] == name


def test_many_explanations_are_timed(
    ran: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("explain", str(ran / "var-adapter" / "seed0"), "--time=300") == 0
    assert capsys.readouterr().out.startswith("300 images explained in ")


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images=999"], "There is no test image 999: they are 0 to"),
        (["--images="], "--images names none"),
        (["--images=nothing.png"], "nothing.png cannot be read (No such file"),
        (["--images=small.png"], "small.png has 9 x 16 pixels: the run reads 16 x 16"),
        (["--images=whole.png", "--label=x"], "The run never learned a class 'x': it knows"),
        (["--images=1", "--label=3"], "--label is of files"),
        (["--each=0"], "--each is 0"),
        (["--time=0"], "--time is 0"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    words: list[str],
    said: str,
    ran: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (9, 16)).save("small.png")
    Image.new("L", (16, 16)).save("whole.png")
    assert command("explain", str(ran / "var-adapter" / "seed0"), *words) == 2
    assert said in refused(capsys)


@pytest.mark.parametrize(
    ("method", "name", "said"),
    [
        ("finetune", "explain", "is no run of a var method"),
        ("diffusion", "explain", "is no run of a var method"),
        ("diffusion", "insertion_deletion", "is no run of a var or a discriminative method"),
    ],
)
def test_runs_that_cannot_be_explained_are_refused(
    method: str,
    name: str,
    said: str,
    ran: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(name, str(ran / method / "seed0")) == 2
    assert said in refused(capsys)
    assert command(name, str(ran / method)) == 2
    assert "is no run: name a folder" in refused(capsys)


# --- insertion and deletion ---


@pytest.fixture
def compared(ran: Path, command: Command, tmp_path: Path) -> pd.DataFrame:
    """The table of both kinds of methods by all explanations."""
    runs = [str(ran / method / "seed0") for method in ("var-adapter", "finetune")]
    words = ["--images=6", "--step=64", "--samples=8", "--steps=2", f"--name={tmp_path / 'table'}"]
    assert command("insertion_deletion", *runs, *words) == 0
    return pd.read_csv(tmp_path / "table.csv")


def test_a_table_of_insertion_and_deletion(
    compared: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.insertion_deletion import METHODS as EXPLANATIONS

    table = compared.set_index(["model", "explanation"])
    assert table.loc["var-adapter"].index.tolist() == list(EXPLANATIONS)
    assert table.loc["finetune"].index.tolist() == list(EXPLANATIONS[2:])  # it has no tokens
    evaluations = table["evaluations"]
    windows = ((16 - 4) // 2 + 1) ** 2
    # Six classes; occlusion also asks for the whole image, integrated gradients two steps.
    assert evaluations["var-adapter", "tmi"] == 3
    assert evaluations["var-adapter", "occlusion"] == 6 * (windows + 1)
    assert evaluations["finetune", "occlusion"] == windows + 1
    assert evaluations["var-adapter", "lime"] == 6 * 8
    assert evaluations["finetune", "kernel_shap"] == 8
    assert evaluations["var-adapter", "saliency"] == 6 * 3
    assert evaluations["finetune", "integrated_gradients"] == 2 * 3
    assert evaluations["finetune", "random"] == 0
    for column in ("insertion_auc", "deletion_auc"):
        assert table[column].between(0, 1).all()
        assert table.loc["var-adapter", column].nunique() > 3
    # How it was measured stands in every row.
    settings = compared[["step", "baseline", "kernel", "sigma", "samples", "steps", "images"]]
    assert settings.drop_duplicates().to_numpy().tolist() == [[64, 0, 11, 5, 8, 2, 6]]
    text = (tmp_path / "table.md").read_text()
    assert "Gaussian of 11 pixels and sigma 5" in text
    assert "64 pixels a step" in text
    rows = [line for line in text.splitlines() if line.startswith("| var-adapter")]
    assert len(rows) == len(EXPLANATIONS)
    assert f"{table.loc['var-adapter', 'tmi'].insertion_auc:.3f}±" in rows[0]
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "table_var-adapter.svg",
        "table_finetune.svg",
    }


def test_seeds_of_one_method_are_told_apart(
    ran: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "split_digits" / "finetune" / f"seed{seed}" for seed in (0, 1)]
    for folder in folders:  # what they have learned does not matter here
        shutil.copytree(ran / "finetune" / "seed0", folder)
    config, progress = (folders[1] / name for name in ("config.yaml", "progress.json"))
    before, of_seed_1 = config.read_bytes(), config.read_bytes().replace(b"seed: 0", b"seed: 1", 1)
    config.write_bytes(of_seed_1)
    hashes = [hashlib.sha256(content).hexdigest() for content in (before, of_seed_1)]
    progress.write_text(progress.read_text().replace(*hashes))
    words = ["--methods=saliency", "--images=2", "--step=64", f"--name={tmp_path / 'table'}"]
    assert command("insertion_deletion", *map(str, folders), *words) == 0
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "table_finetune_seed0.svg",
        "table_finetune_seed1.svg",
    }
    text = (tmp_path / "table.md").read_text()
    for name in ("finetune seed0", "finetune seed1"):
        assert f"| {name} | saliency |" in text
    assert re.search(r"Predicted rightly: finetune seed0 [\d.]+%, finetune seed1 [\d.]+%", text)
    capsys.readouterr()
    assert command("insertion_deletion", str(folders[0]), str(folders[0]), *words) == 2
    assert "name each once" in refused(capsys)
    other = tmp_path / "other" / "finetune" / "seed0"
    shutil.copytree(folders[0], other)
    assert command("insertion_deletion", str(folders[0]), str(other), *words) == 2
    assert f"{tmp_path} holds runs of several experiments (other, split_digits)" in refused(capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods=tmi,magic"], "There is no explanation 'magic': choose from tmi"),
        (["--methods="], "--methods names none"),
        (["--images=0"], "images is 0: there are"),
        (["--samples=1"], "--samples must be 2 or more"),
        (["--step=0"], "step is 0"),
        (["--kernel=4"], "kernel is 4: give an odd number below 32"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str], said: str, ran: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("insertion_deletion", str(ran / "var-adapter" / "seed0"), *words) == 2
    assert said in refused(capsys)


def test_a_network_has_no_tokens(
    ran: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(ran / "finetune" / "seed0")
    assert command("insertion_deletion", folder, "--methods=tmi") == 2
    assert "has no tokens: tmi is of a var method" in refused(capsys)


def test_without_captum_it_says_how_to_get_it(
    ran: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    folder = str(ran / "finetune" / "seed0")
    words = ["--methods=lime", "--images=2", f"--name={tmp_path / 'table'}"]
    assert command("insertion_deletion", folder, *words) == 2
    assert "pip install -e '.[explain]'" in refused(capsys)


def test_change_is_one_minus_the_cosine_of_the_last_maps_to_the_first() -> None:
    first = [[1.0, 0.0, 2.0, 0.0, 1.0], [0.5, 1.0, 1.0, 0.0, 0.0]]

    def rows(*maps: list[list[float]]) -> pd.DataFrame:
        parts = [
            {"experience": t, "image": image, "label_nats": value}
            for t, images in enumerate(maps)
            for image, tokens in enumerate(images)
            for value in tokens
        ]
        return pd.DataFrame(parts)

    against = [[-value for value in first[0]], first[1]]  # one image of two the other way round
    assert drift.change(rows(first), (1, 2)) is None
    assert drift.change(rows(first, against, first), (1, 2)) == pytest.approx(0, abs=1e-12)
    assert drift.change(rows(first, first, against), (1, 2)) == pytest.approx(1)
