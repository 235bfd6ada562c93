"""A function of many files by all cores: Python's lock leaves many threads no faster than one.

By processes, where they can be forked from this one: others would run the user's script again, up
to where this process stands, and may wait there for the lock that it holds on a cached file.
"""

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cil import parallel

FEWEST = 512  # calls worth processes: these take some tenths of a second to start and to end
_AT_ONCE = 64  # calls a process is sent
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_AHEAD = 1024  # calls of threads whose results wait to be taken

T = TypeVar("T")


def by_all_cores(function: Callable[[int], T], count: int) -> Iterator[T]:
    """function(0), function(1), ... function(count - 1), in this order.

    Results must be such as can be pickled; what else a call changes may be lost.
    """
    if sys.platform == "linux" and parallel.cores() > 1 and count >= FEWEST:
        yield from _by_processes(function, count)
    else:
        yield from _by_threads(function, count)


def _by_threads(function: Callable[[int], T], count: int) -> Iterator[T]:
    with ThreadPoolExecutor(parallel.cores()) as threads:
        for first in range(0, count, _AHEAD):
            yield from threads.map(function, range(first, min(first + _AHEAD, count)))


def _by_processes(function: Callable[[int], T], count: int) -> Iterator[T]:
    # A loader tells when one of its processes has died; at Ctrl-C they end without a word.
    from torch import Generator
    from torch.utils.data import DataLoader

    calls: Any = _Calls(function, count)
    loader = DataLoader(
        calls,
        batch_size=_AT_ONCE,
        collate_fn=list,
        num_workers=parallel.cores(),
        multiprocessing_context="fork",
        worker_init_fn=_end_with_parent,
        generator=Generator(),  # it draws a number for every pass, which no run is to miss
    )
    for results in loader:
        yield from results


def _end_with_parent(_: int) -> None:
    """Have Linux end this process with the one that started it, also where that is killed.

    It would wait for ever for someone to take its results.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Calls:
    """A data set as a loader asks for one."""

    def __init__(self, function: Callable[[int], Any], count: int) -> None:
        self.function, self.count = function, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> Any:
        return self.function(item)
