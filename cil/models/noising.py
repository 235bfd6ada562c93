"""From data to noise and back: the noise schedules of diffusion, and the straight flow.

x_t = a_t x_0 + s_t eps. A model of objective `noise` predicts eps (DDPM, arXiv 2006.11239), one of
objective `flow` the velocity eps - x_0 of the straight path (rectified flow, arXiv 2209.03003).

Shapes: B rows, Z channels, h = w side. Times run from 0 (clean) to 1000 (noise).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

TIMES = 1000  # timesteps of the noise schedules; the flow's time is continuous

Objective = Literal["noise", "flow"]
NoiseSchedule = Literal["linear", "cosine"]


class Noising(nn.Module):
    """How data is noised, what a model predicts of it, and what a prediction means."""

    def __init__(self, objective: Objective, schedule: NoiseSchedule) -> None:
        """`schedule` counts for the objective `noise` alone."""
        super().__init__()
        self.objective = objective
        kept = _linear() if schedule == "linear" else _cosine()
        self.kept_T: Tensor  # a_t^2 after each of the thousand steps; fp64 up to here
        self.register_buffer("kept_T", kept.float(), persistent=False)

    def coefficients(self, times_B: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t, (B, 1, 1, 1) each. A time of -1 (noise) or 0 (flow) has no noise at all."""
        times = times_B[:, None, None, None]
        if self.objective == "flow":
            return 1 - times / TIMES, times / TIMES
        kept = self.kept_T[times.long().clamp_min(0)].where(times >= 0, 1.0)
        return kept.sqrt(), (1 - kept).sqrt()

    def random_times(self, count: int, device: torch.device) -> Tensor:
        """(count,): whole numbers for `noise`, any for `flow`."""
        if self.objective == "flow":
            return TIMES * torch.rand(count, device=device)
        return torch.randint(TIMES, (count,), device=device).float()

    def even_times(self, count: int) -> Tensor:
        """Evenly spaced times (count,), rising: the middles of so many equal parts.

        Raises:
            ValueError: there are no so many timesteps.
        """
        if not 1 <= count <= TIMES:
            raise ValueError(f"count is {count}: give one from 1 to {TIMES}")
        times = (torch.arange(count, dtype=torch.float64) + 0.5) * (TIMES / count)
        return (times if self.objective == "flow" else times.floor()).float()

    def descent(self, steps: int) -> Tensor:
        """Times to sample through (steps + 1,), from nothing but noise to no noise at all."""
        edges = torch.linspace(TIMES, 0, steps + 1, dtype=torch.float64)
        return (edges if self.objective == "flow" else edges.floor() - 1).float()

    def noised(self, clean_BZhw: Tensor, noise_BZhw: Tensor, times_B: Tensor) -> Tensor:
        """x_t."""
        a, s = self.coefficients(times_B)
        return a * clean_BZhw + s * noise_BZhw

    def target(self, clean_BZhw: Tensor, noise_BZhw: Tensor) -> Tensor:
        """What a model learns to predict."""
        return noise_BZhw - clean_BZhw if self.objective == "flow" else noise_BZhw

    def parts(
        self, noised_BZhw: Tensor, predicted_BZhw: Tensor, times_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x_0 and eps as a prediction has them."""
        a, s = self.coefficients(times_B)
        if self.objective == "flow":  # a + s = 1
            return noised_BZhw - s * predicted_BZhw, noised_BZhw + a * predicted_BZhw
        return (noised_BZhw - s * predicted_BZhw) / a, predicted_BZhw


def _linear() -> Tensor:
    """a_t^2 of variances that rise evenly from 1e-4 to 0.02 (DDPM)."""
    return (1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64)).cumprod(0)


def _cosine() -> Tensor:
    """a_t^2 that falls as a squared cosine (arXiv 2102.09672), no variance above 0.999."""
    shares = torch.arange(TIMES + 1, dtype=torch.float64) / TIMES
    level = ((shares + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    return (level[1:] / level[:-1]).clamp_min(0.001).cumprod(0)
