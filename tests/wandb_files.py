"""Offline runs of W&B, read back from their files by its own reader."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def inspected(folder: Path) -> list[dict[str, Any]]:
    """The records of the finished offline run in a folder, as W&B reads them back."""
    (run,) = folder.glob("wandb/offline-run-*")
    return [json.loads(line) for line in _lines(run)]


@functools.cache
def _lines(run: Path) -> list[str]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
