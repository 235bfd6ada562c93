"""How important each pixel is for a class, by captum's methods, by TMI and at random.

captum (pip install -e '.[explain]') asks a model for the log-probability of every class on altered
images (occlusion, LIME, KernelSHAP) or for its gradient (saliency, integrated gradients). Gradients
pass the quantiser of a VAR straight through (cil/classify/straight_through.py). What is taken away
becomes the baseline of the deletion. LIME and KernelSHAP take away whole squares of a grid.

A likelihood evaluation is log p(image | class) of one image and class: a VAR's answer on an altered
image takes one for each class, a network's answer counts as one. A gradient counts as three, the
backward pass taking twice the forward pass.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cil.errors import UserError
from cil.explain import PASSES, Explainable, combined, explain, to_pixels
from experiments.finished import BATCH_SIZE, Finished, in_batches

CAPTUM = ("occlusion", "lime", "kernel_shap", "saliency", "integrated_gradients")
# Of pixels, which shows a little of everything, and of a map as coarse as the explanations.
RANDOM = ("random", "random_map")
# Tokens of (image, class) pairs whose activations are kept for one gradient.
CPU_TOKENS, GPU_TOKENS = 2**14, 2**16
GRADIENT = 3  # evaluations that one costs


@dataclass(frozen=True)
class Attribution:
    """importance_BHW of each pixel, and the evaluations that it took an image."""

    importance_BHW: Tensor
    evaluations: float


@dataclass(frozen=True)
class Effort:
    """How much captum's methods may ask."""

    samples: int  # altered images of LIME and KernelSHAP
    steps: int  # of integrated gradients

    def check(self) -> None:
        """Raises UserError where a number is too small for the method."""
        if self.samples < 2 or self.steps < 1:
            raise UserError("--samples must be 2 or more and --steps 1 or more.")


