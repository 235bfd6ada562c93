"""Class parameters that grow by one class group at a time and never touch an earlier one.

Every group is a parameter tensor of its own: AdamW moves even rows that get no gradient (weight
decay, momentum), so a single growing table could not keep its earlier rows.

Shapes: B images, n classes of a group, D width, r rank.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

NULL_CLASS = -1  # the label that stands for "no class" (classifier-free guidance, p(x))


class LowRank(nn.Module):
    """A low-rank update B A of a linear layer's matrix (LoRA, arXiv 2106.09685); zero at first."""

    def __init__(self, features_in: int, features_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, features_in) * features_in**-0.5)
        self.up = nn.Parameter(torch.zeros(features_out, rank))

    def matrix(self) -> Tensor:
        """(out, in)."""
        return self.up @ self.down


Updates = Mapping[str, LowRank]  # a layer's name -> what is added to its matrix


class Adapter(nn.Module):
    """One group's low-rank updates of a trunk, by place ("0" for block 0, "trunk") and layer."""

    def __init__(self, places: Mapping[str, Mapping[str, nn.Linear]], rank: int) -> None:
        super().__init__()
        self.places = nn.ModuleDict()
        for place, layers in places.items():
            updates = {n: LowRank(m.in_features, m.out_features, rank) for n, m in layers.items()}
            self.places[place] = nn.ModuleDict(updates)

    def at(self, place: str) -> Updates:
        """The updates of one place, by the name of the layer; empty where there are none."""
        if place not in self.places:
            return {}
        return dict(self.places[place].items())  # type: ignore[operator]


