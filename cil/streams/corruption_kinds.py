"""What each corruption of ImageNet-C does to an image (see `cil.streams.corruptions`).

Shapes: images (H, W, C), floats in [0, 1], H = W the side, C channels. `scale` is what lengths in
pixels are multiplied by; what leaves [0, 1] is cut off by the caller.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float64]
Random = np.random.Generator


def to_bytes(image: Image) -> NDArray[np.uint8]:
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


# --- noise ---


def gaussian_noise(image: Image, random: Random, scale: float, sigma: float) -> Image:
    return image + random.normal(0, sigma, image.shape)


def shot_noise(image: Image, random: Random, scale: float, photons: float) -> Image:
    """`photons` reach a white pixel on average."""
    return random.poisson(image * photons) / photons


def impulse_noise(image: Image, random: Random, scale: float, share: float) -> Image:
    """Half of the values that are hit become 0, the others 1."""
    drawn = random.random(image.shape)
    return np.where(drawn < share / 2, 0.0, np.where(drawn > 1 - share / 2, 1.0, image))


# --- blur ---


def defocus_blur(image: Image, random: Random, scale: float, radius: float, alias: float) -> Image:
    """Every point becomes a disc, whose rim is softened by `alias` pixels."""
    from scipy.ndimage import convolve, gaussian_filter

    radius, parts = radius * scale, 9  # so many points a pixel and direction
    reach = int(np.ceil(radius)) + 2
    points = (np.arange((2 * reach + 1) * parts) + 0.5) / parts - reach - 0.5
    inside = points[:, None] ** 2 + points**2 <= radius**2
    disc = inside.reshape(2 * reach + 1, parts, 2 * reach + 1, parts).mean((1, 3))
    disc = gaussian_filter(disc / disc.sum(), alias * scale, mode="constant")
    blurred: Image = convolve(image, disc[:, :, None], mode="mirror")
    return blurred


def glass_blur(
    image: Image, random: Random, scale: float, sigma: float, reach: int, rounds: int
) -> Image:
    """Pixels change places with others at most `reach` away, between two light blurs."""
    reach = max(1, round(reach * scale))
    image = _smooth(image, sigma * scale)
    places = np.arange(image.shape[0] * image.shape[1]).reshape(image.shape[:2])
    for _ in range(rounds):
        _swap(places, random, reach)
    return _smooth(image.reshape(-1, image.shape[2])[places], sigma * scale)


def _swap(places: NDArray[np.int64], random: Random, reach: int) -> None:
    """Swap each place with one at -reach to reach - 1 from it, in both directions.

    All whose neighbourhoods do not meet take their turn together.
    """
    step, (height, width) = 2 * reach, places.shape
    for top, left in np.ndindex(step, step):
        rows = np.arange(reach + top, height - reach, step)[:, None]
        columns = np.arange(reach + left, width - reach, step)[None]
        offsets = random.integers(-reach, reach, (2, rows.size, columns.size))
        here, there = (rows, columns), (rows + offsets[0], columns + offsets[1])
        places[here], places[there] = places[there].copy(), places[here].copy()


def motion_blur(image: Image, random: Random, scale: float, radius: float, sigma: float) -> Image:
    return _dragged(image, random.uniform(-45, 45), radius * scale, sigma * scale)


def zoom_blur(image: Image, random: Random, scale: float, most: float, step: float) -> Image:
    """The mean of the image and of it enlarged about its middle, from 1 up to below `most`."""
    factors = np.arange(1, most, step)
    total = image.copy()
    for factor in factors:
        total += _enlarged(image, factor)
    zoomed: Image = total / (len(factors) + 1)
    return zoomed


# --- weather ---


def snow(
    image: Image,
    random: Random,
    scale: float,
    mean: float,
    spread: float,
    flake: float,
    least: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Image:
    """Flakes of some pixels, driven by wind, over an image that is paler by 1 - `kept`."""
    drawn = random.normal(mean, spread, (*image.shape[:2], 1))
    layer = _enlarged(drawn, max(1.0, flake * scale))
    layer = np.clip(np.where(layer < least, 0, layer), 0, 1)
    layer = _dragged(layer, random.uniform(-135, -45), radius * scale, sigma * scale)
    pale = np.maximum(image, _grey(image) * 1.5 + 0.5)
    return kept * image + (1 - kept) * pale + layer + np.rot90(layer, 2)


def frost(image: Image, random: Random, scale: float, kept: float, ice: float) -> Image:
    """`ice` times a picture of frost is laid over it.

    The paper's are photographs, which are not ours to ship: veins along the contour lines of
    fractals here, the stronger the closer.
    """
    veins = [np.abs(2 * _fractal(len(image), 1.7, random) - 1) for _ in range(3)]
    white = np.exp(-12 * np.minimum.reduce(veins)) * 0.8 + 0.35 * _fractal(len(image), 2, random)
    tint = np.array([0.82, 0.92, 1.0] if image.shape[2] == 3 else [0.91])
    return kept * image + ice * np.clip(white, 0, 1)[:, :, None] * tint


def fog(image: Image, random: Random, scale: float, strength: float, decay: float) -> Image:
    brightest = image.max()
    foggy = image + strength * _fractal(len(image), decay, random)[:, :, None]
    faded: Image = foggy * brightest / (brightest + strength)
    return faded


def brightness(image: Image, random: Random, scale: float, more: float) -> Image:
    """More of V in HSV: all channels grow by the factor by which the largest does."""
    value = image.max(2, keepdims=True)
    brighter = np.clip(value + more, 0, 1)
    return np.where(value > 0, image * brighter / np.maximum(value, 1e-9), brighter)


# --- digital ---


def contrast(image: Image, random: Random, scale: float, kept: float) -> Image:
    means: Image = image.mean((0, 1), keepdims=True)
    return (image - means) * kept + means


def elastic_transform(
    image: Image, random: Random, scale: float, push: float, width: float, corners: float
) -> Image:
    """A random affine map, then every pixel pushed, neighbours alike; all as shares of the side.

    Three points of a square in the middle move by up to `corners`; `width` is that of the Gaussian
    which smooths the pushes.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    side = len(image)
    middle, third = side // 2, side // 3
    points = np.array([[1, 1], [1, -1], [-1, -1]]) * third + middle
    moved = points + random.uniform(-corners * side, corners * side, points.shape)
    back = np.linalg.solve(np.c_[moved, np.ones(3)], points.astype(float))  # (3, 2)
    drawn = random.uniform(-1, 1, (2, side, side))
    pushes = [gaussian_filter(d, width * side, truncate=3) * push * side for d in drawn]
    rows, columns = np.mgrid[:side, :side] + np.stack(pushes)
    source = np.stack([rows, columns, np.ones_like(rows)], -1) @ back
    layers = [
        map_coordinates(layer, source.transpose(2, 0, 1), order=1, mode="mirror")
        for layer in image.transpose(2, 0, 1)
    ]
    return np.stack(layers, -1)


