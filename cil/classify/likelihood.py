"""log p(x | y): how likely a VAR finds an image's tokens under each class (VARC, 2510.12060).

Shapes: B images, n classes of a group, C classes in all, L tokens, K scales, Z latent channels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.models.class_groups import Incremental


@torch.inference_mode()
def group_log_likelihoods(
    model: Incremental, group: int, tokens_BL: Tensor, inputs_BLZ: Tensor, max_rows: int = 64
) -> Tensor:
    """log p(token | coarser tokens, class) for each class of one group -> (B, n, L).

    A group is always scored on its own, at most `max_rows` (image, class) pairs at a time, so that
    groups that arrive later cannot change even the rounding of an earlier one. The default fits the
    activations of a small model into a processor's cache: of 16 to 1,024 it was the fastest.
    """
    labels = torch.tensor(model.groups.labels(group), device=tokens_BL.device)
    trunk, adapter = model.trunk(group), model.groups.adapter(group)
    chunk = max(1, max_rows // len(labels))
    parts = []
    for tokens, inputs in zip(tokens_BL.split(chunk), inputs_BLZ.split(chunk), strict=True):
        condition = model.groups.condition(labels.repeat(len(tokens)))
        logits = trunk(inputs.repeat_interleave(len(labels), 0), condition, adapter)
        targets = tokens.repeat_interleave(len(labels), 0)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        parts.append(-losses.view(len(tokens), len(labels), -1))
    return torch.cat(parts)


def token_log_likelihoods(model: Incremental, tokens_BL: Tensor, inputs_BLZ: Tensor) -> Tensor:
    """The same for every class of every group, in label order -> (B, C, L)."""
    groups = range(len(model.groups))
    return torch.cat([group_log_likelihoods(model, g, tokens_BL, inputs_BLZ) for g in groups], 1)


def noisy_copies(latents_BZhw: Tensor, samples: int, sigma: float) -> Iterator[Tensor]:
    """The latents, then `samples` - 1 copies with Gaussian noise of standard deviation `sigma`.

    Likelihood smoothing (2510.12060) averages the log-likelihoods over them: a token that lies near
    the border of two codes no longer decides alone. The noise is the same for every image, class
    and call, so that a score depends on its image alone, and not on what else is in the batch.
    """
    yield latents_BZhw
    generator = torch.Generator().manual_seed(0)
    for _ in range(samples - 1):
        noise = torch.randn(latents_BZhw.shape[1:], generator=generator)
        yield latents_BZhw + sigma * noise.to(latents_BZhw)


def by_scale(values_BCL: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Sum the tokens of each scale -> (B, C, K)."""
    return torch.stack([s.sum(-1) for s in values_BCL.split([p * p for p in scales], -1)], -1)


def fit_scale_weights(values_BCK: Tensor, labels_B: Tensor, prior: float = 0.1) -> Tensor:
    """Weights (K,) of the scales in score = sum_k w_k log p_k, by cross-entropy on held-out images.

    Tokens of one scale are predicted independently of each other, so their sum is overconfident,
    and the more so the finer the scale. Only the ratio of the weights decides a class: the prior
    pulls their logarithms together, which keeps an easy (separable) first experience from driving
    them to extremes. The result is scaled to mean 1.
    """
    values_BCK = values_BCK.detach().double()
    labels_B = labels_B.to(values_BCK.device)
    logs_K = torch.zeros(values_BCK.shape[-1], dtype=torch.float64, device=values_BCK.device)
    logs_K.requires_grad_(True)
    optimiser = torch.optim.LBFGS([logs_K], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        cross_entropy = F.cross_entropy(values_BCK @ logs_K.exp(), labels_B)
        value = cross_entropy + prior * (logs_K - logs_K.mean()).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    weights_K = logs_K.detach().exp()
    return (weights_K / weights_K.mean()).float()