class ClassGroups(nn.Module):
    """The class embeddings of every group, one null embedding, and one optional adapter a group."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(width) * (1 / (3 * width)) ** 0.5)
        self.embeddings = nn.ParameterList()
        self.adapters = nn.ModuleList()  # nn.Identity where a group has none

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def sizes(self) -> list[int]:
        """Classes of each group, in order of arrival."""
        return [len(e) for e in self.embeddings]

    @property
    def classes(self) -> int:
        return sum(self.sizes)

    def grow(self, classes: int, adapter: Adapter | None = None) -> None:
        """Add a group of `classes` classes; freeze every earlier group.

        New embeddings start close to the null one: what the trunk knows of images in general.
        """
        for parameter in [*self.embeddings.parameters(), *self.adapters.parameters()]:
            parameter.requires_grad_(False)
        # By the CPU's generator, wherever the model lies: with another device's the draw, and all
        # that follow it, would depend on whether the trunk was just learned, found or resumed.
        noise = torch.randn(classes, len(self.null), device="cpu").to(self.null.device)
        self.embeddings.append(nn.Parameter(self.null.detach() + 0.02 * noise))
        self.adapters.append(nn.Identity() if adapter is None else adapter.to(self.null.device))

    def adopt(self, embeddings_nD: Tensor, null_D: Tensor) -> None:
        """Take over learned embeddings as the first group, and the null embedding."""
        self.null = nn.Parameter(null_D.clone())
        self.embeddings.append(nn.Parameter(embeddings_nD.clone()))
        self.adapters.append(nn.Identity())

    def clear(self) -> None:
        """Forget every group; the null embedding stays."""
        self.embeddings = nn.ParameterList()
        self.adapters = nn.ModuleList()

    def adapter(self, group: int) -> Adapter | None:
        adapter = self.adapters[group]
        return adapter if isinstance(adapter, Adapter) else None

    def labels(self, group: int) -> range:
        """The labels of a group: labels count classes in order of arrival."""
        first = sum(self.sizes[:group])
        return range(first, first + self.sizes[group])

    def condition(self, labels_B: Tensor) -> Tensor:
        """labels (B,), NULL_CLASS among them -> embeddings (B, D)."""
        table = torch.cat([*self.embeddings, self.null[None]])
        return table[labels_B]  # NULL_CLASS is -1: the last row


Plasticity = Literal["embedding", "adapter", "trunk", "copy", "scratch"]


class Incremental(nn.Module):
    """A trunk and the class groups it serves; plasticity says what a new group may change.

    embedding: its own embeddings only. adapter: also a low-rank update of the trunk, used for this
    group alone. trunk: the one trunk keeps learning (the case that can forget). copy: a trunk of
    its own, started from the first (memory grows). scratch: a trunk of its own too, but started
    from the first weights, which have learned nothing (as one VAE a class in van de Ven et al.
    2021, "Class-incremental learning with generative classifiers").

    The trunk itself learns before the first group, with classes that are forgotten again
    (`start`): the first group is then served like every other, neither worse nor better. With
    scratch it does not: `learns_trunk`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        width: int,
        plasticity: Plasticity,
        adapter_rank: int,
        adapter_everywhere: bool,
    ) -> None:
        super().__init__()
        self.trunks = nn.ModuleList([trunk])  # the one that learned first; `copy` adds one a group
        self.groups = ClassGroups(width)
        self.plasticity = plasticity
        self.adapter_rank = adapter_rank
        self.adapter_everywhere = adapter_everywhere
        self.starting = False  # whether the one group there is only teaches the trunk
        self._trunk_of: list[int] = []  # by group

    def start(self, classes: int) -> None:
        """Let the trunk learn from `classes` classes, which `end_start` or a `grow` forgets."""
        self._check_empty()
        self.starting = True
        self.groups.grow(classes)
        self._trunk_of = [0]

    def end_start(self) -> None:
        """Forget the classes of `start`, if that is what there are; the trunk has learned."""
        if self.starting:
            self.starting = False
            self.groups.clear()
            self._trunk_of = []

    def adopt(self, embeddings_nD: Tensor, null_D: Tensor) -> None:
        """Take over classes that the trunk knows already, as the first group."""
        self._check_empty()
        self.groups.adopt(embeddings_nD, null_D)
        self._trunk_of = [0]

    def grow(self, classes: int) -> None:
        """Add a class group. Only what it may change requires a gradient afterwards."""
        self.end_start()
        adapter = None
        if self.plasticity != "trunk":
            self.requires_grad_(False)
        if self.plasticity == "adapter":
            adapter = self.trunks[0].new_adapter(  # type: ignore[operator]
                self.adapter_rank, self.adapter_everywhere
            )
        if self.plasticity in ("copy", "scratch"):
            shared = self.trunks[0].shared_parts()  # type: ignore[operator]
            copied = deepcopy(self.trunks[0], memo={id(part): part for part in shared})
            self.trunks.append(copied.requires_grad_(True))
            for part in shared:
                part.requires_grad_(False)
        self.groups.grow(classes, adapter)
        self._trunk_of.append(len(self.trunks) - 1)

    def forward(self, inputs_BLZ: Tensor, labels_B: Tensor, group: int) -> Tensor:
        """Teacher-forced logits (B, L, V) under labels (B,) of one group, NULL_CLASS among them."""
        condition_BD, adapter = self.groups.condition(labels_B), self.groups.adapter(group)
        return self.trunk(group)(inputs_BLZ, condition_BD, adapter, self.groups.null)

    def log_likelihoods(
        self, inputs_BLZ: Tensor, labels_B: Tensor, tokens_BL: Tensor, group: int
    ) -> Tensor:
        """log p of each token (B, L) under these labels: what training maximises."""
        condition_BD, adapter = self.groups.condition(labels_B), self.groups.adapter(group)
        trunk = self.trunk(group)
        x_BLD = trunk.features(inputs_BLZ, condition_BD, adapter, self.groups.null)
        return trunk.log_likelihoods(x_BLD, condition_BD, tokens_BL, adapter)

    def predictions(
        self, noised_BZhw: Tensor, times_B: Tensor, labels_B: Tensor, group: int
    ) -> Tensor:
        """What a DiT predicts (B, Z, h, w) under these labels."""
        condition_BD, adapter = self.groups.condition(labels_B), self.groups.adapter(group)
        predicted: Tensor = self.trunk(group)(noised_BZhw, times_B, condition_BD, adapter)
        return predicted

    def null_alone(self) -> "Incremental":
        """A model of one class, the null one, on the first trunk: what reads classes reads it."""
        alone = Incremental(self.trunks[0], len(self.groups.null), "embedding", 1, False)
        alone.adopt(self.groups.null[None].detach(), self.groups.null.detach())
        return alone.train(self.training)

    def trunk(self, group: int) -> Any:
        """The trunk that serves a group."""
        return self.trunks[self._trunk_of[group]]

    def trunk_without_class(self, group: int) -> Any:
        """The trunk that knows what a group's image is like given no class."""
        return self.trunk(group) if self.plasticity == "scratch" else self.trunks[0]

    @property
    def learns_trunk(self) -> bool:
        """Whether the first trunk is to learn before there is a group."""
        return self.plasticity != "scratch"

    def _check_empty(self) -> None:
        if len(self.groups):
            raise ValueError(f"there are {len(self.groups)} class groups already")

    @property
    def trains_null(self) -> bool:
        """Whether condition dropout has anything to teach: what reads the null class learns."""
        return self.starting or self.plasticity in ("trunk", "scratch")
