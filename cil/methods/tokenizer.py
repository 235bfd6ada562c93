"""Training the tokenizer: reconstruction, commitment, and a codebook that follows by averages."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cil import parallel
from cil.config import TrainerConfig
from cil.methods.training import LoggedModule, autocast, one_cycle
from cil.models.tokenizer import MultiScaleTokenizer


class TokenizerModule(LoggedModule):
    """Fits a `MultiScaleTokenizer` on batches (images, ...).

    The codebook is an exponential moving average of the vectors matched to each code (van den Oord
    et al. 2017, appendix A.1); a code that hardly any vector matches restarts at a random vector of
    the batch, which keeps nearly the whole codebook in use. Several devices follow the vectors of
    all of them, so that their codebooks stay one.
    """

    beta = 0.25  # weight of the commitment
    decay = 0.97
    dead_below = 0.1  # matches a step, on average, under which a code counts as dead

    def __init__(
        self,
        tokenizer: MultiScaleTokenizer,
        *,
        lr: float,
        steps: int,
        settings: TrainerConfig,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.tokenizer = tokenizer
        self.lr, self.steps = lr, steps
        for index, phi in enumerate(tokenizer.phis):  # fewer scales than phis leave some out
            phi.requires_grad_(index in tokenizer.phi_of_scale)
        self.counts_V: Tensor
        self.sums_VZ: Tensor
        self.register_buffer("counts_V", torch.ones(len(tokenizer.codebook)))
        self.register_buffer("sums_VZ", tokenizer.codebook.detach().clone())

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, tokenizer = batch[0], self.tokenizer
        with autocast(self.settings):  # the convolutions alone: what is matched stays in 32 bits
            latents = tokenizer.before(tokenizer.encoder(images))
        quantised = tokenizer.quantise(latents.float())
        with autocast(self.settings):
            decoded = tokenizer.decoder(tokenizer.after(quantised.straight_through()))
        reconstruction = F.mse_loss(decoded.float(), images)
        commitment = quantised.loss(self.beta)
        self._follow(quantised.pooled_NZ, quantised.matches_N)
        values = {
            "tokenizer/reconstruction": reconstruction,
            "tokenizer/commitment": commitment,
        }
        self.record(values, show="tokenizer/reconstruction")
        return reconstruction + commitment

    @torch.no_grad()
    def _follow(self, vectors_NZ: Tensor, matches_N: Tensor) -> None:
        counts = torch.zeros_like(self.counts_V)
        counts.index_add_(0, matches_N, torch.ones_like(vectors_NZ[:, 0]))
        sums = torch.zeros_like(self.sums_VZ).index_add_(0, matches_N, vectors_NZ)
        parallel.add_up(counts, sums)
        self.counts_V.lerp_(counts, 1 - self.decay)
        self.sums_VZ.lerp_(sums, 1 - self.decay)
        dead = self.counts_V < self.dead_below
        self.sums_VZ[dead] = _drawn(vectors_NZ, int(dead.sum()))
        self.counts_V[dead] = 1.0
        self.tokenizer.codebook.copy_(self.sums_VZ / self.counts_V[:, None])

    def configure_optimizers(self) -> Any:
        return one_cycle(self.tokenizer, lr=self.lr, steps=self.steps, weight_decay=0.0)


def _drawn(vectors_NZ: Tensor, count: int) -> Tensor:
    """Random vectors (count, Z) of all devices, the same on each of them."""
    n = len(vectors_NZ)
    picks = torch.randint(n * parallel.world(), (count,), device=vectors_NZ.device)
    own = (picks // n == parallel.rank())[:, None]
    drawn = torch.where(own, vectors_NZ[picks % n], 0.0)
    if count:
        parallel.add_up(drawn)
    return drawn
