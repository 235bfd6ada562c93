"""What a DiT denoises: the tokenizer's continuous latents, or the pixels themselves.

Shapes: B images, Z channels, h = w side.
"""

import torch
from torch import Tensor, nn

from cil.models.tokenizer import MultiScaleTokenizer


class Latents(nn.Module):
    """Images (B, channels, H, W) in [-1, 1] <-> latents (B, Z, h, w) of mean 0 and deviation 1.

    Latents are the encoder's output before quantisation, as in latent diffusion (2112.10752);
    without a tokenizer they are the pixels. Noise schedules are made for data of deviation 1.
    """

    def __init__(self, tokenizer: MultiScaleTokenizer | None, channels: int, side: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.shape = channels, side, side
        self.mean_Z11: Tensor
        self.std_Z11: Tensor
        self.register_buffer("mean_Z11", torch.zeros(channels, 1, 1))
        self.register_buffer("std_Z11", torch.ones(channels, 1, 1))

    def standardise(self, mean_Z: Tensor, std_Z: Tensor) -> None:
        """Take these for the mean and the deviation of each channel of `raw`."""
        self.mean_Z11.copy_(mean_Z[:, None, None])
        self.std_Z11.copy_(std_Z.clamp_min(1e-6)[:, None, None])

    def raw(self, images: Tensor) -> Tensor:
        """images -> latents as they come."""
        return images if self.tokenizer is None else self.tokenizer.encode(images)

    def standardised(self, raw_BZhw: Tensor) -> Tensor:
        return (raw_BZhw.float() - self.mean_Z11) / self.std_Z11

    def encode(self, images: Tensor) -> Tensor:
        return self.standardised(self.raw(images))

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """latents -> images, clamped to [-1, 1]."""
        raw = latents_BZhw * self.std_Z11 + self.mean_Z11
        images = raw if self.tokenizer is None else self.tokenizer.decode_latents(raw)
        return images.clamp(-1, 1)