def pixelate(image: Image, random: Random, scale: float, share: float) -> Image:
    from PIL import Image as Pictures

    side, coarse = len(image), max(1, int(len(image) * share))
    box = Pictures.Resampling.BOX
    return _picture(_as_picture(image).resize((coarse, coarse), box).resize((side, side), box))


def jpeg_compression(image: Image, random: Random, scale: float, quality: int) -> Image:
    from PIL import Image as Pictures

    file = io.BytesIO()
    _as_picture(image).save(file, "JPEG", quality=quality)
    return _picture(Pictures.open(file))


# --- what several of them do ---


def _enlarged(image: Image, factor: float) -> Image:
    """About its middle, cut to the same size."""
    from scipy.ndimage import affine_transform

    first = (len(image) - 1) / 2 * (1 - 1 / factor)
    layers = [
        affine_transform(layer, [1 / factor] * 2, first, order=1, mode="nearest")
        for layer in image.transpose(2, 0, 1)
    ]
    return np.stack(layers, -1)


def _smooth(image: Image, sigma: float) -> Image:
    from scipy.ndimage import gaussian_filter

    smoothed: Image = gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
    return smoothed


def _dragged(image: Image, degrees: float, radius: float, sigma: float) -> Image:
    """Motion blur: half a Gaussian along a line of 2 radius + 1 pixels, as ImageMagick has it."""
    steps = np.arange(2 * max(1, round(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    steps, weights = steps[weights > 1e-4], weights[weights > 1e-4]
    angle = np.deg2rad(degrees)
    down, right = (np.round(steps * f(angle)).astype(int) for f in (np.sin, np.cos))
    height, width, _ = image.shape
    blurred = np.zeros_like(image)
    for y, x, weight in zip(down, right, weights / weights.sum(), strict=True):
        rows = np.clip(np.arange(height) + y, 0, height - 1)
        columns = np.clip(np.arange(width) + x, 0, width - 1)
        blurred += weight * image[rows[:, None], columns]
    return blurred


def _fractal(side: int, decay: float, random: Random) -> Image:
    """A plasma fractal (side, side) from 0 to 1 by the diamond-square algorithm.

    The random part of a height falls by `decay` squared from one grid to the next finer one.
    """
    size = 1 << (side - 1).bit_length()
    heights, step, height = np.zeros((size, size)), size, 1.0

    def mean(corners: Sequence[Image]) -> Image:
        around: Image = sum(corners) / 4  # type: ignore[assignment]
        return around + random.uniform(-height, height, around.shape)

    while step >= 2:
        half = step // 2
        coarse = heights[::step, ::step]
        below = np.roll(coarse, -1, 0)
        middles = mean([coarse, below, np.roll(coarse, -1, 1), np.roll(below, -1, 1)])
        heights[half::step, half::step] = middles
        heights[::step, half::step] = mean(
            [coarse, np.roll(coarse, -1, 1), middles, np.roll(middles, 1, 0)]
        )
        heights[half::step, ::step] = mean([coarse, below, middles, np.roll(middles, 1, 1)])
        step, height = half, height / decay**2
    heights -= heights.min()
    scaled: Image = (heights / max(heights.max(), 1e-12))[:side, :side]
    return scaled


def _grey(image: Image) -> Image:
    """(H, W, 1): the brightness that eyes see (ITU-R BT.601)."""
    weights = [0.299, 0.587, 0.114] if image.shape[2] == 3 else [1.0]
    return (image @ np.array(weights))[:, :, None]


def _as_picture(image: Image) -> Any:
    from PIL import Image as Pictures

    values = to_bytes(image)
    return Pictures.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def _picture(picture: Any) -> Image:
    values = np.asarray(picture, np.float64) / 255
    return values.reshape(*values.shape[:2], -1)
