"""Metrics against matrices worked by hand and against Avalanche's own metric classes."""

import numpy as np
import pytest

from cil.metrics import (
    accuracy_curve,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    last_accuracy,
    summarise,
)

NAN = float("nan")

# Every group is at its best right after it was learned: all definitions of forgetting agree.
FALLING = np.array([[0.9, NAN, NAN], [0.6, 0.8, NAN], [0.3, 0.6, 1.0]])
# Group 0 rises from 0.5 to 0.9 and ends at 0.6: it gained 0.1 since it was learned (backward
# transfer, Avalanche) and lost 0.3 since its best (Chaudhry).
RISING = np.array([[0.5, NAN, NAN], [0.9, 0.8, NAN], [0.6, 0.7, 0.4]])


def test_curve_weights_groups_by_their_test_images() -> None:
    # 10, 30 and 40 images: (0.6*10 + 0.8*30) / 40 = 0.75; (0.3*10 + 0.6*30 + 1.0*40) / 80 = 0.7625
    assert accuracy_curve(FALLING, [10, 30, 40]) == pytest.approx([0.9, 0.75, 0.7625])
    assert last_accuracy(FALLING, [10, 30, 40]) == pytest.approx(0.7625)


def test_average_incremental_accuracy_includes_the_first_experience() -> None:
    assert average_incremental_accuracy(FALLING, [10, 30, 40]) == pytest.approx(
        (0.9 + 0.75 + 0.7625) / 3
    )


def test_definitions_agree_on_a_falling_matrix() -> None:
    # group 0 loses 0.6, group 1 loses 0.2
    assert forgetting(FALLING) == pytest.approx(0.4)
    assert backward_transfer(FALLING) == pytest.approx(-0.4)


def test_definitions_disagree_when_a_group_improves_before_it_falls() -> None:
    # Chaudhry: ((0.9 - 0.6) + (0.8 - 0.7)) / 2; GEM: ((0.6 - 0.5) + (0.7 - 0.8)) / 2
    assert forgetting(RISING) == pytest.approx(0.2)
    assert backward_transfer(RISING) == pytest.approx(0.0)


def test_chaudhry_is_negative_when_every_group_ends_at_its_best() -> None:
    # the maximum is over earlier experiences only: the last row must not compete with itself
    R = np.array([[0.5, NAN], [0.8, 1.0]])
    assert forgetting(R) == pytest.approx(-0.3)
    assert backward_transfer(R) == pytest.approx(0.3)


def test_one_experience_cannot_forget() -> None:
    assert summarise([[0.75]], [8]) == {
        "last_accuracy": 0.75,
        "average_incremental_accuracy": 0.75,
        "forgetting": 0.0,
        "backward_transfer": 0.0,
    }


def test_values_above_the_diagonal_are_never_read() -> None:
    filled = np.where(np.isnan(RISING), 1.0, RISING)
    sizes = np.array([3, 4, 5])
    assert summarise(filled, sizes) == summarise(RISING, sizes)
    assert accuracy_curve(filled, sizes).tolist() == accuracy_curve(RISING, sizes).tolist()


@pytest.mark.parametrize(
    ("R", "complaint"),
    [
        (np.ones((2, 3)), "T, T"),
        (np.ones(3), "T, T"),
        (np.ones((0, 0)), "T, T"),
        (np.array([[0.5, NAN], [NAN, 0.5]]), "fractions"),
        (np.array([[50.0]]), "fractions"),
    ],
)
def test_what_is_no_accuracy_matrix_is_refused(R: np.ndarray, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        forgetting(R)


@pytest.mark.parametrize("sizes", [[1, 2], [1, 2, 0], [[1, 2, 3]], [1, NAN, 3], [1, 2, np.inf]])
def test_sizes_must_fit_the_matrix(sizes: list[float]) -> None:
    with pytest.raises(ValueError, match="3 positive counts"):
        last_accuracy(FALLING, sizes)


# --- against Avalanche, fed with plain numbers ---


def avalanche_differences(R: np.ndarray, metric: str) -> float:
    """Mean over the earlier groups of Avalanche's standalone Forgetting or BWT."""
    module = pytest.importorskip("avalanche.evaluation.metrics.forgetting_bwt")
    differences = getattr(module, metric)()
    for t, row in enumerate(R):
        for i in range(t + 1):
            differences.update(i, row[i], initial=i == t)
    return float(np.mean(list(differences.result().values())))


@pytest.mark.parametrize("R", [FALLING, RISING])
def test_backward_transfer_equals_avalanche(R: np.ndarray) -> None:
    assert backward_transfer(R) == pytest.approx(avalanche_differences(R, "BWT"))


def test_forgetting_equals_avalanche_only_where_a_group_starts_at_its_best() -> None:
    assert forgetting(FALLING) == pytest.approx(avalanche_differences(FALLING, "Forgetting"))
    assert avalanche_differences(RISING, "Forgetting") == pytest.approx(0.0)
    assert forgetting(RISING) == pytest.approx(0.2)


def test_accuracies_equal_avalanche_on_predictions() -> None:
    torch = pytest.importorskip("torch")
    from avalanche.evaluation.metrics import Accuracy

    generator = torch.Generator().manual_seed(0)
    sizes, R, curve = [40, 25, 60], np.full((3, 3), NAN), []
    for t in range(3):
        stream = Accuracy()
        for i in range(t + 1):
            labels = torch.randint(0, 2, (sizes[i],), generator=generator) + 2 * i
            predictions = torch.randint(0, 2 * t + 2, (sizes[i],), generator=generator)
            group = Accuracy()
            for metric in (group, stream):
                metric.update(predictions, labels)
            R[t, i] = group.result()
        curve.append(stream.result())
    assert accuracy_curve(R, sizes) == pytest.approx(curve)
    assert last_accuracy(R, sizes) == pytest.approx(curve[-1])
    assert average_incremental_accuracy(R, sizes) == pytest.approx(np.mean(curve))
