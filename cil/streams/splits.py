"""Holding out a share of the training images, the same ones in every run."""

import numpy as np

from cil.errors import UserError

_SEED = 0  # never a setting: every run holds out the same images


def held_out(targets_N: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on and of those held out, ascending, stratified by class.

    Raises:
        UserError: the share leaves one of them without an image of every class.
    """
    from sklearn.model_selection import train_test_split

    classes = len(np.unique(targets_N))
    least = classes / len(targets_N)
    if not least <= share <= 1 - least:
        raise UserError(
            f"stream.validation is {share}: choose a share of the training images from "
            f"{least:.2g} to {1 - least:.2g}."
        )
    kept, apart = train_test_split(
        np.arange(len(targets_N)),
        test_size=round(share * len(targets_N)),
        stratify=targets_N,
        random_state=_SEED,
    )
    return np.sort(kept), np.sort(apart)
