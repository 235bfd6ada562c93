"""Test sets that ImageNet's classes come in under another distribution, in their own layouts.

name             folders below its root         paper
imagenet-v2      0 to 999                       Recht et al. 2019, arXiv 1902.10811
imagenet-r       by WordNet id                  Hendrycks et al. 2021, arXiv 2006.16241
imagenet-a       by WordNet id                  Hendrycks et al. 2021, arXiv 1907.07174
imagenet-sketch  by WordNet id                  Wang et al. 2019, arXiv 1905.13549
objectnet        images/OBJECT, and mappings/   Barbu et al. 2019
imagenet-c       CORRUPTION/SEVERITY/WordNet id Hendrycks and Dietterich 2019, arXiv 1903.12261

A class is known by its WordNet id, such as n01440764: so must the classes of the stream be called.
"""

import hashlib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cil.errors import UserError
from cil.parallel import unseen
from cil.streams.image_folder import ImageFiles
from cil.streams.image_scan import SUFFIXES, named, scan

KINDS = (
    "imagenet-v2",
    "imagenet-r",
    "imagenet-a",
    "imagenet-sketch",
    "objectnet",
    "imagenet-c",
)
OBJECTNET_BORDER = 2  # px: a red frame by which copies in training data are to be found
_MAPPINGS = {
    "objects": "folder_to_objectnet_label.json",
    "names": "objectnet_to_imagenet_1k.json",
    "lines": "pytorch_to_imagenet_2012_id.json",
}
_LABELS = "imagenet_to_label_2012_v2"  # a name a line


@dataclass(frozen=True)
class ShiftSet:
    """The images of a set that show classes of a stream.

    Items of `images` are (float image (3, size, size) in [-1, 1], folder); `right` (folders,
    classes) says which labels of the stream are right for a folder: ObjectNet's may have several.
    `missing` are the classes of the stream that the set has no image of; `content` hashes its
    files.
    """

    name: str
    images: Dataset
    right: Tensor
    missing: tuple[str, ...]
    content: str


def read_shift_set(
    kind: str, root: Path, class_names: Sequence[str], size: int, cache: Path
) -> list[ShiftSet]:
    """A set at `root`, restricted to the classes of a stream, given by label; shown at `size` px.

    imagenet-c is a set for each corruption and severity that is there, the others are one.

    Raises:
        UserError: there is no such kind or folder, its layout is another, it has no image of any
            of the classes, or a file is no image.
    """
    if kind not in KINDS:
        raise UserError(f"There is no test set '{kind}': choose from {', '.join(KINDS)}.")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root} for {kind}: name the one it was unpacked to.")
    wanted = [name for name in class_names if name in set(ilsvrc_classes())]
    if not wanted:
        raise UserError(
            f"{kind} has ImageNet's classes, known by their WordNet ids such as n01440764, and the "
            f"stream has none of them: its classes are {named(class_names)}."
        )
    if kind == "imagenet-c":
        parts = _corrupted_folders(root)
        return [
            _restricted(f"{kind}/{name}", folder, _by_wnid(), class_names, size, cache)
            for name, folder in parts
        ]
    border, folder = 0, root
    classes_of: Mapping[str, Collection[str]] = _by_wnid()
    if kind == "imagenet-v2":
        classes_of = {str(i): {wnid} for i, wnid in enumerate(ilsvrc_classes())}
    elif kind == "objectnet":
        border, folder, classes_of = OBJECTNET_BORDER, root / "images", _objectnet_classes(root)
    return [_restricted(kind, folder, classes_of, class_names, size, cache, border)]


@once
def ilsvrc_classes() -> tuple[str, ...]:
    """The WordNet ids of the thousand classes of ILSVRC 2012, sorted: that is their numbering."""
    with warnings.catch_warnings(), unseen():
        warnings.simplefilter("ignore")  # of optional packages that are not needed here
        from avalanche.benchmarks.datasets.imagenet_data import IMAGENET_TORCHVISION_WNIDS

    return tuple(sorted(IMAGENET_TORCHVISION_WNIDS))


