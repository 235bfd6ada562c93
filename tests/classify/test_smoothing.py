"""Copies of an image: each its own, and none that depends on the images beside it."""

import torch

from cil.classify.smoothing import image_seeds, noisy_copies, varied_copies


def test_a_seed_is_the_pixels():
    images = torch.randn(3, 2, 4, 4)
    seeds = image_seeds(images)
    assert len(set(seeds)) == 3
    assert image_seeds(images[1:]) == seeds[1:]
    assert image_seeds(images.to(memory_format=torch.channels_last)) == seeds


def test_noise_is_the_images_own():
    latents = torch.randn(5, 4, 3, 3)
    seeds = image_seeds(torch.randn(5, 1, 6, 6))
    copies = noisy_copies(latents, seeds, samples=3, sigma=0.2)
    assert len(copies) == 3
    assert torch.equal(copies[0], latents)
    assert torch.equal(noisy_copies(latents[2:3], seeds[2:3], 3, sigma=0.2), copies[:, 2:3])
    noise = copies[1:] - latents
    assert 0.1 < noise.std() < 0.3
    assert not torch.allclose(noise[0], noise[1])
    assert not torch.allclose(noise[0, 0], noise[0, 1])


def test_variations_are_the_images_own():
    images = torch.randn(5, 2, 4, 4)
    seeds = image_seeds(images)

    def vary(image):
        return image + torch.rand(())

    copies = varied_copies(images, seeds, 3, vary)
    assert copies.shape == (3, 5, 2, 4, 4)
    assert torch.equal(copies[0], images)
    assert torch.equal(varied_copies(images[2:3], seeds[2:3], 3, vary), copies[:, 2:3])
    moved = (copies[1:] - images).mean((2, 3, 4))
    assert len(moved.flatten().unique()) == 10
