"""W&B at arm's length: it gets what it should, and whatever it does, training does not notice."""

import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from wandb_files import inspected

from cil import tracking
from cil.tracking import Tracker
from cil.wandb_access import Wish, choose_mode, has_account, reachable

KEY = "0123456789" * 4


@dataclass(frozen=True)
class Settings:
    mode: Wish = "offline"
    project: str = "cil-test"
    entity: str | None = None


def start(folder: Path, mode: Wish = "offline", init_timeout: float = 8) -> Tracker:
    return Tracker.start(
        Settings(mode),
        experiment="split_digits",
        method="var",
        seed=3,
        config={"var": {"depth": 4}},
        folder=folder,
        tags=["generative"],
        init_timeout=init_timeout,
    )


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tracking._said.clear()


class FakeRun:
    """Records what it is asked; `broken` names calls that raise, `hanging` ones that never end."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.broken: set[str] = set()
        self.hanging: set[str] = set()
        self.summary = types.SimpleNamespace(update=lambda values: self._called("summary", values))

    def _called(self, name: str, value: Any) -> None:
        self.calls.append((name, value))
        if name in self.broken:
            raise SystemExit(f"{name} broke\nin many lines")
        if name in self.hanging:
            threading.Event().wait()

    def log(self, values: dict[str, Any]) -> None:
        self._called("log", values)

    def define_metric(self, name: str, step_metric: str) -> None:
        self._called("define_metric", (name, step_metric))

    def finish(self, exit_code: int) -> None:
        self._called("finish", exit_code)


def use(tracker: Tracker) -> None:
    tracker.log_step(0, {"train/loss": 0.3})
    tracker.log_step(5, {"train/loss": 0.2})
    tracker.log_experience(0, {"cl/accuracy": 0.9})
    tracker.finish({"last_accuracy": 0.9})


def test_calls_arrive_in_order_on_their_own_axes() -> None:
    run = FakeRun()
    use(Tracker(lambda: run))
    assert run.calls == [
        ("define_metric", ("train/*", "step")),
        ("log", {"step": 0, "train/loss": 0.3}),
        ("log", {"step": 5, "train/loss": 0.2}),
        ("define_metric", ("cl/*", "experience")),
        ("log", {"experience": 0, "cl/accuracy": 0.9}),
        ("summary", {"last_accuracy": 0.9}),
        ("finish", 0),
    ]


def test_leaving_without_finish_marks_the_run_as_failed() -> None:
    run = FakeRun()
    with Tracker(lambda: run) as tracker:
        tracker.log_step(0, {"train/loss": 0.3})
    assert run.calls[-1] == ("finish", 1)
    with Tracker(lambda: run) as tracker:
        use(tracker)
    assert run.calls[-1] == ("finish", 0)


@pytest.mark.parametrize("call", ["log", "define_metric", "summary", "finish"])
def test_a_failing_call_is_one_warning_and_silence(
    call: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun()
    run.broken = {call}
    with Tracker(lambda: run) as tracker:
        use(tracker)
        use(tracker)
    tracker._thread.join(5)
    assert [record.message for record in caplog.records] == [
        f"W&B is off for the rest of this run: {call} broke."
    ]
    assert [name for name, _ in run.calls].count(call) <= 2  # finish is tried once more


@pytest.mark.parametrize("call", ["log", "finish"])
def test_a_hanging_call_holds_nobody_up(call: str, caplog: pytest.LogCaptureFixture) -> None:
    run = FakeRun()
    run.hanging = {call}
    began = time.monotonic()
    tracker = Tracker(lambda: run, patience=0.2)
    for step in range(1000):
        tracker.log_step(step, {"train/loss": 0.3})
    assert time.monotonic() - began < 10  # a hundredth of a second each on a starved machine
    use(tracker)
    assert time.monotonic() - began < 20  # the call itself would hang for ever
    assert len(caplog.records) == 1
    assert "did not finish in time" in caplog.text


def test_a_start_that_hangs_or_fails_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    use(Tracker(lambda: threading.Event().wait(), patience=0.1))

    def fail() -> None:
        raise OSError("no room")

    tracker = Tracker(fail)
    use(tracker)
    tracker._thread.join(5)
    assert "no room" in caplog.text


def test_what_w_and_b_does_not_take_is_not_hoarded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "QUEUE_LENGTH", 10)
    run = FakeRun()
    run.hanging = {"log"}
    tracker = Tracker(lambda: run, patience=0.1)
    for step in range(50):
        tracker.log_step(step, {"train/loss": 0.3})
    tracker.finish({})
    assert tracker._calls.qsize() <= 10
    assert "does not answer" in caplog.text
    assert len(caplog.records) == 1


def test_disabled_imports_no_wandb(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "import test_tracking as t; t.use(t.start(Path(sys.argv[1]), 'disabled'))\n"
        "print('wandb' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_cannot_be_imported_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(start(tmp_path))
    assert "could not be started" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    (tmp_path / "file").touch()
    use(start(tmp_path / "file" / "seed0"))
    assert len(caplog.records) == 1
    assert "could not be started" in caplog.text


# --- which mode ---


@pytest.mark.parametrize(
    ("wish", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "offline"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
    ],
)
def test_mode(
    wish: Wish, environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_mode(wish) == mode


def test_an_account_in_netrc_is_found_for_its_own_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_account()
    (tmp_path / "netrc").write_text("machine")
    assert not has_account()


def test_reachable_means_that_anything_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert reachable()
        thread.join()
    assert not reachable()


# --- the real wandb ---


@pytest.mark.integration
def test_an_offline_run_holds_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "seed3"
    picture = tmp_path / "curves.png"
    Figure().savefig(picture)
    random.seed(0)
    expected = random.Random(0).random()
    tracker = start(folder)
    tracker.log_step(0, {"train/loss": 0.3})
    tracker.log_step(7, {"train/loss": 0.2})
    tracker.log_experience(0, {"cl/accuracy": 0.9})
    tracker.log_matrix(np.array([[0.9, np.nan], [0.8, 0.7]]), [40, 41], ["0, 1", "2, 3"])
    tracker.log_confusion([0, 1, 1], [0, 1, 0], ["zero", "one"])
    tracker.log_figure("forgetting_curves", picture)
    tracker.log_figure("samples", picture, 2)
    tracker.finish({"last_accuracy": 0.75})
    assert random.random() == expected  # W&B draws from no generator that training uses
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""

    records = inspected(folder)
    (run,) = [r["run"] for r in records if r["type"] == "run"]
    assert run["run_id"] == (folder / "wandb_id").read_text()
    assert (run["run_group"], run["display_name"]) == ("split_digits", "var-seed3")
    assert (run["job_type"], run["project"]) == ("var", "cil-test")
    assert run["tags"] == ["split_digits", "var", "generative"]
    assert run["config"]["update"]["var"] == {"depth": 4}
    assert run["config"]["update"]["experiment"] == "split_digits"
    metrics = [r["metric"] for r in records if r["type"] == "metric"]
    axes = {m["glob_name"]: m["step_metric"] for m in metrics if "glob_name" in m}
    assert axes == {"train/*": "step", "cl/*": "experience"}
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [(h["step"], h["train/loss"]) for h in history if "train/loss" in h] == [
        (0, 0.3),
        (7, 0.2),
    ]
    assert [(h["experience"], h["cl/accuracy"]) for h in history if "cl/accuracy" in h] == [
        (0, 0.9)
    ]
    assert any(h.get("figures/forgetting_curves.format") == "png" for h in history)
    (samples,) = [h for h in history if "figures/samples.format" in h]
    assert samples["experience"] == 2
    summaries = [r["summary"]["update"] for r in records if r["type"] == "summary"]
    assert any(s.get("last_accuracy") == 0.75 for s in summaries)
    (groups,) = [s["class_groups"] for s in summaries if "class_groups" in s]
    assert groups == {
        "names": ["0, 1", "2, 3"],
        "test_images": [40, 41],
        "accuracy": [[0.9], [0.8, 0.7]],
    }
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/accuracy_matrix*.json")
    assert json.loads(table.read_text()) == {
        "columns": ["after experience", "0, 1", "2, 3"],
        "data": [[0, 0.9, None], [1, 0.8, 0.7]],
    }
    (chart,) = folder.glob("wandb/offline-run-*/files/media/table/confusion*.json")
    counts = {(row[0], row[1]): row[2] for row in json.loads(chart.read_text())["data"]}
    assert {pair: n for pair, n in counts.items() if n} == {
        ("zero", "zero"): 1,
        ("one", "one"): 1,
        ("one", "zero"): 1,
    }
    assert list(folder.glob("wandb/offline-run-*/files/media/images/figures/*.png"))


@pytest.mark.integration
def test_a_full_disk_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """W&B itself says nothing of rows that it could not write."""
    free = types.SimpleNamespace(free=4096)
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            tracker = start(tmp_path / name)
            tracker.log_step(0, {"train/loss": 0.3})
            monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
            tracker.finish({"last_accuracy": 0.75})
    (record,) = caplog.records
    assert "is full" in record.message


ONLINE = """
import logging, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_tracking as t
for name in ("a", "b"):
    t.use(t.start(Path(sys.argv[1]) / name, "online"))
