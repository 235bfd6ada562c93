"""A hundred characters drawn from matplotlib's fonts: real variety anywhere, with no download.

Each image is one character in a random face, size, place, rotation, stroke and colour on a random
background. All of them are drawn once, from one seed, and cached.
"""

import hashlib
import json
import math
import string
import tempfile
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from cil.errors import UserError
from cil.streams.memory_images import MemoryImages
from cil.streams.stream import Source

# Told apart at 32 pixels, in every face, rotated by 20 degrees: of those that differ in size or
# little else (O and 0, l and I, S and 5, Z and 2) there is one at most.
CHARACTERS = (
    "0123456789"
    "ABCDEFGHJKLMNPQRTUVWXY"
    "adefhmnrt"
    "ΓΔΞΣΦΨΩξλμπω"
    "БДЖИШЧЮЯЫ"
    "&@#$%§¶?{"
    "±÷≈∞√∫∇€£¥∀∃⊕∴∵≤≥"
    "←→↑↓↔"
    "♠♥♦♣"
    "♀♂♪"
)
PER_CLASS = (300, 50)  # training and test images

_VERSION = 1  # of the drawings: raise it with every change that moves a pixel
_SEED = 0  # never a setting: every run sees the same images
_FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
_BOLD = {face for face in _FACES if "Bol" in face} | {"cmb10"}  # made no bolder: gaps would close
# Computer Modern's tables put other characters under many codes than those of letters and digits.
_LETTER_FACES = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")
_LETTERS = string.ascii_letters + string.digits

_FINER = 3  # characters are drawn this many times larger than shown
_LONGER = 0.7  # the longer side of a character, before it varies; the image's side is 1
_RIM = 4  # hundredths of the image's side
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])  # of red, green and blue


class Wobble:
    """Rotates, scales and shifts an image a little; what comes in from outside is its reflection.

    Backgrounds differ, so no colour to fill with would leave the image without a rim.
    """

    degrees = 7.0
    scale = 0.08
    shift = 0.05  # of a side

    def __repr__(self) -> str:
        return f"Wobble({self.degrees}, {self.scale}, {self.shift})"

    def __call__(self, image: Tensor) -> Tensor:
        """image (C, H, W) in [-1, 1], H = W -> the same shape and range."""
        turn, scale, right, down = (2 * torch.rand(4) - 1).tolist()
        angle, size = math.radians(self.degrees) * turn, 1 + self.scale * scale
        along, across = math.cos(angle) / size, math.sin(angle) / size
        # In affine_grid's units a side is 2 long.
        affine = torch.tensor(
            [[along, -across, 2 * self.shift * right], [across, along, 2 * self.shift * down]]
        )
        grid = functional.affine_grid(affine[None], [1, *image.shape], align_corners=False)
        moved = functional.grid_sample(
            image[None], grid, padding_mode="reflection", align_corners=False
        )[0]
        return moved.clamp(-1, 1)  # rounding may leave the range by a hair


def glyphs(
    validation: float,
    augment: bool,
    cache: Path,
    image_size: int = 32,
    *,
    per_class: tuple[int, int] = PER_CLASS,
) -> Source:
    """A hundred characters; splits hold images (3, image_size, image_size) and class ids.

    Of each class's `per_class[0]` training images the share `validation` is kept for everything
    that is tuned or fitted; its `per_class[1]` test images are the same for every share. The first
    call takes about a minute; its images are kept in one file below `cache`, some 100 MB.

    Raises:
        UserError: `validation` is not between 0 and 1, the file cannot be
            written, or matplotlib's fonts are not where they belong.
    """
    held_out = _held_out(validation, per_class[0])
    train, test, drawn = _images(cache, image_size, per_class)
    kept = per_class[0] - held_out  # images are drawn independently, so the first are a fair choice
    return Source(
        name="glyphs100",
        class_names=tuple(unicodedata.name(character).lower() for character in CHARACTERS),
        train=_split(train[:, :kept]),
        validation=_split(train[:, kept:]),
        test=_split(test),
        image_size=image_size,
        channels=3,
        content=hashlib.sha256(f"{drawn} {kept}".encode()).hexdigest(),
        augment=Wobble() if augment else None,
    )


def _held_out(validation: float, images: int) -> int:
    """How many of a class's training images are for validation."""
    held_out = round(validation * images) if 0 < validation < 1 else 0
    if not 0 < held_out < images:
        raise UserError(
            f"stream.validation is {validation}: choose a share that holds out from 1 to "
            f"{images - 1} of the {images} training images of a class."
        )
    return held_out


