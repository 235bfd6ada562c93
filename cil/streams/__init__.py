"""Where images come from: sources cut into streams of class groups."""

import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from cil.errors import UserError

if TYPE_CHECKING:  # torch and Avalanche cost seconds; naming the sources must not
    from cil.streams.stream import Source, Stream


class StreamSettings(Protocol):
    """What of the `stream` section of a configuration decides the images and their order."""

    @property
    def source(self) -> str: ...
    @property
    def experiences(self) -> int: ...
    @property
    def class_order(self) -> Sequence[int] | None: ...
    @property
    def order_seed(self) -> int: ...
    @property
    def validation(self) -> float: ...
    @property
    def augment(self) -> bool: ...


def open_stream(settings: StreamSettings) -> "Stream":
    """Build the stream of a configuration.

    Raises:
        UserError: the source is unknown, its classes do not divide into the experiences, the class
            order is no permutation of them, or the validation share leaves a split empty.
    """
    from cil.streams.stream import build_stream, class_order

    if settings.source not in _SOURCES:
        raise UserError(_unknown(settings.source))
    source = _SOURCES[settings.source](settings)
    order = settings.class_order
    if order is None:
        order = class_order(len(source.class_names), settings.order_seed)
    return build_stream(source, settings.experiences, order)


def _digits(settings: StreamSettings) -> "Source":
    from cil.streams.digits import digits

    return digits(validation=settings.validation, augment=settings.augment)


_SOURCES: dict[str, Callable[[StreamSettings], "Source"]] = {"digits": _digits}


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _SOURCES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(_SOURCES))}."
    return f"stream.source is '{name}', which does not exist: {hint}"
