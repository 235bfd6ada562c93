"""The commands that draw images with finished runs, in small, and what they refuse."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import TINY, folders

from cil.records import read_run
from cil.run import exit_code
from cil.run import main as run
from experiments import edit, sample_quality
from experiments.finished import picture

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Finished runs on digits of a VAR, a diffusion model and joint, and of joint on others."""
    runs = tmp_path_factory.mktemp("generating") / "runs"
    line = [*TINY, *folders(runs), "--samples.per_class=2"]
    methods = "--methods=[var-adapter,diffusion-adapter,joint]"
    assert run(["split_digits", *line, methods, "--stream.stop_after=2"]) == 0
    short = ["--stream.stop_after=1", "--methods=[var-adapter]", f"--runs={runs / 'short'}"]
    assert run(["split_digits", *line, *short]) == 0
    fours = ["--stream.protocol=b4-2", "--methods=[joint]", f"--runs={runs / 'fours'}"]
    assert run(["split_digits", *line, *fours, "--stream.stop_after=1"]) == 0
    return runs


@pytest.fixture
def command(monkeypatch, capsys) -> Command:
    """Runs one of the two commands in this process -> exit code, stdout, stderr."""

    def call(module, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words), "--accelerator=cpu"])
        code = exit_code(module.main)
        return code, *capsys.readouterr()

    return call


def of(root: Path, method: str, *above: str) -> Path:
    return root.joinpath(*above, "split_digits", method, "seed0")


@pytest.mark.integration
def test_a_run_keeps_what_it_has_drawn(root: Path) -> None:
    for method in ("var-adapter", "diffusion-adapter"):
        view = read_run(of(root, method))
        sheets = [view.samples(t) for t in range(2)]
        assert [sheet.shape for sheet in sheets] == [(2 * t, 2, 16, 16, 1) for t in (1, 2)]
        assert all(np.array_equal(sheet, sheets[-1][: len(sheet)]) for sheet in sheets)
    assert read_run(of(root, "joint")).samples(1) is None


@pytest.mark.integration
def test_a_table_of_sample_quality(root: Path, tmp_path: Path, command: Command) -> None:
    runs = [of(root, method) for method in ("var-adapter", "diffusion-adapter")]
    words = [*runs, "--images=6", "--guidance", "0", "2", "--steps=2", f"--name={tmp_path / 'q'}"]
    code, shown, errors = command(sample_quality, *words)
    assert code == 0, errors
    table = pd.read_csv(tmp_path / "q.csv")
    drawn = [f"{name} seed 0: {what}" for name in ("var-adapter", "diffusion-adapter")
             for what in ("decoder", "guidance 0", "guidance 2")]  # fmt: skip
    assert table["images"].unique().tolist() == ["real: training", "real: held out", *drawn]
    assert table["classes"].tolist()[:3] == ["all", "4, 2", "7, 6"]
    assert set(table["number"]) == {24, 12}
    every = table[table["classes"] == "all"].set_index("images")
    assert every["fid"].idxmin() in ("real: training", "real: held out")
    assert every["recognised"][:2].min() > every["recognised"][drawn].max()
    shares = table[["precision", "recall", "recognised"]]
    assert shares.min().min() >= 0
    assert shares.max().max() <= 1
    # A group's accuracies are those of all.
    for name, rows in table[table["classes"] != "all"].groupby("images"):
        assert rows["recognised"].mean() == pytest.approx(every["recognised"][name])
    text = (tmp_path / "q.md").read_text()
    assert "the 64 values before the last layer of cnn of joint seed 0" in text
    assert text.count("\n| ") == 2 + len(table)
    assert "recognised" in shown


@pytest.mark.integration
def test_a_group_of_few_images_leaves_the_others_their_numbers(
    root: Path, tmp_path: Path, command: Command
) -> None:
    """One image a class, two a group: too few for the three nearest neighbours."""
    words = [of(root, "var-adapter"), "--images=1", "--steps=2", f"--name={tmp_path / 'q'}"]
    code, _, errors = command(sample_quality, *words)
    assert code == 0, errors
    table = pd.read_csv(tmp_path / "q.csv").set_index("classes")
    assert table.loc["all", ["fid", "precision", "recall"]].notna().all(axis=None)
    assert table.loc["4, 2", ["fid", "precision", "recall"]].isna().all(axis=None)
    assert table["recognised"].notna().all()
    assert "nan" not in (tmp_path / "q.md").read_text()


@pytest.mark.integration
def test_a_judge_may_have_learned_other_groups(
    root: Path, tmp_path: Path, command: Command
) -> None:
    judge = f"--judge={of(root, 'joint', 'fours')}"
    words = [of(root, "var-adapter"), judge, "--images=2", f"--name={tmp_path / 'q'}"]
    code, _, errors = command(sample_quality, *words)
    assert code == 0, errors
    table = pd.read_csv(tmp_path / "q.csv")
    assert table["classes"].tolist()[:3] == ["all", "4, 2", "7, 6"]


