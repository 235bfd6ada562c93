"""From settings to the VAR's parts, and what is wrong with settings that make no model."""

from dataclasses import asdict

from cil.config import TokenizerConfig, VARConfig
from cil.errors import UserError
from cil.methods.checks import check_heads, check_ranges, check_tokenizer
from cil.models.class_groups import Incremental
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import VAR
from cil.streams.stream import Stream


def check_settings(stream: Stream, tokenizer: TokenizerConfig, var: VARConfig) -> None:
    """Raises UserError where the settings do not fit each other or the stream's images."""
    check_ranges("var", var)
    check_tokenizer(stream, tokenizer)
    check_heads("var", asdict(var))
    if var.smoothing == "views" and stream.augment is None:
        raise UserError(
            "var.smoothing is views, but with stream.augment false no image is varied: choose "
            "noise."
        )
    if var.plasticity == "scratch" and var.condition_from:
        raise UserError(
            f"var.condition_from is {var.condition_from}, but with plasticity scratch no block is "
            "shared by all classes: give 0."
        )
    if var.condition_from > var.depth:
        raise UserError(
            f"var.condition_from is {var.condition_from}, but var.depth is {var.depth}: "
            "give at most as many."
        )


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