class Model:
    """A finished run's method as captum sees it: images -> log-probabilities of the classes."""

    def __init__(self, run: Finished) -> None:
        self.method, self.device, self.side = run.method, run.device, run.stream.image_size
        self.by_tokens = isinstance(run.method, Explainable)
        self.per_image = run.method.classes_seen if self.by_tokens else 1
        self.answered = 0  # images, gradients counted as GRADIENT
        self.at_once = BATCH_SIZE
        if self.by_tokens:
            tokens = run.method.tokenizer.tokens * run.method.classes_seen
            room = GPU_TOKENS if self.device.type == "cuda" else CPU_TOKENS
            self.at_once = max(1, room // tokens)

    def log_probabilities(self, images: Tensor) -> Tensor:
        """(N, C); of a VAR without smoothing."""
        self.answered += len(images)
        if not self.by_tokens:
            return in_batches(self.method.scores, images).float().log_softmax(1)
        # A copy, as captum may go on with it outside of inference mode.
        scores = in_batches(lambda part: self.method.every_class(part, 1), images)
        return scores.clone().float().log_softmax(1)

    def probabilities(self, images: Tensor) -> Tensor:
        return self.log_probabilities(images).exp()

    def differentiable(self, images: Tensor) -> Tensor:
        """The same with gradients; for few images at a time."""
        self.answered += GRADIENT * len(images)
        scores: Tensor = self.method.differentiable_scores(images)
        return scores.float().log_softmax(1)


def attribute(
    name: str,
    model: Model,
    images: Tensor,
    labels_B: Tensor,
    rivals_B: Tensor,
    baseline: float,
    effort: Effort,
    progress: bool,
) -> Attribution:
    """The importance of each pixel for the labels by the method of this name."""
    if name in ("tmi", "tmi_contrast"):
        return _tmi(name, model, images, labels_B, rivals_B)
    if name in RANDOM:
        side = model.side if name == "random" else squares(model.side)
        seeded = torch.Generator().manual_seed(0)
        drawn = torch.rand(len(images), side, side, generator=seeded)
        return Attribution(to_pixels(drawn, model.side), 0)
    before = model.answered
    shown = Parts(images, labels_B, name, progress)
    importance = _captum(name, model, shown, baseline, effort)
    evaluations = (model.answered - before) / len(images) * model.per_image
    return Attribution(importance.cpu(), evaluations)


class Parts:
    """Images and labels so many at a time, behind a progress bar."""

    def __init__(self, images: Tensor, labels_B: Tensor, title: str, progress: bool) -> None:
        self.images, self.labels_B = images, labels_B
        self.title, self.progress = title, progress

    def of(self, size: int) -> Iterable[tuple[Tensor, Tensor]]:
        parts = list(zip(self.images.split(size), self.labels_B.split(size), strict=True))
        return tqdm(parts, desc=self.title, leave=False, disable=not self.progress)


def _tmi(
    name: str, model: Model, images: Tensor, labels_B: Tensor, rivals_B: Tensor
) -> Attribution:
    parts = zip(*(part.split(BATCH_SIZE) for part in (images, labels_B, rivals_B)), strict=True)
    maps = []
    for part in parts:
        found = explain(model.method, *part).cpu()
        values_BL = found.label_BL if name == "tmi" else found.contrast()
        # Not the heat map, in which all that speaks against is equally unimportant.
        maps.append(to_pixels(combined(values_BL, found.scales), model.side))
    return Attribution(torch.cat(maps), PASSES)


def _captum(name: str, model: Model, shown: Parts, baseline: float, effort: Effort) -> Tensor:
    try:
        from captum import attr
    except ImportError:
        raise UserError(
            "captum is not installed: pip install -e '.[explain]', or leave out its methods with "
            "--methods."
        ) from None
    square = model.side // squares(model.side)
    grid = _grid(model.side, square, shown.images.device)
    if name == "occlusion":
        channels = shown.images.shape[1]
        occlusion = attr.Occlusion(model.log_probabilities)
        options = {
            "sliding_window_shapes": (channels, square, square),
            "strides": (channels, max(1, square // 2), max(1, square // 2)),
            "baselines": baseline,
        }
        # All images lack the same window at a time.
        return _each(shown, BATCH_SIZE, lambda x, y: occlusion.attribute(x, target=y, **options))
    if name in ("lime", "kernel_shap"):
        explainer: Any = (attr.Lime if name == "lime" else attr.KernelShap)(model.log_probabilities)
        options = {
            "baselines": baseline,
            "feature_mask": grid,
            "n_samples": effort.samples,
            "perturbations_per_eval": min(effort.samples, BATCH_SIZE),
        }
        # One regression an image, on squares that are taken away at random, of a fixed seed.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return _each(shown, 1, lambda x, y: explainer.attribute(x, target=y, **options))
    if name == "saliency":
        saliency = attr.Saliency(model.differentiable)
        with warnings.catch_warnings():  # that it asks for the pixels' gradients itself
            warnings.simplefilter("ignore")
            return _each(shown, model.at_once, lambda x, y: saliency.attribute(x, target=y))
    integrated = attr.IntegratedGradients(model.differentiable)
    options = {
        "baselines": baseline,
        "n_steps": effort.steps,
        "internal_batch_size": model.at_once,
    }
    return _each(shown, model.at_once, lambda x, y: integrated.attribute(x, target=y, **options))


def _each(shown: Parts, size: int, call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Attributions (B, channels, H, W) -> the sum over the channels (B, H, W)."""
    return torch.cat([call(x, y).detach().sum(1).cpu() for x, y in shown.of(size)])


def squares(side: int) -> int:
    """Squares a side of the grid that LIME and KernelSHAP take away from: 16 of a digit, else 64.

    A window of occlusion is as large and moves by half of that.
    """
    return max(1, min(8, side // 4))


def _grid(side: int, square: int, device: torch.device) -> Tensor:
    """The number of the square that each pixel lies in (1, 1, side, side)."""
    place = torch.arange(side, device=device).div(square, rounding_mode="floor")
    place = place.clamp_max(squares(side) - 1)
    return (place[:, None] * squares(side) + place)[None, None]
