"""What measuring commands share: time on a device, a machine's rate, and where a table goes."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from cil.environment import commit
from cil.records import write_bytes


@dataclass(frozen=True)
class Timing:
    seconds: float
    peak_bytes: int | None  # on a GPU


def timed(call: Callable[[], object], where: torch.device) -> Timing:
    if where.type != "cuda":
        began = time.perf_counter()
        call()
        return Timing(time.perf_counter() - began, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return Timing(time.perf_counter() - began, torch.cuda.max_memory_allocated())


def matrix_rate(where: torch.device) -> float:
    """Multiply-accumulates a second in a product of two large matrices of random numbers."""
    size, kind = (8192, torch.bfloat16) if where.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=where, dtype=kind) for _ in range(2))
    # Several products at a time, as a model makes them: a single one is over before a GPU heats up.
    best = min(timed(lambda: [left @ right for _ in range(8)], where).seconds for _ in range(6))
    return 8 * size**3 / best


def keep(table: pd.DataFrame, experiment: str, name: str, where: str, folder: Path) -> Path:
    """Write a table of measurements with its device, commit and command; returns the CSV file."""
    table.insert(0, "device", where)
    table.insert(1, "commit", commit())
    table.insert(2, "command", command(experiment, sys.argv[1:]))
    slug = re.sub(r"\W+", "-", where).strip("-").lower()
    path = folder / f"{experiment}-{name}-{slug}.csv"
    write_bytes(path, table.to_csv(index=False).encode(), "--results")
    return path


def command(experiment: str, arguments: Sequence[str]) -> str:
    """The line that measures this again; where its table was put says nothing of the numbers."""
    words = [word for word in arguments if not word.startswith("--results=")]
    if "--results" in words:
        at = words.index("--results")
        del words[at : at + 2]
    return " ".join([f"python -m experiments.{experiment}", *words])
