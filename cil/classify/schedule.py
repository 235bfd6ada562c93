"""Which classes are scored on which scales and how often, and what that costs (2510.12060).

The same for the diffusion classifier, whose stages read timesteps (2303.16203).

Shapes: D width, C classes, L tokens, p_k side of scale k.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cil.errors import UserError
from cil.models.dit import DiT
from cil.models.noising import TIMES
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import VAR


@dataclass(frozen=True)
class Stage:
    """Score the classes left, then keep the best `keep` of them that are near the very best.

    An image with a single class left is decided: no further stage reads it.
    """

    scales: int  # the first so many scales
    samples: int  # copies of the image whose log-likelihoods are averaged, the clean one counted
    keep: int
    margin: float = math.inf  # nats that a class may lie below the best


Schedule = Sequence[Stage]
_ALL = 2**31  # classes that a stage may keep: as many as there are


def schedule(name: str, scales: int, samples: int) -> tuple[Stage, ...]:
    """The schedule of that name for a model of so many scales; its last stage takes `samples`.

    varc: every class on every scale. a_varc: every class on the first 6 of 10 scales (as large a
    share of other numbers of scales), the best 10 on all, the best 3 of those on several copies
    (three as published).

    Raises:
        UserError: no schedule has that name.
    """
    first = max(1, round(0.6 * scales))
    named = {
        "varc": (Stage(scales, samples, 1),),
        "a_varc": (Stage(first, 1, 10), Stage(scales, 1, 3), Stage(scales, samples, 1)),
    }
    if name not in named:
        raise UserError(f"there is no schedule {name}: choose {' or '.join(named)}.")
    return named[name]


@dataclass(frozen=True)
class Timesteps:
    """Score the classes left at so many timesteps more, then keep the best `keep`.

    An image with a single class left is decided: no further stage reads it.
    """

    timesteps: int
    keep: int


def diffusion_schedule(wanted: str | Sequence[Sequence[int]]) -> tuple[Timesteps, ...]:
    """The stages of that name, or those listed as [timesteps, classes kept].

    dc_25: every class at 25 timesteps. dc_25_250: then the best five at 225 more (2303.16203).

    Raises:
        UserError: no schedule has that name, the list is none of such pairs, or a stage is to keep
            more classes than the one before it leaves.
    """
    named: dict[str, Sequence[Sequence[int]]] = {
        "dc_25": [[25, 1]],
        "dc_25_250": [[25, 5], [225, 1]],
    }
    listed = named.get(wanted, []) if isinstance(wanted, str) else wanted
    whole = isinstance(listed, list | tuple) and listed and all(map(_is_pair, listed))
    if not whole or sum(stage[0] for stage in listed) > TIMES:
        raise UserError(
            f"{wanted} is no schedule of timesteps: choose {' or '.join(named)}, or a list of "
            f"[timesteps, classes kept], at most {TIMES} timesteps in all."
        )
    for (_, left), (_, keep) in itertools.pairwise(listed):
        if keep > left:
            raise UserError(
                f"{wanted} is no schedule of timesteps: a stage keeps {keep} classes, but the one "
                f"before it leaves {left}; let every stage keep as many as that or fewer."
            )
    return tuple(Timesteps(timesteps, keep) for timesteps, keep in listed)


def _is_pair(stage: object) -> bool:
    """Whether it is two whole numbers of 1 or more; lists from a command line may hold anything."""
    pair = isinstance(stage, list | tuple) and len(stage) == 2
    return pair and all(type(number) is int and number >= 1 for number in stage)  # type: ignore[attr-defined]


def adaptive(margins_K: Sequence[float], samples: int) -> tuple[Stage, ...]:
    """Prune after every scale by the margin of the posterior; `fit_margins` finds the margins.

    Further copies are read of the images that the clean one does not decide.

    Raises:
        ValueError: there are no margins.
    """
    if not margins_K:
        raise ValueError("there are no margins yet: fit them on held-out images")
    stages = tuple(Stage(k + 1, 1, _ALL, margin) for k, margin in enumerate(margins_K))
    return (*stages, Stage(len(margins_K), samples, 1)) if samples > 1 else stages


def fit_margins(
    values_BCK: Tensor,
    labels_B: Tensor,
    final_BC: Tensor | None = None,
    tolerance: float = 0.005,
) -> list[float]:
    """The margins after each scale that drop the true class of few held-out images.

    values_BCK are weighted log-likelihoods of every class and scale, final_BC the scores that
    decide in the end (their sum, unless more copies are read). Of the images that these classify
    rightly at most the share `tolerance` is lost, with the same quantile of what they need at every
    scale. No margin is below -log(tolerance), so that few or easy images do not drop a class that
    is still likely.

    Raises:
        ValueError: tolerance is not between 0 and 1.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}: give a share between 0 and 1")
    partial_BCK = values_BCK.double().cumsum(-1)
    final_BC = partial_BCK[..., -1] if final_BC is None else final_BC
    right_B = final_BC.argmax(1) == labels_B
    partial_BCK, labels_B = partial_BCK[right_B], labels_B[right_B]
    own_BK = partial_BCK[torch.arange(len(labels_B)), labels_B]
    needed_BK = partial_BCK.amax(1) - own_BK
    floor = -math.log(tolerance)
    if not len(needed_BK):
        return [math.inf] * values_BCK.shape[-1]
    # An image is lost if its rank at any scale lies above the quantile.
    ordered_KB = needed_BK.T.sort(1).values.contiguous()
    ranks_KB = torch.searchsorted(ordered_KB, needed_BK.T.contiguous(), right=True)
    worst_B = ranks_KB.amax(0).sort().values
    # The quantile with its correction for few images (as in conformal prediction).
    rank = min(len(worst_B), math.ceil((1 - tolerance) * (len(worst_B) + 1)))
    level = int(worst_B[rank - 1])
    return [max(float(needed), floor) for needed in ordered_KB[:, level - 1]]


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates to classify one image."""

    layers: float  # in linear layers and convolutions: what the literature counts
    attention: float  # in the products of queries with keys and of weights with values

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.layers + other.layers, self.attention + other.attention)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.layers - other.layers, self.attention - other.attention)

    def times(self, count: float) -> "Cost":
        return Cost(count * self.layers, count * self.attention)


def cost(
    stages: Schedule,
    trunk: VAR,
    classes: int,
    tokenizer: MultiScaleTokenizer | None = None,
    cached: bool = True,
    reads: Sequence[float] | None = None,
    encodings: int = 1,
) -> Cost:
    """What classifying one image among `classes` costs, the encoder included if one is given.

    The image is encoded so many times: once for copies of its latents, for each of copies of the
    image itself.

    `reads`, where given, is the mean number of classes that each stage read; without it every stage
    is taken to keep as many as it may.

    With `cached` False every stage starts from nothing, as in the authors' code; with True it reads
    on where the stage before it stopped, and scores no copy of the image twice.
    """
    total = Cost(0.0, 0.0) if tokenizer is None else encoder_cost(tokenizer).times(encodings)
    read: list[int] = []  # how many scales of each copy the cache holds, for all classes left
    for number, stage in enumerate(stages):
        left = classes if reads is None else reads[number]
        if number and left <= 1 and reads is None:  # decided
            break
        for copy in range(stage.samples):
            before = read[copy] if cached and copy < len(read) else 0
            common = common_cost(trunk, stage.scales) - common_cost(trunk, before)
            own = class_cost(trunk, stage.scales) - class_cost(trunk, before)
            if 0 < before < stage.scales:  # what the class modulates is projected anew
                own += Cost(_modulation_macs(trunk), 0.0)
            total += common + own.times(left)
            read[copy : copy + 1] = [max(before, stage.scales)]
        classes = min(classes, stage.keep)
    return total


def diffusion_cost(
    stages: Sequence[Timesteps],
    trunk: DiT,
    classes: int,
    tokenizer: MultiScaleTokenizer | None = None,
) -> Cost:
    """What the diffusion classifier costs an image, the encoder included if one is given."""
    total = encoder_cost(tokenizer) if tokenizer is not None else Cost(0.0, 0.0)
    for number, stage in enumerate(stages):
        if number and classes <= 1:  # decided
            break
        total += denoising_cost(trunk).times(classes * stage.timesteps)
        classes = min(classes, stage.keep)
    return total


def denoising_cost(trunk: DiT) -> Cost:
    """What one prediction costs: one class at one timestep."""
    once = _macs(trunk.time1) + _macs(trunk.time2) + _macs(trunk.head_adaln)
    layers = once + trunk.tokens * (_macs(trunk.embed) + _macs(trunk.head))
    blocks = [_block_macs(block, trunk.tokens) for block in trunk.blocks]
    attention = 2.0 * trunk.tokens**2 * trunk.width * len(blocks)
    return Cost(layers + sum(blocks), attention)


def common_cost(trunk: VAR, scales: int) -> Cost:
    """What the first `scales` scales cost once an image: nothing if the class enters at once."""
    if not trunk.condition_from or not scales:
        return Cost(0.0, 0.0)
    tokens = _tokens(trunk, scales)
    embedded = (tokens - _tokens(trunk, 1)) * _macs(trunk.embed)
    return Cost(embedded, 0.0) + _blocks_cost(trunk, range(trunk.condition_from), scales)


def class_cost(trunk: VAR, scales: int) -> Cost:
    """What the first `scales` scales cost for every class."""
    if not scales:
        return Cost(0.0, 0.0)
    tokens = _tokens(trunk, scales)
    layers = tokens * _macs(trunk.head) + _macs(trunk.head_adaln)
    if trunk.shared_adaln is not None and trunk.condition_from < len(trunk.blocks):
        layers += _macs(trunk.shared_adaln)
    if not trunk.condition_from:
        layers += (tokens - _tokens(trunk, 1)) * _macs(trunk.embed)
    blocks = range(trunk.condition_from, len(trunk.blocks))
    return Cost(layers, 0.0) + _blocks_cost(trunk, blocks, scales)


def encoder_cost(tokenizer: MultiScaleTokenizer) -> Cost:
    """Encoding one image; counted by torch on tensors without content."""
    with torch.device("meta"):
        image = torch.empty(1, tokenizer.encoder.conv_in.in_channels, *2 * [tokenizer.image_size])
    # A copy of the shapes alone: the weights stay where they are.
    parameters = {n: torch.empty_like(p, device="meta") for n, p in tokenizer.named_parameters()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(_Encode(tokenizer), _prefixed(parameters), image)
    flops = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in flops.items() if "attention" in str(op))
    return Cost((sum(flops.values()) - attention) / 2, attention / 2)


class _Encode(nn.Module):
    def __init__(self, tokenizer: MultiScaleTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, image: Any) -> Any:
        return self.tokenizer.before(self.tokenizer.encoder(image))  # never compiled


def _prefixed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"tokenizer.{name}": value for name, value in parameters.items()}


def _blocks_cost(trunk: VAR, blocks: range, scales: int) -> Cost:
    layers = attention = 0.0
    sides = trunk.scales[:scales]
    ends = [_tokens(trunk, k + 1) for k in range(scales)]
    pairs = sum(p * p * end for p, end in zip(sides, ends, strict=True))
    for block in (trunk.blocks[i] for i in blocks):
        layers += _block_macs(block, ends[-1])
        attention += 2 * pairs * trunk.width
    return Cost(layers, attention)


def _block_macs(block: nn.Module, tokens: int) -> float:
    """Of a block's linear layers; its AdaLN reads the condition and no token."""
    layers: dict[str, nn.Linear] = block.adaptable(everywhere=True)  # type: ignore[operator]
    return sum(_macs(layer) * (1 if name == "adaln" else tokens) for name, layer in layers.items())


def _modulation_macs(trunk: VAR) -> float:
    """Of the layers that read the class and no token."""
    macs = _macs(trunk.head_adaln)
    blocks = list(trunk.blocks)[trunk.condition_from :]
    if trunk.shared_adaln is not None and blocks:
        macs += _macs(trunk.shared_adaln)
    for block in blocks:
        layers: dict[str, nn.Linear] = block.adaptable(everywhere=False)  # type: ignore[operator]
        macs += sum(_macs(layer) for layer in layers.values())
    return macs


def _tokens(trunk: VAR, scales: int) -> int:
    return sum(p * p for p in trunk.scales[:scales])


def _macs(layer: nn.Linear) -> int:
    """Of one row."""
    return layer.in_features * layer.out_features