"""


@pytest.mark.integration
@pytest.mark.parametrize("network", ["none", "black hole", "no account", "refusing server"])
def test_online_without_network_or_account_goes_on_offline(network: str, tmp_path: Path) -> None:
    """In a process of its own: what wandb does when the interpreter ends is part of the time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = os.environ | {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": KEY,
        }
        environment.pop("WANDB_ERROR_REPORTING")
        if network == "no account":
            del environment["WANDB_API_KEY"]
        if network == "none":
            server.close()
        if network == "refusing server":
            threading.Thread(target=refuse, args=(server,), daemon=True).start()
        command = [sys.executable, "-c", ONLINE, str(tmp_path), str(Path(__file__).parent)]
        began = time.monotonic()
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=170
        )
        seconds = time.monotonic() - began
    assert seconds < 120  # two runs: on its own, W&B waits 90 s and more for each
    lines = (result.stdout + result.stderr).splitlines()
    assert len([line for line in lines if "goes on offline" in line]) == 1, lines
    assert len(lines) == 1, lines
    for name in ("a", "b"):
        history = [r["history"]["item"] for r in inspected(tmp_path / name) if "history" in r]
        assert [h["train/loss"] for h in history if "train/loss" in h] == [0.3, 0.2]


def refuse(server: socket.socket) -> None:
    """Answer every request with 403, as a server does that does not know the key."""
    while True:
        connection, _ = server.accept()
        connection.recv(10_000)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\n{}")
        connection.close()


@pytest.mark.integration
def test_a_resumed_run_keeps_its_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            use(start(tmp_path))
            ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert not caplog.records
