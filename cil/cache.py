"""What is made once and used again: a file, and beside it a note of what it was made from.

A cached file's name holds a hash of everything that decides its content, this package's own code
included, so that what does not match is never found. The note, NAME.json, is written last: a file
counts from then on. It holds the file's sha256, by which damage is noticed.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from cil import parallel
from cil.files import explained, lock, plain_value, write_json

KEY = "--cache"  # the setting that chooses the folder
_DECIDES = ("models", "methods", "classify", "streams")  # the packages whose code counts


def place(folder: Path, name: str, key: Mapping[str, Any], suffix: str) -> Path:
    """Where in `folder` a file made from `key` (plain values) belongs."""
    readable = re.sub(r"\W+", "-", name).strip("-")
    return folder / f"{readable}-{hashed({'code': _code(), **key})[:16]}{suffix}"


def hashed(key: Mapping[str, Any]) -> str:
    """The hex sha256 of plain values."""
    text = json.dumps(key, sort_keys=True, default=plain_value)
    return hashlib.sha256(text.encode()).hexdigest()


def find(path: Path) -> dict[str, Any] | None:
    """The facts kept beside a cached file; None where there is none, or a damaged one (said).

    Of several devices the first one looks, for all of them.
    """
    facts: dict[str, Any] | None = parallel.broadcast(look(path) if parallel.is_first() else None)
    return facts


def look(path: Path) -> dict[str, Any] | None:
    """The same, for this process alone."""
    note = _note(path)
    if not note.exists():
        return None
    try:
        facts: dict[str, Any] = json.loads(note.read_bytes())
        whole = facts.pop("note") == hashed(facts)
        with path.open("rb") as file:
            whole &= hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        print(f"{path} is damaged and is made again", file=sys.stderr)
        return None
    return facts


def keep(path: Path, sha256: str, key: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Let a written file count, with the facts that `find` is to give back (plain values)."""
    content = {**facts, "made_from": dict(key), "sha256": sha256}
    write_json(_note(path), {**content, "note": hashed(content)}, KEY)


@contextmanager
def alone(path: Path) -> Iterator[float]:
    """One run at a time looks for a cached file and makes it; others wait, then find it.

    Yields the seconds that were waited for another run.
    """
    if not parallel.is_first():  # which holds it for all devices of this run
        yield 0.0
        return
    with explained(path.parent, KEY):
        path.parent.mkdir(parents=True, exist_ok=True)
    place, said, began = path.with_name(f".{path.name}.lock"), False, time.perf_counter()
    while (held := lock(place, KEY)) is None:
        if not said:
            print(f"waiting for another run, which is making {path} ...", file=sys.stderr)
        said = True
        time.sleep(0.2)
    with held:  # closing it lets go, as does the end of the process
        yield time.perf_counter() - began if said else 0.0


def size(path: Path) -> str:
    """Of a file, to be read by people."""
    return f"{path.stat().st_size / 1e6:.1f} MB"


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


@cache
def _code() -> str:
    """A hash of the code that decides what is cached."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for part in _DECIDES:
        for file in sorted([root / "parallel.py", *(root / part).rglob("*.py")]):
            digest.update(file.relative_to(root).as_posix().encode() + b"\n" + file.read_bytes())
    return digest.hexdigest()
