"""What learning a generative method costs in multiply-accumulates; asking it is `schedule.cost`'s.

A step counts as three forward passes, as of any network, whatever of it is frozen. Left out are
adapters, a few per cent of the trunk, and the reading of the first group's held-out images for the
scale weights, about one.
"""

import torch

from cil.classify.schedule import Cost
from cil.config import TokenizerConfig
from cil.models.macs import macs
from cil.models.tokenizer import MultiScaleTokenizer


def tokenizer_macs(tokenizer: MultiScaleTokenizer, settings: TokenizerConfig) -> float:
    """Of learning the tokenizer."""
    weight = tokenizer.codebook
    latents = torch.zeros(1, weight.shape[1], *2 * [tokenizer.scales[-1]], device=weight.device)
    decoding = macs(lambda: tokenizer.decoder(tokenizer.after(latents)))
    step = settings.batch_size * 3 * (encoding_macs(tokenizer, 1) + decoding)
    return settings.steps * step


def encoding_macs(tokenizer: MultiScaleTokenizer, images: int) -> float:
    """Of encoding so many images; the look-up of their codes is left out."""
    side, channels = tokenizer.image_size, tokenizer.encoder.conv_in.in_channels
    image = torch.zeros(1, channels, side, side, device=tokenizer.codebook.device)
    return images * macs(lambda: tokenizer.before(tokenizer.encoder(image)))


def steps_macs(steps: int, batch_size: int, forward: Cost) -> float:
    """Of so many optimiser steps, whose forward pass costs that much an image."""
    return steps * batch_size * 3 * (forward.layers + forward.attention)
