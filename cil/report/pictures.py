"""The pictures that runs left in their figures/, made small enough to stand in a page.

A hundred runs leave hundreds of them, so each method is shown by its first seed that has any; of a
numbered series (samples_experience0, 1, 2 ...) the last stands for all. What is left out is linked.
"""

import base64
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from cil.files import damaged, read_bytes
from cil.records import RunView

WIDEST = 1200  # pixels
SHOWN = 96 / 150  # figures have 150 pixels an inch, a page has 96: text is as large as in the page
AS_IT_IS = 60_000  # bytes: smaller ones are not worth another compression
ALL_TOGETHER = 6_000_000  # bytes of pictures in a page
IN_THE_PAGE_ANYWAY = ("accuracy_matrix",)
# Heading -> how the names of its figures begin.
KINDS = {
    "Samples": "samples",
    "Explanations": "explanations",
    "Confusion": "confusion",
    "Other figures": "",
}


@dataclass(frozen=True)
class Picture:
    name: str
    source: str  # a data URI
    size: tuple[int, int]  # on the page
    alt: str
    link: str  # to the file itself


@dataclass
class Shown:
    """The pictures of one kind and method; left_out: (name, link)."""

    method: str
    seed: int
    pictures: list[Picture] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def pictures(runs: Sequence[RunView], page: Path) -> dict[str, list[Shown]]:
    """Heading -> what is shown of each method, in the order of the runs.

    Raises:
        UserError: a picture is damaged.
    """
    kinds: dict[str, list[Shown]] = {heading: [] for heading in KINDS}
    left = ALL_TOGETHER
    done: dict[tuple[str, str], Shown] = {}
    for run in runs:
        for heading, names in _by_kind(_names(run)).items():
            first = done.get((heading, run.method))
            if first is not None:
                link = relative(run.folder / "figures", page)
                first.left_out.append((f"seed {run.seed}", f"{link}/"))
                continue
            shown = done[heading, run.method] = Shown(run.method, run.seed)
            kinds[heading].append(shown)
            for name in names:
                path = run.folder / "figures" / f"{name}.png"
                picture = None if _is_earlier(name, names) else _picture(path, run, page)
                if picture is None or len(picture.source) > left:
                    shown.left_out.append((path.name, relative(path, page)))
                else:
                    left -= len(picture.source)
                    shown.pictures.append(picture)
    return {heading: shown for heading, shown in kinds.items() if shown}


def data_uri(data: bytes, kind: str) -> str:
    """An image of a kind ("png", "svg+xml") as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def relative(path: Path, page: Path) -> str:
    """A link from the page to a file or folder, safe as an address whatever the names hold."""
    return quote(Path(os.path.relpath(path, page.resolve().parent)).as_posix())


def _names(run: RunView) -> list[str]:
    """The figures of a run, those of a series by their number."""
    stems = [path.stem for path in (run.folder / "figures").glob("*.png")]
    return sorted(set(stems) - {*IN_THE_PAGE_ANYWAY}, key=lambda name: (*_series(name), name))


def _series(name: str) -> tuple[str, int]:
    """samples_experience12 -> (samples_experience, 12); -1 for what is no part of a series."""
    found = re.fullmatch(r"(.*?)(\d+)", name)
    return (found[1], int(found[2])) if found else (name, -1)


def _is_earlier(name: str, names: Sequence[str]) -> bool:
    """Whether a later one of the same series is there."""
    series, number = _series(name)
    return any(number < n for s, n in map(_series, names) if s == series and number >= 0)


def _by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        heading = next(h for h, start in KINDS.items() if name.startswith(start))
        kinds.setdefault(heading, []).append(name)
    return kinds


def _picture(path: Path, run: RunView, page: Path) -> Picture:
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            small, kind = _small(image, data)
            size = (round(SHOWN * image.width), round(SHOWN * image.height))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise damaged(path) from error
    source, alt = data_uri(small, kind), _alt(path.stem, run)
    return Picture(path.name, source, size, alt, relative(path, page))


def _small(image: Image.Image, data: bytes) -> tuple[bytes, str]:
    """The bytes of a picture and their kind; wide or heavy ones are made smaller."""
    image.load()
    if image.width <= WIDEST and len(data) <= AS_IT_IS:
        return data, "png"
    narrow = image.convert("RGB")
    if image.width > WIDEST:
        height = max(1, round(image.height * WIDEST / image.width))
        narrow = narrow.resize((WIDEST, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    narrow.save(buffer, "WEBP", quality=85, method=4)
    if image.width <= WIDEST and len(data) <= buffer.tell():
        return data, "png"
    return buffer.getvalue(), "webp"


def _alt(name: str, run: RunView) -> str:
    """What a figure shows, in numbers where the record has them."""
    who, T = f"{run.method}, seed {run.seed}", len(run.matrix)
    if name.startswith("samples"):
        drawn = f"Images of {len(run.stream['class_names'])} classes drawn by {who}"
        return f"{drawn}, {T} experiences learned{_drift(run)}."
    if name.startswith("explanations"):
        first = ", ".join(f"{100 * accuracy:.0f}" for accuracy in run.matrix[:, 0])
        return (
            f"Heat maps of what speaks for a class, by {who}. Accuracy on the first class group "
            f"after each experience: {first} %."
        )
    if name == "confusion":
        return f"Which class {who} takes for which: {_most_confused(run)}."
    last = 100 * run.summary["last_accuracy"]
    return f"{name.replace('_', ' ')} of {who}; last accuracy {last:.1f} %."


def _drift(run: RunView) -> str:
    """How far earlier classes' images moved, if the run measured it."""
    rows = run.metrics()
    drift = rows[rows["name"] == "samples/drift"]["value"]
    if drift.empty:
        return ""
    return (
        "; those of earlier classes differ from what was drawn when these were new by "
        f"{100 * drift.iloc[-1]:.1f} % of the range of a pixel"
    )


def _most_confused(run: RunView) -> str:
    """The class that is most often taken for another at the end."""
    rows = run.predictions()
    wrong = rows[rows["label"] != rows["prediction"]]
    if wrong.empty:
        return "none is taken for another"
    pairs = Counter(zip(wrong["label"].tolist(), wrong["prediction"].tolist(), strict=True))
    (label, prediction), count = pairs.most_common(1)[0]
    names = run.stream["class_names"]
    return f"most often {names[label]} for {names[prediction]}, {count} images of {len(rows)}"
