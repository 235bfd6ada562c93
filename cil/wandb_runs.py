"""Finished runs as Weights & Biases keeps them, read back through its public API.

A run has there what `cil.tracking` sent: its config, the stream-final numbers in its summary, the
accuracy matrix as numbers under `CLASS_GROUPS` (the table beside it is for the eye), one row of
history an experience, and the figures. Its model and its predictions are on disk alone.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cil.errors import UserError
from cil.wandb_access import base_url, has_account, reachable

CLASS_GROUPS = "class_groups"  # in the summary: names, test_images, accuracy (rows of R up to t)
FIGURES = "figures/"
AXES = ("step", "experience")  # what history is counted in; the summary keeps the last of each
SECONDS = 30  # for each answer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class WandbRun:
    """A finished run of a W&B project; the same to read as `cil.records.RunView`.

    matrix (T, T) in [0, 1], NaN above the diagonal; sizes: test images of each class group; url:
    where its page is.
    """

    url: str
    experiment: str
    method: str
    seed: int
    config: dict[str, Any]
    summary: dict[str, Any]
    matrix: FloatArray
    sizes: list[int]
    group_names: list[str]
    _public: Any  # wandb's own object

    def over_experiences(self, name: str) -> FloatArray:
        """A number such as "samples/drift" after each experience (T,); NaN where there is none."""
        values = np.full(len(self.sizes), np.nan)
        with _answered(self.url):
            for row in self._public.scan_history(keys=["experience", name]):
                values[int(row["experience"])] = row[name]
        return values

    def pictures(self) -> list[str]:
        """The names of its figures."""
        keys = self._public.summary_metrics
        return sorted(key.removeprefix(FIGURES) for key in keys if key.startswith(FIGURES))

    def picture(self, name: str) -> bytes | None:
        """A figure as a PNG file, of those after each experience the last; None: there is none."""
        if name not in self.pictures():
            return None
        path = self._public.summary_metrics[FIGURES + name]["path"]
        with _answered(self.url), tempfile.TemporaryDirectory() as folder:
            self._public.file(path).download(root=folder, replace=True).close()
            return (Path(folder) / path).read_bytes()


def read_wandb(address: str) -> list[WandbRun]:
    """The finished runs of ENTITY/PROJECT or ENTITY/PROJECT/GROUP, sorted as those of folders are.

    Runs that cil did not record, or that are not finished, are left out; of several with the same
    experiment, method, seed and settings the newest counts.

    Raises:
        UserError: the address is none, there is no account, no network, no such project or no
            finished run in it.
    """
    parts = address.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(
            f"'{address}' is no address at W&B: write wandb:ENTITY/PROJECT or "
            "wandb:ENTITY/PROJECT/GROUP."
        )
    if not has_account():
        raise UserError("No W&B account is set up here: run `wandb login`, or name a run folder.")
    if not reachable():
        raise UserError(f"W&B cannot be reached at {base_url()}: try later, or name a run folder.")
    filters = {"group": parts[2]} if len(parts) == 3 else {}
    os.environ.setdefault("WANDB_SILENT", "true")
    with _answered(address):
        import wandb

        api = wandb.Api(timeout=SECONDS)
        found = list(api.runs(f"{parts[0]}/{parts[1]}", filters=filters, lazy=False))
    runs = converted(found)
    if not runs:
        raise UserError(f"W&B holds no finished runs of cil in {address}.")
    return runs


def converted(found: Iterable[Any]) -> list[WandbRun]:
    """wandb's public runs, the oldest first -> ours; see `read_wandb`."""
    newest: dict[tuple[str, str, int, str], WandbRun] = {}
    for public in found:
        if CLASS_GROUPS in public.summary_metrics and "experiment" in public.config:
            run = _converted(public)
            settings = json.dumps(run.config, sort_keys=True)
            newest[run.experiment, run.method, run.seed, settings] = run
    return [newest[key] for key in sorted(newest)]


def _converted(public: Any) -> WandbRun:
    config = dict(public.config)
    config.pop("environment", None)  # of no result, and another on another machine
    groups = public.summary_metrics[CLASS_GROUPS]
    matrix = np.full((len(groups["accuracy"]),) * 2, np.nan)
    for t, row in enumerate(groups["accuracy"]):
        matrix[t, : t + 1] = row
    return WandbRun(
        url=public.url,
        experiment=config.pop("experiment"),
        method=config["method"],
        seed=config["seed"],
        config=config,
        summary=_final(public.summary_metrics),
        matrix=matrix,
        sizes=list(groups["test_images"]),
        group_names=list(groups["names"]),
        _public=public,
    )


def _final(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The stream-final numbers, without the last values of what was logged on the way."""
    return {
        name: value
        for name, value in summary.items()
        if isinstance(value, int | float | str)
        and "/" not in name
        and not name.startswith("_")
        and name not in AXES
    }


@contextmanager
def _answered(address: str) -> Iterator[None]:
    """Turn whatever wandb raises into one sentence: it raises errors of many packages."""
    try:
        yield
    except Exception as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"W&B did not give the runs of {address}: {why.rstrip('.')}.") from error
