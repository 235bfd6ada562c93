"""Holding out a share of the training images, the same ones in every run."""

import numpy as np

from cil.errors import UserError

_SEED = 0  # never a setting: every run holds out the same images


def held_out(targets_N: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on and of those held out, ascending, stratified by class.

    Of every class at least one image is held out and one is left, however small it is.

    Raises:
        UserError: the share is not between 0 and 1, or a class has fewer than two images.
    """
    from sklearn.model_selection import train_test_split

    if not 0 < share < 1:
        raise UserError(
            f"stream.validation is {share}: choose a share of the training images above 0 and "
            "below 1."
        )
    classes = _classes(targets_N)
    most = len(targets_N) - len(classes)
    kept, apart = train_test_split(
        np.arange(len(targets_N)),
        test_size=min(max(round(share * len(targets_N)), len(classes)), most),
        stratify=targets_N,
        random_state=_SEED,
    )
    # Stratifying rounds the share of a small class down to none.
    apart, kept = _with_one_of_each(classes, apart, kept, targets_N)
    kept, apart = _with_one_of_each(classes, kept, apart, targets_N)
    return np.sort(kept), np.sort(apart)


def _classes(targets_N: np.ndarray) -> np.ndarray:
    """The class ids; UserError where one has too few images to share out."""
    classes, counts = np.unique(targets_N, return_counts=True)
    if not len(classes):
        raise UserError(
            "There are no training images to hold out for stream.validation: give every class two "
            "or more."
        )
    if counts.min() < 2:
        raise UserError(
            f"Class {classes[counts.argmin()]} has a single training image: give every class two "
            "or more, as stream.validation holds out a share of them."
        )
    return classes


def _with_one_of_each(
    classes: np.ndarray, part: np.ndarray, other: np.ndarray, targets_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both parts, an image of each class that `part` lacks being taken from `other`."""
    lacking = np.setdiff1d(classes, targets_N[part])
    moved = [np.flatnonzero(targets_N[other] == lacked)[0] for lacked in lacking]
    return np.append(part, other[moved]), np.delete(other, moved)
