"""torch.compile for the parts of a model that most of the time goes into."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@cache
def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function through torch.compile, one graph for every number of tokens that it meets.

    Graphs of fixed shapes are a fifth faster than one for all (measured on an H200), and there are
    few: a schedule reads the same scales again and again. Only a batch may vary (`any_batch`).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Blocks are compiled one by one: their gradients travel while earlier ones are computed anyway.
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(function, dynamic=False)


def any_batch(*tensors: Tensor | None) -> None:
    """Tell the compiler that the first axis of these varies from call to call.

    Not in training, where all batches have one size.
    """
    for tensor in tensors:
        if tensor is not None and not torch.is_grad_enabled():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


@contextmanager
def eagerly(parts: Iterable[Any]) -> Iterator[None]:
    """Within it these modules are not compiled, as for few images of ever new numbers."""
    before = [(part, part.compiled) for part in parts]
    for part, _ in before:
        part.compiled = False
    try:
        yield
    finally:
        for part, was in before:
            part.compiled = was
