"""What a stream's settings must satisfy; Avalanche takes a damaged class order without a word."""

import re
from collections.abc import Sequence

from cil.errors import UserError


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
    strangers = sorted({original for original in order if not 0 <= original < classes})
    twice = sorted({original for original in order if order.count(original) > 1})
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
