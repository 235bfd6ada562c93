"""Class scores of a VAR as a function of pixels, for methods that ask for gradients.

An image's tokens are whole numbers, so nothing can be differentiated through them. Straight-through
estimation (Bengio et al. 2013, arXiv 1308.3432) takes each token as it is, and in the backward pass
as a softmax over all codes of minus their squared distances, in units of the mean squared distance
to the nearest code of the scale. Gradients so reach the pixels on both ways that a token has into
log p(x | y): as what the transformer reads, and as what it is to predict.

Shapes: B images, n classes of a group, C classes in all, L tokens, V vocabulary, Z latent channels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cil.models.class_groups import Incremental
from cil.models.compiling import eagerly
from cil.models.tokenizer import MultiScaleTokenizer


def straight_through_scores(
    model: Incremental, tokenizer: MultiScaleTokenizer, images: Tensor, weights_K: Tensor
) -> Tensor:
    """images (B, channels, H, W) -> sum_k w_k log p(tokens of scale k | coarser, class) (B, C).

    The values are those of the likelihood engine. All classes of all images go through the
    transformer at once and keep their activations: give it few images.
    """
    choices_BLV, inputs_BLZ = straight_through(tokenizer, images)
    sizes = torch.tensor([p * p for p in tokenizer.scales], device=images.device)
    weights_L = weights_K.repeat_interleave(sizes)
    with eagerly(model.trunks):  # else every batch size and its gradients are compiled anew
        groups = [
            _group_scores(model, group, choices_BLV, inputs_BLZ, weights_L)
            for group in range(len(model.groups))
        ]
    return torch.cat(groups, 1)


def _group_scores(
    model: Incremental, group: int, choices_BLV: Tensor, inputs_BLZ: Tensor, weights_L: Tensor
) -> Tensor:
    """(B, n)."""
    labels = model.groups.labels(group)
    pairs_BLZ = inputs_BLZ.repeat_interleave(len(labels), 0)
    labels_N = torch.arange(labels.start, labels.stop, device=inputs_BLZ.device)
    logits = model(pairs_BLZ, labels_N.repeat(len(inputs_BLZ)), group)
    log_p = F.log_softmax(logits.float(), -1).unflatten(0, (-1, len(labels)))
    return ((log_p * choices_BLV[:, None]).sum(-1) * weights_L).sum(-1)


def straight_through(tokenizer: MultiScaleTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as (B, L, V), one at the code and zero elsewhere, and what the transformer reads.

    Both with gradients.
    """
    with torch.autocast(images.device.type, enabled=False):  # as the tokenizer itself
        latents = tokenizer.before(tokenizer.encoder(images))
        summed, choices, inputs = torch.zeros_like(latents), [], []
        for k, p in enumerate(tokenizer.scales):
            inputs.append(tokenizer.next_input(summed, k))
            residual = F.interpolate(latents - summed, size=(p, p), mode="area")
            choices_BNV = _choices(rearrange(residual, "b z h w -> b (h w) z"), tokenizer.codebook)
            summed = summed + tokenizer.detail_of(choices_BNV @ tokenizer.codebook, k)
            choices.append(choices_BNV)
    return torch.cat(choices, 1), torch.cat(inputs[1:], 1)


def _choices(vectors_BNZ: Tensor, codebook_VZ: Tensor) -> Tensor:
    """One at the nearest code (B, N, V); its gradient is that of the softmax."""
    squares_BN1 = vectors_BNZ.square().sum(-1, keepdim=True)
    # As the tokenizer computes it, so that a token near a border falls on the same side.
    partial_BNV = codebook_VZ.square().sum(1) - 2 * vectors_BNZ @ codebook_VZ.T
    distances_BNV = (squares_BN1 + partial_BNV).clamp_min(0)
    least = distances_BNV.detach().amin(-1).mean().clamp_min(torch.finfo(torch.float32).tiny)
    soft = (-distances_BNV / least).softmax(-1)
    hard = F.one_hot(partial_BNV.argmin(-1), len(codebook_VZ)).to(soft)
    return hard + soft - soft.detach()
