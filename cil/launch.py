"""Starting processes, one a device or a run, and seeing to it that all of them end together.

The processes say nothing of their own end: they report it to the one that started them, which
makes one sentence of it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from cil import parallel
from cil.config import TrainerConfig
from cil.errors import DivergenceError, UserError, is_interrupt, readers_missed
from cil.parallel import Place

CONTEXT = multiprocessing.get_context("spawn")
GRACE = 5.0  # seconds in which a process may end by itself after another one failed
LONGEST = 20_000  # characters of a report: a pipe takes so many without a reader


@dataclass(frozen=True)
class Report:
    """How a process failed."""

    when: float  # on the machine's clock, which all of them read
    kind: str  # "refused": a UserError; "diverged": that kind of it; "interrupted"; "crashed"
    text: str  # the sentence, or the end of the traceback


def launch(settings: TrainerConfig, work: Callable[..., None], *arguments: Any) -> None:
    """Call work(*arguments) in one process for each of `settings.devices`; wait for all of them.

    `work` must be importable by its name, and it and its arguments are pickled. When one process
    fails, the others are interrupted at once, and killed where they do not react.

    Raises:
        UserError: one of them raised it, or was killed.
        KeyboardInterrupt: one of them was interrupted.
        SystemExit: one of them crashed; its traceback is on stderr.
    """
    ports = CONTEXT.SimpleQueue()
    places = [Place(rank, rank, settings.devices) for rank in range(settings.devices)]
    together(_as_device, [(place, settings, ports, work, arguments) for place in places])


def together(
    work: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Call work(*a) in a process of its own for each `a` of `arguments`, as `launch` does.

    Meanwhile `watch` is called about twice a second.
    """
    children: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for given in arguments:
            receiver, sender = CONTEXT.Pipe(duplex=False)
            child = CONTEXT.Process(
                target=_take_part, args=(sender, sys.orig_argv, bool(children), work, given)
            )
            children.append(child)
            pipes.append(receiver)
            _start(child)
            sender.close()
        _wait(children, watch)
        killed = [rank for rank, child in enumerate(children) if (child.exitcode or 0) < 0]
    finally:
        _end(children)
    reports = [report for pipe in pipes if (report := _received(pipe)) is not None]
    _explain(reports, children, killed)


def shared(count: int) -> Any:
    """So many bytes (and a lock of theirs) that processes started here can write and read."""
    return CONTEXT.Array("b", count)


def queue() -> Any:
    """What processes started here put, for this one to get."""
    return CONTEXT.SimpleQueue()


def _start(child: BaseProcess) -> None:
    """An interrupt waits meanwhile, here and in the child, which would show a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(children: Sequence[BaseProcess], watch: Callable[[], None]) -> None:
    """Until all have ended well, or the first one has not."""
    running = list(children)
    while running and not any(child.exitcode for child in children):
        wait([child.sentinel for child in running], timeout=0.5)
        watch()
        running = [child for child in running if child.is_alive()]


def _end(children: Sequence[BaseProcess]) -> None:
    """Interrupt those that still run, so that they close what they hold; then kill them."""
    children = [child for child in children if child.pid is not None]  # those that were started
    try:
        for child in children:
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
    finally:  # also when interrupted once more
        for child in children:
            child.kill()
            child.join()


def _received(pipe: Connection) -> Report | None:
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:  # it ended well, or had no time to report
        return None


def _explain(
    reports: Sequence[Report], children: Sequence[BaseProcess], killed: Sequence[int]
) -> None:
    """Raise what the end of one process was; those of the others follow from it."""
    by_kind = {report.kind: report for report in sorted(reports, key=lambda r: -r.when)}
    if "refused" in by_kind:
        raise UserError(by_kind["refused"].text)
    if "diverged" in by_kind:
        raise DivergenceError(by_kind["diverged"].text)
    if killed:
        name = signal.Signals(-(children[killed[0]].exitcode or 0)).name
        raise UserError(
            f"Process {killed[0]} of {len(children)} was ended by {name}, as happens when memory "
            "runs out; the same line goes on from the last experience."
        )
    if "crashed" in by_kind:
        print(by_kind["crashed"].text, file=sys.stderr, end="")
        raise SystemExit(1)
    if "interrupted" in by_kind:
        raise KeyboardInterrupt
    if any(child.exitcode for child in children):  # before it could report: Python said why
        raise SystemExit(1)


def _as_device(
    place: Place,
    settings: TrainerConfig,
    ports: Any,
    work: Callable[..., None],
    arguments: Sequence[Any],
) -> None:
    """The work, as one of the devices that share it."""
    parallel.join(place, settings, ports)
    work(*arguments)
    parallel.leave()


def _take_part(
    report: Connection,
    command: list[str],
    echo: bool,
    work: Callable[..., None],
    arguments: Sequence[Any],
) -> None:
    """What one of the processes does; an echo is one whose warnings the first one says as well."""
    os.setpgrp()  # Ctrl-C reaches the process that started this one, which passes it on
    threading.Thread(target=_follow, daemon=True).start()
    sys.orig_argv = command  # the records show it
    tqdm.set_lock(threading.RLock())  # its own, for all processes, would outlive an abrupt end
    if echo:
        warnings.simplefilter("ignore")
    try:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            with readers_missed():
                work(*arguments)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except BaseException as error:
        report.send(_report(error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an orderly end would wait for the other processes


def _follow() -> None:
    """End when the process that started this one does, whatever ended it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report(error: BaseException) -> Report:
    if isinstance(error, UserError):
        kind = "diverged" if isinstance(error, DivergenceError) else "refused"
        return Report(time.monotonic(), kind, str(error))
    if is_interrupt(error):
        return Report(time.monotonic(), "interrupted", "")
    return Report(time.monotonic(), "crashed", traceback.format_exc()[-LONGEST:])
