"""What learning a VAR costs in multiply-accumulates; what it costs to ask is `schedule.cost`."""

import torch

from cil.classify.schedule import Stage, cost
from cil.config import TokenizerConfig, VARConfig
from cil.models.macs import macs
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import VAR


def start_macs(
    tokenizer: MultiScaleTokenizer, trunk: VAR, made_by: TokenizerConfig, var: VARConfig
) -> float:
    """Of the tokenizer and the trunk, which learn before the first class group."""
    encode, decode = _tokenizer_macs(tokenizer)
    learned = made_by.steps * made_by.batch_size * 3 * (encode + decode)
    return learned + var.first_steps * var.batch_size * 3 * _trunk_macs(trunk)


def group_macs(tokenizer: MultiScaleTokenizer, trunk: VAR, var: VARConfig, encoded: int) -> float:
    """Of one class group, whose learning `encoded` images as token maps began with.

    A step counts as three forward passes, as of any network, whatever of it is frozen; adapters
    are left out, a few per cent of the trunk.
    """
    encode, _ = _tokenizer_macs(tokenizer)
    return encoded * encode + var.steps * var.batch_size * 3 * _trunk_macs(trunk)


def _trunk_macs(trunk: VAR) -> float:
    """One image's tokens under one class."""
    whole = cost((Stage(len(trunk.scales), 1, 1),), trunk, classes=1)
    return whole.layers + whole.attention


def _tokenizer_macs(tokenizer: MultiScaleTokenizer) -> tuple[float, float]:
    """Of encoding one image and of decoding it; the look-up in between is left out."""
    weight = tokenizer.codebook
    side = tokenizer.image_size
    image = torch.zeros(1, tokenizer.encoder.conv_in.in_channels, side, side, device=weight.device)
    latents = torch.zeros(1, weight.shape[1], *2 * [tokenizer.scales[-1]], device=weight.device)
    encode = macs(lambda: tokenizer.before(tokenizer.encoder(image)))
    decode = macs(lambda: tokenizer.decoder(tokenizer.after(latents)))
    return encode, decode
