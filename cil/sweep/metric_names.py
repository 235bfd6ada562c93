"""The numbers that a sweep may look at, known before a trial has trained.

Some are of some methods alone, which only a finished run of them tells.
"""

import re

from cil.command_line import near
from cil.errors import UserError
from cil.records.layout import MORE_NUMBERS, NUMBERS
from cil.sweep.definition import Definition

SUMMARY = (
    *NUMBERS,
    *MORE_NUMBERS,
    "milliseconds_an_image",
    "likelihood_evaluations",
    "prediction_attention_macs",
)
LOGGED = (
    "cl/accuracy",
    "cl/accumulated_accuracy",
    "cl/classes",
    "cl/milliseconds_an_image",
    "explanations/drift",
    "samples/drift",
    "samples/seconds",
    "train/loss",
    "tokenizer/reconstruction",
    "tokenizer/commitment",
    "tokenizer/codebook_use",
    "var/nats_a_token",
    "cca/loss",
    "cca/nats_apart",
    "diffusion/squared_error",
)
NUMBERED = re.compile(r"cl/accuracy_group\d+|scale_weight_\d+")


def is_known(name: str) -> bool:
    """Whether runs of some method have a number of this name."""
    return name in (*SUMMARY, *LOGGED) or NUMBERED.fullmatch(name) is not None


def check_metric(definition: Definition) -> None:
    """Raises UserError when no run has the number that the sweep looks at."""
    name = definition.metric
    if not is_known(name):
        hint = near(name, (*SUMMARY, *LOGGED)) or f"choose from {', '.join(sorted(NUMBERS))}."
        raise UserError(f"{definition.path} looks at {name}, which no run has: {hint}")
