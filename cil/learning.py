"""The runs of an experiment, a method with a seed each: learned where they are not finished yet.

One after the other, side by side in processes of their own, or each on several devices; what a run
leaves is recorded in its place, from which the same runs go on when they were interrupted.
"""

import atexit
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cil import parallel, trial
from cil.config import Config
from cil.errors import DivergenceError, UserError
from cil.launch import launch, queue, shared, together
from cil.methods.loading import check_workers
from cil.methods.registry import (
    build,
    check_batches,
    check_names,
    check_samples,
    check_seeds,
    check_sides,
    check_tuned,
    expand,
    is_of,
    settings,
)
from cil.records import RunView, finished_run

if TYPE_CHECKING:  # torch and Avalanche cost seconds, and --help must not wait for them
    from cil.methods.method import Method
    from cil.streams.stream import Stream

Run = tuple[str, int]  # a method's name and a seed
_LEARNING, _DONE = 1, 2


def complete(experiment: str, config: Config, fresh: bool = False) -> list[RunView]:
    """Every method with every seed, each learned or found finished.

    On several devices it starts a process for each, or is one of those that torchrun started; of
    these the first alone returns the runs, the others nothing. Of the methods that a set's name
    stands for, those that the stream cannot run are named on stderr and left out.

    Raises:
        DivergenceError: one came to no numbers; the others were learned nonetheless, unless several
            devices share the work.
        UserError: bad settings, a damaged record, a disk that is full or cannot be written, no
            method is left, or one that is finished had another stream than the others.
    """
    check(config)
    if trial.current() is not None:
        trial.check_single(expand(listed(config.methods)), listed(config.seeds))
    place = parallel.place_given(config.trainer)
    if place is not None and parallel.world() == 1:  # a search meets once, for all its trials
        parallel.join(place, config.trainer)
        atexit.register(parallel.leave)
    # Of the whole line, not of what is left of it: threads are the jobs' share (see below).
    jobs = min(config.trainer.jobs, len(_places(experiment, config)))
    config = replace(config, trainer=replace(config.trainer, jobs=jobs))
    left = parallel.broadcast(left_to_learn(experiment, config, fresh))
    if left and place is None and config.trainer.devices > 1:
        launch(config.trainer, _run_methods, experiment, config, left, fresh)
    elif len(left) > 1 and place is None and config.trainer.jobs > 1:
        _run_side_by_side(experiment, config, left, fresh)
    elif left:
        with _share_of_threads(config.trainer.jobs if place is None else 1):
            _run_methods(experiment, config, left, fresh)
    views = finished(experiment, config) if parallel.is_first() else []
    if not parallel.broadcast(len(views)):  # all processes end alike
        raise UserError(
            "None of the methods can learn this stream, for the reasons given above: change what "
            "they name, or choose other methods."
        )
    return views


def check(config: Config) -> None:
    """Raises UserError for what no stream can mend: names, seeds, settings out of range."""
    wished = listed(config.methods)
    check_names(wished)
    check_seeds(listed(config.seeds))
    check_tuned(config)
    if not (config.runs.strip() and config.cache.strip()):  # as of a variable that is not set
        raise UserError("runs and cache must not be empty: name a folder, . for this one.")
    check_sides(wished, config)
    check_samples(config.samples)
    check_batches(expand(wished), config, parallel.processes(config.trainer))
    check_workers(config.trainer)


def left_to_learn(experiment: str, config: Config, fresh: bool = False) -> dict[Run, Path]:
    """The runs that `complete` would begin or go on with, and their places.

    Raises:
        UserError: a finished one is damaged, was made with other settings, or had another stream
            than the others.
    """
    places = _places(experiment, config)
    done = () if fresh else [(v.method, v.seed) for v in finished(experiment, config)]
    return {run: place for run, place in places.items() if run not in done}


def finished(experiment: str, config: Config) -> list[RunView]:
    """Those of the wanted runs that are finished; raises as `left_to_learn` does."""
    views: list[RunView] = []
    for (name, seed), place in _places(experiment, config).items():
        stream = views[0].stream if views else None
        view = finished_run(place, settings(name, config, seed), stream)
        views += [] if view is None else [view]
    return views