@pytest.mark.integration
def test_what_sample_quality_refuses(root: Path, tmp_path: Path, command: Command) -> None:
    var, joint = of(root, "var-adapter"), of(root, "joint")
    short = of(root, "var-adapter", "short")
    lines = {
        (joint,): "is a run of joint, which draws no images",
        (var, f"--judge={var}"): "judge by a discriminative one",
        (short,): "--methods=[joint] --seeds=[0]`, or name another",
        (short, f"--judge={joint}"): "has learned other classes",
        (var, "--images=1000"): "test images of a class to compare with",
        (var, "--guidance", "-1"): "samples.guidance is -1",
        (var, "--images=2", f"--judge={tmp_path}"): "is no run: name a folder",
    }
    for words, sentence in lines.items():
        code, _, errors = command(sample_quality, *words)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert sentence in errors


@pytest.mark.integration
def test_an_edit_is_a_picture(root: Path, tmp_path: Path, command: Command) -> None:
    run = of(root, "var-adapter")
    options = ["--box=0,8,16,16", "--to=6", "--to=2", "--copies=2", f"--out={tmp_path / 'a.png'}"]
    code, shown, errors = command(edit, run, "--image=7", *options)
    assert code == 0, errors
    assert "1x1 100 %, 2x2 50 %, 3x3 67 %, 4x4 50 %" in " ".join(shown.split())
    assert Image.open(tmp_path / "a.png").width > 400
    again = [*options[:-1], f"--out={tmp_path / 'b.png'}"]
    assert command(edit, run, "--image=7", *again)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # The same region as a mask, of the same image as a file, is the same edit.
    view = read_run(run)
    assert view.folder.exists()
    white = np.zeros((16, 16), np.uint8)
    white[:8] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    masked = ["--outside", f"--mask={tmp_path / 'mask.png'}", *again[1:]]
    assert command(edit, run, "--image=7", *masked)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert command(edit, run, "--image=7", "--raw", *again)[0] == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    # Without a class it is that which the run reads; without a name it lies with the run's figures.
    code, shown, _ = command(edit, run, "--image=7", "--box=0,8,16,16", "--copies=1")
    assert code == 0
    assert (run / "figures" / "edit.png").exists()
    # Then coarse tokens that are mostly kept are given, unless another share is asked for.
    assert "1x1 0 %, 2x2 50 %, 3x3 33 %, 4x4 50 %" in " ".join(shown.split())
    every = ["--box=0,8,16,16", "--copies=1", "--cover=0"]
    _, shown, _ = command(edit, run, "--image=7", *every)
    assert "1x1 100 %" in " ".join(shown.split())


@pytest.mark.integration
def test_what_edit_refuses(root: Path, tmp_path: Path, command: Command) -> None:
    run, short = of(root, "var-adapter"), of(root, "var-adapter", "short")
    box = "--box=0,0,8,8"
    Image.new("RGB", (20, 16)).save(tmp_path / "wide.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    wide, black, text = (tmp_path / f"{name}.png" for name in ("wide", "black", "text"))
    lines = {
        (run, f"--image={wide}", box): "has 20 x 16 pixels: the run reads 16 x 16",
        (run, f"--image={text}", box): "is no picture that can be read",
        (run, f"--image={tmp_path / 'none.png'}", box): "cannot be read (No such file",
        (run, "--image=450", box): "There is no test image 450: they are 0 to 178",
        (run, "--image=0", f"--mask={wide}"): "has 20 x 16 pixels: the run reads 16 x 16",
        (run, "--image=0", f"--mask={black}"): "the mask is empty",
        (run, "--image=0", "--box=0,0,16,16", "--outside"): "the mask is empty",
        (run, "--image=0", "--box=0,0,17,8"): "none above 16",
        (run, "--image=0", "--box=8,0,8,8"): "x0 below x1",
        (run, "--image=0", "--box=left"): "--box is left",
        (short, "--image=0", box, "--to=7"): "The run never learned a class '7': it knows ",
        (run, "--image=0", box, "--to=77"): "did you mean 7?",
        (run, "--image=0", box, "--cover=1"): "--cover is 1.0: give a share of a token",
        (run, "--image=0", box, "--cover=nan"): "--cover is nan",
        (run, "--image=0", box, "--copies=0"): "--copies must be 1 or more",
        (run, "--image=0", box, "--seed=-1"): "--seed 0 or more",
        (run, "--image=0", box, "--seed=4294967295", "--copies=2"): "4294967295 at most",
        (run, "--image=0", box, "--out=a.jpg"): "ends in .png",
        (of(root, "diffusion-adapter"), "--image=0", box): "only a VAR has tokens to keep",
    }
    for words, sentence in lines.items():
        code, _, errors = command(edit, *words)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert sentence in errors


def test_a_file_is_read_as_the_stream_has_its_images(tiny_stream, tmp_path: Path) -> None:
    image, _ = tiny_stream.experiences[1].test[0]
    values = ((image[0] + 1) * 127.5).round().byte().numpy()
    Image.fromarray(values).convert("RGB").save(tmp_path / "image.png")
    found = picture(tmp_path / "image.png", tiny_stream)
    torch.testing.assert_close(found, image, atol=1 / 250, rtol=0)


def test_a_box_ends_before_its_far_corner(tiny_stream) -> None:
    region = edit.box("1,2,4,8", tiny_stream)
    assert region.nonzero().amin(0).tolist() == [2, 1]  # row, column
    assert region.nonzero().amax(0).tolist() == [7, 3]
    assert region.sum() == 18
