"""Named numbers from one accuracy matrix; pure functions, so every table can be recomputed.

Letters: T experiences. The accuracy matrix R (T, T) holds at [t, i] the accuracy, in [0, 1], on the
test images of class group i after experience t, the prediction being taken over all classes seen up
to t (class-incremental evaluation, no task label at test time). Whatever stands above the diagonal
(i > t, usually NaN) is never read. sizes (T,) counts the test images of each class group.

"Forgetting" has several definitions in use: Chaudhry's below starts from the best accuracy a group
ever had, GEM's backward transfer and Avalanche's `StreamForgetting` from the accuracy right after
the group was learned. Name the definition wherever a number is shown.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


def accuracy_curve(R: ArrayLike, sizes: Sequence[int] | NDArray[np.integer]) -> FloatArray:
    """Accuracy on the test images of all classes seen so far, after each experience -> (T,).

    Weighted by test images, so that it equals the fraction of images classified correctly
    (Avalanche's stream accuracy), also when class groups differ in size.
    """
    matrix = _lower_triangle(R)
    weights = np.asarray(sizes, dtype=np.float64)
    counts = (weights > 0) & np.isfinite(weights)
    if weights.shape != matrix.shape[:1] or not counts.all():
        raise ValueError(f"sizes must be {len(matrix)} positive counts, not {list(weights)}")
    return np.tril(matrix) @ weights / np.cumsum(weights)


def last_accuracy(R: ArrayLike, sizes: Sequence[int] | NDArray[np.integer]) -> float:
    """Accuracy on the test images of all classes after the last experience."""
    return float(accuracy_curve(R, sizes)[-1])


def average_incremental_accuracy(R: ArrayLike, sizes: Sequence[int] | NDArray[np.integer]) -> float:
    """Mean over t of the accuracy on all classes seen after experience t, the first one included.

    Rebuffi et al. 2017, "iCaRL: Incremental classifier and representation learning".
    """
    return float(accuracy_curve(R, sizes).mean())


def forgetting(R: ArrayLike) -> float:
    """Mean over earlier groups i of max_{i <= t < last} R[t, i] - R[last, i]; 0.0 when T = 1.

    Chaudhry et al. 2018, "Riemannian walk for incremental learning" (F there). It lies in [-1, 1]
    and is negative when the groups end above everything they had before.
    """
    matrix = _lower_triangle(R)
    if len(matrix) == 1:
        return 0.0
    best = matrix[:-1, :-1].max(axis=0)  # zeros above the diagonal cannot win: accuracies are >= 0
    return float((best - matrix[-1, :-1]).mean())


def backward_transfer(R: ArrayLike) -> float:
    """Mean over earlier groups i of R[last, i] - R[i, i]; 0.0 when T = 1; negative when forgetting.

    Lopez-Paz & Ranzato 2017, "Gradient episodic memory for continual learning", BWT.
    """
    matrix = _lower_triangle(R)
    if len(matrix) == 1:
        return 0.0
    return float((matrix[-1, :-1] - np.diagonal(matrix)[:-1]).mean())


def summarise(R: ArrayLike, sizes: Sequence[int] | NDArray[np.integer]) -> dict[str, float]:
    """The four numbers of this file under their function names."""
    return {
        "last_accuracy": last_accuracy(R, sizes),
        "average_incremental_accuracy": average_incremental_accuracy(R, sizes),
        "forgetting": forgetting(R),
        "backward_transfer": backward_transfer(R),
    }


def _lower_triangle(R: ArrayLike) -> FloatArray:
    """R with zeros above its diagonal.

    Raises:
        ValueError: R is not square, is empty, or holds anything but accuracies up to its diagonal.
    """
    matrix = np.asarray(R, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"an accuracy matrix is (T, T) with T >= 1, not {matrix.shape}")
    known = matrix[np.tril_indices(len(matrix))]
    if not ((known >= 0) & (known <= 1)).all():  # also false for NaN
        raise ValueError("an accuracy matrix holds fractions in [0, 1] up to its diagonal")
    return np.tril(np.nan_to_num(matrix))
