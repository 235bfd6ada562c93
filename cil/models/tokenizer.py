"""The multi-scale residual tokenizer of VAR (arXiv 2404.02905, algorithms 1 and 2).

An image becomes L tokens: p_1 x p_1 of them for the coarsest scale, ..., p_K x p_K for the finest.

Shapes: B images, Z latent channels, h = w = p_K, K scales, L = sum p_k^2 tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cil.models.autoencoder import Decoder, Encoder
from cil.models.compiling import any_batch, compiled


@dataclass(frozen=True)
class Quantised:
    """One pass of residual quantisation."""

    encoded_BZhw: Tensor  # the encoder's output
    partial_BZhw: tuple[Tensor, ...]  # what the first scales add up to: the first, two, ... all
    tokens_BL: Tensor
    inputs_BLZ: Tensor  # what a transformer reads: as `var_input` of these tokens
    pooled_NZ: Tensor  # the vectors that were matched, scale by scale, and the codes they met:
    matches_N: Tensor  # what an averaging codebook follows

    def straight_through(self) -> Tensor:
        """The sum over all scales (B, Z, h, w), straight-through to the encoder's output."""
        return self.encoded_BZhw + (self.partial_BZhw[-1] - self.encoded_BZhw).detach()

    def loss(self, commitment: float) -> Tensor:
        """Commitment, plus what teaches phi to reproduce the encoder's output; mean of scales."""
        losses = [
            commitment * F.mse_loss(self.encoded_BZhw, partial.detach())
            + F.mse_loss(partial, self.encoded_BZhw.detach())
            for partial in self.partial_BZhw
        ]
        return torch.stack(losses).mean()


P = ParamSpec("P")
T = TypeVar("T")


def _full_precision(
    method: Callable[Concatenate["MultiScaleTokenizer", P], T],
) -> Callable[Concatenate["MultiScaleTokenizer", P], T]:
    """Outside of any autocast: an image is the same tokens in whatever precision they are used.

    (Within what the device's convolutions do: on a GPU torch lets them round factors to TF32.)
    """

    @wraps(method)
    def exact(self: "MultiScaleTokenizer", *args: P.args, **options: P.kwargs) -> T:
        with torch.autocast("cuda" if self.codebook.is_cuda else "cpu", enabled=False):
            return method(self, *args, **options)

    return exact


