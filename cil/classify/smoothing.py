"""Copies of an image whose likelihoods are averaged (likelihood smoothing, arXiv 2510.12060).

Shapes: B images, S copies of an image, Z latent channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def image_seeds(images: Tensor) -> list[int]:
    """A number for each image that depends on its pixels alone."""
    bits = images.detach().float().contiguous().view(torch.int32).flatten(1).long()
    odd = torch.arange(bits.shape[1], device=bits.device) * 2 + 1
    seeds: list[int] = (bits * odd).sum(1).tolist()  # whole numbers: the same on every device
    return seeds


def noisy_copies(latents_BZhw: Tensor, seeds: Sequence[int], samples: int, sigma: float) -> Tensor:
    """The latents and `samples` - 1 copies with Gaussian noise -> (S, B, Z, h, w).

    Likelihood smoothing (2510.12060) averages the log-likelihoods over them: a token that lies near
    the border of two codes no longer decides alone. An image's noise comes from its own seed and is
    the same for every class, so that a score depends on its image alone and not on the batch.
    """
    shape = samples - 1, *latents_BZhw.shape[1:]
    own = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noise_SBZhw = torch.stack(own, 1).to(latents_BZhw)
    return torch.cat([latents_BZhw[None], latents_BZhw + sigma * noise_SBZhw])


def varied_copies(
    images: Tensor, seeds: Sequence[int], samples: int, vary: Callable[[Tensor], Tensor]
) -> Tensor:
    """images (B, ...), then what `vary` makes of each, `samples` - 1 times -> (S, B, ...).

    A shifted or mirrored image is read as wholly other tokens, and yet as ones that the model has
    learned from; noise on latents moves few tokens, and those to where no image has them. An
    image's copies come from its own seed, so that a score depends on its image alone.
    """
    copies = []
    with torch.random.fork_rng(devices=[]), _one_thread():
        for image, seed in zip(images.cpu(), seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            copies.append(torch.stack([vary(image) for _ in range(samples - 1)]))
    return torch.cat([images[None], torch.stack(copies, 1).to(images)])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Many threads would wait for each other at every small image: on 16 cores for 10 ms a copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
