"""log p(x | y): how likely a VAR finds an image's tokens under each class (VARC, 2510.12060).

Shapes: B images, n classes of a group, C classes in all, N pairs of image and class, L tokens,
K scales, S copies of an image, Z latent channels.
"""

import math
from itertools import pairwise, product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classify.reading import Images, Reader, first_tokens, suitable_cache
from cil.classify.schedule import Schedule
from cil.models.class_groups import Incremental

Mean = Literal["log_likelihoods", "probabilities"]


@torch.inference_mode()
def group_log_likelihoods(
    model: Incremental,
    group: int,
    tokens_BL: Tensor,
    inputs_BLZ: Tensor,
    max_tokens: int | None = None,
) -> Tensor:
    """log p(token | coarser tokens, class) for each class of one group -> (B, n, L).

    A group is always scored on its own, so that groups that arrive later cannot change even the
    rounding of an earlier one, for the same `max_tokens`: so many of its pairs' tokens go through
    the transformer at once (None: what suits the device and its free memory).
    """
    return Images(model, tokens_BL, inputs_BLZ, max_tokens).read_group(group)


def token_log_likelihoods(model: Incremental, tokens_BL: Tensor, inputs_BLZ: Tensor) -> Tensor:
    """The same for every class of every group, in label order -> (B, C, L)."""
    with torch.inference_mode():
        images = Images(model, tokens_BL, inputs_BLZ)
        return torch.cat([images.read_group(group) for group in range(len(model.groups))], 1)


@torch.inference_mode()
def staged_scores(
    model: Incremental,
    tokens_SBL: Tensor,
    inputs_SBLZ: Tensor,
    weights_K: Tensor,
    stages: Schedule,
    mean: Mean = "log_likelihoods",
    max_tokens: int | None = None,
    reads: list[Tensor] | None = None,
    first: int = 0,
) -> Tensor:
    """Weighted log-likelihoods (B, C) of the classes left at the end; -inf for the others.

    tokens_SBL and inputs_SBLZ are those of at least as many copies of each image as a stage asks
    for, the clean one first; `mean` says of what the copies are averaged (2510.12060: its public
    code averages log-likelihoods, its text probabilities). A stage reads on where an earlier one
    stopped, with its keys, values and log-likelihoods, and scores no copy anew. `reads` takes in
    how many classes each stage read for each image (stages, B). Classes below `first`, where a
    group begins, are not read: the result is (B, C - first).
    """
    trunk, classes = model.trunk(0), model.groups.classes
    # Tokens of an image whose keys and values are kept between stages, if no margin drops a class.
    kept = [
        min(stage.keep, classes) * stage.samples * first_tokens(trunk, stage.scales)
        for i, stage in enumerate(stages)
        if any(later.scales > stage.scales for later in stages[i + 1 :])
    ]
    size = max(1, suitable_cache(trunk, tokens_SBL.device) // max(kept, default=1))
    parts = zip(tokens_SBL.split(size, 1), inputs_SBLZ.split(size, 1), strict=True)
    return torch.cat(
        [_staged(model, *part, weights_K, stages, mean, max_tokens, reads, first) for part in parts]
    )


def _staged(
    model: Incremental,
    tokens_SBL: Tensor,
    inputs_SBLZ: Tensor,
    weights_K: Tensor,
    stages: Schedule,
    mean: Mean,
    max_tokens: int | None,
    reads: list[Tensor] | None,
    first: int,
) -> Tensor:
    copies, images, classes = len(tokens_SBL), tokens_SBL.shape[1], model.groups.classes
    # Copies that every stage either reads or leaves out together are read as if further images.
    ends = sorted({stage.samples for stage in stages})
    sets = [
        Images(model, tokens_SBL[a:b].flatten(0, 1), inputs_SBLZ[a:b].flatten(0, 1), max_tokens)
        for a, b in pairwise([0, *ends])
    ]
    readers: dict[tuple[int, int], Reader] = {}  # by set and group
    scores_BC = torch.full((images, classes), -torch.inf, device=weights_K.device)
    left_BC = torch.ones_like(scores_BC, dtype=torch.bool)
    left_BC[:, :first] = False
    counts = []
    for number, stage in enumerate(stages):
        later = stages[number + 1 :]
        # An image with one class left is decided. (With one class in all, it is scored once.)
        open_BC = left_BC & ((left_BC.sum(1, keepdim=True) > 1) | (number == 0))
        counts.append(open_BC.sum(1))
        values_SBC = scores_BC.new_full((copies, images, classes), -torch.inf)
        in_use = ends.index(stage.samples)
        for i, group in product(range(in_use + 1), range(len(model.groups))):
            last = not any(ends[i] <= s.samples and stage.scales < s.scales for s in later)
            known = readers.pop((i, group), None)
            fresh = sets[i].readers(group, open_BC, cached=0 if last else stage.scales)
            for reader in [known] if known else fresh:
                reader.keep(open_BC)
                values_N = reader.score(stage.scales, weights_K, last)
                copy_N, image_N, label_N = reader.rows_3N
                copy_N = copy_N + (ends[i - 1] if i else 0)
                values_SBC[copy_N, image_N, label_N] = values_N
                if i == in_use and not last:
                    # What cannot be among the best any more need not wait for the classes that
                    # are still to be read: keys and values are most of the memory.
                    means_BC = _mean(values_SBC[: stage.samples], mean)
                    near_BC = survivors(means_BC, stage.keep, stage.margin)
                    near_BC[:, reader.labels.stop :] = True
                    values_SBC.masked_fill_(~near_BC, -torch.inf)
                    for other in (reader, *readers.values()):
                        other.keep(near_BC)
                if (i, group) in readers:
                    readers[i, group].take_over(reader)
                else:
                    readers[i, group] = reader
        values_BC = _mean(values_SBC[: stage.samples], mean)
        scores_BC = values_BC.where(open_BC, scores_BC.masked_fill(~left_BC, -torch.inf))
        left_BC = survivors(scores_BC, stage.keep, stage.margin)
    if reads is not None:
        reads.append(torch.stack(counts))
    return scores_BC[:, first:]


def survivors(scores_BC: Tensor, keep: int, margin: float = math.inf) -> Tensor:
    """Which of the classes scored so far (the others are at -inf) go on: the best `keep`.

    Of these, those that lie no more than `margin` below the very best.
    """
    best = scores_BC.topk(min(keep, scores_BC.shape[1]), dim=1)
    among_BC = torch.zeros_like(scores_BC, dtype=torch.bool).scatter(1, best.indices, True)
    return among_BC & (scores_BC >= best.values[:, :1] - margin) & scores_BC.isfinite()


def _mean(scores_SN: Tensor, mean: Mean) -> Tensor:
    if mean == "log_likelihoods":
        return scores_SN.mean(0)
    return scores_SN.logsumexp(0) - math.log(len(scores_SN))


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