class Phi(nn.Module):
    """phi(x) = x/2 + conv3x3(x)/2: mends what up-sampling a coarse scale blurs."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * self.conv(x)


class MultiScaleTokenizer(nn.Module):
    """Images (B, image_channels, H, W) in [-1, 1] <-> tokens (B, L) in [0, V).

    The defaults are the released 256 px model. The image side must be 2^(levels-1) * scales[-1].
    The codebook takes no gradient: it is trained by moving averages (methods/tokenizer.py). With
    `compiled` set, encoding and reading go through torch.compile.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        channels: int = 160,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        residual_blocks: int = 2,
        latent_channels: int = 32,
        vocabulary: int = 4096,
        scales: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        phis: int = 4,
    ) -> None:
        super().__init__()
        sizes = (image_channels, channels, multipliers, residual_blocks, latent_channels)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)
        self.before = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
        self.after = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
        self.codebook = nn.Parameter(torch.randn(vocabulary, latent_channels), requires_grad=False)
        self.phis = nn.ModuleList(Phi(latent_channels) for _ in range(phis))
        self.scales = tuple(scales)
        self.phi_of_scale = [self._phi_index(k) for k in range(len(self.scales))]
        self.compiled = False
        self.image_size = 2 ** (len(multipliers) - 1) * self.scales[-1]
        for k, p in enumerate(self.scales[:-1]):
            self.register_buffer(f"_enlarge{k}", _bicubic(p, self.scales[-1]), persistent=False)

    @property
    def tokens(self) -> int:
        """L."""
        return sum(p * p for p in self.scales)

    @_full_precision
    def encode(self, images: Tensor) -> Tensor:
        """images -> continuous latents (B, Z, h, w)."""
        if not self.compiled:
            return self.before(self.encoder(images))
        any_batch(images)
        return self.before(compiled(Encoder.forward)(self.encoder, images))

    def tokenize(self, images: Tensor) -> Tensor:
        """images -> tokens (B, L)."""
        return self.tokenize_latents(self.encode(images))

    def tokenize_latents(self, latents_BZhw: Tensor) -> Tensor:
        """The encoder's output -> tokens (B, L)."""
        return self.read(latents_BZhw)[0]

    def read(self, latents_BZhw: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output -> tokens (B, L), and `var_input` of them at no further cost."""
        if not self.compiled:
            return _read(self, latents_BZhw)
        any_batch(latents_BZhw)
        return compiled(_read)(self, latents_BZhw)

    def decode(self, tokens_BL: Tensor) -> Tensor:
        """tokens -> images (B, image_channels, H, W), clamped to [-1, 1]."""
        *_, latents = self.partial_latents(tokens_BL)
        return self.decode_latents(latents).clamp(-1, 1)

    @_full_precision
    def decode_latents(self, latents_BZhw: Tensor) -> Tensor:
        return self.decoder(self.after(latents_BZhw))

    @_full_precision
    def quantise(self, latents_BZhw: Tensor) -> Quantised:
        """Residual quantisation, coarse to fine (algorithm 1)."""
        target = latents_BZhw.detach()
        summed = torch.zeros_like(target)
        tokens, inputs, pooled, matches, partial = [], [], [], [], []
        for k, p in enumerate(self.scales):
            inputs.append(self.next_input(summed.detach(), k))
            vectors = rearrange(_area(target - summed.detach(), p), "b z h w -> (b h w) z")
            ids = self._nearest(vectors)
            ids_BN = ids.view(len(target), p * p)
            summed = summed + self.detail(ids_BN, k)
            tokens.append(ids_BN)
            pooled.append(vectors)
            matches.append(ids)
            partial.append(summed)
        return Quantised(
            latents_BZhw,
            tuple(partial),
            torch.cat(tokens, 1),
            torch.cat(inputs[1:], 1),  # the first scale reads none
            torch.cat(pooled),
            torch.cat(matches),
        )

    @_full_precision
    def detail(self, tokens_BN: Tensor, k: int) -> Tensor:
        """What scale k adds to the latents: tokens (B, p_k^2) -> (B, Z, h, w)."""
        return self.detail_of(self.codebook[tokens_BN], k)

    @_full_precision
    def detail_of(self, vectors_BNZ: Tensor, k: int) -> Tensor:
        """The same of vectors that stand in the place of codes."""
        vectors = rearrange(vectors_BNZ, "b (p q) z -> b z p q", p=self.scales[k])
        if k < len(self.scales) - 1:
            # Bicubic interpolation as two matrix products: torch's own kernel is made for few
            # channels, and takes most of the time of a quantisation on a GPU.
            enlarge_hp = getattr(self, f"_enlarge{k}")
            vectors = enlarge_hp @ vectors @ enlarge_hp.T
        return self.phis[self.phi_of_scale[k]](vectors)

    @_full_precision
    def match(self, residual_BZhw: Tensor, k: int) -> Tensor:
        """What the scales before k leave of latents -> its tokens of scale k (B, p_k^2)."""
        vectors_BNZ = self.next_input(residual_BZhw, k)
        return self._nearest(vectors_BNZ.flatten(0, 1)).view(vectors_BNZ.shape[:2])

    def partial_latents(self, tokens_BL: Tensor) -> Iterator[Tensor]:
        """The latents (B, Z, h, w) as they stand after scale 1, 2, ..., K."""
        summed: Tensor | float = 0.0
        for k, tokens in enumerate(tokens_BL.split([p * p for p in self.scales], dim=1)):
            summed = summed + self.detail(tokens, k)
            yield summed

    def next_input(self, latents_BZhw: Tensor, k: int) -> Tensor:
        """What the transformer reads to predict scale k: latents so far -> (B, p_k^2, Z)."""
        return rearrange(_area(latents_BZhw, self.scales[k]), "b z h w -> b (h w) z")

    def var_input(self, tokens_BL: Tensor) -> Tensor:
        """Teacher forcing: tokens -> (B, L - p_1^2, Z), the input of every scale but the first."""
        latents = self.partial_latents(tokens_BL)
        return torch.cat([self.next_input(next(latents), k) for k in range(1, len(self.scales))], 1)

    def _nearest(self, vectors_NZ: Tensor) -> Tensor:
        # ||v - c||^2 without ||v||^2, which does not change the argmin.
        squares_V = self.codebook.square().sum(1)
        return torch.addmm(squares_V, vectors_NZ, self.codebook.T, alpha=-2).argmin(1)

    def _phi_index(self, k: int) -> int:
        """Scales share phis: each takes the nearest of evenly spaced ticks on [0, 1]."""
        n = len(self.phis)
        # The released model has its four ticks at 1/12 .. 11/12, other counts at 1/2n .. 1 - 1/2n.
        margin = 1 / (3 * n) if n == 4 else 1 / (2 * n)
        # numpy, as in the released code: with ten scales two positions lie exactly half-way between
        # ticks, and the rounding of linspace decides which phi they get.
        ticks = np.linspace(margin, 1 - margin, n)
        position = k / max(len(self.scales) - 1, 1)
        return int(np.argmin(np.abs(ticks - position)))


def _read(tokenizer: MultiScaleTokenizer, latents_BZhw: Tensor) -> tuple[Tensor, Tensor]:
    quantised = tokenizer.quantise(latents_BZhw)
    return quantised.tokens_BL, quantised.inputs_BLZ


def _bicubic(size: int, larger: int) -> Tensor:
    """(larger, size): how bicubic interpolation enlarges one axis."""
    # On the CPU also where the parameters are built without memory (official.py).
    single = torch.eye(size, device="cpu").view(1, size, size, 1)
    return F.interpolate(single, size=(larger, 1), mode="bicubic")[0, :, :, 0].T.contiguous()


def _area(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="area")
