"""Weights & Biases, kept at arm's length: what runs send there. Imports wandb only when used.

Every call goes through a queue to one daemon thread, so that training never waits for W&B: neither
for a network that is down nor for a service that hangs. The first failure is said in one warning;
after it the tracker does nothing. Our own records on disk are the truth, W&B is a view of them.
"""

import functools
import logging
import math
import os
import queue
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cil.files import write_bytes
from cil.trial import Trial
from cil.wandb_access import PROBE_SECONDS, Mode, Wish, choose_mode, has_account, reachable
from cil.wandb_runs import CLASS_GROUPS

INIT_SECONDS = 15.0  # wandb's own default is 90
FINISH_SECONDS = 30.0  # for uploading what is left at the end of a run
SLACK_SECONDS = 10.0  # for the W&B service on this machine to answer at all
CHARTED_CLASSES = 100
LEAST_ROOM = 2**17  # bytes; W&B writes blocks of 32 kB
QUEUE_LENGTH = 100_000  # calls kept while W&B does not answer, some tens of megabytes

logger = logging.getLogger(__name__)
_said: set[str] = set()


class TrackerSettings(Protocol):
    """What `Tracker.start` reads from the config."""

    @property
    def mode(self) -> Wish: ...
    @property
    def project(self) -> str: ...
    @property
    def entity(self) -> str | None: ...


class Tracker:
    """One W&B run: one method, one seed. No method of this class raises or blocks but `finish`,
    which waits for a bounded time. Leaving it as a context manager without `finish` marks the W&B
    run as failed.
    """

    def __init__(
        self,
        begin: Callable[[], Any] | None,
        patience: float = FINISH_SECONDS,
        folder: Path | None = None,
    ) -> None:
        """begin: makes the W&B run, called in the thread; None: a tracker that does nothing.
        patience: seconds that `finish` waits at most; folder: where W&B's files go. Use
        `Tracker.start`.
        """
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._axes: set[str] = set()
        self._patience, self._folder = patience, folder
        self._open = begin is not None
        self._thread = threading.Thread(target=self._work, args=(begin,), daemon=True, name="wandb")
        if self._open:
            self._thread.start()

    @classmethod
    def start(
        cls,
        settings: TrackerSettings,
        *,
        experiment: str,
        method: str,
        seed: int,
        config: Mapping[str, Any],
        folder: Path,
        tags: Sequence[str] = (),
        trial: Trial | None = None,
        init_timeout: float = INIT_SECONDS,
    ) -> "Tracker":
        """Begin, or go on with, the W&B run of a method and seed.

        folder: the run folder; W&B's own files go to folder/wandb and the id of the W&B run is kept
        in folder/wandb_id, so that a resumed run goes on in the same one. tags: besides the names
        of experiment and method. trial: of a sweep, whose runs are the group; an agent's has its
        W&B run already, with an id and a name. init_timeout: seconds until an online start is given
        up for an offline one.
        """
        try:
            mode = choose_mode(settings.mode)
            if mode == "disabled":
                return cls(None)
            # Its reports about itself are sent even offline, and waited for at exit for 10 s.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            os.environ.setdefault("WANDB_SILENT", "true")  # no lines between the progress bars
            import wandb  # noqa: F401  (here: imports in two threads at once can deadlock)

            run_id = _run_id(folder, trial.name if trial and trial.by_agent else _new_id())
        except Exception as error:
            _warn("W&B is off, it could not be started", _line(error))
            return cls(None)
        name: str | None = f"{method}-seed{seed}"
        if trial is not None:
            name = None if trial.by_agent else f"{trial.name}-{name}"
        arguments = {
            "project": settings.project,
            "entity": settings.entity,
            "group": trial.sweep if trial else experiment,
            "job_type": method,
            "name": name,
            "tags": [experiment, method, *tags],
            # By which `cil.wandb_runs` knows the run, whatever its group and name are.
            "config": {**config, "experiment": experiment, "method": method, "seed": seed},
            "dir": str(folder),
            "id": run_id,
        }
        begin = functools.partial(_begin, mode, init_timeout, arguments)
        return cls(begin, init_timeout + PROBE_SECONDS + FINISH_SECONDS + SLACK_SECONDS, folder)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one optimiser step; step counts along the whole stream."""
        self._log("step", step, values)

    def log_experience(self, experience: int, values: Mapping[str, float]) -> None:
        """Values after one experience, such as {"cl/accuracy": 0.9}."""
        self._log("experience", experience, values)

    def log_matrix(
        self, matrix: NDArray[np.floating], sizes: Sequence[int], group_names: Sequence[str]
    ) -> None:
        """The accuracy matrix (T, T) as a table, NaN cells empty; and in the summary, as numbers
        that `cil.wandb_runs` reads back, with the test images of each class group.
        """
        columns, values = ["after experience", *group_names], np.array(matrix)
        numbers = {
            "names": list(group_names),
            "test_images": list(sizes),
            "accuracy": [row[: t + 1].tolist() for t, row in enumerate(values)],
        }

        def call(run: Any) -> None:
            import wandb

            rows = [
                [t, *(None if math.isnan(value) else float(value) for value in row)]
                for t, row in enumerate(values)
            ]
            run.log({"accuracy_matrix": wandb.Table(columns=list(columns), data=list(rows))})
            run.summary.update({CLASS_GROUPS: numbers})

        self._send(call)

    def log_confusion(
        self, labels: Sequence[int], predictions: Sequence[int], class_names: Sequence[str]
    ) -> None:
        """Which class is taken for which, as a chart of W&B's; of very many classes none.

        A cell is a row of its table: the figure of the record shows what the chart cannot.
        """
        if len(class_names) > CHARTED_CLASSES:
            return
        values = list(class_names), list(labels), list(predictions)

        def call(run: Any) -> None:
            import wandb

            names, truth, guesses = values
            chart = wandb.plot.confusion_matrix(y_true=truth, preds=guesses, class_names=names)
            run.log({"confusion": chart})

        self._send(call)

    def log_figure(self, name: str, path: Path, experience: int | None = None) -> None:
        """An image file as figures/<name>, of after an experience where there is one each time."""
        after = {} if experience is None else {"experience": experience}

        def call(run: Any) -> None:
            import wandb

            run.log({f"figures/{name}": wandb.Image(str(path)), **after})

        self._send(call)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put the stream-final numbers into the summary, upload what is left, end the W&B run."""
        numbers = dict(summary)
        self._send(lambda run: run.summary.update(numbers))
        self._close(exit_code=0)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self._close(exit_code=1)

    def _log(self, axis: str, position: int, values: Mapping[str, float]) -> None:
        row = {axis: position, **values}

        def call(run: Any) -> None:
            for name in values:
                pattern = f"{name.split('/')[0]}/*" if "/" in name else name
                if pattern not in self._axes:
                    self._axes.add(pattern)
                    run.define_metric(pattern, step_metric=axis)
            run.log(row)

        self._send(call)

    def _send(self, call: Callable[[Any], None]) -> None:
        if not self._open:
            return
        if self._calls.qsize() < QUEUE_LENGTH:
            self._calls.put(call)
        else:
            self._open = False
            _warn("W&B is off for the rest of this run", "it does not answer")

    def _close(self, exit_code: int) -> None:
        if not self._open:
            return
        self._send(lambda run: run.finish(exit_code=exit_code))
        self._open = False
        self._calls.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            _warn("W&B did not finish in time; `wandb sync` can upload what its folder holds")
        if self._folder is not None and _is_full(self._folder):
            # It drops what it cannot write, without a word.
            _warn("W&B's files have gaps", f"the disk of {self._folder} is full")

    def _work(self, begin: Callable[[], Any]) -> None:
        """The thread: make the run, then carry out the calls until None or the first failure."""
        run = None
        try:
            run = begin()
            while (call := self._calls.get()) is not None:
                call(run)
        except BaseException as error:  # SystemExit too: nothing of W&B may end a training
            self._open = False
            _warn("W&B is off for the rest of this run", _line(error))
            with suppress(BaseException):
                if run is not None:
                    run.finish(exit_code=1)


