"""Whether reasons drift: the same few test images explained again after each experience.

A method whose earlier groups are frozen gives the same reasons for a class for ever; only the best
wrong class may be another one. One that keeps learning can stay right and yet change its reasons.

Shapes: N images, T experiences, L tokens, p_K the side of the finest scale, H x W pixels.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cil import plots
from cil.explain import Explainable, best_wrong, combined, explain, heat_map, to_pixels

IMAGES = 4
COLUMNS = 10  # experiences that the figure shows at most


def chosen(images: Dataset, count: int = IMAGES) -> list[int]:
    """The first `count` images, as evenly over the classes as they come."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(images.targets):  # type: ignore[attr-defined]
        of_class.setdefault(label, []).append(index)
    turns = zip_longest(*(of_class[label] for label in sorted(of_class)))
    return [index for turn in turns for index in turn if index is not None][:count]


def read(images: Dataset, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images (N, channels, H, W) and labels (N,)."""
    pairs = [images[index] for index in indices]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def reasons(method: Explainable, images: Dataset, device: torch.device) -> pd.DataFrame:
    """What every token of the chosen images says now, a row a token.

    Columns: image (its place among `images`), label, prediction, rival (the best wrong class),
    token, label_nats and rival_nats (both against the null class).
    """
    indices = chosen(images)
    pixels, labels_N = read(images, indices)
    pixels = pixels.to(device)
    scores_NC = method.every_class(pixels).cpu()
    found = explain(method, pixels, labels_N, best_wrong(scores_NC, labels_N))
    tokens = found.label_BL.shape[1]
    each = {
        "image": indices,
        "label": labels_N.tolist(),
        "prediction": scores_NC.argmax(1).tolist(),
        "rival": found.rivals_B.tolist(),
    }
    columns: dict[str, Any] = {name: np.repeat(values, tokens) for name, values in each.items()}
    columns["token"] = np.tile(np.arange(tokens), len(indices))
    columns["label_nats"] = found.label_BL.flatten().double().cpu().numpy()
    columns["rival_nats"] = found.rival_BL.flatten().double().cpu().numpy()
    return pd.DataFrame(columns)


def change(rows: pd.DataFrame, scales: Sequence[int]) -> float | None:
    """How far the last reasons for the images' classes are from the first; None: they are these.

    The mean over images of 1 - the cosine of the maps against the null class, in [0, 2].
    """
    experiences = sorted(rows["experience"].unique().tolist())
    if len(experiences) < 2:
        return None
    first, last = (rows[rows["experience"] == t] for t in (experiences[0], experiences[-1]))
    count = first["image"].nunique()
    maps = [combined(_tokens(table, "label_nats", count), scales) for table in (first, last)]
    likeness = [_likeness(a, b) for a, b in zip(*maps, strict=True)]
    return max(0.0, 1 - sum(likeness) / count)  # of equal maps it may be off by a rounding


def figure(
    rows: pd.DataFrame,
    images: Dataset,
    class_names: Sequence[str],
    scales: Sequence[int],
    accuracies_T: Sequence[float],
    title: str,
) -> plots.Figure:
    """Two rows an image: why its class, and why not the best wrong one; a column an experience.

    rows: those of `reasons`, with their experience; accuracies_T: on the first class group.
    """
    experiences = sorted(rows["experience"].unique().tolist())
    picks = np.linspace(0, len(experiences) - 1, min(COLUMNS, len(experiences))).round().astype(int)
    shown = [experiences[pick] for pick in picks]
    indices = rows["image"].drop_duplicates().tolist()
    pixels, labels_N = read(images, indices)
    tables = [rows[rows["experience"] == t] for t in shown]
    label_TNpp, rival_TNpp = (
        [combined(_tokens(table, column, len(indices)), scales) for table in tables]
        for column in ("label_nats", "rival_nats")
    )
    contrast_TNpp = [a - b for a, b in zip(label_TNpp, rival_TNpp, strict=True)]
    rivals = [table.groupby("image", sort=False)["rival"].first().tolist() for table in tables]
    maps, notes, names = [], [], []
    for n, label in enumerate(labels_N.tolist()):
        name = class_names[label]
        names += [f"{name}, test image {indices[n]}\nagainst no class", "against the\nbest wrong"]
        likeness = [_likeness(m[n], label_TNpp[0][n]) for m in label_TNpp]
        notes.append([f"r = {r:.2f}" for r in likeness])
        likeness = [_likeness(m[n], contrast_TNpp[0][n]) for m in contrast_TNpp]
        against = [class_names[of_images[n]] for of_images in rivals]
        notes.append([f"{c}, r = {r:.2f}" for c, r in zip(against, likeness, strict=True)])
        for series in (label_TNpp, contrast_TNpp):
            heat = heat_map(torch.stack([m[n] for m in series]))
            maps.append(to_pixels(heat, pixels.shape[-1]).numpy())
    return plots.heat_maps(
        np.repeat(pictures(pixels), 2, 0),
        np.stack(maps),
        names,
        [f"after {t + 1}: {accuracies_T[t]:.0%}" for t in shown],
        notes,
        f"{title}\nOrange speaks for it; nothing does where none is. Above: accuracy on the first\n"
        "class group. r: cosine to the first map.",
    )


def pictures(images: Tensor) -> NDArray[np.float64]:
    """Images in [-1, 1] -> (N, H, W, 3 or 1) in [0, 1]."""
    channels_last = images.clamp(-1, 1).permute(0, 2, 3, 1)
    values: NDArray[np.float64] = ((channels_last + 1) / 2).double().cpu().numpy()
    return values


def _tokens(table: pd.DataFrame, column: str, images: int) -> Tensor:
    return torch.from_numpy(table[column].to_numpy(np.float64, copy=True)).view(images, -1)


def _likeness(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))
