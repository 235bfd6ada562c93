"""log p(token | class) of images under a few classes each, the null class among them.

Shapes: B images, P classes an image is read under, C classes in all, L tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cil.classify.reading import MAX_LOGITS, Images, Reader
from cil.models.class_groups import NULL_CLASS, Incremental
from cil.models.var import VAR


@torch.inference_mode()
def pair_log_likelihoods(
    model: Incremental,
    tokens_BL: Tensor,
    inputs_BLZ: Tensor,
    labels_BP: Tensor,
    max_tokens: int | None = None,
) -> Tensor:
    """log p(token | coarser tokens, class) under an image's own classes -> (B, P, L).

    Of the labels NULL_CLASS is no class at all, without an adapter: as in sampling by the trunk
    that knows so of the group that an image's first label belongs to (`trunk_without_class`). A
    pair that is named several times is read once. `max_tokens` is that of
    `group_log_likelihoods`.
    """
    images = Images(model, tokens_BL, inputs_BLZ, max_tokens)
    values_BPL = torch.empty(*labels_BP.shape, tokens_BL.shape[1], device=tokens_BL.device)
    wanted_BC = torch.zeros(
        len(labels_BP), model.groups.classes + 1, dtype=torch.bool, device=labels_BP.device
    ).scatter(1, labels_BP % (model.groups.classes + 1), True)  # the last column is the null class
    for group in range(len(model.groups)):
        labels = model.groups.labels(group)
        of_group_BP = (labels_BP >= labels.start) & (labels_BP < labels.stop)
        if of_group_BP.any():
            reader = Reader(images, group, labels, wanted_BC)
            values_NL = reader.read(len(images.scales), last=True)
            _, image_N, label_N = reader.rows_3N
            row_of_BC = torch.zeros_like(wanted_BC, dtype=torch.long)
            row_of_BC[image_N, label_N] = torch.arange(len(image_N), device=image_N.device)
            image_M, place_M = of_group_BP.nonzero(as_tuple=True)
            row_M = row_of_BC[image_M, labels_BP[image_M, place_M]]
            values_BPL[image_M, place_M] = values_NL[row_M]
    null_BP = labels_BP == NULL_CLASS
    for trunk, of_trunk_B in _without_class(model, labels_BP[:, 0]):
        image_M, place_M = (null_BP & of_trunk_B[:, None]).nonzero(as_tuple=True)
        if len(image_M):
            read_N, row_M = image_M.unique(return_inverse=True)
            values_BPL[image_M, place_M] = _null(images, trunk, read_N)[row_M]
    return values_BPL


def _without_class(model: Incremental, labels_B: Tensor) -> Iterator[tuple[VAR, Tensor]]:
    """The trunks that know images of no class, and which of the labels are of each one's groups."""
    of_trunk: dict[VAR, Tensor] = {}
    for group in range(len(model.groups)):
        labels, trunk = model.groups.labels(group), model.trunk_without_class(group)
        # An image that is read under no class at all counts to the first group.
        of_group_B = (labels_B.clamp_min(0) >= labels.start) & (labels_B < labels.stop)
        of_trunk[trunk] = of_trunk.get(trunk, torch.zeros_like(of_group_B)) | of_group_B
    yield from of_trunk.items()


def _null(images: Images, trunk: VAR, rows_N: Tensor) -> Tensor:
    """log p(token | coarser tokens) of some of the images (N, L)."""
    groups = images.model.groups
    every, tokens = range(len(images.scales)), images.tokens_BL.shape[1]
    size = max(1, min(images.max_tokens, MAX_LOGITS // trunk.head.out_features) // tokens)
    parts = []
    for rows in rows_N.split(size):
        null_BD = groups.null.expand(len(rows), -1)
        if trunk.condition_from:
            x = images.shared(every)[rows]
        else:
            x = trunk.common(images.inputs(every)[rows], null_BD, every)
        x = trunk.conditioned(x, null_BD, every)
        parts.append(trunk.log_likelihoods(x, null_BD, images.tokens_BL[rows]))
    return torch.cat(parts)
