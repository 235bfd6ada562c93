"""Training the tokenizer on real digits: it reconstructs, and its codebook stays in use."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cil.config import TokenizerConfig
from cil.methods.seeding import seed_all
from cil.methods.tokenizer import TokenizerModule
from cil.methods.training import fit
from cil.methods.var_parts import build_tokenizer
from cil.models.tokenizer import MultiScaleTokenizer
from cil.streams.tokens import Views, in_memory, shuffled_images

STEPS = 110
DEAD = slice(0, 12)  # codes that no vector will ever match, at the start


@pytest.fixture(scope="module")
def images(tiny_stream) -> TensorDataset:
    return TensorDataset(*in_memory(Views(tiny_stream.experiences[0].train, 4, seed=0)))


@pytest.fixture(scope="module")
def settings(tiny_tokenizer_config) -> TokenizerConfig:
    return replace(tiny_tokenizer_config, vocabulary=32, steps=STEPS)


@pytest.fixture(scope="module")
def trained(images, settings, quiet_cpu):
    """A tokenizer after a short training that began with a third of its codes far away."""
    seed_all(0)
    tokenizer = build_tokenizer(settings, 1)
    tokenizer.codebook[DEAD] = 100.0
    rows: list[tuple[int, dict[str, float]]] = []
    module = TokenizerModule(tokenizer, lr=settings.lr, steps=STEPS, settings=quiet_cpu)
    fit(
        module,
        shuffled_images(images, settings.batch_size, workers=0),
        steps=STEPS,
        title="tokenizer",
        settings=quiet_cpu,
        log=lambda step, values: rows.append((step, dict(values))),
        batch_key="tokenizer.batch_size",
        first_step=1000,
    )
    return tokenizer.eval(), rows


@torch.no_grad()
def test_nearly_every_code_is_used(trained, images, settings):
    tokenizer, _ = trained
    tokens = tokenizer.tokenize(images.tensors[0])
    assert len(tokens.unique()) > 0.9 * settings.vocabulary


def test_dead_codes_restart_among_the_vectors(trained):
    tokenizer, _ = trained
    assert tokenizer.codebook.abs().max() < 20  # averages alone would leave them at 100


@torch.no_grad()
def test_images_are_reconstructed(trained, images):
    tokenizer, rows = trained
    losses = [values["tokenizer/reconstruction"] for _, values in rows]
    assert losses[-1] < 0.5 * losses[0]
    x = images.tensors[0]
    error = (tokenizer.decode(tokenizer.tokenize(x)) - x).square().mean()
    assert error < 0.5 * (x - x.mean(0)).square().mean()  # better than the mean image


def test_logged_steps_count_from_the_first_step_given(trained):
    _, rows = trained
    assert [step for step, _ in rows] == list(range(1009, 1000 + STEPS, 10))
    assert {name for _, values in rows for name in values} == {
        "tokenizer/reconstruction",
        "tokenizer/commitment",
    }


def plain_average(tokenizer: MultiScaleTokenizer, images: Tensor) -> Tensor:
    """The codebook after one step, one matched vector at a time (decay 0.97, counts from 1)."""
    with torch.no_grad():
        quantised = tokenizer.quantise(tokenizer.encode(images))
    codes = []
    for code, vector in enumerate(tokenizer.codebook):
        matched = [
            v
            for v, m in zip(quantised.pooled_NZ, quantised.matches_N.tolist(), strict=True)
            if m == code
        ]
        total = 0.97 * vector + 0.03 * sum(matched, torch.zeros_like(vector))
        codes.append(total / (0.97 + 0.03 * len(matched)))
    return torch.stack(codes)


def test_a_step_moves_codes_to_the_average_of_what_they_match(images, settings, quiet_cpu):
    seed_all(1)
    tokenizer = build_tokenizer(settings, 1)
    before, expected = tokenizer.codebook.clone(), plain_average(tokenizer, images.tensors[0][:16])
    fit(
        TokenizerModule(tokenizer, lr=settings.lr, steps=1, settings=quiet_cpu),
        DataLoader(TensorDataset(*(t[:16] for t in images.tensors)), batch_size=16),
        steps=1,
        title="tokenizer",
        settings=quiet_cpu,
        log=lambda step, values: None,
        batch_key="tokenizer.batch_size",
    )
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(tokenizer.codebook.data, expected, atol=1e-4, rtol=1e-4)
