"""From settings to the diffusion model's parts, and what is wrong with settings that make none."""

from dataclasses import asdict, replace

from cil.classify.schedule import diffusion_schedule
from cil.config import DiffusionConfig, TokenizerConfig
from cil.errors import UserError
from cil.methods.checks import check_heads, check_ranges, check_tokenizer
from cil.methods.var_parts import build_tokenizer
from cil.models.class_groups import Incremental
from cil.models.dit import SIZES, DiT
from cil.models.latents import Latents
from cil.models.noising import Noising
from cil.streams.stream import Stream


def sized(settings: DiffusionConfig) -> DiffusionConfig:
    """With the depth, width and heads of the published size, if one is named."""
    if settings.size is None:
        return settings
    depth, width, heads = SIZES[settings.size]
    return replace(settings, depth=depth, width=width, heads=heads)


def check_settings(stream: Stream, tokenizer: TokenizerConfig, diffusion: DiffusionConfig) -> None:
    """Raises UserError where the settings do not fit each other or the stream's images."""
    check_ranges("diffusion", diffusion)
    diffusion_schedule(diffusion.schedule)
    if diffusion.space == "latents":
        check_tokenizer(stream, tokenizer)
    sizes = sized(diffusion)
    check_heads("diffusion", asdict(sizes))
    if sizes.width % 4:
        raise UserError(f"diffusion.width is {sizes.width}: give a multiple of four.")
    side = tokenizer.scales[-1] if diffusion.space == "latents" else stream.image_size
    if side % diffusion.patch:
        raise UserError(
            f"diffusion.patch is {diffusion.patch}, which does not divide the side of the "
            f"{diffusion.space}, {side}."
        )


def build_latents(stream: Stream, tokenizer: TokenizerConfig, settings: DiffusionConfig) -> Latents:
    if settings.space == "pixels":
        return Latents(None, stream.channels, stream.image_size)
    built = build_tokenizer(tokenizer, stream.channels)
    return Latents(built, tokenizer.latent_channels, tokenizer.scales[-1])


def build_noising(settings: DiffusionConfig) -> Noising:
    return Noising(settings.objective, settings.noise_schedule)


def build_model(latents: Latents, settings: DiffusionConfig) -> Incremental:
    channels, side, _ = latents.shape
    sizes = sized(settings)
    trunk = DiT(
        channels=channels,
        side=side,
        patch=sizes.patch,
        depth=sizes.depth,
        width=sizes.width,
        heads=sizes.heads,
    )
    everywhere = settings.adapter_layers == "all"
    return Incremental(trunk, sizes.width, settings.plasticity, settings.adapter_rank, everywhere)
