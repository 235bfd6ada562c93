"""One page from the runs of an experiment: what stands in it, and how it is written."""

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cil import figures, table
from cil.errors import UserError
from cil.records import RunView, figure_bytes, read_runs, unfinished_runs, write_bytes
from cil.report import numbers
from cil.report.pictures import data_uri, pictures, relative

TEMPLATES = Path(__file__).parent / "templates"
FILE = "report.html"


@dataclass(frozen=True)
class RunOnPage:
    """A run as it is listed: its numbers, and what it was made with, as YAML."""

    seed: int
    link: str
    cells: list[numbers.Cell]
    config: str
    environment: str
    summary: str
    files: list[tuple[str, str]]  # name, link


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write all finished runs of an experiment as one page; returns its path.

    It is FOLDER/report.html, or `output`; its links to the runs are relative to where it is.

    Raises:
        UserError: there is no such folder, no finished run in it, several experiments or settings,
            a damaged file, or a place that cannot be written.
    """
    runs, page = _runs(folder), output or folder / FILE
    write_bytes(page, render(runs, folder, page).encode(), "--output")
    return page


def render(runs: Sequence[RunView], folder: Path, page: Path) -> str:
    """The HTML of a page that will stand at `page`."""
    runs = numbers.in_order(runs)
    methods = numbers.by_method(runs)
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        experiment=runs[0].experiment,
        script=script,  # ours, and the only one that may run
        script_digest=digest,
        runs=len(runs),
        methods=len(methods),
        seeds=len({r.seed for r in runs}),
        findings=_findings(runs),
        notes=_notes(runs, folder),
        caption=table.CAPTION,
        columns=numbers.result_columns(),
        rows=numbers.result_rows(runs),
        curves=_curves(runs),
        curve_rows=numbers.curve_rows(runs),
        experiences=max(len(r.matrix) for r in runs),
        matrices=numbers.matrices(runs),
        pictures=pictures(runs, page),
        costs=[_costs(each) for each in _comparable(runs)],
        cost_columns=[numbers.Column(h, False) for h in numbers.MORE_COSTS.values()],
        cost_rows=numbers.cost_rows(runs),
        streams=_streams(runs),
        provenance=_provenance(runs, f"python -m cil.report {shlex.quote(str(folder))}"),
        listed={name: [_listed(r, page) for r in each] for name, each in methods.items()},
        anchor=numbers.anchor,
    )


def _runs(folder: Path) -> list[RunView]:
    runs = read_runs(folder)
    if not runs:
        begun = len(unfinished_runs(folder))
        raise UserError(
            f"No run in {folder} is finished ({begun} begun): give the folder of an experiment, "
            "runs/NAME, or finish one with `python -m cil.run`."
        )
    return runs


def _comparable(runs: Sequence[RunView]) -> list[list[RunView]]:
    """The runs of each stream; where there are several, of those that more than one method saw."""
    streams = numbers.by_stream(runs)
    return [each for each in streams if len(streams) == 1 or len(numbers.by_method(each)) > 1]


def _findings(runs: Sequence[RunView]) -> list[str]:
    """What the table says, in sentences."""
    sentences = []
    for each in _comparable(runs):
        if len(each) < len(runs):
            sentences.append(f"On the stream of {', '.join(numbers.by_method(each))}:")
        sentences += _ranking(each)
    return sentences


def _ranking(runs: Sequence[RunView]) -> list[str]:
    """The highest and lowest of runs that can be compared, in sentences."""
    rows = numbers.result_rows(runs)
    without = [row for row in rows if not row.stores]
    best, worst = rows[0].cells[0].text, rows[-1].cells[0].text
    most = without[0].cells[0].text if without else best
    sentences = [f"The highest last accuracy is {best}\u00a0% ({_having(best, rows)})."]
    if most != best:
        sentences.append(
            f"Of the methods that store no image, {_having(most, without)} reaches the most: "
            f"{most}\u00a0%."
        )
    if worst not in (best, most):
        sentences.append(f"The lowest is {worst}\u00a0% ({_having(worst, rows)}).")
    return sentences


def _having(last: str, rows: Sequence[numbers.Row]) -> str:
    """The methods with this last accuracy: several may have the same."""
    return ", ".join(row.name for row in rows if row.cells[0].text == last)


def _notes(runs: Sequence[RunView], folder: Path) -> list[str]:
    """What a reader must know before comparing numbers."""
    notes = []
    if len(numbers.by_stream(runs)) > 1:
        notes.append(
            "These runs did not all see the same stream, so their numbers cannot be compared; "
            "each stream is described below."
        )
    if any(r.stream.get("evaluated_on") == "validation" for r in runs):
        notes.append("Some runs were evaluated on held-out training images, not on test images.")
    seeds = {name: len(each) for name, each in numbers.by_method(runs).items()}
    if len({*seeds.values()}) > 1:
        most = max(seeds.values())
        fewer = ", ".join(f"{name} ({count})" for name, count in seeds.items() if count < most)
        notes.append(f"Methods with fewer than {most} seeds: {fewer}.")
    for run in unfinished_runs(folder):
        notes.append(
            f"Unfinished: {run.method} seed {run.seed}, {run.learned} of {run.experiences} "
            "experiences learned; it is in no table and no figure."
        )
    return notes


def _curves(runs: Sequence[RunView]) -> dict[str, str]:
    """The forgetting curves for a wide page and a narrow one, and what they say."""
    ends = [f"{row.name} {row.cells[0].text}" for row in numbers.result_rows(runs)]
    return {
        "wide": data_uri(figure_bytes(table.curves(runs), "svg"), "svg+xml"),
        "narrow": data_uri(figure_bytes(table.curves(runs, columns=1), "svg"), "svg+xml"),
        "alt": "Accuracy on all classes seen so far against experiences learned. "
        f"After the last one, in per cent: {', '.join(ends)}.",
    }


def _costs(runs: Sequence[RunView]) -> dict[str, str]:
    """Accuracy against cost of runs of one stream, and what it says."""
    last, seconds, macs = (
        numbers.result_keys().index(key)
        for key in ("last_accuracy", "training_seconds", "prediction_macs")
    )
    points = [
        f"{row.name} {row.cells[last].text} %, {row.cells[macs].text} and {row.cells[seconds].text}"
        for row in numbers.result_rows(runs)
    ]
    figure = figures.accuracy_against_cost(runs)
    return {
        "source": data_uri(figure_bytes(figure, "svg"), "svg+xml"),
        "alt": "Last accuracy against the multiply-accumulates of classifying an image and the "
        f"seconds of training: {'; '.join(points)}.",
    }


def _streams(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    """Each stream that these runs saw, with the methods that saw it."""
    found: dict[str, dict[str, Any]] = {}
    for r in runs:
        key = json.dumps(r.stream, sort_keys=True)
        known = found.setdefault(key, {"facts": r.stream, "methods": []})
        if r.method not in known["methods"]:
            known["methods"].append(r.method)
    for known in found.values():
        known["groups"] = numbers.group_names(known["facts"])
        known["reproducibility"] = _yaml(known["facts"].get("reproducibility") or {})
    return list(found.values())


def _provenance(runs: Sequence[RunView], command: str) -> list[str]:
    days = sorted({str(r.environment.get("created", ""))[:10] for r in runs} - {""})
    made = [f"Made on {days[0]}" + (f" to {days[-1]}." if len(days) > 1 else ".")] if days else []
    return [line.replace("`", "") for line in table.provenance(runs, command)] + made


def _listed(run: RunView, page: Path) -> RunOnPage:
    link = f"{relative(run.folder, page)}/"
    files = [path for path in sorted(run.folder.iterdir()) if not path.name.startswith(".")]
    return RunOnPage(
        seed=run.seed,
        link=link,
        cells=numbers.run_cells(run, link),
        config=_yaml(run.config),
        environment=_yaml(run.environment),
        summary=_yaml(run.summary),
        files=[(path.name + "/" * path.is_dir(), relative(path, page)) for path in files],
    )


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
