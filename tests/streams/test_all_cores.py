"""One function for many files: the same results in the same order, by processes or by threads."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from cil.run import exit_code
from cil.streams import all_cores
from cil.streams.all_cores import FEWEST, by_all_cores


@pytest.mark.parametrize("count", [0, 1, FEWEST, FEWEST + 65])
@pytest.mark.parametrize("platform", [sys.platform, "darwin"])
def test_results_come_in_order(count, platform, monkeypatch):
    monkeypatch.setattr(all_cores.sys, "platform", platform)
    offset = 3  # what a function holds on to comes along
    assert list(by_all_cores(lambda item: item + offset, count)) == list(range(3, count + 3))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are none")
def test_many_calls_are_shared_out_to_processes(monkeypatch):
    monkeypatch.setattr(all_cores.parallel, "cores", lambda: 2)
    workers = set(by_all_cores(lambda _: os.getpid(), FEWEST))
    assert len(workers) == 2
    assert os.getpid() not in workers
    assert set(by_all_cores(lambda _: os.getpid(), FEWEST - 1)) == {os.getpid()}


def test_what_a_function_raises_is_raised():
    def fails(item: int) -> int:
        if item == FEWEST - 1:
            raise MemoryError
        return item

    with pytest.raises(MemoryError):
        list(by_all_cores(fails, FEWEST))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are none")
def test_its_processes_end_with_a_process_that_is_killed():
    """Each has more to say than a pipe holds, and no one would take it."""
    code = (
        "import os; from cil.streams.all_cores import by_all_cores\n"
        "for pid, _ in by_all_cores(lambda _: (os.getpid(), bytes(2**20)), 512):\n"
        "    print(pid, flush=True); input()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(1)  # by then its pipe is full
        parent.kill()
    deadline = time.monotonic() + 10
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are none")
def test_one_that_is_killed_is_one_sentence(capsys):
    def killed(item: int) -> None:
        if item == FEWEST - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(partial(list, by_all_cores(killed, FEWEST))) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: A process that reads images was ended")


def test_no_random_number_is_drawn():
    before = torch.get_rng_state()
    list(by_all_cores(str, FEWEST))
    assert torch.equal(before, torch.get_rng_state())
