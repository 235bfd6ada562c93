"""What a folder of images holds, and which of its files are no images: looked at once, then cached.

A class is a folder; its images may lie in folders below it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from cil.cache import KEY, alone
from cil.errors import UserError
from cil.files import write_bytes
from cil.streams.all_cores import by_all_cores

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# How files of a kind end. Nothing may follow in a whole PNG; cameras append to a JPEG.
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}
_TAIL = 1024  # bytes in which the end of a JPEG is looked for
_NAMED = 5  # faulty files that a message names
_MANY = 500  # files worth a progress bar


@dataclass(frozen=True)
class File:
    """One image file, as it was when it was looked at."""

    path: str  # below the scanned folder
    size: int  # bytes
    changed: int  # nanoseconds since 1970
    digest: str = ""  # hex, of its content
    fault: str | None = None  # why it cannot be read


def scan(folder: Path, classes: Sequence[str], cache: Path, decode: bool) -> dict[str, list[File]]:
    """The image files of each class folder, in order of their paths.

    Reads every file and looks at how it begins and ends; with `decode` every image is decoded. What
    was found is kept in `cache`, and only new or changed files are looked at again. Files with
    other endings than those of images, and what is `hidden`, are left out.

    Raises:
        UserError: a file is no image or not whole, a class folder holds no image.
    """
    found = {name: list(_walk(folder, folder / name)) for name in classes}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise UserError(
            f"{folder} has class folders without an image: {named(empty)}; fill or remove them."
        )
    every = [file for files in found.values() for file in files]
    place = _place(folder, cache, decode)
    with alone(place):
        known = _load(place)
        unseen = [file for file in every if not _same(known.get(file.path), file)]
        if unseen:
            known |= _looked_at(folder, unseen, decode)
            _save(place, [known[file.path] for file in every])
    looked_at = [known[file.path] for file in every]
    faulty = [f"{file.path} ({file.fault})" for file in looked_at if file.fault]
    if faulty:
        raise UserError(
            f"Of {len(every)} files in {folder}, {len(faulty)} cannot be read as images: "
            f"{named(faulty)}; replace or remove them."
        )
    return {name: [known[file.path] for file in files] for name, files in found.items()}


def _looked_at(folder: Path, files: Sequence[File], decode: bool) -> dict[str, File]:
    """The files by their paths, with what is wrong with them."""
    looked = by_all_cores(lambda item: _look(folder, files[item], decode), len(files))
    title = f"looking at the images of {folder}"
    hidden = True if len(files) < _MANY else None  # None: shown in a terminal, not in a log
    bar = tqdm(looked, title, len(files), unit="", disable=hidden)
    return {file.path: file for file in bar}


def named(things: Sequence[str]) -> str:
    """The first few of many, and how many more there are."""
    more = f" and {len(things) - _NAMED} more" if len(things) > _NAMED else ""
    return ", ".join(things[:_NAMED]) + more


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out, as what macOS puts beside an archive's."""
    return name.startswith(".") or name == "__MACOSX"


def _walk(folder: Path, below: Path) -> Iterator[File]:
    """Image files in and below a folder. Links are followed, but none to where one is already."""
    entered = {os.path.realpath(below)}
    for place, folders, names in os.walk(below, followlinks=True):
        here = Path(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in list(folders):
            real = os.path.realpath(os.path.join(place, name))
            if real in entered or here.is_relative_to(real):
                folders.remove(name)
            entered.add(real)
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not hidden(name):
                yield _stat(folder, Path(place, name))


def _stat(folder: Path, path: Path) -> File:
    relative = path.relative_to(folder).as_posix()
    try:
        facts = path.stat()
    except OSError as error:  # a link to nowhere
        return File(relative, 0, 0, fault=error.strerror)
    return File(relative, facts.st_size, facts.st_mtime_ns)


def _same(known: File | None, file: File) -> bool:
    if known is None or known.fault is not None:  # it may have been a disk's that has passed
        return False
    return (known.size, known.changed) == (file.size, file.changed)


def _look(folder: Path, file: File, decode: bool) -> File:
    """The file, with what is wrong with it."""
    from PIL import Image

    fault, digest = file.fault, ""
    if fault is None:
        try:
            with (folder / file.path).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
                stream.seek(0)
                fault = _cut_off(stream, file.size)
            if fault is None:
                with Image.open(folder / file.path) as image:
                    if decode:
                        image.load()
        except Exception as error:  # decoders of damaged files raise whatever comes to hand
            fault = "no image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return File(file.path, file.size, file.changed, digest, fault)


def _cut_off(stream: BinaryIO, size: int) -> str | None:
    """Whether a file stops before its end, as most broken ones do."""
    end = _ENDS.get(stream.read(2))
    stream.seek(max(0, size - _TAIL))
    return "cut off" if end and end not in stream.read() else None


def _place(folder: Path, cache: Path, decode: bool) -> Path:
    key = hashlib.sha256(f"{folder.resolve()} {decode}".encode()).hexdigest()[:16]
    return cache / "scans" / f"{folder.name}-{key}.json"


def _load(path: Path) -> dict[str, File]:
    try:
        return {row["path"]: File(**row) for row in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        return {}


def _save(path: Path, files: Sequence[File]) -> None:
    write_bytes(path, json.dumps([asdict(file) for file in files]).encode(), KEY)
