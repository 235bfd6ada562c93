"""Finished runs read from folders and from W&B: the same numbers, pictures and sentences."""

import base64
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finished
import numpy as np
import pytest
import wandb
from test_tracking import refuse
from tiny import TINY, folders
from wandb.apis.public import Run
from wandb_files import inspected

from cil import editing, figures, results, run, table, wandb_runs
from cil.errors import UserError
from cil.plots.style import STYLES
from cil.records import RunView, figure_bytes, read_runs
from cil.wandb_runs import WandbRun, converted

KEY = "0123456789" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, one of which draws and explains, in folders and as offline runs of W&B."""
    runs = tmp_path_factory.mktemp("results") / "runs"
    words = ["split_digits", *TINY, *folders(runs), "--methods=[var,finetune]"]
    words += ["--wandb.mode=offline", "--stream.stop_after=2"]
    assert run.main(words) == 0
    return runs


@pytest.fixture(scope="module")
def views(folder: Path) -> list[RunView]:
    return read_runs(folder)


def as_public(view: RunView) -> Run:
    """What W&B's public API gives of a run, filled from the files of its offline run.

    It is wandb's own class; what it would fetch from a server comes from these files.
    """
    records = inspected(view.folder)
    summary: dict[str, Any] = {}
    for record in records:
        for name, value in record.get("summary", {}).get("update", {}).items():
            *above, last = name.split(".")
            inner = summary
            for word in above:
                inner = inner.setdefault(word, {})
            inner[last] = value
    (begun,) = [record["run"] for record in records if record["type"] == "run"]
    config = {name: {"value": value} for name, value in begun["config"]["update"].items()}
    attributes = {
        "name": begun["run_id"],
        "state": "finished",
        "config": json.dumps(config),
        "summaryMetrics": json.dumps(summary),
    }
    service: Any = SimpleNamespace(app_url="https://wandb.ai/")
    public = Run(service, "entity", "project", begun["run_id"], attributes, lazy=False)
    history = [record["history"]["item"] for record in records if "history" in record]
    (files,) = view.folder.glob("wandb/offline-run-*/files")
    public.scan_history = lambda keys: [row for row in history if set(keys) <= set(row)]
    public.file = lambda name: File(files, name)
    return public


class File:
    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def download(self, root: str, replace: bool) -> Any:
        target = Path(root) / self.name
        target.parent.mkdir(parents=True)
        shutil.copy(self.folder / self.name, target)
        return target.open()


@pytest.fixture(scope="module")
def online(views: list[RunView]) -> list[WandbRun]:
    return converted([as_public(view) for view in views])


# --- both sources ---


@pytest.mark.integration
def test_wandb_gives_back_what_the_folders_hold(
    views: list[RunView], online: list[WandbRun]
) -> None:
    assert [r.method for r in online] == ["finetune", "var"]
    for mine, theirs in zip(views, online, strict=True):
        for name in ("experiment", "method", "seed", "summary", "sizes", "group_names"):
            assert getattr(theirs, name) == getattr(mine, name), name
        assert np.array_equal(theirs.matrix, mine.matrix, equal_nan=True)
        assert theirs.config.items() >= mine.config.items()
        assert theirs.url.endswith(f"/entity/project/runs/{theirs._public.id}")


@pytest.mark.integration
def test_numbers_over_experiences_are_the_same(
    views: list[RunView], online: list[WandbRun]
) -> None:
    for mine, theirs in zip(views, online, strict=True):
        for name in ("cl/accuracy", "samples/drift", "explanations/drift", "none/such"):
            values = mine.over_experiences(name)
            assert values.shape == (len(mine.sizes),)
            assert np.array_equal(values, theirs.over_experiences(name), equal_nan=True)
    var = views[1]
    assert not np.isnan(var.over_experiences("cl/accuracy")).any()
    for name in ("samples/drift", "explanations/drift"):  # of after the first experience is none
        assert np.isnan(var.over_experiences(name)).tolist() == [True, False]
    assert np.isnan(var.over_experiences("none/such")).all()


@pytest.mark.integration
def test_pictures_are_the_same(views: list[RunView], online: list[WandbRun]) -> None:
    var, theirs = views[1], online[1]
    expected = ["accuracy_matrix", "confusion", "explanations", "samples"]
    expected.append("samples_over_experiences")
    assert var.pictures() == theirs.pictures() == expected
    for name in expected:
        assert var.picture(name) == theirs.picture(name)
    assert var.picture("samples") == (var.folder / "figures/samples_experience1.png").read_bytes()
    assert var.picture("none") is theirs.picture("none") is None


@pytest.mark.integration
@pytest.mark.parametrize(
    "draw", [figures.accuracy_matrices, figures.forgetting_bars, figures.accuracy_against_cost]
)
def test_figures_are_the_same(views: list[RunView], online: list[WandbRun], draw: Any) -> None:
    drawn = [figure_bytes(draw(runs), "png") for runs in (views, online)]
    assert drawn[0] == drawn[1]
    assert table.frame(views).equals(table.frame(online))


@pytest.mark.integration
def test_a_gallery_shows_the_runs_that_have_the_picture(views: list[RunView]) -> None:
    shown = figures.pictures(views, "samples")
    assert [words for words, _ in shown.pictures] == ["var, seed 0: samples"]
    data = base64.b64encode(views[1].picture("samples") or b"").decode()
    assert f'alt="var, seed 0: samples" src="data:image/png;base64,{data}"' in shown._repr_html_()
    assert repr(shown) == "1 picture, shown in a notebook"
    assert repr(figures.Gallery([("a", b""), ("b", b"")], "")).startswith("2 pictures, ")
    none = figures.pictures(views, "<none>")
    assert repr(none) == "None of these runs has a picture <none>."
    assert none._repr_html_() == "<p>None of these runs has a picture &lt;none&gt;.</p>"


@pytest.mark.integration
def test_shares_over_experiences(views: list[RunView], online: list[WandbRun]) -> None:
    """Of the methods that have them; bars and bands are those of `plots`."""
    for name, label in figures.SHARES.items():
        pictures = [figures.over_experiences(runs, name) for runs in (views, online)]
        (axes,) = pictures[0].axes
        assert axes.get_ylabel() == label
        assert [text.get_text().split()[0] for text in axes.texts] == ["var"]
        assert len({figure_bytes(picture, "png") for picture in pictures}) == 1
    (text,) = figures.over_experiences(views[:1], "samples/drift").axes[0].texts
    assert text.get_text() == "None of these runs recorded samples/drift."


@pytest.mark.integration
def test_edits_take_the_models_that_run_folders_hold(
    folder: Path, views: list[RunView], online: list[WandbRun]
) -> None:
    names = views[1].stream["class_names"]
    (axes,) = editing.edits(views, image=1, seeds=2, cache=f"{folder}-cache").axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == [f"var: {names[1]}", f"var: {names[3]}"]  # its own class, and the last learned
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == ["image", "region", "seed 0", "seed 1"]
    tiles = np.asarray(axes.images[0].get_array())
    side = views[1].stream["image_size"]
    image, edit = tiles[:side, :side], tiles[:side, 2 * (side + 1) :][:, :side]
    assert np.array_equal(edit[:, : side // 2], image[:, : side // 2])  # the left half is kept
    assert not np.array_equal(edit, image)
    (text,) = editing.edits(online).axes[0].texts
    assert text.get_text() == "Edits take a model: none of these is a run of var in a run folder."
    with pytest.raises(UserError, match="There is no test image 1000: the first class group has"):
        editing.edits(views, image=1000, cache=f"{folder}-cache")


@pytest.mark.integration
def test_a_run_without_its_model_is_not_left_out_of_edits_in_silence(
    folder: Path, views: list[RunView], capsys: pytest.CaptureFixture[str]
) -> None:
    gone = [replace(views[1], folder=folder / "gone", seed=seed) for seed in (1, 2)]
    (text,) = editing.edits(gone, cache=f"{folder}-cache").axes[0].texts
    reasons = text.get_text().splitlines()
    assert [reason.partition(":")[0] for reason in reasons] == ["var seed 1", "var seed 2"]
    assert all("is missing" in reason for reason in reasons)
    assert capsys.readouterr().err == ""
    (axes,) = editing.edits([gone[0], views[1]], seeds=1, cache=f"{folder}-cache").axes
    assert len(axes.get_yticklabels()) == 2
    assert capsys.readouterr().err == f"left out: {reasons[0]}\n"


@pytest.mark.integration
def test_of_equal_runs_the_newest_counts(views: list[RunView]) -> None:
    older, newer, other = (as_public(views[0]) for _ in range(3))
    older.summary_metrics["last_accuracy"] = 0.0
    other.config["stream"]["order_seed"] = 7  # another setting: a sweep's
    found = converted([older, newer, other])
    assert [r.summary["last_accuracy"] for r in found] == 2 * [views[0].summary["last_accuracy"]]
    with pytest.raises(UserError, match=r"differ in stream.order_seed, .*: keep one of the two\."):
        table.frame(found)


@pytest.mark.integration
def test_runs_that_are_not_finished_or_not_ours_are_left_out(views: list[RunView]) -> None:
    unfinished, strange = as_public(views[0]), as_public(views[0])
    del unfinished.summary_metrics[wandb_runs.CLASS_GROUPS]
    del strange.config["experiment"]
    assert converted([unfinished, strange]) == []


@pytest.mark.integration
def test_load_reads_either(
    folder: Path, views: list[RunView], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word decides; of W&B the group is asked for, and all numbers at once."""
    asked = []

    class Api:
        def __init__(self, timeout: int) -> None:
            pass

        def runs(self, path: str, filters: dict[str, str], lazy: bool) -> Iterator[Run]:
            asked.append((path, filters, lazy))
            return iter([as_public(view) for view in views])

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_runs, "reachable", lambda: True)
    monkeypatch.setattr(wandb, "Api", Api)
    for source in (folder, str(folder / "split_digits"), "wandb:me/cil/split_digits"):
        assert [r.method for r in results.load(source)] == ["finetune", "var"]
    assert len(results.load("wandb:me/cil")) == 2
    assert asked == [("me/cil", {"group": "split_digits"}, False), ("me/cil", {}, False)]
    monkeypatch.setattr(Api, "runs", lambda *_, **__: iter([]))
    with pytest.raises(UserError, match=r"W&B holds no finished runs of cil in me/cil\."):
        results.load("wandb:me/cil")


