"""What learning is said to cost, against what torch counts while it learns, backward included."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cil.config import DiscriminativeConfig
from cil.methods.discriminative import Discriminative
from cil.methods.seeding import seed_all
from cil.methods.var import VARMethod

pytestmark = pytest.mark.integration


def counted(method, experience) -> float:
    """Multiply-accumulates of learning it, forward and backward."""
    seed_all(0, experience.index)
    with FlopCounterMode(display=False) as counter:
        method.learn(experience, lambda *_: None)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["lwf", "slda"])
def test_a_networks(name, tiny_stream, cache) -> None:
    settings = DiscriminativeConfig(epochs=1, backbone_epochs=1, stored_images=30)
    cpu = torch.device("cpu")
    method = Discriminative(name, tiny_stream, settings, cache, device=cpu, show_progress=False)
    real = sum(counted(method, experience) for experience in tiny_stream.experiences[:2])
    # The first layer passes no gradient on to the image: three passes are a little too many.
    assert 0.85 < real / method.size().learning_macs <= 1.02


def test_a_vars(tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache) -> None:
    settings = replace(tiny_var_config, plasticity="trunk", depth=1, first_steps=6, steps=5)
    tokenizer = replace(tiny_tokenizer_config, steps=6)
    method = VARMethod("var", tiny_stream, tokenizer, settings, quiet_cpu, cache)
    real = sum(counted(method, experience) for experience in tiny_stream.experiences[:2])
    assert 0.7 < real / method.size().learning_macs < 1.3
    # What another run finds in the cache counts for it all the same.
    again = VARMethod("var", tiny_stream, tokenizer, settings, quiet_cpu, cache)
    seed_all(0, 0)
    again.learn(tiny_stream.experiences[0], lambda *_: None)
    seed_all(0, 1)
    again.learn(tiny_stream.experiences[1], lambda *_: None)
    restored = VARMethod("var", tiny_stream, tokenizer, settings, quiet_cpu, cache)
    restored.load_state(method.state())
    assert again.size() == method.size() == restored.size()


def test_the_margins_of_an_adaptive_schedule(
    tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache
) -> None:
    """What is read of held-out images to find them, in every copy and under every class."""
    tokenizer = replace(tiny_tokenizer_config, steps=1)
    few = {"plasticity": "trunk", "depth": 1, "first_steps": 1, "steps": 1, "smoothing_samples": 4}
    learned = {}
    for schedule in ("varc", "adaptive"):
        settings = replace(tiny_var_config, schedule=schedule, **few)
        method = VARMethod("var", tiny_stream, tokenizer, settings, quiet_cpu, cache)
        real = sum(counted(method, experience) for experience in tiny_stream.experiences[:2])
        learned[schedule] = (real, method.size().learning_macs)
    real, said = (b - a for a, b in zip(*learned.values(), strict=True))
    assert 0.7 < real / said < 1.3
