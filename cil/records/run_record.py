"""What a run leaves on disk: the only reader and writer of run folders (see cil/records/layout.py).

A run can be killed at any moment. Every file is written whole or not at all, and a save counts from
the moment progress.json is renamed into place: files are written before it, older checkpoints are
removed after it, and whatever a save that was cut short left behind is dropped by the next `open`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from cil.errors import UserError
from cil.files import damaged, explained, lock, write_bytes, write_json
from cil.records import layout
from cil.records.checkpoints import load_checkpoint, save_checkpoint
from cil.records.layout import FloatArray, MetricRow, Progress
from cil.records.resume import (
    LOCK,
    being_cleared,
    check_config,
    check_stream,
    clear_folder,
    make_folder,
    note_environment,
    plain,
)
from cil.records.run_view import RunView, read_run
from cil.records.samples import SAMPLES, Images, read_samples, sheet, write_samples

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class RunRecord:
    """The record of one run: one method, one seed. Use as a context manager, or `close` it.

    Errors of the disk and damaged files are UserErrors; calls out of order are ValueErrors.
    """

    def __init__(self, folder: Path, held: IO[str]) -> None:
        """Private: use `RunRecord.open`."""
        self.folder = folder
        self.finished = False
        self._lock = held
        self._keep_checkpoints = False
        self._progress = Progress(0, 0, 0, [], [], 0, {})
        self._metrics = layout.METRICS_HEADER
        self._buffer: list[MetricRow] = []
        self._unreadable: list[str] = []
        self._matrix: FloatArray = np.full((0, 0), np.nan)

    @classmethod
    def open(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        stream: Mapping[str, Any],
        environment: Mapping[str, Any],
        fresh: bool = False,
        *,
        keep_checkpoints: bool = False,
    ) -> Self:
        """Create the run folder, or go on with what it holds.

        config: nested plain dict, every leaf of which must equal the recorded one on resuming;
        stream: JSON-able, its "fingerprint" must equal the recorded one; fresh: empty this run
        folder first; keep_checkpoints: remove none when a newer one is saved.

        Raises:
            UserError: changed config or stream, another writer, a damaged file, or a folder that
                cannot be written or is no run folder.
        """
        folder = Path(folder)
        make_folder(folder)
        held = lock(folder / LOCK)
        if held is None:
            raise UserError(
                f"Another process is writing in {folder}; wait until it ends or choose another "
                "folder with --runs."
            )
        record = cls(folder, held)
        record._keep_checkpoints = keep_checkpoints
        try:
            record._begin(plain(config), plain(stream), plain(environment), fresh)
        except BaseException:
            record.close()
            raise
        return record

    @property
    def learned(self) -> int:
        """Experiences learned and committed."""
        return self._progress.learned

    @property
    def evaluated(self) -> int:
        """Experiences after which the method was evaluated; `learned` or one less."""
        return self._progress.evaluated

    @property
    def steps(self) -> int:
        """Optimiser steps of all learned experiences."""
        return self._progress.steps

    @property
    def seconds(self) -> list[float]:
        """Training seconds of each learned experience."""
        return list(self._progress.seconds)

    @property
    def test_sizes(self) -> list[int]:
        """Test images of each evaluated class group."""
        return list(self._progress.test_sizes)

    @property
    def unreadable(self) -> list[str]:
        """Image files noted as unreadable, each once, in the order of the first note."""
        return list(dict.fromkeys([*self._progress.unreadable, *self._unreadable]))

    def matrix(self) -> FloatArray:
        """The accuracy matrix so far: (evaluated, evaluated), NaN above the diagonal."""
        return self._matrix.copy()

    def latest(self, name: str) -> float:
        """The value of a metric that was saved last; KeyError when none was."""
        rows = (row.split(",") for row in self._metrics.decode().splitlines()[1:])
        values = {metric: float(value) for _, _, metric, value in rows}
        return values[name]

    def log(self, experience: int, step: int, values: Mapping[str, float]) -> None:
        """Note metrics; step counts along the stream. In memory until the next save."""
        rows = [(experience, step, name, float(value)) for name, value in values.items()]
        self._buffer.extend(rows)

    def note_unreadable(self, names: Sequence[str]) -> None:
        """Note image files that could not be decoded. In memory until the next save."""
        self._unreadable.extend(names)

    def save_learned(
        self, experience: int, state: Mapping[str, Any], steps: int, seconds: float
    ) -> None:
        """Commit a learned experience.

        state: the method's, tensors and plain values; what else it must keep goes in pickled as
        bytes. steps and seconds: what THIS experience took.
        """
        if not experience == self.learned == self.evaluated or self.finished:
            raise ValueError(f"experience {experience} cannot be saved as learned now")
        name = layout.checkpoint(experience)
        digest = save_checkpoint(self.folder / name, state)
        kept = self._progress.sha256
        if not self._keep_checkpoints:
            kept = {key: digest for key, digest in kept.items() if "/" not in key}
        self._commit(
            kept | {name: digest},
            learned=experience + 1,
            steps=self.steps + steps,
            seconds=[*self.seconds, float(seconds)],
        )
        self._sweep()

    def load_state(self) -> dict[str, Any]:
        """The state saved last, on the CPU; UserError when its file is damaged or missing."""
        name = layout.newest_checkpoint(self._progress)
        return load_checkpoint(self.folder / name, self._progress.sha256[name])

    def save_evaluated(self, experience: int, row: Sequence[float], sizes: Sequence[int]) -> None:
        """Commit the evaluation after an experience.

        row: accuracy in [0, 1] on each class group seen, experience + 1 numbers; sizes: their test
        images.
        """
        if not experience == self.evaluated == self.learned - 1 or self.finished:
            raise ValueError(f"experience {experience} cannot be saved as evaluated now")
        if not len(row) == len(sizes) == experience + 1:
            raise ValueError(f"after experience {experience} there are {experience + 1} groups")
        matrix = np.full((experience + 1, experience + 1), np.nan)
        matrix[:-1, :-1] = self._matrix
        matrix[-1] = row
        digest = write_bytes(self.folder / layout.MATRIX, layout.matrix_bytes(matrix))
        self._commit(
            self._progress.sha256 | {layout.MATRIX: digest},
            evaluated=experience + 1,
            test_sizes=[int(size) for size in sizes],
        )
        self._matrix = matrix

    def save_predictions(self, frame: "pd.DataFrame") -> None:
        """Write the predictions of the final evaluation, one row an image."""
        write_bytes(self.folder / layout.PREDICTIONS, frame.to_csv(index=False).encode())

    def predictions(self) -> "pd.DataFrame":
        """What `save_predictions` wrote."""
        return layout.read_table(self.folder / layout.PREDICTIONS)

    def save_samples(self, experience: int, images: Images) -> None:
        """Write what was drawn of every class after an experience, (classes, images, H, W, ch)."""
        write_samples(sheet(self.folder, experience), images)

    def samples(self, experience: int, side: int) -> Images | None:
        """What was drawn after an experience, images of this side; None where nothing was."""
        return read_samples(sheet(self.folder, experience), side)

    def save_figure(self, name: str, figure: "Figure", vector: bool = True) -> Path:
        """Write figures/<name>.png and, with `vector`, .svg; returns the path of the PNG."""
        return write_figure(self.folder / "figures" / f"{name}.png", figure, vector)

    def save_explanations(self, experience: int, frame: "pd.DataFrame") -> None:
        """Write what tokens said of a few images after an experience; again, if it is redone."""
        path = self.folder / layout.EXPLANATIONS / f"experience{experience}.csv"
        frame = frame.assign(experience=experience)
        write_bytes(path, frame.to_csv(index=False).encode())

    def explanations(self) -> "pd.DataFrame":
        """All that `save_explanations` wrote, with the column experience; empty if nothing."""
        return layout.read_explanations(self.folder)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the stream-final numbers; from here on the run is finished and never redone."""
        if self.learned != self.evaluated or self.finished:
            raise ValueError("a run is finished once, after its last evaluation")
        if self._buffer:
            raise ValueError("metrics were logged after the last save and would be lost")
        write_json(self.folder / layout.SUMMARY, summary)
        self.finished = True

    def summary(self) -> dict[str, Any]:
        """The stream-final numbers of a finished run."""
        return layout.read_summary(self.folder)

    def close(self) -> None:
        """Let go of the folder; what was logged but not saved is lost."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- opening ---

    def _begin(
        self,
        config: dict[str, Any],
        stream: dict[str, Any],
        environment: dict[str, Any],
        fresh: bool,
    ) -> None:
        if fresh or being_cleared(self.folder):
            clear_folder(self.folder)
        if (self.folder / layout.PROGRESS).exists():
            self._resume(config, stream, environment)
            self._sweep()
            return
        if any((self.folder / n).exists() for n in (layout.CHECKPOINTS, layout.SUMMARY)):
            raise damaged(self.folder / layout.PROGRESS, "is missing")
        hashes = {
            layout.CONFIG: write_bytes(self.folder / layout.CONFIG, layout.config_bytes(config)),
            layout.STREAM: write_json(self.folder / layout.STREAM, stream),
        }
        write_json(self.folder / layout.ENVIRONMENT, environment)
        self._save_progress(replace(self._progress, sha256=hashes))
        self._sweep()

    def _resume(
        self, config: dict[str, Any], stream: dict[str, Any], environment: dict[str, Any]
    ) -> None:
        self._progress = layout.read_progress(self.folder)
        check_config(self.folder, self._progress, config)
        check_stream(self.folder, self._progress, stream)
        self._metrics = layout.read_metrics(self.folder, self._progress)
        self._matrix = layout.read_matrix(self.folder, self._progress)
        self.finished = (self.folder / layout.SUMMARY).exists()
        if self.finished:
            self.summary()
        else:
            note_environment(self.folder, environment)

    # --- saving ---

    def _commit(self, sha256: dict[str, str], **changes: Any) -> None:
        """Write the metrics noted so far, then progress.json: from then on the save counts."""
        metrics = self._metrics + layout.metrics_bytes(self._buffer)
        digest = write_bytes(self.folder / layout.METRICS, metrics)
        changes |= {"metrics_bytes": len(metrics), "sha256": sha256 | {layout.METRICS: digest}}
        changes["unreadable"] = self.unreadable
        self._save_progress(replace(self._progress, **changes))
        self._metrics = metrics
        self._buffer.clear()
        self._unreadable.clear()

    def _save_progress(self, progress: Progress) -> None:
        write_json(self.folder / layout.PROGRESS, asdict(progress))
        self._progress = progress

    def _sweep(self) -> None:
        """Remove what no commit speaks of: temporary files and superseded checkpoints."""
        with explained(self.folder):
            folders = ("", "figures/", f"{SAMPLES}/", f"{layout.EXPLANATIONS}/")
            stale = [path for name in folders for path in self.folder.glob(f"{name}*.tmp")]
            for path in self.folder.glob(f"{layout.CHECKPOINTS}/*"):
                if f"{layout.CHECKPOINTS}/{path.name}" not in self._progress.sha256:
                    stale.append(path)
            for path in stale:
                path.unlink(missing_ok=True)


def write_figure(path: Path, figure: "Figure", vector: bool = True) -> Path:
    """Write a figure as PNG under `path`, and as SVG beside it; of photographs no `vector`."""
    if vector:
        write_bytes(path.with_suffix(".svg"), figure_bytes(figure, "svg"))
        figure.set_layout_engine("none")  # both have one layout, and finding it takes long
    write_bytes(path, figure_bytes(figure, "png"))
    return path


def figure_bytes(figure: "Figure", kind: str) -> bytes:
    """A figure as "svg" or "png", the same bytes for the same figure."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    figure.set_dpi(150)
    with rc_context({"svg.hashsalt": "cil"}):  # else the names within an SVG are drawn at random
        # savefig would draw it twice, the first time for its layout alone.
        if kind == "svg":
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        else:
            FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def finished_run(
    folder: Path, config: Mapping[str, Any], stream: Mapping[str, Any] | None = None
) -> RunView | None:
    """The run in a folder if it is finished; what was learned from is left unopened.

    Raises:
        UserError: it was made with another config, or on another stream where one is given, or one
            of its files is damaged.
    """
    if not (folder / layout.SUMMARY).exists() or being_cleared(folder):
        return None
    progress = layout.read_progress(folder)
    check_config(folder, progress, plain(config))
    if stream is not None:
        check_stream(folder, progress, stream)
    return read_run(folder)
