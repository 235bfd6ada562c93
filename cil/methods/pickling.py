"""Pickle an object whose parts belong to the stream, leaving the stream out.

Avalanche's strategies can only be kept whole, and their memories hold on to the images they were
cut from. Written by reference, a memory is a list of indices, and no image enters a checkpoint (but
iCaRL's, which Avalanche copies).
"""

import io
import pickle
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_DEVICE = "device"


def dumps(value: Any, references: Mapping[str, Any]) -> Tensor:
    """Pickle `value`; the objects in `references` and every torch.device go by name alone.

    -> the pickle's bytes (N,), uint8: torch.save writes a tensor as it is, but bytes as text, half
    as large again and fifteen times as slowly.
    """
    names = {id(thing): name for name, thing in references.items()}

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing: Any) -> Any:
            name = _DEVICE if isinstance(thing, torch.device) else names.get(id(thing))
            return NotImplemented if name is None else (_referenced, (name,))

    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=_as_module(Pickler=Pickler))
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def loads(data: Tensor, references: Mapping[str, Any], device: torch.device) -> Any:
    """Restore what `dumps` wrote, with `references` as they are now, accelerators' tensors on
    `device`, and `device` in place of the one it was written on.

    It runs code named in `data`, as every pickle does: give it files of your own only.
    """
    things = {**references, _DEVICE: device}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == (_referenced.__module__, _referenced.__name__):
                return things.__getitem__
            return super().find_class(module, name)

    module = _as_module(Unpickler=Unpickler)
    place = _place_on(device)
    return torch.load(
        io.BytesIO(data.numpy().data), map_location=place, pickle_module=module, weights_only=False
    )


def _place_on(device: torch.device) -> Callable[[Any, str], Any]:
    def place(storage: Any, location: str) -> Any:
        # Some tensors live on the CPU whatever the device: Adam's step counts, sampling weights.
        on_cpu = location == "cpu" or device.type == "cpu"
        return storage if on_cpu else storage.to(device=device)

    return place


def _as_module(**classes: type) -> Any:
    """torch.save and torch.load take their pickler from something that looks like a module."""
    return SimpleNamespace(__name__=__name__, **classes)


def _referenced(name: str) -> Any:
    raise pickle.UnpicklingError(f"{name} was written by reference: read it with pickling.loads.")
