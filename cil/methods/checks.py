"""What is wrong with the settings of methods, said before anything is built."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cil.config import DiscriminativeConfig, TokenizerConfig
from cil.errors import UserError
from cil.models.backbones import SMALLEST_FOR_RESNET
from cil.streams.image_scan import named
from cil.streams.stream import Stream, View
from cil.streams.tokens import MOST_CODES

_RANGES = {
    "vocabulary": (2, MOST_CODES),
    "residual_blocks": (0, math.inf),
    "condition_from": (0, math.inf),
    "weight_decay": (0, math.inf),
    "smoothing_sigma": (0, math.inf),
    "drop_path": (0, 0.99),
    "condition_dropout": (0, 0.99),
    "cca_steps": (0, math.inf),
    "cca_lr": (1e-12, math.inf),
    "cca_beta": (1e-12, math.inf),
    "cca_lambda": (0, math.inf),
    "lr": (1e-12, math.inf),
}
# Setting -> the least and the most it may be; those not named may be any number above 0.
_DISCRIMINATIVE = {
    "weight_decay": (0.0, math.inf),
    "momentum": (0.0, 0.999),
    "ewc_lambda": (0.0, math.inf),
    "si_lambda": (0.0, math.inf),
    "mas_lambda": (0.0, math.inf),
    "mas_alpha": (0.0, 1.0),
    "lwf_alpha": (0.0, math.inf),
    "slda_shrinkage": (0.0, 1.0),
    "fecam_shrinkage": (0.0, math.inf),
    "derpp_alpha": (0.0, math.inf),
    "derpp_beta": (0.0, math.inf),
    "bic_held_out": (0.01, 0.99),
}


def check_ranges(section: str, settings: Any) -> None:
    """Raises UserError for a number (or list of numbers) outside what its setting can mean."""
    for key, value in asdict(settings).items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            continue
        low, high = _RANGES.get(key, (1, math.inf))
        if not numbers or not all(low <= n <= high and n < math.inf for n in numbers):
            wanted = f"from {low} to {high}" if high < math.inf else f"{low} or more"
            raise UserError(f"{section}.{key} is {value}: choose {wanted}.")


def check_tokenizer(stream: Stream, tokenizer: TokenizerConfig) -> None:
    """Raises UserError where the tokenizer's settings do not fit each other or the images."""
    check_ranges("tokenizer", tokenizer)
    if tokenizer.scales != sorted(set(tokenizer.scales)) or len(tokenizer.scales) < 2:
        raise UserError(
            f"tokenizer.scales is {tokenizer.scales}: give at least two sides from small to large."
        )
    size = 2 ** (len(tokenizer.multipliers) - 1) * tokenizer.scales[-1]
    if size != stream.image_size:
        raise UserError(
            f"tokenizer.multipliers and tokenizer.scales make a tokenizer of {size} px, but the "
            f"images of {stream.name} have {stream.image_size} px: the last scale times 2 for "
            "every multiplier but the first must equal it."
        )


def check_heads(section: str, sizes: Mapping[str, int]) -> None:
    """Raises UserError when `heads` does not divide `width`."""
    if sizes["width"] % sizes["heads"]:
        raise UserError(
            f"{section}.heads is {sizes['heads']}, which does not divide {section}.width "
            f"{sizes['width']}."
        )


def check_discriminative(settings: DiscriminativeConfig) -> None:
    """Raises UserError for a number outside what its setting can mean."""
    for key, value in asdict(settings).items():
        if isinstance(value, str):
            continue
        low, high = _DISCRIMINATIVE.get(key, (None, math.inf))
        if (value <= 0 if low is None else value < low) or not value <= high or value == math.inf:
            wanted = "it above 0" if low is None else f"{low:g} or more"
            wanted = wanted if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"discriminative.{key} is {value}: give {wanted}.")


def check_backbone(name: str, image_size: int, where: str) -> None:
    """Raises UserError for images too small for the network; `where` says how large they are."""
    if name not in ("auto", "cnn") and image_size < SMALLEST_FOR_RESNET:
        raise UserError(
            f"discriminative.backbone is {name}, which needs images of {SMALLEST_FOR_RESNET} px or "
            f"more, but {where}: choose cnn."
        )


def check_memory(name: str, stored: int, share: float, stream: Stream) -> None:
    """Raises UserError where a memory of `stored` images has no room for every class.

    With a `share` below 1 it holds two kinds of images, of which the smaller is that share of it;
    then no class may have a single image either, or it would have none of one kind.
    """
    classes = len(stream.class_names)
    if int(share * stored) < classes:
        raise UserError(
            f"discriminative.stored_images is {stored}, too few for {name}: {stream.name} has "
            f"{classes} classes, so give it {math.ceil(classes / share)} or more."
        )
    counts: Counter[int] = Counter()
    for experience in stream.experiences if share < 1 else ():
        assert isinstance(experience.train, View)
        counts.update(experience.train.targets)
    single = [stream.class_names[label] for label in counts if counts[label] == 1]
    if single:
        raise UserError(
            f"{name} learns from some images of a class and fits its bias on others, so it needs "
            f"two or more: {stream.name} has one training image of {named(single)}."
        )
