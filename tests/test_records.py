"""Run folders: what is written comes back, kills at any point resume, damage is named."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from cil import files
from cil.errors import UserError
from cil.records import RunRecord, RunView, read_run, read_runs
from cil.records.layout import NUMBERS

CONFIG: dict[str, Any] = {
    "var": {"depth": 4, "lr": 1e-3, "scales": (1, 2, 3, 4), "plasticity": "adapter"},
    "seed": 0,
    "stream": {"augment": True, "class_order": None},
}
STREAM = {"name": "digits", "fingerprint": "0123456789abcdef", "class_names": ["0", "1"]}
ENVIRONMENT = {"commit": "abc", "device": "cpu", "created": "2026-01-01", "command": "x"}
SIZES = [90, 91, 89]
SUMMARY = {"last_accuracy": np.float32(0.5), **dict.fromkeys(NUMBERS[1:], 1)}
SUMMARY |= {"pretrained_on": "nothing"}


def opened(folder: Path, **changes: Any) -> RunRecord:
    arguments = {"config": CONFIG, "stream": STREAM, "environment": ENVIRONMENT} | changes
    return RunRecord.open(folder, **arguments)


def accuracies(t: int) -> list[float]:
    return [1 / (3 + t + i) for i in range(t + 1)]  # no finite decimal: repr must round-trip


def run_to_end(folder: Path, seed: int = 0) -> None:
    """A protocol in small: two experiences, each learned in three steps and then evaluated."""
    with opened(folder, config=CONFIG | {"seed": seed}) as record:
        if record.finished:
            return
        weight = record.load_state()["weight"] if record.learned else torch.zeros(2)
        while record.evaluated < 2:
            t = record.evaluated
            if record.learned == t:
                for step in range(3):
                    weight = weight + 0.1
                    values = {"train/loss": float(weight[0])}
                    record.log(t, record.steps + step, values)
                record.save_learned(t, {"weight": weight, "pickled": b"\x80\xff"}, 3, 0.5)
            record.log(t, record.steps, {"cl/accuracy": accuracies(t)[0]})
            record.save_evaluated(t, accuracies(t), SIZES[: t + 1])
        record.save_predictions(pd.DataFrame({"label": [0, 1], "predicted": [0, 0]}))
        record.finish(SUMMARY)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "split_digits" / "var" / "seed0"
    run_to_end(folder)
    return folder


@pytest.fixture
def halfway(tmp_path: Path) -> Path:
    """A run folder after one whole experience."""
    folder = tmp_path / "split_digits" / "var" / "seed0"
    with opened(folder) as record:
        record.log(0, 0, {"train/loss": 0.3})
        record.save_learned(0, {"weight": torch.ones(3)}, 5, 1.5)
        record.save_evaluated(0, [0.75], [90])
    return folder


# --- what is written comes back ---


def test_a_run_leaves_the_promised_files(finished: Path) -> None:
    assert set(contents(finished)) == {
        ".lock",
        "accuracy_matrix.csv",
        "checkpoints/experience1.pt",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "predictions.csv",
        "progress.json",
        "stream.json",
        "summary.json",
    }
    metrics = pd.read_csv(finished / "metrics.csv")
    assert list(metrics.columns) == ["experience", "step", "name", "value"]
    losses = metrics[metrics.name == "train/loss"]
    assert losses.step.tolist() == [0, 1, 2, 3, 4, 5]  # one count along the whole stream
    assert losses.experience.tolist() == [0, 0, 0, 1, 1, 1]
    table = pd.read_csv(finished / "accuracy_matrix.csv")
    assert table.group0.tolist() == pytest.approx([accuracies(0)[0], accuracies(1)[0]])
    assert np.isnan(table.group1[0])


def test_what_was_recorded_comes_back_to_the_bit(finished: Path) -> None:
    with opened(finished) as record:
        assert (record.learned, record.evaluated, record.steps) == (2, 2, 6)
        assert record.finished
        assert record.seconds == [0.5, 0.5]
        assert record.test_sizes == SIZES[:2]
        assert record.summary() == SUMMARY
        state = record.load_state()
        assert state["pickled"] == b"\x80\xff"
        assert torch.equal(state["weight"], torch.zeros(2) + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1)
        R = record.matrix()
    assert R[1].tolist() == accuracies(1)
    assert R[0, 0] == accuracies(0)[0]
    assert np.isnan(R[0, 1])


def test_empty_record(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as record:
        assert (record.learned, record.evaluated, record.steps, record.seconds) == (0, 0, 0, [])
        assert not record.finished
        assert record.matrix().shape == (0, 0)
        with pytest.raises(ValueError, match="no experience"):
            record.load_state()


def test_what_was_logged_but_not_saved_is_forgotten(halfway: Path) -> None:
    with opened(halfway) as record:
        record.log(1, 5, {"train/loss": 0.1})
    with opened(halfway) as record:
        record.save_learned(1, {}, 1, 0.1)
    assert (halfway / "metrics.csv").read_text() == (
        "experience,step,name,value\n0,0,train/loss,0.3\n"
    )


def test_figures_are_written_as_png_and_svg(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as record:
        path = record.save_figure("accuracy_matrix", Figure())
    assert path == tmp_path / "run" / "figures" / "accuracy_matrix.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in path.with_suffix(".svg").read_bytes()


def test_calls_out_of_order_are_refused(halfway: Path) -> None:
    with opened(halfway) as record:
        with pytest.raises(ValueError, match="experience 0"):
            record.save_learned(0, {}, 1, 1.0)
        with pytest.raises(ValueError, match="experience 1"):
            record.save_evaluated(1, [0.5, 0.5], [1, 1])
        record.save_learned(1, {}, 1, 1.0)
        with pytest.raises(ValueError, match="2 groups"):
            record.save_evaluated(1, [0.5], [1])
        with pytest.raises(ValueError, match="last evaluation"):
            record.finish({})


def test_a_state_that_could_not_be_loaded_is_refused_at_once(halfway: Path) -> None:
    with opened(halfway) as record:
        with pytest.raises(TypeError, match="pickled"):
            record.save_learned(1, {"path": Path("x")}, 1, 1.0)
        assert record.learned == 1
    with opened(halfway) as record:
        assert torch.equal(record.load_state()["weight"], torch.ones(3))


def test_another_environment_is_kept_beside_the_first(halfway: Path) -> None:
    for commit in ("abc", "def", "def"):
        opened(halfway, environment=ENVIRONMENT | {"commit": commit, "created": "now"}).close()
    recorded = json.loads((halfway / "environment.json").read_text())
    assert recorded["commit"] == "abc"
    assert [later["commit"] for later in recorded["resumed"]] == ["def"]


# --- killed at any moment ---


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counting(n: int, act: Callable[[], None]) -> Callable[[str], Callable[..., Any]]:
    """Wrap functions of os so that `act` is called before their n-th call, all counted together."""
    calls = 0

    def wrap(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                act()
            return original(*args, **kwargs)

        return wrapped

    return wrap


KILL_POINTS = ("replace", "fsync", "unlink", "rmdir")


def killed_at(n: int, work: Callable[[], None]) -> int:
    """Run `work` in a child killed by SIGKILL before the n-th change to the file system."""

    def child() -> None:
        os.fsync = lambda fd: None  # a SIGKILL loses no written page, and waiting takes time
        wrap = counting(n, lambda: os.kill(os.getpid(), signal.SIGKILL))
        for name in KILL_POINTS:
            setattr(os, name, wrap(name))
        work()

    return in_child(child)


def test_killed_anywhere_a_run_resumes_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    expected = contents(finished)
    for n in range(1, 1000):
        folder = tmp_path / str(n) / "seed0"
        status = killed_at(n, partial(run_to_end, folder))
        run_to_end(folder)
        assert contents(folder) == expected, f"killed at point {n}"
        if status == 0:
            break
    assert status == 0
    assert n > 40  # files, renames and folders of two experiences: the points were really there


def test_killed_again_and_again_a_run_still_ends(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "seed0"
    kills = 0
    while killed_at(20, lambda: run_to_end(folder)) != 0:
        kills += 1
        assert kills < 50
    assert kills > 2
    assert contents(folder) == contents(finished)


def test_fresh_killed_anywhere_starts_over(halfway: Path, tmp_path: Path) -> None:
    changed = CONFIG | {"seed": 1}

    def start_over(folder: Path) -> None:
        opened(folder, config=changed, fresh=True).close()

    for n in range(1, 1000):
        folder = tmp_path / str(n)
        shutil.copytree(halfway, folder)
        (folder / "figures").mkdir()
        status = killed_at(n, partial(start_over, folder))
        # without --fresh now: what was being deleted is not mixed with what begins anew
        with opened(folder, config=changed) as record:
            assert record.learned == 0
            assert not (folder / "metrics.csv").exists()
        if status == 0:
            break
    assert status == 0
    assert n > 10


@pytest.mark.integration
def test_sigkill_from_outside_at_random_moments(finished: Path, tmp_path: Path) -> None:
    """The same with a real process and a clock instead of chosen points."""
    folder = tmp_path / "seed0"
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from test_records import run_to_end; print(flush=True); run_to_end(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(folder), str(Path(__file__).parent)]
    for milliseconds in (2, 5, 10, 20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # imports are done
        time.sleep(milliseconds / 1000)
        process.kill()
        process.communicate()
    run_to_end(folder)
    assert contents(folder) == contents(finished)


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_errors_at_every_write_leave_a_folder_that_resumes(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    for n in range(1, 1000):
        folder = tmp_path / str(n) / "seed0"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)
            patch.setattr(os, name, counting(n, fail)(name))
            said = sentence(partial(run_to_end, folder))
        assert not list(folder.rglob("*.tmp"))
        run_to_end(folder)
        assert contents(folder) == contents(finished)
        if not said and n > 40:
            break  # a failing fsync of a folder is no error: some n below this one say nothing
        assert not said or "Input/output error" in said
    assert n < 100


def sentence(work: Callable[[], None]) -> str:
    """What a UserError of `work` says; empty when there is none."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def test_leftover_temporary_files_are_removed(halfway: Path) -> None:
    (halfway / "figures").mkdir()
    names = ["progress.json.tmp", "checkpoints/experience1.pt.tmp", "figures/a.png.tmp"]
    for name in names:
        (halfway / name).write_bytes(b"half")
    opened(halfway).close()
    assert not [name for name in names if (halfway / name).exists()]


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, "seed = 0 and now it is 1"),
        ({"var": CONFIG["var"] | {"depth": 6}}, "var.depth = 4 and now it is 6"),
        ({"var": CONFIG["var"] | {"scales": (1, 2)}}, "var.scales = [1, 2, 3, 4] and now it is"),
        ({"var": CONFIG["var"] | {"new": 1}}, "var.new = not set and now it is 1"),
        ({"stream": {"augment": True}}, "stream.class_order = null and now it is not set"),
        ({"stream": {"augment": 1, "class_order": None}}, "stream.augment = true and now it is 1"),
    ],
)
def test_a_changed_config_is_refused_by_naming_the_key(
    halfway: Path, change: dict[str, Any], expected: str
) -> None:
    before = contents(halfway)
    with pytest.raises(UserError) as refusal:
        opened(halfway, config=CONFIG | change)
    assert expected in str(refusal.value)
    assert "--fresh" in str(refusal.value)
    assert "--runs" in str(refusal.value)
    assert contents(halfway) == before