def _begin(mode: Mode, init_timeout: float, arguments: Mapping[str, Any]) -> Any:
    """A W&B run, online if that is the mode and the server lets us, else offline."""
    import wandb

    settings = wandb.Settings(
        init_timeout=init_timeout,
        finish_timeout=FINISH_SECONDS,
        console="off",
        disable_code=True,
    )
    if mode == "online":
        try:
            why_not = _why_not_online()
            if not why_not:
                return wandb.init(mode="online", resume="allow", settings=settings, **arguments)
        except Exception as error:
            why_not = _line(error)
            # W&B calls the id of a run that it failed to start "in use"
            arguments = {**arguments, "id": _new_id()}
        _warn("W&B goes on offline, `wandb sync` can upload later", why_not)
    return wandb.init(mode="offline", settings=settings, **arguments)


def _why_not_online() -> str:
    if not has_account():
        return "no account is set up, see `wandb login`"  # asking for one would block
    return "" if reachable() else "its server cannot be reached"


def _run_id(folder: Path, first: str) -> str:
    """The id of the W&B run that belongs to a run folder, which is `first` on first use."""
    path = folder / "wandb_id"
    if not path.exists():
        write_bytes(path, first.encode())
    return path.read_text().strip()


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < LEAST_ROOM
    except OSError:
        return False


def _new_id() -> str:
    return secrets.token_hex(4)


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _warn(what: str, why: str = "") -> None:
    """Say it once a process: four methods on a dead network are one piece of news."""
    if what not in _said:
        _said.add(what)
        logger.warning(f"{what}: {why}." if why else f"{what}.")
