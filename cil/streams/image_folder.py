"""Streams of image files: `train/` and `test/` (or `val/`) with a folder for each class.

ImageNet and its subsets come like this, with `val/`: their `test/` has no class folders and is not
read. Images are decoded when they are asked for.
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

from cil.cache import hashed
from cil.errors import UserError
from cil.streams.decoded import Decoded, decoded_once
from cil.streams.image_scan import File, hidden, named, scan
from cil.streams.splits import held_out
from cil.streams.stream import Source

LISTS = Path(__file__).parent / "class_lists"
NAMED = {
    "ucir": "imagenet100_ucir.txt",  # three differ that are called ImageNet-100
    "cmc": "imagenet100_cmc.txt",
    "podnet": "imagenet100_podnet.txt",
    "tiny_imagenet100": "tiny_imagenet100.txt",
}
TEST_FOLDERS = ("test", "val")  # the first that has class folders is read


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
        self.decoded: Decoded | None = None  # a file of those that were decoded before

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        target = self.targets[item]
        for other in itertools.chain([item], self._others_of_class(item)):
            try:
                return _floats(self.pixels(other)), target
            except (MemoryError, UserError):  # neither is the file's fault
                raise
            except Exception:  # decoders of damaged files raise whatever comes to hand
                self.unreadable[other] = True
        raise UserError(
            f"{self.folder} has no readable image left in the class of {self.paths[item]}."
        )

    def decode_once(self, digests: Sequence[str], cache: Path) -> None:
        """Keep small images decoded in a file; `digests` tell the content of every image's file.

        Raises:
            UserError: the file cannot be written.
        """
        files = hashed({"files": list(digests)})
        key = {"files": files, "size": self.size, "border": self.border}
        folder, name = cache / "decoded", self.folder.name
        self.decoded = decoded_once(self.pixels, len(self), self.size, folder, name, key)

    def pixels(self, item: int) -> Tensor:
        """(3, size, size) uint8; raises as `decode` does."""
        known = None if self.decoded is None else self.decoded[item]
        if known is not None:
            return known
        return decode_bytes(self.folder / str(self.paths[item]), self.size, self.border)

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

    Test images are those of `test/` where it has class folders, else those of `val/`: where both
    have them `val/` is not read.

    `class_list` is a name in NAMED or a file with a class a line. The share `validation` of the
    training images, stratified, is held out.

    Raises:
        UserError: a folder or a class of the list is missing, a class has a single training image,
            a file is unreadable.
    """
    tests = _check_layout(root)
    names, test_root = _classes(root / "train", tests, class_list)
    train = scan(root / "train", names, cache, decode=False)
    _check_two_of_each(root / "train", train)
    test = scan(test_root, names, cache, decode=True)
    files = _flat(train)
    kept, apart = held_out(np.array([target for _, target in files]), validation)
    return Source(
        name=root.name if class_list is None else f"{root.name} ({Path(class_list).stem})",
        class_names=tuple(names),
        train=_images(root / "train", [files[i] for i in kept], image_size, cache),
        validation=_images(root / "train", [files[i] for i in apart], image_size, cache),
        test=_images(test_root, _flat(test), image_size, cache),
        image_size=image_size,
        channels=3,
        content=_content([train, test], image_size, validation),
        augment=ShiftAndMirror(mirror) if augment else None,
        class_list=None if class_list is None else Path(class_list).stem,
    )


def decode(path: Path, size: int, border: int = 0) -> Tensor:
    """An image file -> (3, size, size) in [-1, 1]; as `decode_bytes`, which has 0 to 255."""
    return _floats(decode_bytes(path, size, border))


def decode_bytes(path: Path, size: int, border: int = 0) -> Tensor:
    """An image file -> (3, size, size) uint8: its middle square, the shorter side resized.

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
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _rgb(image: "Image.Image") -> "Image.Image":  # type: ignore[name-defined]  # noqa: F821
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits: PIL would clip all that is brighter than 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _check_layout(root: Path) -> list[Path]:
    """The folders that test images may lie in."""
    tests = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise UserError(
            f"{root.absolute()} was looked for and is not there as it should be: it must hold the "
            "folders train and val (or test), and in each a folder of images for every class; "
            "stream.root says where it is."
        )
    return tests


def _classes(train: Path, tests: Sequence[Path], class_list: str | None) -> tuple[list[str], Path]:
    """Names of the classes, sorted, and that of the folders `tests` which holds them."""
    there = {folder: _folders(folder) for folder in (train, *tests)}
    if class_list is not None:
        names = sorted(_read_list(class_list))
        origin = f"of the class list {class_list} (stream.class_list)"
    else:
        names = sorted(there[train])
        origin = f"of {train}"
    _check_names(train, names)
    test = next((folder for folder in tests if there[folder] & set(names)), tests[-1])
    for folder in (train, test):
        missing = [name for name in names if name not in there[folder]]
        if missing:
            raise UserError(
                f"{folder} has no folder for {len(missing)} of the {len(names)} classes {origin}: "
                f"{named(missing)}."
            )
    return names, test


def _check_two_of_each(train: Path, found: dict[str, list[File]]) -> None:
    """Raises UserError for classes of which none could be held out."""
    single = [name for name, files in found.items() if len(files) == 1]
    if single:
        raise UserError(
            f"{train} has classes with a single image: {named(single)}; give each two or more, as "
            "a share of them is held out, or leave the class out."
        )


def _check_names(train: Path, names: Sequence[str]) -> None:
    """Records and W&B take no other names."""
    bad = [name for name in names if name.encode("utf-8", "replace").decode() != name]
    if bad:
        shown = named([name.encode("utf-8", "backslashreplace").decode() for name in bad])
        raise UserError(
            f"{train} has class folders whose names are no UTF-8: {shown}; rename them."
        )


def _read_list(class_list: str) -> list[str]:
    path = LISTS / NAMED[class_list] if class_list in NAMED else Path(class_list)
    try:
        names = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"stream.class_list is {class_list}: choose {', '.join(NAMED)} or a text file with the "
            "name of a class in every line."
        ) from None
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path} names no class, or one of them twice.")
    return names


def _folders(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir() and not hidden(p.name)}


def _flat(found: dict[str, list[File]]) -> list[tuple[File, int]]:
    """All images with their class ids."""
    return [(file, target) for target, files in enumerate(found.values()) for file in files]


def _images(folder: Path, files: Sequence[tuple[File, int]], size: int, cache: Path) -> ImageFiles:
    paths, targets = [file.path for file, _ in files], [target for _, target in files]
    images = ImageFiles(folder, paths, targets, size)
    images.decode_once([file.digest for file, _ in files], cache)
    return images


def _content(found: Sequence[dict[str, list[File]]], image_size: int, validation: float) -> str:
    """Hashes the files by what the scan has read of them."""
    digest = hashlib.sha256(f"middle square {image_size} {validation}".encode())
    for split in found:
        for name, files in split.items():
            for file in files:
                line = f"{name}/{file.path} {file.digest}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