def _split(images: np.ndarray) -> MemoryImages:
    """images (classes, images of a class, 3, H, W) uint8 -> a split, class after class."""
    classes, count = images.shape[:2]
    targets = np.repeat(np.arange(classes), count)
    return MemoryImages(torch.from_numpy(images.reshape(-1, *images.shape[2:])), targets.tolist())


def _images(
    cache: Path, image_size: int, per_class: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Training and test images (classes, images of a class, 3, H, W) uint8, and their sha256.

    They come from the cache when it holds what would be drawn now.
    """
    path = cache / f"glyphs100-{image_size}px.npz"
    key = _key(image_size, per_class)
    cached = _load(path, key)
    if cached is not None:
        return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Made before anything is drawn: that a folder is read-only is better known at once.
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=cache) as folder:
            train, test = _draw(image_size, per_class, path)
            digest = _digest(key, train, test)
            temporary = Path(folder, path.name)
            np.savez(temporary, train=train, test=test, digest=np.array(digest))
            temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): choose another --cache."
        ) from error
    return train, test, digest


def _load(path: Path, key: str) -> tuple[np.ndarray, np.ndarray, str] | None:
    """What `path` holds; None when it is missing, damaged, or was drawn under another key."""
    try:
        with np.load(path) as file:
            train, test, digest = file["train"], file["test"], str(file["digest"])
    except Exception:  # numpy and zipfile raise a dozen kinds, depending on the byte that is wrong
        return None
    return (train, test, digest) if digest == _digest(key, train, test) else None


def _key(image_size: int, per_class: tuple[int, int]) -> str:
    """All that decides the images, apart from the releases of Pillow and numpy."""
    fonts = hashlib.sha256()
    for face in (*_FACES, *_LETTER_FACES):
        fonts.update(_font_file(face).read_bytes())
    return json.dumps([_VERSION, _SEED, CHARACTERS, image_size, per_class, fonts.hexdigest()])


def _digest(key: str, train: np.ndarray, test: np.ndarray) -> str:
    digest = hashlib.sha256(key.encode())
    for images in (train, test):
        digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def _font_file(face: str) -> Path:
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    if not path.is_file():
        raise UserError(f"The font {path} is missing: install matplotlib from PyPI again.")
    return path


def faces_of() -> dict[str, list[str]]:
    """For each character the faces that have it."""
    from fontTools.ttLib import TTFont

    faces: dict[str, list[str]] = {character: [] for character in CHARACTERS}
    for face in (*_FACES, *_LETTER_FACES):
        with TTFont(_font_file(face), lazy=True) as font:
            codes = font.getBestCmap()
        for character in CHARACTERS:
            if ord(character) in codes and (face in _FACES or character in _LETTERS):
                faces[character].append(face)
    return faces


def _draw(image_size: int, per_class: tuple[int, int], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All training and test images, in the layout of `_images`; `path` is for the progress bar."""
    faces = faces_of()
    splits = [
        np.empty((len(CHARACTERS), count, 3, image_size, image_size), np.uint8)
        for count in per_class
    ]
    with tqdm(
        total=len(CHARACTERS) * sum(per_class),
        desc=f"drawing glyphs100, once, for {path}",
        unit=" images",
    ) as bar:
        for label, character in enumerate(CHARACTERS):
            for split, images in enumerate(splits):
                for i in range(images.shape[1]):
                    # Each image has a seed of its own, so the splits share no draws.
                    rng = np.random.default_rng([_SEED, split, label, i])
                    images[label, i] = draw(character, faces[character], image_size, rng)
                bar.update(images.shape[1])
    return splits[0], splits[1]


def draw(
    character: str, faces: Sequence[str], image_size: int, rng: np.random.Generator
) -> np.ndarray:
    """One random image of a character, (3, image_size, image_size) uint8."""
    # The ink has one end of the brightness range; the background and a rim share the other. A rim
    # as dark as the ink would close the gaps of # and €, and leave a blob.
    dark = rng.uniform(0, 0.4)
    light, other_light, rim = rng.uniform(dark + 0.35, 1, size=3)
    style = rng.choice(["solid", "rimmed", "hollow"], p=[0.6, 0.2, 0.2])
    if style == "hollow":
        dark, rim = rim, dark
    levels = np.array([dark, rim, light, other_light])
    if rng.random() < 0.5:
        levels = 1 - levels
    ink_3, rim_3, light_3, other_3 = (_colour(level, rng) for level in levels)

    layers = {0: ink_3} if style == "solid" else {_RIM: rim_3, 0: ink_3}
    shapes = _shapes(character, faces, image_size, rng, list(layers))
    image = light_3 + _pattern(image_size, rng)[..., None] * (other_3 - light_3)
    for shape, colour in zip(shapes, layers.values(), strict=True):
        image += shape[..., None] * (colour - image)
    image += rng.uniform(0, 0.05) * rng.standard_normal(image.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8).transpose(2, 0, 1)


def _shapes(
    character: str,
    faces: Sequence[str],
    image_size: int,
    rng: np.random.Generator,
    rims: Sequence[int],
) -> list[np.ndarray]:
    """How much of each pixel a randomly placed character covers, (H, W) in [0, 1].

    Once with each of the `rims`, in hundredths of the image's side, and always in the same place.
    """
    face = faces[int(rng.integers(len(faces)))]
    stroke = int(rng.integers(1 if face in _BOLD else 3))
    side = _FINER * image_size
    angle = math.radians(rng.uniform(-20, 20))
    size = rng.uniform(0.8, 1.15)
    width, height = size * rng.uniform(0.85, 1.15, size=2)
    room = (1 - size * _LONGER) / 2 * 0.7 * side
    right, down = rng.uniform(-room, room, size=2)
    # Pillow asks where an output pixel comes from: back by the shift, the rotation and the size.
    centre = side / 2
    a, b = math.cos(angle) / width, math.sin(angle) / width
    d, e = -math.sin(angle) / height, math.cos(angle) / height
    x, y = centre + right, centre + down
    back = (a, b, centre - a * x - b * y, d, e, centre - d * x - e * y)
    shapes = []
    for rim in rims:
        mask = _mask(character, face, image_size, stroke + rim)
        moved = mask.transform(mask.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
        shapes.append(np.asarray(moved.reduce(_FINER)) / 255)
    return shapes


@lru_cache(maxsize=256)  # all that one class needs
def _mask(character: str, face: str, image_size: int, stroke: int) -> Image.Image:
    """The character in the middle of a grey image; its longer side is `_LONGER` of the image's.

    `stroke` thickens its lines by so many parts of a hundredth of the image's side.
    """
    side = _FINER * image_size
    # Raqm, the other layout engine, is not part of every Pillow.
    engine = ImageFont.Layout.BASIC
    font = ImageFont.truetype(_font_file(face), side, layout_engine=engine)
    left, top, right, bottom = font.getbbox(character)
    font = font.font_variant(size=side * side * _LONGER / max(right - left, bottom - top))
    left, top, right, bottom = font.getbbox(character)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text(
        ((side - left - right) / 2, (side - top - bottom) / 2),
        character,
        fill=255,
        font=font,
        stroke_width=round(stroke * side / 100),
    )
    return mask


def _colour(brightness: float, rng: np.random.Generator) -> np.ndarray:
    """A random colour of about this brightness, (3,) in [0, 1]."""
    colour = rng.random(3) * rng.random()
    return (colour + brightness - colour @ _BRIGHTNESS).clip(0, 1)


def _pattern(image_size: int, rng: np.random.Generator) -> np.ndarray:
    """How far a background has gone from its first colour to its second, (H, W) in [0, 1]."""
    kind = rng.choice(["plain", "gradient", "noise", "stripes", "blobs"])
    if kind == "plain":
        return np.zeros((image_size, image_size))
    if kind == "noise":
        return rng.random((image_size, image_size))
    if kind == "blobs":
        coarse = Image.fromarray(rng.random((5, 5), dtype=np.float32))
        blurred = coarse.resize((image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(blurred).clip(0, 1)
    angle = rng.uniform(0, 2 * math.pi)
    places = np.arange(image_size) / image_size - 0.5
    along = places[:, None] * math.sin(angle) + places * math.cos(angle)
    if kind == "gradient":
        return (along - along.min()) / (along.max() - along.min())
    waves = np.sin(2 * math.pi * (along * rng.uniform(2, 8) + rng.random()))
    return (0.5 + waves).clip(0, 1)  # flat tops: stripes with soft edges
