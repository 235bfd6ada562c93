"""An experience as cached token maps or latents: the tokenizer is frozen, so it encodes once.

Shapes: N encoded images (images times views), B of a batch, L tokens.
"""

import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)
from tqdm import tqdm

from cil import cache, parallel
from cil.files import HashingWriter, explained, replacing

MOST_CODES = int(np.iinfo(np.int16).max) + 1  # tokens are kept as 16-bit numbers
_MOST_PIXELS = 2**22  # encoded at once: 64 images of 256 pixels a side
_LONG = 20  # batches worth a progress bar
_MANY = 100_000  # encoded images worth a word
_CHUNK = 2**10  # rows read at once


class Turned(Dataset):
    """A dataset's images, each turned by a random quarter.

    Class y turned by r quarters is the class y + r * classes. The first class group is all that the
    trunk ever sees whole; turned images, as classes of their own, make it richer than its few
    classes are (after PASS, Zhu et al., CVPR 2021).
    """

    def __init__(self, images: Dataset, turns: int, classes: int) -> None:
        self.images, self.turns, self.classes = images, turns, classes

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        image, label = self.images[item]
        quarter = int(torch.randint(self.turns, ()))
        return torch.rot90(image, quarter, (1, 2)), label + quarter * self.classes


class Drawn(Dataset):
    """A dataset that varies its images, asked for (item, seed).

    An image so depends on its seed alone, and not on which process or device loads it.
    """

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, asked: tuple[int, int]) -> tuple[Tensor, int]:
        item, seed = asked
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs as well.
            torch.default_generator.manual_seed(seed)
            return self.images[item]


class Views(Dataset):
    """Several passes over a dataset that varies its images; row n is the same image every time."""

    def __init__(self, images: Dataset, views: int, seed: int) -> None:
        self.images, self.views, self.seed = Drawn(images), views, seed

    def __len__(self) -> int:
        return self.views * len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.images[row % len(self.images), self.seed + row]


class EncodedImages(Dataset):
    """Encoded images and labels in a memory-mapped file; items are (content (B, ...), labels (B,)).

    Content is tokens (B, L) int16, or whatever float16 an image was encoded to. An item is asked
    for by the list of its B rows, which are read at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(path, cache.KEY):
            self.rows = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        read = self.rows[rows]
        labels = read["label"].astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(read["content"])), torch.from_numpy(labels)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel (Z,) of contents (N, Z, h, w), float64."""
        sums: Any = 0.0
        for first in range(0, len(self.rows), _CHUNK):  # the file may be larger than the memory
            part = self.rows["content"][first : first + _CHUNK].astype(np.float64)
            sums = sums + np.stack([part.sum((0, 2, 3)), np.square(part).sum((0, 2, 3))])
        count = self.rows["content"][:, 0].size
        mean, square = torch.from_numpy(sums / count)
        return mean, (square - mean.square()).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Encoding:
    """How images become rows of a file."""

    encode: Callable[[Tensor], Tensor]  # images (B, channels, H, W) -> (B, ...)
    content: np.dtype  # of a row: `tokens_of` or `floats_of`
    device: torch.device
    workers: int  # processes that load images
    progress: bool
    unreadable: Callable[[], list[str]]  # files that could not be decoded so far


def tokens_of(count: int) -> np.dtype:
    """A row of so many tokens."""
    return np.dtype(("<i2", (count,)))


def floats_of(shape: tuple[int, ...]) -> np.dtype:
    """A row of numbers of this shape, in 16 bits: their rounding is far below the noise added."""
    return np.dtype(("<f2", shape))


