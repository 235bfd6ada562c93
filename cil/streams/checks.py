"""What a stream and its settings must satisfy; Avalanche takes damaged ones without a word."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cil.errors import UserError
from cil.streams.image_scan import named

if TYPE_CHECKING:  # torch costs seconds, and --help must not wait for it
    from torch import Tensor

BEYOND = 0.01  # of [-1, 1]: what rounding may add to a value


def group_sizes(source: str, classes: int, protocol: str) -> list[int]:
    """Classes of each group: b50-10 is 50 first, then 10 each; b0-10 is 10 each.

    Raises:
        UserError: it is written otherwise, or `classes` do not divide like this.
    """
    match = re.fullmatch(r"b(\d+)-(\d+)", protocol)
    if not match:
        raise UserError(
            f"stream.protocol is '{protocol}': write b0-10 for groups of 10 classes, b50-10 for 50 "
            "classes first and then groups of 10."
        )
    first, step = int(match[1]), int(match[2])
    rest = classes - first
    if step < 1 or rest < 0 or rest % step or classes < 1:
        workable = [str(size) for size in range(1, classes + 1) if classes % size == 0]
        raise UserError(
            f"stream.protocol is {protocol}, but the {classes} classes of {source} do not divide "
            f"like this: choose b0-N with N one of {', '.join(workable)}, or another first group."
        )
    return [first] * (first > 0) + [step] * (rest // step)


def check_class_order(source: str, classes: int, class_order: Sequence[int]) -> None:
    """Raises UserError unless `class_order` is a permutation of range(classes)."""
    order = list(class_order)
    strangers = [original for original in order if original not in range(classes)]
    twice = [original for original in range(classes) if order.count(original) > 1]
    if strangers:
        fault = f"holds {strangers}, no class of {source}"
    elif twice:
        fault = f"holds {twice} more than once"
    elif len(order) != classes:
        fault = f"has {len(order)} entries, but {source} has {classes} classes"
    else:
        return
    raise UserError(
        f"stream.class_order {fault}: give each of 0 to {classes - 1} once, or leave it out and "
        "choose a stream.order_seed."
    )


def check_targets(place: str, targets_N: np.ndarray, class_names: Sequence[str]) -> None:
    """Raises UserError unless every class has a target, and every target a class."""
    classes, there = set(range(len(class_names))), set(np.unique(targets_N).tolist())
    missing = ", ".join(class_names[original] for original in sorted(classes - there))
    if missing:
        raise UserError(f"{place} hold none of: {missing}; every class needs one or more.")
    strangers = named([str(target) for target in sorted(there - classes)])
    if strangers:
        raise UserError(
            f"{place} have targets that are no classes: {strangers}; give 0 to {len(classes) - 1}, "
            "or name these in class_names too."
        )


def check_image(place: str, image: "Tensor", shape: tuple[int, int, int]) -> None:
    """Raises UserError unless an image has this (channels, H, W) and floats in [-1, 1]."""
    from torch import is_tensor

    if not is_tensor(image) or not image.is_floating_point():
        raise UserError(f"{place} is no tensor of floats: give it as one of {shape}.")
    if image.shape != shape:
        raise UserError(
            f"{place} is {tuple(image.shape)}, but channels and image_size make it {shape}: "
            "set them to what the images are, or resize these."
        )
    if not image.abs().max() <= 1 + BEYOND:  # also false for NaN
        raise UserError(
            f"{place} has values from {image.min():.3g} to {image.max():.3g}: scale all images "
            "to [-1, 1]."
        )
