"""Images made to be misread: an attack on a finished method, and whether its scores notice it.

`perturbed` is projected gradient descent (Madry et al. 2018, arXiv 1706.06083) as captum has it:
untargeted, no pixel further than eps from where it was (L-infinity), from a random start, in steps
of 2.5 eps / steps along the sign of the gradient. It climbs the log odds against the label, of
which the cross entropy of the scores is the softplus: the signs are the same, but it does not
round to zero where a label is all but certain, as a likelihood of a whole image makes it.

A VAR's scores are log-likelihoods of whole numbers, and what gradients they have are straight
through the quantiser (cil/classify/straight_through.py). That is an approximation, so a VAR that
withstands its own gradients has not been shown to withstand an attack: images that were made
against another method, which need none of its gradients, are the second witness. Gradients are
those of the image alone, without the noisy copies that smoothing adds when it is classified.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cil.config import TrainerConfig
from cil.errors import UserError
from cil.methods.scoring import score
from cil.methods.training import fitting
from cil.ood import WithNull, auroc, familiarity, is_generative
from cil.records import RunView

CLEAN, WHITE_BOX, TRANSFER = "clean", "white box", "transfer"
NOTICED_BY = ("msp", "energy")  # of cil.ood.SCORES
LEVEL = 2 / 255  # one of the 0..255 that a pixel is written with, in images of [-1, 1]

Scores = Callable[[Tensor], Tensor]  # images (B, channels, H, W) -> (B, C), with gradients


@dataclass(frozen=True)
class Budget:
    """How far an attack may go: `eps` in 1/255 of the range of a pixel, each on its own."""

    eps: tuple[float, ...]
    steps: int

    def check(self) -> None:
        """Raises UserError for numbers that nothing can be attacked with."""
        for value in self.eps:
            if not 0 < value <= 255:
                raise UserError(f"--eps is {value:g}: give numbers above 0, up to 255.")
        if self.steps < 1:
            raise UserError(f"--steps is {self.steps}: give 1 or more.")


@dataclass(frozen=True, eq=False)
class Shown:
    """Images (N, channels, H, W) as an attack has left them; eps is 0 of those that are `CLEAN`."""

    attack: str
    eps: float
    images: Tensor


def prepare(method: Any, image: Tensor) -> bool:
    """Freeze the parameters of a method; whether its scores have gradients of an image's pixels.

    image (channels, H, W) is one to try. Those that answer by statistics of classes have none, nor
    has diffusion.
    """
    if not hasattr(method, "differentiable_scores"):
        return False
    if hasattr(method.model, "requires_grad_"):
        method.model.requires_grad_(False)
    pixels = image[None].clone().requires_grad_()
    scores: Tensor = method.differentiable_scores(pixels)
    if not scores.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(scores.sum(), pixels, allow_unused=True)
    return gradient is not None


def log_odds_against(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """log (1 - p) / p of the label under a softmax of the scores (B,)."""
    label_B1 = labels_B[:, None]
    others = scores_BC.scatter(1, label_B1, -torch.inf).logsumexp(1)
    return others - scores_BC.gather(1, label_B1)[:, 0]


def perturbed(
    scores: Scores, images: Tensor, labels_N: Tensor, eps: float, steps: int, at_once: int
) -> Tensor:
    """The images (N, channels, H, W) in [-1, 1], each pixel moved by up to eps / 255 of its range.

    Of one seed and not rounded to 256 levels. `at_once` images are attacked at a time; another
    number of them starts elsewhere.

    Raises:
        UserError: captum is not installed, or the GPU's memory is too small.
    """
    try:
        from captum.robust import PGD
    except ImportError:
        raise UserError("captum is not installed: pip install -e '.[explain]'.") from None
    attack = PGD(scores, log_odds_against, lower_bound=-1, upper_bound=1)
    size = {"radius": eps * LEVEL, "step_size": 2.5 * eps * LEVEL / steps, "step_num": steps}
    parts = zip(images.split(at_once), labels_N.split(at_once), strict=True)
    free = "free what other programs use of it"
    with fitting("the attack", free), torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # that it asks for the pixels' gradients itself
        made = [attack.perturb(x, target=y, random_start=True, **size) for x, y in parts]
    return torch.cat(made).detach()


def evaluate(
    run: RunView,
    method: Any,
    shown: Iterable[Shown],
    labels_N: Tensor,
    trainer: TrainerConfig,
    done: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """A row of each that is shown: method, seed, attack, eps, accuracy, msp, energy.

    The first must be `CLEAN`; msp and energy are how often a clean image looks more familiar by
    that score (see `cil.ood.familiarity`) than an attacked one, an AUROC: 0.5 is not noticed. A
    method classifies as it does in its run, with its schedule and its smoothing. `done` is called
    after each.
    """
    rows, clean = [], None
    for each in shown:
        accuracy, familiar = _asked(run, method, each.images.cpu(), labels_N.cpu(), trainer)
        row = {"attack": each.attack, "eps": each.eps, "accuracy": accuracy}
        if clean is None:
            clean = familiar
        else:
            row |= {name: auroc(clean[name], familiar[name]) for name in NOTICED_BY}
        rows.append(row)
        done()
    columns = ["attack", "eps", "accuracy", *NOTICED_BY]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    frame.insert(0, "method", run.method)
    frame.insert(1, "seed", run.seed)
    return frame


def _asked(
    run: RunView, method: Any, images: Tensor, labels_N: Tensor, trainer: TrainerConfig
) -> tuple[float, dict[str, Tensor]]:
    """The accuracy, and how familiar each image looks by the scores of `cil.ood` (N,)."""
    dataset = TensorDataset(images, labels_N)
    ((scores_NC, _),) = score(method, [dataset], trainer, f"{run.method} under attack")
    accuracy = (scores_NC.argmax(1) == labels_N).double().mean().item()
    if is_generative(run):  # no class left out, no scale weighted, no copies
        ((both, _),) = score(WithNull(method), [dataset], trainer, f"{run.method} log p(x)")  # type: ignore[arg-type]
        scores_NC = both[:, :-1]
    return accuracy, familiarity(scores_NC.float())
