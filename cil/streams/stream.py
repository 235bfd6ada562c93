"""What the rest of the code sees of a data set: class groups that arrive one experience at a time.

A class's label is its position in arrival order: experience 0 has labels 0..n0-1, experience 1 the
next ones. Names and the original order travel beside it; nothing downstream remaps.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from cil.errors import UserError
from cil.parallel import unseen
from cil.streams.checks import check_class_order, check_image, check_targets, group_sizes

Transform = Callable[[Tensor], Tensor]

# Split -> what its images are.
SPLITS = {"train": "training", "validation": "held-out training", "test": "test"}


@dataclass(frozen=True)
class Source:
    """What a source file returns: three disjoint splits in the source's own class order.

    Items of the splits are (float image (C, H, W) in [-1, 1], original class id); each split has
    the class ids of all its items as `targets`, and where it reads files `marked` and `mark` (see
    `ImageFiles`).
    """

    name: str
    class_names: tuple[str, ...]
    train: Dataset
    validation: Dataset
    test: Dataset
    image_size: int
    channels: int
    content: str  # hex sha256 of the images and lists that define it
    augment: Transform | None = None  # of one image tensor; applied to training images alone
    class_list: str | None = None  # name of the list that chose the classes; None: all there are


@dataclass(frozen=True)
class Experience:
    """One class group with its images. Items of the datasets are (image, label)."""

    index: int
    labels: tuple[int, ...]
    train: Dataset  # augmented afresh at each access
    train_plain: Dataset  # the same images without augmentation
    validation: Dataset
    test: Dataset
    avalanche: Any  # the Avalanche train experience; only methods/discriminative.py touches it


@dataclass(frozen=True)
class Stream:
    """Class groups in the order of their arrival, and what is needed to name and rebuild them."""

    name: str
    class_names: tuple[str, ...]  # arrival order: class_names[label]
    class_order: tuple[int, ...]  # original class ids, in arrival order
    experiences: tuple[Experience, ...]
    image_size: int
    channels: int
    fingerprint: str
    reproducibility: dict[str, Any]  # Avalanche's own record of the benchmark; plain JSON values
    splits: tuple[Dataset, ...]  # the source's train, validation and test images
    class_list: str | None  # name of the list that chose the classes; None: all there are
    augment: Transform | None = None  # what varies the training images
    on_validation: bool = False  # `test` of the experiences are held-out training images

    @property
    def class_list_hash(self) -> str:
        """16 hex digits that tell lists of one name apart, whatever the order of arrival.

        They begin what `LC_ALL=C sort FILE | sha256sum` says of a file with a class name a line.
        """
        lines = "".join(f"{name}\n" for name in sorted(self.class_names))
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def unreadable(self) -> list[str]:
        """Image files that could not be decoded so far, though the scan took them.

        In the order of the splits. Another image of the class stood in for each.
        """
        return [name for split in self._of_files() for name in split.marked()]

    def mark_unreadable(self, names: Collection[str]) -> None:
        """Let these, and no others, be the files that could not be decoded so far."""
        for split in self._of_files():
            split.mark(set(names))

    def _of_files(self) -> list[Any]:
        return [split for split in self.splits if hasattr(split, "marked")]


class View(Dataset):
    """Some items of a source split under arrival-order labels.

    Avalanche's own datasets agree with it item for item, at several times the cost of an access.
    """

    def __init__(
        self,
        base: Dataset,
        indices: Sequence[int],
        label_of: Sequence[int],
        augment: Transform | None = None,
    ) -> None:
        """`indices` chooses from `base`; `label_of` takes an original class id to its label."""
        self.base = base
        self.indices = [int(index) for index in indices]
        self.targets = [label_of[target] for target in _targets(base)[self.indices]]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        image, _ = self.base[self.indices[item]]
        return (image if self.augment is None else self.augment(image)), self.targets[item]


def class_order(classes: int, seed: int) -> list[int]:
    """The arrival order drawn by `seed`, from a generator of its own.

    With 1993 it is the order of the class-incremental literature since iCaRL (arXiv 1611.07725).

    Raises:
        UserError: numpy's legacy generator takes no such seed.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"stream.order_seed is {seed}: choose one from 0 to {2**32 - 1}.")
    return [int(original) for original in np.random.RandomState(seed).permutation(classes)]


