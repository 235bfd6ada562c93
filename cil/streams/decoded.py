"""Small images, decoded once: at 64 px that takes four times as long as reading and varying one.

A file of bytes, read row by row through a memory map: memory does not grow with the number of
images, and runs side by side share what they have read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cil import cache, parallel
from cil.files import explained, replacing
from cil.streams.tokens import in_order

MOST_BYTES = 2**31  # of one file; more images, or larger ones, are decoded whenever they are read
FEWEST_IMAGES = 1000  # worth a file
_BATCH = 256  # images that a process decodes at a time


class Decoded:
    """Images by their numbers, (3, side, side) uint8; None for those in `failed`.

    These could not be decoded when the file was made.
    """

    def __init__(self, path: Path, failed: frozenset[int]) -> None:
        self.path, self.failed = path, failed
        self._rows: np.ndarray | None = None

    def __getitem__(self, item: int) -> Tensor | None:
        if item in self.failed:
            return None
        if self._rows is None:
            with explained(self.path, cache.KEY):
                self._rows = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(np.array(self._rows[item]))

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map holds all that it shows.
        return {**self.__dict__, "_rows": None}


class _Tried(Dataset):
    """Items are (pixels (3, side, side), whether they could be decoded)."""

    def __init__(self, decode: Callable[[int], Tensor], count: int, side: int) -> None:
        self.decode, self.count, self.side = decode, count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> tuple[Tensor, bool]:
        try:
            return self.decode(item), True
        except MemoryError:
            raise
        except Exception:  # decoders of damaged files raise whatever comes to hand
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8), False


def decoded_once(
    decode: Callable[[int], Tensor],
    count: int,
    side: int,
    folder: Path,
    name: str,
    key: Mapping[str, Any],
) -> Decoded | None:
    """So many images, `decode` (number -> (3, side, side) uint8) of each, in a file in `folder`.

    It is made if it is not there; `key` is all that decides it, and `name` begins its name. None
    where a file is not worth its making, or would be too large.

    Raises:
        UserError: the file cannot be written.
    """
    if count < FEWEST_IMAGES or count * 3 * side * side > MOST_BYTES:
        return None
    path = cache.place(folder, name, key, ".npy")
    with cache.alone(path):
        facts = cache.look(path) or _write(_Tried(decode, count, side), path, key)
    return Decoded(path, frozenset(facts["failed"]))


def _write(images: _Tried, path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """Write the file, on all cores; returns the facts kept beside it."""
    count, shape = len(images), (len(images), 3, images.side, images.side)
    batches = in_order(images, _BATCH, min(parallel.cores(), count // _BATCH))
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    wholes = []
    with replacing(path, cache.KEY) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for pixels, whole in tqdm(batches, f"decoding {count:,} images, once", leave=False):
            file.write(pixels.numpy().tobytes())
            wholes.append(whole)
    facts = {"failed": (~torch.cat(wholes)).nonzero()[:, 0].tolist()}
    cache.keep(path, file.digest(), key, facts)
    return facts
