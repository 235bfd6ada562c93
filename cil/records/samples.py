"""Drawn images on disk: one PNG file an experience, lossless, a row of tiles for every class.

Shapes: C classes, N images of each, H = W side, channels 1 or 3.
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cil.files import damaged, read_bytes, write_bytes

Images = NDArray[np.uint8]  # (C, N, H, W, channels)
SAMPLES = "samples"


def sheet(folder: Path, experience: int) -> Path:
    return folder / SAMPLES / f"experience{experience}.png"


def write_samples(path: Path, images: Images) -> None:
    """Raises UserError when the disk is full or the folder cannot be written."""
    C, N, H, W, channels = images.shape
    tiles = images.transpose(0, 2, 1, 3, 4).reshape(C * H, N * W, channels)
    buffer = io.BytesIO()
    Image.fromarray(tiles[..., 0] if channels == 1 else tiles).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def read_samples(path: Path, side: int) -> Images | None:
    """The images of a sheet, whose tiles have this side; None where nothing was drawn.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        tiles = np.asarray(Image.open(io.BytesIO(read_bytes(path))))
    except (OSError, SyntaxError) as error:  # Pillow raises the latter for a broken chunk
        raise damaged(path) from error
    rows, columns = (length // side for length in tiles.shape[:2])
    if (rows * side, columns * side) != tiles.shape[:2]:
        raise damaged(path)
    return tiles.reshape(rows, side, columns, side, -1).transpose(0, 2, 1, 3, 4)
