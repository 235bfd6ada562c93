"""What a run leaves on disk: the only reader and writer of run folders."""

from cil.files import with_ending, write_bytes, write_json
from cil.records.run_record import RunRecord, figure_bytes, finished_run, write_figure
from cil.records.run_view import RunView, group_name, read_run, read_runs
from cil.records.samples import Images
from cil.records.unfinished import UnfinishedRun, unfinished_runs

__all__ = [
    "Images",
    "RunRecord",
    "RunView",
    "UnfinishedRun",
    "figure_bytes",
    "finished_run",
    "group_name",
    "read_run",
    "read_runs",
    "unfinished_runs",
    "with_ending",
    "write_bytes",
    "write_figure",
    "write_json",
]