def test_the_same_config_in_other_types_is_the_same(halfway: Path) -> None:
    var = CONFIG["var"] | {"scales": [1, 2, 3, 4], "depth": 4.0}
    opened(halfway, config=CONFIG | {"var": var}).close()


def test_another_stream_is_refused(halfway: Path) -> None:
    with pytest.raises(UserError, match=r"another stream .*0123456789abcdef, now fedc"):
        opened(halfway, stream=STREAM | {"fingerprint": "fedc"})


def test_fresh_starts_over_in_this_folder_alone(halfway: Path) -> None:
    sibling = halfway.parent / "seed1"
    shutil.copytree(halfway, sibling)
    before = contents(sibling)
    with opened(halfway, config=CONFIG | {"seed": 5}, fresh=True) as record:
        assert record.learned == 0
    assert not (halfway / "checkpoints").exists()
    assert contents(sibling) == before


def test_fresh_mends_damage(halfway: Path) -> None:
    (halfway / "progress.json").write_text("{")
    opened(halfway, fresh=True).close()


def test_a_second_writer_is_refused_until_the_first_is_done(halfway: Path) -> None:
    with opened(halfway), pytest.raises(UserError, match=r"Another process is writing in .*seed0"):
        opened(halfway, fresh=True)
    opened(halfway).close()


