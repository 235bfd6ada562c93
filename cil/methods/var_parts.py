"""From settings to the VAR's parts, and what is wrong with settings that make no model."""

import math
from dataclasses import asdict

from cil.config import TokenizerConfig, VARConfig
from cil.errors import UserError
from cil.models.class_groups import Incremental
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import VAR
from cil.streams.stream import Stream
from cil.streams.tokens import MOST_CODES


def check_settings(stream: Stream, tokenizer: TokenizerConfig, var: VARConfig) -> None:
    """Raises UserError where the settings do not fit each other or the stream's images."""
    _check_ranges(tokenizer, var)
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
    if var.width % var.heads:
        raise UserError(f"var.heads is {var.heads}, which does not divide var.width {var.width}.")
    if var.condition_from > var.depth:
        raise UserError(
            f"var.condition_from is {var.condition_from}, but var.depth is {var.depth}: "
            "give at most as many."
        )


def _check_ranges(tokenizer: TokenizerConfig, var: VARConfig) -> None:
    """Raises UserError for a number (or list of numbers) outside what its setting can mean."""
    ranges = {
        "vocabulary": (2, MOST_CODES),
        "residual_blocks": (0, math.inf),
        "condition_from": (0, math.inf),
        "weight_decay": (0, math.inf),
        "smoothing_sigma": (0, math.inf),
        "drop_path": (0, 0.99),
        "condition_dropout": (0, 0.99),
        "lr": (1e-12, math.inf),
    }
    for section, settings in (("tokenizer", tokenizer), ("var", var)):
        for key, value in asdict(settings).items():
            if isinstance(value, str | bool):
                continue
            low, high = ranges.get(key, (1, math.inf))
            numbers = value if isinstance(value, list) else [value]
            if not numbers or not all(low <= n <= high and n < math.inf for n in numbers):
                wanted = f"from {low} to {high}" if high < math.inf else f"{low} or more"
                raise UserError(f"{section}.{key} is {value}: choose {wanted}.")


def build_tokenizer(settings: TokenizerConfig, image_channels: int) -> MultiScaleTokenizer:
    return MultiScaleTokenizer(
        image_channels=image_channels,
        channels=settings.channels,
        multipliers=settings.multipliers,
        residual_blocks=settings.residual_blocks,
        latent_channels=settings.latent_channels,
        vocabulary=settings.vocabulary,
        scales=settings.scales,
        phis=settings.phis,
    )


def build_model(tokenizer: TokenizerConfig, settings: VARConfig) -> Incremental:
    trunk = VAR(
        vocabulary=tokenizer.vocabulary,
        latent_channels=tokenizer.latent_channels,
        scales=tokenizer.scales,
        depth=settings.depth,
        width=settings.width,
        heads=settings.heads,
        drop_path=settings.drop_path,
        condition_from=settings.condition_from,
    )
    everywhere = settings.adapter_layers == "all"
    return Incremental(
        trunk, settings.width, settings.plasticity, settings.adapter_rank, everywhere
    )