def _by_wnid() -> dict[str, Collection[str]]:
    return {wnid: {wnid} for wnid in ilsvrc_classes()}


def _restricted(
    name: str,
    folder: Path,
    classes_of: Mapping[str, Collection[str]],
    class_names: Sequence[str],
    size: int,
    cache: Path,
    border: int = 0,
) -> ShiftSet:
    """Those folders of a set that show classes of the stream; `classes_of` says what they show."""
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    there = [
        path.name for path in sorted(folder.glob("*")) if path.name in classes_of and _filled(path)
    ]
    chosen = [f for f in there if labels.keys() & classes_of[f]]
    if not chosen:
        found = f"it has {len(there)} folders of other classes" if there else "none was found"
        raise UserError(
            f"{folder} has no image of any of the {len(class_names)} classes of the stream in the "
            f"layout of {name.partition('/')[0]}: {found}."
        )
    files = scan(folder, chosen, cache, decode=True)
    right = torch.zeros(len(chosen), len(class_names), dtype=torch.bool)
    for row, folder_name in enumerate(chosen):
        right[row, [labels[c] for c in classes_of[folder_name] if c in labels]] = True
    every = [(file, row) for row, found in enumerate(files.values()) for file in found]
    lines = "".join(f"{file.path} {file.digest}\n" for file, _ in every)
    paths, rows = [file.path for file, _ in every], [row for _, row in every]
    return ShiftSet(
        name=name,
        images=ImageFiles(folder, paths, rows, size, border),
        right=right,
        missing=tuple(c for c in class_names if not right[:, labels[c]].any()),
        content=hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16],
    )


def _filled(folder: Path) -> bool:
    """Whether an image lies in it: some classes of a set are empty."""
    return any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))


def _corrupted_folders(root: Path) -> list[tuple[str, Path]]:
    """(CORRUPTION/SEVERITY, its folder), also where the archives' own folders lie in between."""
    found = dict(_severities(root)) | dict(
        pair for group in sorted(root.glob("*")) if group.is_dir() for pair in _severities(group)
    )
    if not found:
        raise UserError(
            f"{root} is not laid out as imagenet-c: it must hold CORRUPTION/SEVERITY/CLASS, such "
            "as gaussian_noise/1/n01440764."
        )
    return sorted(found.items())


def _severities(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.glob("*/[1-5]"):
        if path.is_dir():
            yield f"{path.parent.name}/{path.name}", path


def _objectnet_classes(root: Path) -> dict[str, set[str]]:
    """Folder of images -> the ImageNet classes it shows, by the files in mappings/.

    A folder's label has one or more names of ImageNet's, parted by "; "; a name stands in a line
    of the list of names, and every line belongs to a class, by its number in the sorted WordNet
    ids.
    """
    maps = {key: _mapping(root / "mappings" / name) for key, name in _MAPPINGS.items()}
    try:
        text = (root / "mappings" / _LABELS).read_text(encoding="utf-8")
    except OSError:
        raise _no_objectnet(root / "mappings" / _LABELS) from None
    wnids = ilsvrc_classes()
    try:
        number_of = {line: int(number) for number, line in maps["lines"].items()}
        by_name = {
            name.strip(): wnids[number_of[line]]
            for line, name in enumerate(text.splitlines())
            if line in number_of
        }
        return {
            folder: {by_name[name.strip()] for name in maps["names"][label].split("; ")}
            for folder, label in maps["objects"].items()
            if label in maps["names"]
        }
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"The files in {root / 'mappings'} do not fit each other ({error}): take those that "
            "came with ObjectNet."
        ) from None


def _mapping(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _no_objectnet(path) from None
    if not isinstance(content, dict):
        raise _no_objectnet(path)
    return content


def _no_objectnet(path: Path) -> UserError:
    return UserError(
        f"{path} is missing or cannot be read: objectnet needs the folders images and mappings as "
        "it was published."
    )
