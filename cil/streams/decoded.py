"""Small images, decoded once: at 64 px that takes four times as long as reading and varying one.

A file of bytes, read row by row through a memory map: memory does not grow with the number of
images, and runs side by side share what they have read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from cil import cache
from cil.files import explained, replacing
from cil.streams.all_cores import by_all_cores

MOST_BYTES = 2**31  # of one file; more images, or larger ones, are decoded whenever they are read
FEWEST_IMAGES = 1000  # worth a file


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
    key = {**key, "pillow": PIL.__version__}
    path = cache.place(folder, name, key, ".npy")
    facts = cache.look(path)  # by many at once: the lock is for those who make it
    if facts is None:
        with cache.alone(path):
            facts = cache.look(path) or _write(decode, count, side, path, key)
    return Decoded(path, frozenset(facts["failed"]))


def _write(
    decode: Callable[[int], Tensor], count: int, side: int, path: Path, key: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the file; returns the facts kept beside it."""

    def tried(item: int) -> bytes | None:
        try:
            return decode(item).numpy().tobytes()
        except MemoryError:
            raise
        except Exception:  # decoders of damaged files raise whatever comes to hand
            return None

    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, side, side)}
    failed = []
    # disable=None: shown in a terminal, not in a log.
    bar = tqdm(total=count, desc="decoding images, once", unit="", leave=False, disable=None)
    with replacing(path, cache.KEY) as file, bar:
        np.lib.format.write_array_header_1_0(file, header)
        for item, pixels in enumerate(by_all_cores(tried, count)):
            file.write(bytes(3 * side * side) if pixels is None else pixels)
            failed += [item] if pixels is None else []
            bar.update()
    facts = {"failed": failed}
    cache.keep(path, file.digest(), key, facts)
    return facts
