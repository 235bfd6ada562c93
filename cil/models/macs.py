"""Multiply-accumulates of a computation, as torch counts them."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def macs(compute: Callable[[], object]) -> float:
    """Run `compute` and count its matrix products, convolutions and attention.

    Modules must be in evaluation mode, or normalisations learn from what only counts.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compute()
    return counter.get_total_flops() / 2
