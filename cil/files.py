"""Files that are whole or absent, locks, and what an operating system error means to a user."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from cil.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explained(path: Path, key: str = "--runs") -> Iterator[None]:
    """Turn any OSError of the block into a UserError that names `path` and the way out.

    `key` is the setting that chooses the folder it is in.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"The disk is full: {path} could not be written; free some space and run the same "
                "line again, everything recorded before is intact."
            ) from error
        raise UserError(
            f"{path} cannot be written or read ({error.strerror or error}); "
            f"make it accessible or choose another folder with {key}."
        ) from error


def check_writable(folder: Path, key: str) -> None:
    """Raises UserError, as `explained` does, where no file can be written; made if not there."""
    with explained(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


class HashingWriter:
    """A binary file opened for writing that knows the sha256 of what went through it.

    It keeps its first OSError too: torch.save reports a full disk as a bare RuntimeError.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._sha256.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def replacing(path: Path, key: str = "--runs") -> Iterator[HashingWriter]:
    """Write `path` whole or not at all, also when the process is killed in between.

    The bytes go to a temporary name in the same folder, reach the disk, and are then renamed. The
    name is this writer's own: of several that write one file at a time, the last one counts.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with explained(path, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary, file = _open_temporary(path)
        try:
            with file:
                writer = HashingWriter(cast(BinaryIO, file))
                try:
                    yield writer
                except Exception:
                    if writer.error is not None:
                        raise writer.error from None
                    raise
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # while it is locked: it might pass for a leftover
        except Exception:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _open_temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside `path`, locked as long as it is open."""
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        file = temporary.open("wb")
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()  # another process took it for a leftover before it was locked


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` that nobody holds: those of processes that were killed."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), left.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def with_ending(path: Path, ending: str) -> Path:
    """`path` and an ending; `with_suffix` would drop what follows a dot in a name."""
    return path.with_name(path.name + ending)


def write_bytes(path: Path, data: bytes, key: str = "--runs") -> str:
    """Write a file whole or not at all and return its sha256; raises as `replacing` does."""
    with replacing(path, key) as file:
        file.write(data)
    return file.digest()


def write_json(path: Path, content: Mapping[str, Any], key: str = "--runs") -> str:
    """Write a JSON object whole or not at all and return its sha256."""
    text = json.dumps(content, indent=1, default=plain_value) + "\n"
    return write_bytes(path, text.encode(), key)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: it is missing, truncated, or no object; the sentence names the file.
    """
    data = read_bytes(path)
    try:
        content = json.loads(data)
    except ValueError as error:
        raise damaged(path) from error
    if not isinstance(content, dict):
        raise damaged(path)
    return content


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that must exist; a missing one is a UserError like a damaged one."""
    with explained(path):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise damaged(path, "is missing") from error


def damaged(path: Path, how: str = "is damaged") -> UserError:
    """The error for a file of a run folder that cannot be trusted."""
    return UserError(
        f"{path} {how}; put an undamaged copy back or start this run over with --fresh."
    )


_locks: "weakref.WeakSet[IO[str]]" = weakref.WeakSet()


def lock(path: Path, key: str = "--runs") -> IO[str] | None:
    """Take an exclusive lock that ends with this process; None when another process holds it.

    Close the returned file to let go. A forked child (a DataLoader worker) would hold the lock on
    after its parent was killed, so children close their copy.
    """
    with explained(path, key):
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
    _locks.add(file)
    return file


@contextmanager
def locked(path: Path, key: str = "--runs") -> Iterator[None]:
    """The same for a block, after waiting for another process that holds it."""
    while (held := lock(path, key)) is None:
        time.sleep(0.05)
    with held:
        yield


def _let_go_in_child() -> None:
    for file in list(_locks):
        with suppress(OSError):
            file.close()


os.register_at_fork(after_in_child=_let_go_in_child)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; not every file system can, so failing is no error."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def plain_value(value: Any) -> Any:
    """For json.dumps(default=): numpy scalars become numbers, paths and other objects text."""
    return value.item() if hasattr(value, "item") else str(value)