def test_a_child_does_not_hold_the_lock_of_its_dead_parent(halfway: Path) -> None:
    """A DataLoader worker outlives a killed trainer for seconds; resuming must not wait for it."""
    reading, writing = os.pipe()

    def parent() -> None:
        record = opened(halfway)
        child = os.fork()
        if child == 0:
            os.read(reading, 1)
            os._exit(0)
        assert record.learned == 1
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(parent) == -signal.SIGKILL
    opened(halfway).close()
    os.write(writing, b"x")
    os.close(reading)
    os.close(writing)


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a run's"):
        opened(tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file.* \(Not a directory\).*--runs"):
        opened(tmp_path / "file" / "var" / "seed0")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "garbled": lambda data: bytes(255 - byte for byte in data),
    "zeroed": lambda data: bytes(len(data)),
}
FILES = [
    "progress.json",
    "metrics.csv",
    "accuracy_matrix.csv",
    "config.yaml",
    "stream.json",
    "environment.json",
    "checkpoints/experience0.pt",
]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(halfway: Path, name: str, how: str) -> None:
    path = halfway / name
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    with pytest.raises(UserError) as refusal:
        opened(halfway).load_state()
    assert str(path) in str(refusal.value)
    assert "--fresh" in str(refusal.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(halfway: Path, name: str) -> None:
    (halfway / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        opened(halfway).load_state()


def test_one_changed_digit_is_damage(halfway: Path) -> None:
    for name, old, new in (
        ("accuracy_matrix.csv", "0.75", "0.85"),
        ("metrics.csv", "0.3", "0.2"),
    ):
        path = halfway / name
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=name):
            opened(halfway)
        path.write_text(text)


@pytest.mark.parametrize(
    "change",
    [
        {"learned": 5},
        {"learned": "1"},
        {"steps": None},
        {"seconds": []},
        {"seconds": ["x"]},
        {"sha256": None},
        {"sha256": {"config.yaml": "", "stream.json": ""}},
        {"extra": 1},
        {"test_sizes": [1, 2]},
        {"test_sizes": ["x"]},
        {"unreadable": [1]},
    ],
)
def test_progress_that_contradicts_itself_is_damage(halfway: Path, change: dict[str, Any]) -> None:
    path = halfway / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"progress\.json is damaged"):
        opened(halfway)