def first_of_each(targets: Sequence[int], count: int) -> list[int]:
    """The positions of the first `count` items of each class, or of all there are, ascending."""
    met: Counter[int] = Counter()
    positions = []
    for position, target in enumerate(targets):
        if met[target] < count:
            positions.append(position)
        met[target] += 1
    return positions


def build_stream(source: Source, protocol: str, class_order: Sequence[int]) -> Stream:
    """Cut `source` into class groups (see `group_sizes`), arriving in `class_order`.

    Raises:
        UserError: the classes do not divide as `protocol` asks, `class_order` is no permutation
            of the source's classes, or a split lacks a class, has one of no name, or images that
            are not what `source` says.
    """
    sizes = group_sizes(source.name, len(source.class_names), protocol)
    check_class_order(source.name, len(source.class_names), class_order)
    class_order = [int(original) for original in class_order]
    _check_splits(source)
    scenario = _benchmark(source, sizes, class_order)
    return Stream(
        name=source.name,
        class_names=tuple(source.class_names[original] for original in class_order),
        class_order=tuple(class_order),
        experiences=tuple(_experience(source, scenario, i) for i in range(len(sizes))),
        image_size=source.image_size,
        channels=source.channels,
        fingerprint=_fingerprint(source, sizes, class_order),
        reproducibility=scenario.get_reproducibility_data(),
        splits=(source.train, source.validation, source.test),
        class_list=source.class_list,
        augment=source.augment,
    )


def shortened(stream: Stream, stop_after: int | None, on_validation: bool) -> Stream:
    """The first experiences of a stream, evaluated on the held-out training images if asked for.

    Raises:
        UserError: it does not have so many.
    """
    experiences = stream.experiences[:stop_after]
    if stop_after is not None and not 1 <= stop_after <= len(stream.experiences):
        raise UserError(
            f"stream.stop_after is {stop_after}: {stream.name} has {len(stream.experiences)} "
            "experiences, so give 1 to that many, or null."
        )
    if on_validation:
        experiences = tuple(replace(e, test=e.validation) for e in experiences)
    return replace(stream, experiences=experiences, on_validation=on_validation)


def _benchmark(source: Source, sizes: Sequence[int], class_order: Sequence[int]) -> Any:
    with warnings.catch_warnings(), unseen():
        warnings.simplefilter(
            "ignore"
        )  # it complains of optional packages that are not needed here
        from avalanche.benchmarks import nc_benchmark  # costs seconds: only to build a stream

    # An explicit order and no seed: Avalanche's `seed=` would reseed the global generator.
    return nc_benchmark(
        train_dataset=source.train,
        test_dataset=source.test,
        n_experiences=len(sizes),
        per_exp_classes=dict(enumerate(sizes)),
        task_labels=False,
        shuffle=False,
        fixed_class_order=list(class_order),
        class_ids_from_zero_from_first_exp=True,
        train_transform=source.augment,
    )


def _experience(source: Source, scenario: Any, index: int) -> Experience:
    label_of = scenario.class_mapping
    labels = tuple(sorted(scenario.classes_in_experience["train"][index]))
    train = scenario.train_exps_patterns_assignment[index]
    validation = np.flatnonzero(np.isin(np.take(label_of, _targets(source.validation)), labels))
    return Experience(
        index=index,
        labels=labels,
        train=View(source.train, train, label_of, source.augment),
        train_plain=View(source.train, train, label_of),
        validation=View(source.validation, validation.tolist(), label_of),
        test=View(source.test, scenario.test_exps_patterns_assignment[index], label_of),
        avalanche=scenario.train_stream[index],
    )


def _targets(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.targets, dtype=np.int64)  # type: ignore[attr-defined]


def _fingerprint(source: Source, sizes: Sequence[int], class_order: Sequence[int]) -> str:
    parts = [source.name, source.content, list(source.class_names), list(class_order), list(sizes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check_splits(source: Source) -> None:
    shape = (source.channels, source.image_size, source.image_size)
    for split, kind in SPLITS.items():
        images = getattr(source, split)
        check_targets(f"The {kind} images of {source.name}", _targets(images), source.class_names)
        # One image stands for all: to read them all could take hours.
        check_image(f"The first of the {kind} images of {source.name}", images[0][0], shape)
