"""What a stream's settings must satisfy; Avalanche takes a damaged class order without a word."""

from collections.abc import Sequence

from cil.errors import UserError


def check_experiences(source: str, classes: int, experiences: int) -> None:
    """Raises UserError unless `classes` divide into `experiences` class groups of equal size."""
    if experiences < 1 or classes % experiences:
        workable = [str(count) for count in range(1, classes + 1) if classes % count == 0]
        raise UserError(
            f"stream.experiences is {experiences}, which does not divide the {classes} classes of "
            f"{source}: choose one of {', '.join(workable)}."
        )


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
