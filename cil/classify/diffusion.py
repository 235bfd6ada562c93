"""The diffusion classifier: under which class noise is predicted best (arXiv 2303.16203).

score(x, y) = - mean over (t, eps) of || target - prediction(x_t, t, y) ||^2, with the same (t, eps)
for every class of an image.

Shapes: B images, C classes in all, T timesteps of a stage, P pairs of image and class, N of their
timesteps, Z channels, h = w side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cil.classify.likelihood import survivors
from cil.classify.reading import suitable_tokens
from cil.classify.schedule import Timesteps
from cil.models.class_groups import Incremental
from cil.models.noising import Noising

MAX_NOISE = 2**27  # numbers of noise kept for the images that are scored together: 512 MiB


@torch.inference_mode()
def diffusion_scores(
    model: Incremental,
    noising: Noising,
    clean_BZhw: Tensor,
    seeds: Sequence[int],
    stages: Sequence[Timesteps],
    max_tokens: int | None = None,
    first: int = 0,
) -> Tensor:
    """The scores (B, C) of the classes left at the end; -inf for the others.

    The mean is over the timesteps of all stages that a class has seen. An image's noise comes from
    its own seed, so that a score depends on its image alone and not on the batch. So many tokens go
    through the transformer at once (`max_tokens`; None: what suits the device and its memory).
    Classes below `first`, where a group begins, are not read: the result is (B, C - first).
    """
    most = max(stage.timesteps for stage in stages) * clean_BZhw[0].numel()
    size = max(1, MAX_NOISE // most)
    max_tokens = max_tokens or suitable_tokens(model.trunk(0), clean_BZhw.device)
    rows = [slice(i, i + size) for i in range(0, len(clean_BZhw), size)]
    settings = stages, max_tokens, first
    return torch.cat([_staged(model, noising, clean_BZhw[r], seeds[r], *settings) for r in rows])


def stage_times(noising: Noising, stages: Sequence[Timesteps]) -> list[Tensor]:
    """The timesteps of every stage (T,): evenly spaced, each as well as those of all together.

    All of them are one even grid; a stage takes evenly from what earlier ones have left.
    """
    left = noising.even_times(sum(stage.timesteps for stage in stages))
    times = []
    for stage in stages:
        steps = (torch.arange(stage.timesteps) + 0.5) * (len(left) / stage.timesteps)
        taken = torch.zeros(len(left), dtype=torch.bool)
        taken[steps.long()] = True
        times.append(left[taken])
        left = left[~taken]
    return times


def _staged(
    model: Incremental,
    noising: Noising,
    clean_BZhw: Tensor,
    seeds: Sequence[int],
    stages: Sequence[Timesteps],
    max_tokens: int,
    first: int,
) -> Tensor:
    images, device = len(clean_BZhw), clean_BZhw.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scores_BC = torch.full((images, model.groups.classes), -torch.inf, device=device)
    sums_BC, left_BC = torch.zeros_like(scores_BC), torch.ones_like(scores_BC, dtype=torch.bool)
    left_BC[:, :first] = False
    read = 0
    for number, times_T in enumerate(stage_times(noising, stages)):
        # An image with one class left is decided. (With one class in all, it is scored once.)
        open_BC = left_BC & ((left_BC.sum(1, keepdim=True) > 1) | (number == 0))
        shape = (len(times_T), *clean_BZhw.shape[1:])
        noise_BTZhw = torch.stack([torch.randn(shape, generator=g) for g in generators])
        draws = _Draws(noising, clean_BZhw, noise_BTZhw.to(device), times_T.to(device))
        for group in range(len(model.groups)):
            labels = model.groups.labels(group)
            pairs = open_BC[:, labels.start : labels.stop].nonzero(as_tuple=True)
            image_P, label_P = pairs[0], pairs[1] + labels.start
            errors_P = draws.errors(model, group, image_P, label_P, max_tokens)
            sums_BC[image_P, label_P] += errors_P
        read += len(times_T)
        scores_BC = (-sums_BC / read).where(open_BC, scores_BC.masked_fill(~left_BC, -torch.inf))
        left_BC = survivors(scores_BC, stages[number].keep)
    return scores_BC[:, first:]


class _Draws:
    """The (t, eps) of one stage: every image's own noise at every timestep, for all classes."""

    def __init__(
        self, noising: Noising, clean_BZhw: Tensor, noise_BTZhw: Tensor, times_T: Tensor
    ) -> None:
        self.noising, self.clean_BZhw = noising, clean_BZhw
        self.noise_BTZhw, self.times_T = noise_BTZhw, times_T

    def errors(
        self, model: Incremental, group: int, image_P: Tensor, label_P: Tensor, max_tokens: int
    ) -> Tensor:
        """Squared errors, summed over the timesteps, of these images under classes of a group (P,).

        A group is always read on its own, so that groups that arrive later cannot change even the
        rounding of an earlier one.
        """
        timesteps = len(self.times_T)
        errors_N = self.clean_BZhw.new_empty(len(image_P) * timesteps)
        size = max(1, max_tokens // model.trunk(group).tokens)
        for first in range(0, len(errors_N), size):
            last = min(first + size, len(errors_N))
            row_N = torch.arange(first, last, device=errors_N.device)
            pair_N, step_N = row_N // timesteps, row_N % timesteps
            image_N, times_N = image_P[pair_N], self.times_T[step_N]
            clean, noise = self.clean_BZhw[image_N], self.noise_BTZhw[image_N, step_N]
            noised = self.noising.noised(clean, noise, times_N)
            predicted = model.predictions(noised, times_N, label_P[pair_N], group)
            missed = predicted - self.noising.target(clean, noise)
            errors_N[first:last] = missed.square().flatten(1).sum(1)
        return errors_N.view(-1, timesteps).sum(1)