def _places(experiment: str, config: Config) -> dict[Run, Path]:
    """Every wanted run's folder."""
    folder, names = Path(config.runs) / experiment, expand(listed(config.methods))
    seeds = listed(config.seeds)
    return {(name, seed): folder / name / f"seed{seed}" for seed in seeds for name in names}


def _run_methods(experiment: str, config: Config, places: Mapping[Run, Path], fresh: bool) -> None:
    """Each (method, seed) with its record in its place."""
    stream = _open_stream(config)
    _check_others(experiment, config, places, stream)
    diverged: list[DivergenceError] = []
    for (name, seed), place in _fitting(config, places, stream):
        try:
            _run_method(name, seed, config, stream, place, fresh)
        except DivergenceError as error:
            if len(places) == 1 or parallel.world() > 1:  # whose others need not have seen it
                raise
            diverged.append(error)
            print(f"goes on without {name} seed {seed}: {error}", file=sys.stderr)
    if diverged:
        raise diverged[0]


def _run_side_by_side(
    experiment: str, config: Config, places: Mapping[Run, Path], fresh: bool
) -> None:
    """The same, `trainer.jobs` of them at a time, with one progress bar for all."""
    from tqdm import tqdm

    stream = _open_stream(config)
    _check_others(experiment, config, places, stream)
    runs = _fitting(config, places, stream)
    states = shared(len(runs))  # _LEARNING, then _DONE
    said, diverged = queue(), list[DivergenceError]()
    quiet = replace(config, trainer=replace(config.trainer, progress=False))
    jobs = min(config.trainer.jobs, len(runs))
    shown = ""
    with tqdm(total=len(runs), desc="runs", disable=not config.trainer.progress) as bar:

        def show() -> None:
            nonlocal shown
            now = states[:]
            learning = [
                run for (run, _), state in zip(runs, now, strict=True) if state == _LEARNING
            ]
            if done := now.count(_DONE) - bar.n:
                bar.update(done)
            named = ", ".join(f"{name} seed {seed}" for name, seed in learning)
            # A terminal's clock ticks on; a log file gets a line when there is news.
            if named != shown or sys.stderr.isatty():
                bar.set_postfix_str(named)
                shown = named
            while not said.empty():
                name, seed, sentence = said.get()
                diverged.append(DivergenceError(sentence))
                bar.write(f"goes on without {name} seed {seed}: {sentence}", file=sys.stderr)

        together(_run_next, jobs * [(quiet, runs, fresh, states, said)], show)
        show()
    if diverged:
        raise diverged[0]


def _run_next(
    config: Config, runs: Sequence[tuple[Run, Path]], fresh: bool, states: Any, said: Any
) -> None:
    """One of the jobs: runs that no other has begun, until there are none left."""
    with _share_of_threads(config.trainer.jobs):
        stream = _open_stream(config, quiet=True)
        while True:
            with states.get_lock():
                if 0 not in states[:]:
                    return
                number = states[:].index(0)
                states[number] = _LEARNING
            (name, seed), place = runs[number]
            try:
                _run_method(name, seed, config, stream, place, fresh)
            except DivergenceError as error:
                said.put((name, seed, str(error)))
            states[number] = _DONE


def _check_others(
    experiment: str, config: Config, places: Mapping[Run, Path], stream: "Stream"
) -> None:
    """Raises UserError where a run that is finished, and stays, had another stream than this."""
    for (name, seed), place in _places(experiment, config).items():
        if (name, seed) not in places:
            finished_run(place, settings(name, config, seed), stream_facts(stream))