@pytest.mark.integration
def test_first_seeds(views: list[RunView]) -> None:
    more = [replace(view, seed=view.seed + 1) for view in views]
    assert results.first_seeds([*more, *views]) == views


# --- what cannot be read ---


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def refused(source: str) -> str:
    with pytest.raises(UserError) as caught:
        results.load(source)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


@pytest.mark.parametrize("address", ["", "project", "entity/", "/project", "entity/project/"])
def test_an_address_that_is_none(address: str) -> None:
    assert "write wandb:ENTITY/PROJECT" in refused(f"wandb:{address}")


def test_no_folder_and_no_runs(tmp_path: Path) -> None:
    assert "There is no folder" in refused(str(tmp_path / "none"))
    assert "no finished runs" in refused(str(tmp_path))
    assert "The source is empty" in refused("")


def test_runs_that_are_not_finished_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "e" / "ewc" / "seed1"
    with finished.begin(begun, finished.stream()) as record:
        record.save_learned(0, {}, 1, 2.0)
    finished.finish(tmp_path / "e" / "ewc" / "seed0", 0.5)
    assert [view.seed for view in results.load(tmp_path)] == [0]
    assert capsys.readouterr().err == "not finished and left out: ewc seed 1 (1 of 2 learned)\n"
    (begun / "progress.json").write_text("{")
    assert [view.seed for view in results.load(tmp_path)] == [0]
    assert "progress.json is damaged" in capsys.readouterr().err
    results.load(tmp_path / "e" / "ewc" / "seed0")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("account")
