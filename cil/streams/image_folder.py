"""Streams of image files: `train/` and `val/` (or `test/`) with a folder for each class.

ImageNet and its subsets come like this. Images are decoded when they are asked for.
"""

import hashlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from cil.errors import UserError
from cil.streams.image_scan import File, named, scan
from cil.streams.splits import held_out
from cil.streams.stream import Source

LISTS = Path(__file__).parent / "class_lists"  # of ImageNet-100: three differ
TEST_FOLDERS = ("val", "test")


class ImageFiles(Dataset):
    """Image files as float images (3, size, size) in [-1, 1], with their original class ids.

    A file that cannot be decoded, though the scan took it for an image, is marked in `unreadable`
    and another one of its class takes its place.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[str],
        targets: Sequence[int],
        size: int,
        border: int = 0,
    ) -> None:
        """`border`: pixels of a frame around every image that is cut off."""
        self.folder, self.size, self.border = folder, size, border
        self.paths = np.array(paths)  # not a list of strings, which every loading process copies
        self.targets = [int(target) for target in targets]
        # Shared with the processes that load images.
        self.unreadable = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        target = self.targets[item]
        for other in itertools.chain([item], self._others_of_class(item)):
            try:
                path = self.folder / str(self.paths[other])
                return decode(path, self.size, self.border), target
            except MemoryError:
                raise
            except Exception:  # decoders of damaged files raise whatever comes to hand
                self.unreadable[other] = True
        raise UserError(
            f"{self.folder} has no readable image left in the class of {self.paths[item]}."
        )

    def marked(self) -> list[str]:
        """Paths below the stream's root of the files that are marked, by whichever process."""
        marked = self.unreadable.nonzero()[:, 0].tolist()
        return [self._name(i) for i in marked]

    def mark(self, names: Collection[str]) -> None:
        """Let the files of these names, and no others, be marked."""
        chosen = [self._name(i) in names for i in range(len(self))] if names else False
        self.unreadable[:] = torch.tensor(chosen)

    def _name(self, item: int) -> str:
        return f"{self.folder.name}/{self.paths[item]}"

    def _others_of_class(self, item: int) -> Iterator[int]:
        """The other images of its class, those that follow it first."""
        count = len(self)
        for other in itertools.chain(range(item + 1, count), range(item)):
            if self.targets[other] == self.targets[item]:
                yield other


class ShiftAndMirror:
    """Shifts an image by up to an eighth of its side, and mirrors every other one."""

    def __init__(self, mirror: bool) -> None:
        self.mirror = mirror

    def __repr__(self) -> str:
        return f"ShiftAndMirror({self.mirror})"

    def __call__(self, image: Tensor) -> Tensor:
        """image (C, H, W) -> the same shape."""
        _, h, w = image.shape
        most = h // 8
        # What comes in from outside mirrors the border: it leaves no rim.
        padded = functional.pad(image[None], 4 * [most], mode="reflect")[0]
        top, left = torch.randint(2 * most + 1, (2,)).tolist()
        shifted = padded[:, top : top + h, left : left + w]
        return shifted.flip(-1) if self.mirror and torch.rand(()) < 0.5 else shifted


def image_folder(
    root: Path,
    image_size: int,
    validation: float,
    augment: bool,
    mirror: bool,
    cache: Path,
    class_list: str | None = None,
) -> Source:
    """The classes of a folder, or those of them that a list names.

    `class_list` is ucir, cmc or podnet (three lists called ImageNet-100) or a file with a class a
    line. The share `validation` of the training images, stratified, is held out.

    Raises:
        UserError: a folder or a class of the list is missing, a file is unreadable.
    """
    test_root = _check_layout(root)
    names = _classes(root / "train", test_root, class_list)
    train = scan(root / "train", names, cache, decode=False)
    test = scan(test_root, names, cache, decode=True)
    paths, targets = _flat(train)
    kept, apart = held_out(np.array(targets), validation)
    splits = [
        ImageFiles(root / "train", [paths[i] for i in part], [targets[i] for i in part], image_size)
        for part in (kept, apart)
    ]
    return Source(
        name=root.name if class_list is None else f"{root.name} ({Path(class_list).stem})",
        class_names=tuple(names),
        train=splits[0],
        validation=splits[1],
        test=ImageFiles(test_root, *_flat(test), image_size),
        image_size=image_size,
        channels=3,
        content=_content([train, test], image_size, validation),
        augment=ShiftAndMirror(mirror) if augment else None,
        class_list=None if class_list is None else Path(class_list).stem,
    )


