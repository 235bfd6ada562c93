"""What is learned once and shared: a tokenizer, trunk or backbone serves all methods upon it."""

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn

from cil import cache, parallel
from cil.files import replacing
from cil.methods.method import StepLog

State = dict[str, Any]  # tensors and plain values
# Makes a state; it returns with it the seconds that other cached parts have saved.
Make = Callable[[StepLog], tuple[State, float]]


def made_once(
    folder: Path, kind: str, key: Mapping[str, Any], make: Make, log: StepLog
) -> tuple[State, float]:
    """The state that `make` returns, from the cache if it is there, and the seconds saved.

    What was logged in making it is logged again.

    Raises:
        UserError: it cannot be written.
    """
    path = cache.place(folder / f"{kind}s", kind, key, ".pt")
    with cache.alone(path) as waited:
        facts = cache.find(path)
        if facts is None:
            return _make(path, key, make, log)
    if parallel.is_first():
        print(f"found the {kind} {path}, learned in {facts['seconds']:.0f} s", file=sys.stderr)
    for step, values in facts["log"]:
        log(step, values)
    state: State = parallel.broadcast(
        torch.load(path, map_location="cpu", weights_only=True) if parallel.is_first() else None
    )
    return state, facts["seconds"] - waited  # which passed while another run made it


def digest(module: nn.Module) -> str:
    """A hash of a module's parameters and buffers."""
    result = hashlib.sha256()
    for name, value in module.state_dict().items():
        result.update(name.encode() + value.cpu().numpy().tobytes())
    return result.hexdigest()


def _make(path: Path, key: Mapping[str, Any], make: Make, log: StepLog) -> tuple[State, float]:
    rows: list[tuple[int, dict[str, float]]] = []

    def noting(step: int, values: Mapping[str, float]) -> None:
        rows.append((step, dict(values)))
        log(step, values)

    began = time.perf_counter()
    state, saved = make(noting)
    seconds = time.perf_counter() - began + saved
    if parallel.is_first():
        with replacing(path, cache.KEY) as file:
            torch.save(state, cast(IO[bytes], file))
        cache.keep(path, file.digest(), key, {"seconds": seconds, "log": rows})
    return state, saved
