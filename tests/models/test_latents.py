"""Latents: units of their own spread, and the way back to images."""

import torch

from cil.methods.var_parts import build_tokenizer
from cil.models.latents import Latents

MEAN, STD = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.1])


def test_pixels_come_back_as_they_were():
    latents = Latents(None, 2, 4)
    images = torch.rand(3, 2, 4, 4) * 2 - 1
    assert torch.equal(latents.encode(images), images)  # no units yet
    latents.standardise(MEAN, STD)
    encoded = latents.encode(images)
    torch.testing.assert_close(encoded[:, 1], (images[:, 1] + 1) / 0.1)
    torch.testing.assert_close(latents.decode(encoded), images)
    assert latents.decode(100 * torch.ones(1, 2, 4, 4)).max() == 1


def test_a_channel_that_never_changes_is_no_trouble():
    latents = Latents(None, 2, 4)
    latents.standardise(MEAN, torch.tensor([0.0, 1.0]))
    assert latents.encode(MEAN[:, None, None].expand(1, 2, 4, 4)).isfinite().all()


def test_latents_are_those_before_quantisation(tiny_tokenizer_config, tiny_images, shake):
    tokenizer = build_tokenizer(tiny_tokenizer_config, 1).eval()
    shake(tokenizer)
    latents = Latents(tokenizer, 4, 4)
    raw = tokenizer.encode(tiny_images)
    latents.standardise(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    found = latents.encode(tiny_images)
    assert found.shape == (40, *latents.shape)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(4))
    images = tokenizer.decode_latents(raw).clamp(-1, 1)
    torch.testing.assert_close(latents.decode(found), images, atol=1e-4, rtol=0)
