"""A method's state as one file: whole, hashed, and known to load again before it counts."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from cil.files import damaged, explained, replacing


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> str:
    """Write a state and return the sha256 of its file.

    Raises:
        TypeError: the state holds more than tensors, plain values and bytes, so that torch would
            refuse to load it on resuming.
        UserError: the disk is full or the folder cannot be written.
    """
    import torch

    with replacing(path) as file:
        torch.save(dict(state), cast(IO[bytes], file))
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no tensor
    except Exception as error:
        raise TypeError(
            'a state holds tensors and plain values; pickle anything else into {"pickled": bytes}'
        ) from error
    return file.digest()


def load_checkpoint(path: Path, sha256: str) -> dict[str, Any]:
    """The state in `path`, on the CPU; UserError when the file is missing or has another hash."""
    import torch

    if not path.exists():
        raise damaged(path, "is missing")
    with explained(path), path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise damaged(path)
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