def test_records_of_another_format_are_refused(halfway: Path) -> None:
    path = halfway / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="another version of cil"):
        opened(halfway)


@pytest.mark.parametrize("content", ["", '{"last_acc', "[]", "\x00"])
def test_a_damaged_summary_is_named(finished: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "split_digits" / "var" / "seed0"
    shutil.copytree(finished, folder)
    (folder / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        opened(folder)
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        read_runs(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stored_images", None, r"summary\.json lacks stored_images, as another version"),
        ("pretrained_on", None, r"summary\.json lacks pretrained_on, as another version"),
        ("stored_images", "none", r"summary\.json is damaged"),
        ("last_accuracy", [0.5], r"summary\.json is damaged"),
        ("pretrained_on", 3, r"summary\.json is damaged"),
        ("unreadable_images", "x", r"summary\.json is damaged"),
    ],
)
def test_a_summary_that_tables_cannot_be_made_of_is_named(
    key: str, value: Any, said: str, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "split_digits" / "var" / "seed0"
    shutil.copytree(finished, folder)
    summary = json.loads((folder / "summary.json").read_text()) | {key: value}
    if value is None:
        del summary[key]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=said):
        read_runs(tmp_path)


# --- a full disk ---


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_in_a_sentence(
    halfway: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(halfway)

    class FullFile:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            raise OSError(code, os.strerror(code))

    original = files.HashingWriter
    with opened(halfway) as record:
        with monkeypatch.context() as patch:
            patch.setattr(files, "HashingWriter", lambda file: original(FullFile(file)))  # type: ignore[arg-type]
            with pytest.raises(UserError, match=r"disk is full: .*experience1\.pt"):
                record.save_learned(1, {"weight": torch.ones(9)}, 1, 1.0)
        assert contents(halfway) == before
        record.save_learned(1, {"weight": torch.ones(9)}, 1, 1.0)  # space was made
        assert record.learned == 2


@pytest.mark.integration
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_is_really_full(halfway: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets no small disk be mounted")
    try:
        folder = disk / "seed0"
        shutil.copytree(halfway, folder)
        with opened(folder) as record, pytest.raises(UserError, match="disk is full"):
            record.save_learned(1, {"weight": torch.ones(1_000_000)}, 1, 1.0)
        with opened(folder) as record:
            assert record.learned == 1
            assert torch.equal(record.load_state()["weight"], torch.ones(3))
            record.save_learned(1, {"weight": torch.ones(4)}, 1, 1.0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_device_is_reported_by_the_system_itself(
    halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reports it as a RuntimeError; the real errno must get through all the same."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    original = Path.open

    def open_full(self: Path, *args: Any, **kwargs: Any) -> Any:
        full = ".pt." in self.name and self.name.endswith(".tmp")
        return original(Path("/dev/full") if full else self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with opened(halfway) as record, pytest.raises(UserError, match="disk is full"):
        record.save_learned(1, {"weight": torch.ones(100_000)}, 1, 1.0)


# --- reading finished runs ---


def test_a_copy_is_no_run_of_another_seed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "split_digits" / "var" / "seed7")
    with pytest.raises(UserError, match="var/seed7 holds a run of var with seed 0"):
        read_runs(tmp_path)


def test_read_runs_finds_finished_runs_in_order(tmp_path: Path) -> None:
    for method, seed in (("var", 10), ("var", 9), ("finetune", 0)):
        run_to_end(tmp_path / "split_digits" / method / f"seed{seed}", seed)
    (tmp_path / "split_digits" / "finetune" / "seed0" / "summary.json").unlink()  # unfinished
    runs = read_runs(tmp_path)
    assert [(run.experiment, run.method, run.seed) for run in runs] == [
        ("split_digits", "var", 9),
        ("split_digits", "var", 10),
    ]
    assert read_runs(tmp_path / "split_digits" / "var" / "seed9")[0].seed == 9
    run: RunView = runs[0]
    assert run.config["var"]["scales"] == [1, 2, 3, 4]
    assert run.stream["fingerprint"] == STREAM["fingerprint"]
    assert run.summary == SUMMARY
    assert run.matrix[1].tolist() == accuracies(1)
    assert run.sizes == SIZES[:2]
    assert len(run.metrics()) == 8
    assert run.predictions().predicted.tolist() == [0, 0]


def test_read_runs_of_nothing(tmp_path: Path) -> None:
    assert read_runs(tmp_path) == []
    with pytest.raises(UserError, match="no folder"):
        read_runs(tmp_path / "absent")


def test_a_run_that_is_not_there_or_not_finished_is_not_called_damaged(halfway: Path) -> None:
    with pytest.raises(UserError, match=r"not finished \(experiences learned: 1\).* `python x`"):
        read_run(halfway)
    with pytest.raises(UserError, match=r"There is no run in .*seed1"):
        read_run(halfway.parent / "seed1")
    (halfway / "progress.json").unlink()
    with pytest.raises(UserError, match=r"progress\.json is missing"):
        read_run(halfway)


def test_unreadable_images_are_kept_with_the_next_save_and_counted_once(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as record:
        record.note_unreadable(["b.jpg", "a.jpg"])
        assert record.unreadable == ["b.jpg", "a.jpg"]
        record.save_learned(0, {"weight": torch.zeros(2)}, 3, 0.5)
        record.note_unreadable(["a.jpg", "ö.jpg"])
        assert record.unreadable == ["b.jpg", "a.jpg", "ö.jpg"]
    with opened(tmp_path / "run") as record:  # what was noted after the save is met again
        assert record.unreadable == ["b.jpg", "a.jpg"]
        record.note_unreadable(["a.jpg", "ö.jpg"])
        record.save_evaluated(0, [0.5], SIZES[:1])
    with opened(tmp_path / "run") as record:
        assert record.unreadable == ["b.jpg", "a.jpg", "ö.jpg"]


# --- checkpoints of earlier experiences ---


def test_every_checkpoint_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "split_digits" / "replay" / "seed0"
    with opened(folder, keep_checkpoints=True) as record:
        record.save_learned(0, {"weight": torch.zeros(2)}, 1, 0.1)
        record.save_evaluated(0, [1.0], [90])
    with opened(folder, keep_checkpoints=True) as record:  # and so it does after a resume
        assert torch.equal(record.load_state()["weight"], torch.zeros(2))
        record.save_learned(1, {"weight": torch.ones(2)}, 1, 0.1)
        assert torch.equal(record.load_state()["weight"], torch.ones(2))
        record.save_evaluated(1, [0.5, 1.0], [90, 91])
        record.finish(SUMMARY)
    view = read_run(folder)
    assert view.kept_states() == [0, 1]
    assert torch.equal(view.state(0)["weight"], torch.zeros(2))
    assert torch.equal(view.state()["weight"], view.state(1)["weight"])


def test_else_the_newest_alone_stays(finished: Path) -> None:
    assert read_run(finished).kept_states() == [1]
