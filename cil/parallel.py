"""Several devices: one process each, all running the same code and drawing the same numbers.

What they share out (the images of a step, the batches of an evaluation) goes through here, and so
does every decision that they must not take differently. With one device nothing here does anything.
`launch.py` starts the processes. torch is imported inside: `--help` goes through this file.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cil.config import TrainerConfig
from cil.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    import torch

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # the others wait while the first one learns or draws alone
_OUTSIDE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun says to the processes it starts


@dataclass(frozen=True)
class Place:
    """Which process this is: `rank` counts over all nodes, `local_rank` on its own."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1


_here = Place()
_group: Any = None  # of the processors, for objects, whatever the devices are


def rank() -> int:
    return _here.rank


def local_rank() -> int:
    return _here.local_rank


def world() -> int:
    """The number of processes, which is that of devices."""
    return _here.world


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return _here.rank == 0


def processes(settings: TrainerConfig) -> int:
    """The number of devices on all nodes; UserError for less than one of them, or of jobs."""
    for key in ("devices", "num_nodes", "jobs"):
        if getattr(settings, key) < 1:
            raise UserError(f"trainer.{key} is {getattr(settings, key)}: give 1 or more.")
    return settings.devices * settings.num_nodes


def place_given(settings: TrainerConfig) -> Place | None:
    """The place that torchrun gave to this process; None if it was started by itself.

    Raises:
        UserError: more or fewer processes were started than devices are asked for, or several
            nodes are asked for and none was started.
    """
    wanted = processes(settings)
    if all(name in os.environ for name in _OUTSIDE) and int(os.environ["WORLD_SIZE"]) > 1:
        place = Place(*(int(os.environ[name]) for name in _OUTSIDE))
        if place.world != wanted:
            raise UserError(
                f"{place.world} processes were started (WORLD_SIZE), but trainer.devices is "
                f"{settings.devices} and trainer.num_nodes is {settings.num_nodes}: give numbers "
                f"whose product is {place.world}."
            )
        return place
    if settings.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes is {settings.num_nodes}, but nothing says which of them this is: "
            "start the command on each of them with torchrun, as the README shows."
        )
    return None


def cores() -> int:
    """Those that this process may use: on a shared machine not all there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_echo() -> bool:
    """Whether another process is about to say the same: torchrun gave both the same line."""
    outside = all(name in os.environ for name in _OUTSIDE)
    return _here.world == 1 and outside and os.environ["RANK"] != "0"


def join(place: Place, settings: TrainerConfig, ports: "SimpleQueue[int] | None" = None) -> None:
    """Meet the other processes; they stay together until `leave`.

    The first one hands the others the port of their meeting through `ports`; None: MASTER_ADDR and
    MASTER_PORT, which torchrun sets, say where it is.

    Raises:
        UserError: there are fewer GPUs than trainer.devices.
    """
    global _here, _group
    import torch
    from torch import distributed

    cuda = settings.accelerator != "cpu" and torch.cuda.is_available()
    if cuda:
        there = torch.cuda.device_count()
        if settings.devices > there:
            raise UserError(
                f"trainer.devices is {settings.devices}, but there are {there} GPUs: "
                f"give at most {there}."
            )
        torch.cuda.set_device(place.local_rank)
    if "OMP_NUM_THREADS" not in os.environ:  # all take all cores otherwise
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.devices))
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        store=None if ports is None else _store(place, ports),
        rank=place.rank,
        world_size=place.world,
    )
    _group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    _here = place


def leave() -> None:
    """Part from the other processes, when all of them are done."""
    global _here, _group
    from torch import distributed

    if _here.world > 1:
        barrier()
        distributed.destroy_process_group()
        _here, _group = Place(), None


def abandon(code: int) -> int:
    """The exit code; with other processes about it ends this one, which could not part orderly."""
    if _here.world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def barrier() -> None:
    """Wait until every process is here."""
    if _here.world > 1:
        from torch import distributed

        distributed.barrier(_group)


def broadcast(value: Any) -> Any:
    """The first process's value, on all of them; it may hold tensors on the CPU."""
    if _here.world == 1:
        return value
    from torch import distributed

    box = [value if is_first() else None]
    distributed.broadcast_object_list(box, 0, _group)
    return box[0]


def gather(value: T) -> list[T]:
    """Every process's value by rank, on all of them."""
    if _here.world == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * _here.world
    distributed.all_gather_object(values, value, _group)
    return values


def add_up(*tensors: "torch.Tensor") -> None:
    """Replace tensors by their sums over all processes: the same bits on each."""
    if _here.world > 1:
        from torch import distributed

        for tensor in tensors:
            distributed.all_reduce(tensor)


def in_turns(make: Callable[[], T]) -> T:
    """Call `make` on the first process, then on one of every node, then on the others.

    What it keeps in a cache is made once, and read by those who come later.
    """
    turn = 0 if is_first() else 1 if _here.local_rank == 0 else 2
    for _ in range(turn):
        barrier()
    made = make()
    for _ in range(turn, 2):
        barrier()
    return made


def deal(things: Sequence[T]) -> list[T]:
    """This process's share, dealt like cards: the first to the first, the second to the second."""
    return list(things[_here.rank :: _here.world])


def collect(dealt: Sequence[T]) -> list[T]:
    """The shares of all processes in the order from which they were dealt, on each of them."""
    hands = gather(dealt)
    return [hands[i % len(hands)][i // len(hands)] for i in range(sum(map(len, hands)))]


class Share:
    """This process's equal share of every batch; what cannot be shared evenly is left out."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Any]]:
        for rows in self.batches:
            yield deal(rows[: len(rows) - len(rows) % _here.world])

    def __len__(self) -> int:
        return len(self.batches)


def share(batches: Iterable[list[Any]]) -> Any:
    """This process's part of a sampler of batches, which must draw the same ones on every rank."""
    return batches if _here.world == 1 else Share(batches)


@contextmanager
def unseen() -> Iterator[None]:
    """Within it this process, the first one, is taken for the only one: it waits for no other.

    Avalanche asks torch: on the first of several it would learn from its share of the images alone,
    on the others it cannot even be imported. And what the first learns alone it finds or keeps in
    the cache alone.
    """
    global _here
    if _here.world == 1:
        yield
        return
    from torch import distributed

    here, _here = _here, replace(_here, world=1)
    asked, distributed.is_initialized = distributed.is_initialized, lambda: False
    try:
        yield
    finally:
        _here, distributed.is_initialized = here, asked


@contextmanager
def own_draws(device: "torch.device") -> Iterator[None]:
    """Within it every process draws other random numbers; after it all go on with the same ones."""
    if _here.world == 1:
        yield
        return
    import torch

    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + _here.rank)
        yield


def _store(place: Place, ports: "SimpleQueue[int]") -> Any:
    from torch.distributed import TCPStore

    if place.rank > 0:
        return TCPStore("127.0.0.1", ports.get(), place.world)
    # The system chooses the port: one that was free beforehand may be taken by now.
    store = TCPStore("127.0.0.1", 0, place.world, is_master=True, wait_for_workers=False)
    for _ in range(1, place.world):
        ports.put(store.port)
    return store
