"""The convolutional encoder and decoder around the tokenizer's codebook.

Architecture of VQGAN as VAR uses it (arXiv 2404.02905, section 4): residual blocks at every level,
attention at the coarsest one, a factor of two between levels.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as published; fewer where a small model's channels do not divide into them."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over the h*w positions of (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n c) h w -> n b 1 (h w) c", n=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Padding on the right and below only, as in VQGAN: released weights depend on it.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _level(blocks: int, channels_in: int, channels_out: int, attention: bool) -> nn.ModuleList:
    """The residual blocks of one resolution, each followed by attention at the coarsest."""
    layers = nn.ModuleList()
    for i in range(blocks):
        layers.append(ResidualBlock(channels_in if i == 0 else channels_out, channels_out))
        if attention:
            layers.append(SpatialAttention(channels_out))
    return layers


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels),
            SpatialAttention(channels),
            ResidualBlock(channels, channels),
        ]
    )


class Encoder(nn.Module):
    """images (B, image_channels, H, W) -> latents (B, Z, H/2^n, W/2^n), n = levels - 1."""

    def __init__(
        self,
        image_channels: int,
        channels: int,
        multipliers: Sequence[int],
        residual_blocks: int,
        latent_channels: int,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.layers = nn.ModuleList()
        previous = channels
        for level, width in enumerate(widths):
            coarsest = level == len(widths) - 1
            self.layers.extend(_level(residual_blocks, previous, width, coarsest))
            previous = width if residual_blocks else previous  # only a block changes the width
            if not coarsest:
                self.layers.append(Downsample(previous))
        self.layers.extend(_middle(previous))
        self.norm_out = group_norm(previous)
        self.conv_out = nn.Conv2d(previous, latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for layer in self.layers:
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """latents (B, Z, h, w) -> images (B, image_channels, h*2^n, w*2^n), n = levels - 1."""

    def __init__(
        self,
        image_channels: int,
        channels: int,
        multipliers: Sequence[int],
        residual_blocks: int,
        latent_channels: int,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.layers = _middle(widths[0])
        previous = widths[0]
        for level, width in enumerate(widths):
            # The decoder has one more block a level than the encoder, as in VQGAN.
            self.layers.extend(_level(residual_blocks + 1, previous, width, level == 0))
            if level < len(widths) - 1:
                self.layers.append(Upsample(width))
            previous = width
        self.norm_out = group_norm(previous)
        self.conv_out = nn.Conv2d(previous, image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.conv_in(latents)
        for layer in self.layers:
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))