def test_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    assert "`wandb login`" in refused("wandb:entity/project")


@pytest.mark.usefixtures("account")
def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    assert "cannot be reached at http://127.0.0.1" in refused("wandb:entity/project")


@pytest.mark.integration
@pytest.mark.usefixtures("account")
def test_a_server_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """With wandb's own client: a wrong key, a private project."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        threading.Thread(target=refuse, args=(server,), daemon=True).start()
        assert "W&B did not give the runs of entity/project: " in refused("wandb:entity/project")


@pytest.mark.integration
def test_experiments_are_not_mixed(views: list[RunView], online: list[WandbRun]) -> None:
    place = views[0].folder.parents[1]
    assert place.is_dir()
    with pytest.raises(UserError, match=f"other, split_digits: name the place of one, .*{place}"):
        figures.forgetting_curves([*views, replace(views[0], experiment="other")])
    both = [online[0], replace(online[1], experiment="other")]
    with pytest.raises(UserError, match=r"such as wandb:ENTITY/PROJECT/split_digits\."):
        figures.forgetting_curves(both)
    names = [*views[0].stream["class_names"]]
    other = replace(views[0], stream={**views[0].stream, "class_names": names[::-1]})
    with pytest.raises(UserError, match="different class groups"):
        figures.accuracy_matrices([other, views[1]])


@pytest.mark.integration
def test_a_method_has_its_colour_in_every_figure(views: list[RunView]) -> None:
    curves = figures.forgetting_curves(views).axes[0]
    assert {line.get_color() for line in curves.lines} == {STYLES[v.method][0] for v in views}
