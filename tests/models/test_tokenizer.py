"""The tokenizer against a slow re-computation, on real digits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cil.models.tokenizer import MultiScaleTokenizer

SCALES = (1, 2, 3, 4)
# argmin over numpy.linspace(1/12, 11/12, 4) of the distance to k/9; 2/9 and 7/9 lie half-way.
PUBLISHED = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.fixture
def tokenizer(shake) -> MultiScaleTokenizer:
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(
        image_channels=1,
        channels=8,
        multipliers=(1, 1),
        residual_blocks=1,
        latent_channels=4,
        vocabulary=12,
        scales=SCALES,
        phis=4,
    )
    shake(tokenizer, amount=0.1)
    return tokenizer


def area(x_ZHW: Tensor, size: int) -> Tensor:
    """Means over the windows of adaptive average pooling, one cell at a time."""
    side = x_ZHW.shape[-1]
    edges = [(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]
    rows = [[x_ZHW[:, a:b, c:d].mean((1, 2)) for c, d in edges] for a, b in edges]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, which bicubic interpolation uses."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def bicubic(x_Zpp: Tensor, size: int) -> Tensor:
    p = x_Zpp.shape[-1]
    weights = torch.zeros(size, p)
    for i in range(size):
        centre = (i + 0.5) * p / size - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(j, 0), p - 1)] += cubic(centre - j)
    return torch.einsum("ip,jq,zpq->zij", weights, weights, x_Zpp)


def plain_quantise(tokenizer: MultiScaleTokenizer, f_Zhw: Tensor) -> tuple[list, Tensor, list]:
    """Algorithm 1 of the paper for one image: tokens, latents, latents after every scale."""
    codes, h = tokenizer.codebook, SCALES[-1]
    tokens, f_hat, running = [], torch.zeros_like(f_Zhw), []
    for k, p in enumerate(SCALES):
        residual = area(f_Zhw - f_hat, p)
        looked_up = torch.zeros(len(f_Zhw), p, p)
        for row in range(p):
            for column in range(p):
                distances = [((residual[:, row, column] - c) ** 2).sum().item() for c in codes]
                tokens.append(distances.index(min(distances)))
                looked_up[:, row, column] = codes[tokens[-1]]
        x = bicubic(looked_up, h)
        conv = tokenizer.phis[k].conv  # four scales and four phis: each its own
        f_hat = f_hat + 0.5 * x + 0.5 * functional.conv2d(x, conv.weight, conv.bias, padding=1)
        running.append(f_hat)
    return tokens, f_hat, running


@pytest.mark.parametrize("image", [0, 25])
@torch.no_grad()
def test_quantisation_is_the_papers(tokenizer, tiny_images, image):
    latents = tokenizer.encode(tiny_images[[0, image, 30]])
    latents = latents * 1.5 / latents.std()  # so that codes differ from place to place
    tokens, summed, running = plain_quantise(tokenizer, latents[1])
    quantised = tokenizer.quantise(latents)
    assert len(set(tokens)) > 4
    assert quantised.tokens_BL[1].tolist() == tokens
    torch.testing.assert_close(quantised.straight_through()[1], summed, atol=1e-5, rtol=1e-5)

    inputs = [area(running[k - 1], p) for k, p in enumerate(SCALES) if k > 0]
    expected = torch.cat([x.flatten(1).T for x in inputs])
    for inputs_BLZ in (tokenizer.var_input(quantised.tokens_BL), quantised.inputs_BLZ):
        torch.testing.assert_close(inputs_BLZ[1], expected, atol=1e-5, rtol=1e-5)

    # Commitment of the encoder 0.25, of phi 1: without gradients they are one and the same error.
    one = tokenizer.quantise(latents[1:2])
    errors = torch.stack([((latents[1] - f) ** 2).mean() for f in running])
    torch.testing.assert_close(one.loss(0.25), 1.25 * errors.mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_latents_of_tokens_are_those_of_quantisation(tokenizer, tiny_images):
    quantised = tokenizer.quantise(tokenizer.encode(tiny_images))
    *_, last = tokenizer.partial_latents(quantised.tokens_BL)
    torch.testing.assert_close(last, quantised.straight_through())
    assert torch.equal(tokenizer.tokenize(tiny_images), quantised.tokens_BL)
    with torch.autocast("cpu", torch.bfloat16):  # the same tokens in whatever precision
        assert torch.equal(tokenizer.tokenize(tiny_images), quantised.tokens_BL)
        assert torch.equal(tokenizer.var_input(quantised.tokens_BL), quantised.inputs_BLZ)
    assert tokenizer.tokens == quantised.tokens_BL.shape[1] == 1 + 4 + 9 + 16


@torch.no_grad()
def test_matches_are_the_tokens_of_the_vectors(tokenizer, tiny_images):
    quantised = tokenizer.quantise(tokenizer.encode(tiny_images))
    distances = torch.cdist(quantised.pooled_NZ, tokenizer.codebook)
    assert torch.equal(distances.argmin(1), quantised.matches_N)
    images = len(tiny_images)
    per_scale = quantised.matches_N.split([images * p * p for p in SCALES])
    tokens = torch.cat([matches.view(images, -1) for matches in per_scale], 1)
    assert torch.equal(tokens, quantised.tokens_BL)


def test_reconstruction_reaches_the_encoder_straight_through(tokenizer, tiny_images):
    latents = tokenizer.encode(tiny_images[:4]).detach().requires_grad_(True)
    quantised = tokenizer.quantise(latents)
    target = torch.randn_like(latents)
    gradient = torch.autograd.grad((quantised.straight_through() * target).sum(), latents)[0]
    assert torch.equal(gradient, target)  # as if quantisation were the identity

    images = tokenizer.decode_latents(
        tokenizer.quantise(tokenizer.encode(tiny_images)).straight_through()
    )
    (images - tiny_images).square().mean().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert tokenizer.codebook.grad is None
    assert all(phi.conv.weight.grad is None for phi in tokenizer.phis)


def test_who_learns_from_which_loss(tokenizer, tiny_images):
    quantised = tokenizer.quantise(tokenizer.encode(tiny_images[:8]))
    quantised.loss(0.25).backward()
    assert tokenizer.codebook.grad is None
    assert not tokenizer.codebook.requires_grad
    assert all(phi.conv.weight.grad.abs().sum() > 0 for phi in tokenizer.phis)
    assert all(p.grad.abs().sum() > 0 for p in tokenizer.encoder.conv_in.parameters())
    assert all(p.grad is None for p in tokenizer.decoder.parameters())


def test_commitment_weighs_only_the_encoders_side(tokenizer, tiny_images):
    latents = tokenizer.encode(tiny_images[:2]).detach().requires_grad_(True)
    tokenizer.quantise(latents).loss(0.25).backward()
    with torch.no_grad():
        running = list(tokenizer.partial_latents(tokenizer.tokenize(tiny_images[:2])))
        errors = [2 * (latents - f) / latents.numel() for f in running]
        expected = 0.25 * torch.stack(errors).mean(0)
    torch.testing.assert_close(latents.grad, expected)


def test_ten_scales_share_four_phis_as_published():
    tokenizer = MultiScaleTokenizer(
        channels=4, multipliers=(1, 1), residual_blocks=1, latent_channels=2, vocabulary=2
    )
    assert tokenizer.phi_of_scale == PUBLISHED
    with torch.no_grad():
        for i, phi in enumerate(tokenizer.phis):
            phi.conv.weight.zero_()
            phi.conv.bias.fill_(2.0 * i)
        tokenizer.codebook.zero_()
    for k, p in enumerate(tokenizer.scales):
        used = tokenizer.detail(torch.zeros(1, p * p, dtype=torch.long), k).unique()
        assert used.tolist() == [PUBLISHED[k]]


def test_one_phi_serves_all_scales():
    tokenizer = MultiScaleTokenizer(
        channels=4, multipliers=(1, 1), residual_blocks=1, latent_channels=2, vocabulary=2, phis=1
    )
    assert tokenizer.phi_of_scale == [0] * 10


@torch.no_grad()
def test_decoded_images_have_the_images_shape_and_range(tokenizer, tiny_images):
    tokens = tokenizer.tokenize(tiny_images[:5])
    images = tokenizer.decode(tokens)
    assert images.shape == (5, 1, 8, 8)
    assert tokenizer.image_size == 8
    *_, latents = tokenizer.partial_latents(tokens)
    torch.testing.assert_close(images, tokenizer.decode_latents(latents).clamp(-1, 1))
    tokenizer.decoder.conv_out.weight.mul_(100)  # far outside of the range without a clamp
    images = tokenizer.decode(tokens)
    assert (images.min(), images.max()) == (-1, 1)


@torch.no_grad()
def test_an_image_has_its_tokens_whatever_the_batch(tokenizer, tiny_images):
    together = tokenizer.tokenize(tiny_images)
    alone = torch.cat([tokenizer.tokenize(image[None]) for image in tiny_images])
    assert torch.equal(together, alone)
    assert len(together.unique(dim=0)) > 20
