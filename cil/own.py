"""Methods and streams of your own, under the protocol that cil's are judged by.

    from cil import own

    own.run("split_digits", [MyMethod, "replay"])          # your method beside one of cil's
    own.run("faces", ["var-adapter"], stream=my_stream)    # cil's methods on your stream

Records, figures, W&B, resuming, the table and the report are those of `python -m cil.run`; the
README has an example of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cil.command_line import parse
from cil.config import Config
from cil.errors import UserError
from cil.learning import learn_recorded, listed
from cil.methods.loading import check_workers
from cil.methods.method import Method
from cil.methods.registry import (
    NAMES,
    build,
    check_names,
    check_seeds,
    check_tuned,
    expand,
    settings,
)
from cil.records import RunView, finished_run
from cil.streams import open_stream
from cil.streams.stream import Stream
from cil.table import report


def run(
    experiment: str,
    methods: Sequence[str | type[Method] | Callable[[Stream], Method]],
    stream: Stream | None = None,
    *,
    like: str | None = None,
    overrides: Sequence[str] = (),
) -> list[RunView]:
    """Take methods through a stream, one table at the end; what is finished is not learned again.

    experiment: the folder under runs/, and without `stream` the experiment whose stream it is.
    methods: names of cil's methods or of sets of them, or what makes one of yours of a stream: a
    class, or a function whose name the runs get; when its code has changed, start over with the
    override "--fresh". like: the experiment whose settings hold, by default `experiment` itself, or
    split_digits for a stream of your own. overrides: such as "--seeds=[0,1]".

    Raises:
        UserError: bad settings, unknown names, records of other settings, several devices.
    """
    config, fresh = parse(like or ("split_digits" if stream else experiment), overrides)
    seeds = listed(config.seeds)
    check_seeds(seeds)
    check_tuned(config)
    check_workers(config.trainer)
    names = [method for method in methods if isinstance(method, str)]
    if names or not methods:
        check_names(names)
    each = [m for method in methods for m in (expand([method]) if method in names else [method])]
    if config.trainer.devices * config.trainer.num_nodes > 1:
        raise UserError("own.run works on one device: leave trainer.devices and num_nodes at 1.")
    if stream is None:
        stream = open_stream(config.stream, Path(config.cache))
    else:  # nothing of the configuration says which it is
        config = replace(config, stream=replace(config.stream, source=stream.fingerprint))
    folder, views = Path(config.runs) / experiment, []
    for seed in seeds:
        for method in each:
            wanted, make = _wanted(method, config, seed, stream)
            place = folder / wanted["method"] / f"seed{seed}"
            if fresh or not finished_run(place, wanted):
                learn_recorded(make, wanted, config, stream, place, fresh)
            view = finished_run(place, wanted)
            assert view is not None
            views.append(view)
    report(experiment, views, folder)
    return views


def _wanted(
    method: str | Callable[[Stream], Method], config: Config, seed: int, stream: Stream
) -> tuple[dict[str, Any], Callable[[], Method]]:
    """What the run depends on, and what makes its method."""
    if isinstance(method, str):
        return settings(method, config, seed), partial(build, method, config, stream)
    name = method.__name__
    if name in NAMES:
        raise UserError(f"cil has a method {name} already: give yours another name.")
    wanted = {"seed": seed, "method": name, "stream": asdict(config.stream)}
    return wanted, partial(method, stream)