def encoding_batch(images: Dataset) -> int:
    """How many of these images are encoded at once."""
    pixels = images[0][0][0].numel()
    return max(1, min(1024, _MOST_PIXELS // pixels))


def encode_once(
    images: Views, encoding: Encoding, path: Path, key: Mapping[str, Any]
) -> tuple[EncodedImages, dict[str, Any]]:
    """Encoded images, from the file `path` if it is there.

    `key` is what it was named by (see `cache.place`). Returns them with facts: "seconds" they took
    to make, of which "saved" were saved now, "codes", how many different tokens occur, and
    "unreadable", the files for which others stood in.

    Raises:
        UserError: the file cannot be written.
    """
    with cache.alone(path) as waited:
        found = cache.find(path)
        facts = found or _encode(images, encoding, path, key)
    rows = EncodedImages(path)
    if len(rows) >= _MANY and parallel.is_first():
        how = f"made in {facts['seconds']:.0f} s" if found is None else "found"
        print(f"{len(rows):,} encoded images {how}: {path}, {cache.size(path)}", file=sys.stderr)
    # What passed while another run made them is counted already.
    return rows, {**facts, "saved": 0.0 if found is None else facts["seconds"] - waited}


def shuffled(data: EncodedImages, batch_size: int) -> DataLoader:
    """Batches of encoded images in a new order each pass; this device's share of each of them."""
    rows = parallel.share(_shuffled_rows(data, batch_size))
    return DataLoader(data, sampler=rows, batch_size=None)


def shuffled_images(images: Dataset, batch_size: int, workers: int) -> DataLoader:
    """Batches (images, labels) in a new order each pass, loaded as they are asked for.

    Of several devices each gets its share of every batch.
    """
    return DataLoader(
        Drawn(images),
        batch_sampler=parallel.share(_Seeded(_shuffled_rows(images, batch_size))),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def in_order(
    images: Dataset, batch_size: int, workers: int = 0, *, dealt: bool = False
) -> DataLoader:
    """Batches (images, labels) in the order of the dataset; draws no random numbers.

    With `dealt`, of several devices each gets some of the batches (see `parallel.collect`).
    """
    batches = list(BatchSampler(SequentialSampler(images), batch_size, drop_last=False))  # type: ignore[arg-type]
    return DataLoader(
        images,
        batch_sampler=parallel.deal(batches) if dealt else batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of the seeds of its processes, else the global one
    )


def in_memory(images: Dataset) -> tuple[Tensor, Tensor]:
    """All items of a dataset -> (images (N, channels, H, W), labels (N,))."""
    batches = [tuple(batch) for batch in in_order(images, 256)]
    every, labels = zip(*batches, strict=True)
    return torch.cat(every), torch.cat(labels)


class _Seeded(Sampler):
    """Batches of (item, seed) from batches of items."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seeds = itertools.count(int(torch.randint(2**62, ())))
        for batch in self.batches:
            yield list(zip(batch, seeds, strict=False))


def _shuffled_rows(data: Dataset, batch_size: int) -> BatchSampler:
    least = min(batch_size, len(data))  # type: ignore[arg-type]
    return BatchSampler(RandomSampler(data), least, drop_last=True)  # type: ignore[arg-type]


def _encode(
    images: Views, encoding: Encoding, path: Path, key: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the file `path`. Of several devices each encodes a part, and the first joins them."""
    began = time.perf_counter()
    kind = np.dtype([("label", "<i4"), ("content", encoding.content)])
    ends = [len(images) * i // parallel.world() for i in range(parallel.world() + 1)]
    mine = Subset(images, range(ends[parallel.rank()], ends[parallel.rank() + 1]))
    parts = [path.with_name(f"{path.name}.part{rank}") for rank in range(parallel.world())]
    if parallel.is_first():
        with replacing(path, cache.KEY) as file:
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(images),)})
            used = _write(file, mine, encoding, kind)
            parallel.barrier()  # the other parts are whole
            for part in parts[1:]:
                with part.open("rb") as other:
                    shutil.copyfileobj(other, file)
                part.unlink()
    else:
        with replacing(parts[parallel.rank()], cache.KEY) as file:
            used = _write(file, mine, encoding, kind)
        parallel.barrier()
    codes = int(np.any(parallel.gather(used), axis=0).sum())
    unreadable = sorted(set().union(*parallel.gather(encoding.unreadable())))
    seconds = time.perf_counter() - began
    facts = {"seconds": seconds, "codes": codes, "unreadable": unreadable}
    if parallel.is_first():
        cache.keep(path, file.digest(), key, facts)
    parallel.barrier()
    return facts


def _write(file: HashingWriter, images: Dataset, encoding: Encoding, kind: np.dtype) -> np.ndarray:
    """Write the rows of these images; returns which codes their tokens are (MOST_CODES,)."""
    used = np.zeros(MOST_CODES, dtype=bool)
    for content, labels_B in _encoded(images, encoding):
        rows = np.empty(len(labels_B), kind)
        rows["content"], rows["label"] = content, labels_B
        if content.dtype == np.int16:
            used[content] = True
        file.write(rows.tobytes())
    return used


@torch.inference_mode()
def _encoded(images: Dataset, encoding: Encoding) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(content (B, ...), labels (B,)) of all images, in order; a step behind: no GPU ever waits.

    A batch's content is fetched when the next one's work has been handed to the GPU.
    """
    if not len(images):  # type: ignore[arg-type]  # fewer than devices
        return
    loader = in_order(images, encoding_batch(images), encoding.workers)
    dtype = torch.int16 if encoding.content.base.kind == "i" else torch.float16
    hidden = not encoding.progress or len(loader) < _LONG or not parallel.is_first()
    waiting = None
    for batch, labels in tqdm(loader, "encoding", leave=False, disable=hidden):
        content = encoding.encode(batch.to(encoding.device, non_blocking=True))
        content = content.to(dtype)
        if waiting is not None:
            yield waiting[0].cpu().numpy(), waiting[1].numpy()
        waiting = content, labels
    if waiting is not None:
        yield waiting[0].cpu().numpy(), waiting[1].numpy()