@contextmanager
def _share_of_threads(jobs: int) -> Iterator[None]:
    """Within it the threads of one of so many jobs, also where it is the only one that is left.

    Their number decides in which order sums are taken, and so the last bits of all that is learned.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fitting(
    config: Config, places: Mapping[Run, Path], stream: "Stream"
) -> list[tuple[Run, Path]]:
    """The runs whose method the stream can run."""
    names = list(dict.fromkeys(name for name, _ in places))
    fitting = [name for name in names if _fits(name, config, stream)]
    return [(run, place) for run, place in places.items() if run[0] in fitting]


def _fits(name: str, config: Config, stream: "Stream") -> bool:
    """Whether the stream can run the method; what does not fit is said before any is trained.

    Raises:
        UserError: it cannot, and it was asked for by its own name.
    """
    try:
        build(name, config, stream)
    except UserError as error:
        if name in listed(config.methods):
            raise
        if parallel.is_first():
            print(f"left out: {name}: {error}", file=sys.stderr)
        return False
    return True


def _open_stream(config: Config, quiet: bool = False) -> "Stream":
    from cil.streams import open_stream

    if parallel.is_first() and not quiet:
        print(f"opening the stream {config.stream.source} ...", file=sys.stderr)
    stream = parallel.in_turns(partial(open_stream, config.stream, Path(config.cache)))
    if parallel.broadcast(stream.fingerprint) != stream.fingerprint:
        raise UserError(
            f"The images of {stream.name} are not the same on all nodes: copy those of the first."
        )
    return stream


def _run_method(
    name: str,
    seed: int,
    config: Config,
    stream: "Stream",
    place: Path,
    fresh: bool,
) -> None:
    """One method with one seed, from wherever its record in `place` left off."""
    wanted = settings(name, config, seed)
    learn_recorded(partial(build, name, config, stream), wanted, config, stream, place, fresh)


def learn_recorded(
    build_method: Callable[[], "Method"],
    wanted: Mapping[str, Any],
    config: Config,
    stream: "Stream",
    place: Path,
    fresh: bool,
) -> None:
    """Take a method through a stream with its record in `place` and its run at W&B.

    wanted: the settings that its numbers depend on, with "method" and "seed"; a record of others is
    not gone on with.
    """
    from cil import protocol
    from cil.environment import environment
    from cil.records import RunRecord
    from cil.tracking import Tracker

    name, seed = wanted["method"], wanted["seed"]
    if not parallel.is_first():
        nowhere = Tracker(None)
        protocol.run(build_method, stream, None, nowhere, config.trainer, seed, config.samples)
        return
    facts = stream_facts(stream)
    where, kept = environment(config.trainer), config.trainer.keep_checkpoints
    with RunRecord.open(place, wanted, facts, where, fresh, keep_checkpoints=kept) as record:
        if record.learned:
            print(f"{place}: going on after experience {record.learned}", file=sys.stderr)
        with Tracker.start(
            config.wandb,
            experiment=place.parent.parent.name,
            method=name,
            seed=seed,
            config={**wanted, "stream_fingerprint": stream.fingerprint, "environment": where},
            folder=place,
            tags=_tags(wanted, stream),
            trial=trial.current(),
        ) as tracker:
            protocol.run(
                build_method, stream, record, tracker, config.trainer, seed, config.samples
            )


def _tags(wanted: Mapping[str, Any], stream: "Stream") -> list[str]:
    """What runs at W&B are sifted by, besides experiment and method."""
    kinds = [kind for kind in ("generative", "discriminative") if is_of(wanted, kind)]
    return [*kinds, "held-out images" if stream.on_validation else "test images"]


def stream_facts(stream: "Stream") -> dict[str, Any]:
    """What a record keeps of the stream."""
    return {
        "name": stream.name,
        "fingerprint": stream.fingerprint,
        "evaluated_on": "validation" if stream.on_validation else "test",
        "class_list": stream.class_list,
        "class_list_hash": stream.class_list_hash,
        "class_names": list(stream.class_names),
        "class_order": list(stream.class_order),
        "experiences": [list(e.labels) for e in stream.experiences],
        "image_size": stream.image_size,
        "reproducibility": stream.reproducibility,
    }


def listed(value: Any) -> list[Any]:
    """Methods and seeds may be one, or a list."""
    return value if isinstance(value, list) else [value]
