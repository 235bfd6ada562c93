"""What a number was measured on: it goes into every record."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cil import __version__
from cil.config import TrainerConfig

PACKAGES = ("torch", "pytorch-lightning", "avalanche-lib", "numpy")


def environment(settings: TrainerConfig) -> dict[str, Any]:
    """Commit ("unknown" outside a git checkout, "+changes" when edited), versions, device."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {"cil": __version__, **{name: metadata.version(name) for name in PACKAGES}},
        "device": device(settings),
        "platform": platform.platform(),
        "command": " ".join(sys.orig_argv[1:]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of the source tree that this package was imported from.

    The environment variable CIL_COMMIT names it where git is not at hand: in a container, say.
    """
    if "CIL_COMMIT" in os.environ:
        return os.environ["CIL_COMMIT"]
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a venv in another project
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device(settings: TrainerConfig) -> str:
    """The accelerator's name, or the processor's and how many threads torch uses of it.

    And how many there are of it, if several.
    """
    import torch

    if settings.accelerator != "cpu" and torch.cuda.is_available():
        name = str(torch.cuda.get_device_name())
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    nodes = f"{settings.num_nodes} nodes, on each " if settings.num_nodes > 1 else ""
    return nodes + (f"{settings.devices} x {name}" if settings.devices > 1 else name)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
