"""How near drawn images come to real ones in some feature space: FID, precision and recall.

Shapes: N real images, M drawn ones, D features.
"""

import warnings

import torch
from torch import Tensor, nn

from cil.errors import UserError

NEIGHBOURS = 3  # k of precision and recall, as in their paper
ROWS = 2048  # distances are taken from so many images at a time


class _Given(nn.Module):
    """Takes the place of the Inception network: the features are there already."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features_BD: Tensor) -> Tensor:
        return features_BD


def frechet_distance(real_ND: Tensor, drawn_MD: Tensor) -> float:
    """Frechet distance of the Gaussians with the features' means and covariances, in 64 bits.

    FID (arXiv 1706.08500, equation 6), which takes Inception's features, by torchmetrics. With few
    images it comes out too large: compare numbers of as many images only.

    Raises:
        UserError: a side has fewer than two images.
    """
    _check(real_ND, drawn_MD, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics says at each start that it keeps features
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(_Given(real_ND.shape[1]))
    metric.update(real_ND.double().cpu(), real=True)
    metric.update(drawn_MD.double().cpu(), real=False)
    return max(float(metric.compute()), 0.0)  # of equal sets it rounds to below zero


def precision_recall(real_ND: Tensor, drawn_MD: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, equation 2).

    Precision: the share of drawn images within the balls around real ones that reach to their k-th
    nearest real neighbour; recall: of real images within such balls around drawn ones.

    Raises:
        UserError: a side has no more than k images.
    """
    _check(real_ND, drawn_MD, k + 1)
    real_ND, drawn_MD = real_ND.double(), drawn_MD.double()
    return _share_within(drawn_MD, real_ND, k), _share_within(real_ND, drawn_MD, k)


def _share_within(points_MD: Tensor, centres_ND: Tensor, k: int) -> float:
    """The share of the points in at least one ball around a centre."""
    radii = []
    for first in range(0, len(centres_ND), ROWS):
        distances_RN = torch.cdist(centres_ND[first : first + ROWS], centres_ND)
        rows = torch.arange(len(distances_RN))
        distances_RN[rows, first + rows] = torch.inf  # none is a neighbour of itself
        radii.append(distances_RN.topk(k, largest=False).values[:, -1])
    radii_N, within = torch.cat(radii), 0
    for part_RD in points_MD.split(ROWS):
        within += int((torch.cdist(part_RD, centres_ND) <= radii_N).any(1).sum())
    return within / len(points_MD)


def _check(real_ND: Tensor, drawn_MD: Tensor, least: int) -> None:
    fewest = min(len(real_ND), len(drawn_MD))
    if fewest < least:
        raise UserError(f"there are {fewest} images to compare: take {least} or more of each kind.")
