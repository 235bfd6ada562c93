"""Where images come from: sources cut into streams of class groups."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cil.errors import UserError

if TYPE_CHECKING:  # torch and Avalanche cost seconds; naming the sources must not
    from cil.streams.stream import Source, Stream


class StreamSettings(Protocol):
    """What of the `stream` section of a configuration decides the images and their order."""

    @property
    def source(self) -> str: ...
    @property
    def root(self) -> str | None: ...
    @property
    def class_list(self) -> str | None: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def protocol(self) -> str: ...
    @property
    def class_order(self) -> Sequence[int] | None: ...
    @property
    def order_seed(self) -> int: ...
    @property
    def validation(self) -> float: ...
    @property
    def evaluate(self) -> str: ...
    @property
    def stop_after(self) -> int | None: ...
    @property
    def augment(self) -> bool: ...
    @property
    def mirror(self) -> bool: ...


def open_stream(settings: StreamSettings, cache: Path = Path("cache")) -> "Stream":
    """Build the stream of a configuration; `cache` is the folder of what is made once.

    Raises:
        UserError: the source is unknown or not there, a setting is given that it does not read or
            missing that it needs, its classes do not divide as the protocol asks, the class order
            is no permutation of them, it is to stop after more experiences than there are, or the
            validation share is not between 0 and 1.
    """
    from cil.streams.checks import group_sizes
    from cil.streams.stream import build_stream, class_order, shortened

    if settings.source not in SOURCES:
        raise UserError(_unknown(settings.source))
    _check_read(settings)
    if settings.source in CLASSES:  # or its images would be drawn or downloaded first
        group_sizes(settings.source, CLASSES[settings.source], settings.protocol)
    source = _source(settings, cache)
    order = settings.class_order
    if order is None:
        order = class_order(len(source.class_names), settings.order_seed)
    stream = build_stream(source, settings.protocol, order)
    return shortened(stream, settings.stop_after, settings.evaluate == "validation")


SOURCES = (
    "digits",
    "glyphs100",
    "image_folder",
    "cifar10",
    "cifar100",
    "mnist",
    "fashion_mnist",
)

# Of every source but image_folder.
CLASSES = {
    "digits": 10,
    "glyphs100": 100,
    "cifar10": 10,
    "cifar100": 100,
    "mnist": 10,
    "fashion_mnist": 10,
}

# Of an image_folder's images: below, nothing is to be seen; above, a batch fills the memory.
SIDES = (4, 1024)  # px

# Setting -> the sources that read it; for all others it would be without effect.
_READ_BY = {
    "root": SOURCES[2:],
    "class_list": ("image_folder",),
    "image_size": ("image_folder",),
    "mirror": ("image_folder",),
}


def _check_read(settings: StreamSettings) -> None:
    """Raises UserError for a setting that the source does not read."""
    for key, readers in _READ_BY.items():
        value = getattr(settings, key)
        if value is not None and value is not False and settings.source not in readers:
            shown = "true" if value is True else value
            raise UserError(
                f"stream.{key} is {shown}, but the source {settings.source} does not read it: take "
                f"it out, or choose a stream.source that does ({', '.join(readers)})."
            )


def _source(settings: StreamSettings, cache: Path) -> "Source":
    validation, augment = settings.validation, settings.augment
    if settings.source == "digits":
        from cil.streams.digits import digits

        return digits(validation, augment)
    if settings.source == "glyphs100":
        from cil.streams.glyphs import glyphs

        return glyphs(validation, augment, cache)
    if settings.source == "image_folder":
        from cil.streams.image_folder import image_folder

        root, image_size = _folder(settings)
        return image_folder(
            root,
            image_size,
            validation,
            augment,
            settings.mirror,
            cache,
            settings.class_list,
        )
    from cil.streams.torchvision_sets import torchvision_set

    root = cache / "torchvision" if settings.root is None else Path(settings.root)
    return torchvision_set(settings.source, root, validation, augment)


def _folder(settings: StreamSettings) -> tuple[Path, int]:
    """Where an image_folder is and the side it is shown at.

    Raises:
        UserError: one is missing, or the side is out of range.
    """
    if settings.root is None:
        raise UserError(
            "stream.root is not set: name the folder of the images, such as "
            "--stream.root=data/photos; it must hold the folders train and val (or test), and in "
            "each a folder of images for every class."
        )
    least, most = SIDES
    if settings.image_size is None or not least <= settings.image_size <= most:
        size = "not set" if settings.image_size is None else settings.image_size
        raise UserError(
            f"stream.image_size is {size}: an image_folder needs the side in pixels, from {least} "
            f"to {most}, to which its images are cut and resized, such as --stream.image_size=64."
        )
    return Path(settings.root), settings.image_size


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, SOURCES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SOURCES)}."
    return f"stream.source is '{name}', which does not exist: {hint}"