def decode(path: Path, size: int, border: int = 0) -> Tensor:
    """An image file -> (3, size, size) in [-1, 1]: its middle square, the shorter side resized.

    A frame of `border` pixels is cut off first.

    Turned as its EXIF says; greyscale, palette, CMYK and 16-bit images become RGB, transparent
    parts white; of an animation the first frame.

    Raises:
        OSError, SyntaxError, ValueError: it is no image, or a damaged one.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        if not border:  # whose pixels would be no pixels any more
            opened.draft("RGB", (size, size))  # a large JPEG is decoded at a fraction of its size
        image = _rgb(ImageOps.exif_transpose(opened))
    if border:
        image = ImageOps.crop(image, border)
    return _tensor(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def _rgb(image: "Image.Image") -> "Image.Image":  # type: ignore[name-defined]  # noqa: F821
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits: PIL would clip all that is brighter than 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _tensor(image: "Image.Image") -> Tensor:  # type: ignore[name-defined]  # noqa: F821
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _check_layout(root: Path) -> Path:
    """The folder of test images."""
    tests = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise UserError(
            f"{root.absolute()} was looked for and is not there as it should be: it must hold the "
            "folders train and val (or test), and in each a folder of images for every class; "
            "stream.root says where it is."
        )
    return tests[0]


def _classes(train: Path, test: Path, class_list: str | None) -> list[str]:
    """Names of the classes, sorted."""
    there = {folder: _folders(folder) for folder in (train, test)}
    if class_list is not None:
        names = sorted(_read_list(class_list))
        origin = f"of the class list {class_list} (stream.class_list)"
    else:
        names = sorted(there[train])
        origin = f"of {train}"
    _check_names(train, names)
    for folder, found in there.items():
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(
                f"{folder} has no folder for {len(missing)} of the {len(names)} classes {origin}: "
                f"{named(missing)}."
            )
    return names


def _check_names(train: Path, names: Sequence[str]) -> None:
    """Records and W&B take no other names."""
    bad = [name for name in names if name.encode("utf-8", "replace").decode() != name]
    if bad:
        shown = named([name.encode("utf-8", "backslashreplace").decode() for name in bad])
        raise UserError(
            f"{train} has class folders whose names are no UTF-8: {shown}; rename them."
        )


def _read_list(class_list: str) -> list[str]:
    path = LISTS / f"imagenet100_{class_list}.txt"
    path = path if path.is_file() else Path(class_list)
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"stream.class_list is {class_list}: choose ucir, cmc, podnet or a text file with the "
            "name of a class in every line."
        ) from None
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path} names no class, or one of them twice.")
    return names


def _folders(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}


def _flat(found: dict[str, list[File]]) -> tuple[list[str], list[int]]:
    """Paths and class ids of all images."""
    pairs = [(f.path, target) for target, files in enumerate(found.values()) for f in files]
    paths, targets = zip(*pairs, strict=True)
    return list(paths), list(targets)


def _content(found: Sequence[dict[str, list[File]]], image_size: int, validation: float) -> str:
    """Hashes the files by what the scan has read of them."""
    digest = hashlib.sha256(f"middle square {image_size} {validation}".encode())
    for split in found:
        for name, files in split.items():
            for file in files:
                line = f"{name}/{file.path} {file.digest}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
