"""What must match before a run is resumed, and how a run folder is made and emptied."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cil.errors import UserError
from cil.files import damaged, explained, plain_value, read_json, write_json
from cil.records.layout import CONFIG, ENVIRONMENT, Progress, read_config, read_stream

LOCK, CLEARING = ".lock", ".clearing"
OF_THE_MOMENT = ("created", "command", "resumed")  # differ from sitting to sitting as they should
WAYS_OUT = "set it back, start over with --fresh, or choose another folder with --runs"


def make_folder(folder: Path) -> None:
    """Make a run folder, parents included; UserError when something else is kept in it."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        entries = {path.name for path in folder.iterdir()}
    if entries and not entries & {LOCK, CONFIG}:
        raise UserError(
            f"{folder} holds files that are not a run's; choose another folder with --runs."
        )


def clear_folder(folder: Path) -> None:
    """Empty a run folder but for its lock.

    The marker is there for a kill: a deletion that was cut short must be finished first, for what
    it left no longer fits together (see `being_cleared`).
    """
    with explained(folder):
        (folder / CLEARING).touch()
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (LOCK, CLEARING):
                path.unlink()
        (folder / CLEARING).unlink()


def being_cleared(folder: Path) -> bool:
    return (folder / CLEARING).exists()


def check_config(folder: Path, progress: Progress, config: Mapping[str, Any]) -> None:
    """UserError naming the first key whose value is not the recorded one."""
    changed = changed_keys(read_config(folder, progress), config)
    if changed:
        key, (old, new) = next(iter(changed.items()))
        more = f" ({len(changed) - 1} more differ)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder} was begun with {key} = {old} and now it is {new}{more}; {WAYS_OUT}."
        )


def changed_keys(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Dotted key -> (recorded, now) for every leaf that differs; "not set" where it is absent."""
    old, new = dict(_leaves(recorded)), dict(_leaves(now))
    keys = [*old, *(key for key in new if key not in old)]
    return {k: (_shown(old, k), _shown(new, k)) for k in keys if not _same(old, new, k)}


def check_stream(folder: Path, progress: Progress, stream: Mapping[str, Any]) -> None:
    """UserError when the stream is not the one that the run was begun on."""
    recorded, now = read_stream(folder, progress).get("fingerprint"), stream.get("fingerprint")
    if recorded != now:
        raise UserError(
            f"{folder} was begun on another stream (fingerprint {recorded}, now {now}): its "
            f"images, its classes or their order changed; {WAYS_OUT}."
        )


def note_environment(folder: Path, environment: Mapping[str, Any]) -> None:
    """Keep this sitting's environment under "resumed" when it differs from the last one's."""
    path = folder / ENVIRONMENT
    recorded = read_json(path)
    resumed = recorded.get("resumed", [])
    if not isinstance(resumed, list):
        raise damaged(path)
    last = resumed[-1] if resumed else recorded
    if _lasting(last) != _lasting(environment):
        write_json(path, recorded | {"resumed": [*resumed, environment]})


def plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same content as it comes back from disk: lists for tuples, text for paths."""
    result: dict[str, Any] = json.loads(json.dumps(content, default=plain_value))
    return result


def _lasting(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in environment.items() if key not in OF_THE_MOMENT}


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> bool:
    """Whether both hold the key with one value; 1 and 1.0 are one, 1 and True are not."""
    if _shown(old, key) == _shown(new, key):
        return True
    if key not in old or key not in new or isinstance(old[key], bool) or isinstance(new[key], bool):
        return False
    return bool(old[key] == new[key])


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "not set"
