"""The discriminative methods by name: which of Avalanche's strategies each is, of which paper.

A method is one entry of `RECIPES`; the defaults of its settings stand in `DiscriminativeConfig`.
Nothing costly is imported here: `--help` lists the names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# growing: a backbone under a classifier with a unit for every class seen so far.
# whole: under one with a unit for every class of the stream, which the strategy needs.
# bare: as whole, without the bias that cwr would train for all classes and restore for none; on a
# backbone as of the next three, or its first classes would have a scale of their own.
# icarl, scr: a backbone with a classifier to learn by, and the nearest class mean to answer by.
# turned: under one with a unit for every class of the first experience and each of its turns.
# ncm, fecam, slda: statistics of the features of a backbone that learns the first experience alone.
Kind = Literal["growing", "whole", "bare", "turned", "icarl", "scr", "ncm", "fecam", "slda"]


@dataclass(frozen=True)
class Recipe:
    """How a method is made from one of Avalanche's strategies."""

    strategy: str  # its class in avalanche.training.supervised, or in avalanche_plugins
    source: str  # the paper
    kind: Kind = "growing"
    plugin: str | None = None  # of cil.methods.avalanche_plugins; `options` are its arguments then
    options: Mapping[str, str] = field(default_factory=dict)  # argument -> discriminative setting
    constants: Mapping[str, Any] = field(default_factory=dict)  # its other arguments
    memory: str | None = None  # its argument that bounds the stored images, if it stores any
    afresh: bool = False  # it learns all experiences so far anew, and carries nothing over
    keeps_all: bool = False  # it keeps every image there was
    # The new images' cross-entropy is over their own group's classes: over all it would push down
    # the earlier ones, which the distillation is to keep.
    own_classes: bool = False
    # What it keeps beside network and images, by attribute of the strategy, model or a plugin.
    carries: tuple[str, ...] = ()

    @property
    def frozen(self) -> bool:
        """Whether the backbone learns in the first experience and never again."""
        return self.kind in ("bare", "ncm", "fecam", "slda")

    def settings(self, every: Iterable[str]) -> list[str]:
        """Those of the discriminative settings that this method reads, in their order."""
        own = {*self.options.values(), *([] if self.memory is None else ["stored_images"])}
        own |= {"backbone_epochs"} if self.frozen else set()
        return [key for key in every if key in own or key in _SHARED]

    @property
    def exemplar_free(self) -> bool:
        """Whether it stores no image."""
        return self.memory is None and not self.afresh and not self.keeps_all


_SHARED = ("backbone", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "momentum")
_REPLAYED = {"batch_size_mem": "batch_size"}  # as many stored images as new ones in every step

RECIPES = {
    "finetune": Recipe("Naive", "the lower bound: nothing against forgetting"),
    # Avalanche's importances are squares of a batch's mean gradient, where the paper has the mean
    # of the images' squares: the larger the batch, the smaller they are and the larger a lambda
    # they need.
    "ewc": Recipe(
        "EWC",
        "Kirkpatrick et al. 2017, arXiv 1612.00796",
        options={"ewc_lambda": "ewc_lambda"},
        carries=("saved_params", "importances"),
    ),
    "si": Recipe(
        "Naive",
        "Zenke et al. 2017, arXiv 1703.04200",
        plugin="MendedSI",
        options={"si_lambda": "si_lambda"},
        constants={"damping": 1e-3},  # its authors' on split CIFAR-10
        carries=("anchors", "importances"),
    ),
    # Its importances, too, are of a batch's mean gradient: for digits as good as those
    # of single images.
    "mas": Recipe(
        "Naive",
        "Aljundi et al. 2018, arXiv 1711.09601",
        plugin="MendedMAS",
        options={"lambda_reg": "mas_lambda", "alpha": "mas_alpha"},
        carries=("params", "importance"),
    ),
    # Avalanche asks the old network in training mode, so by the statistics of the new images. Of
    # held-out digits lwf is right for 66 % so, and for 63 % at best with the running statistics of
    # its paper, at a weight of 30; icarl, which does the same, for 93 % either way.
    "lwf": Recipe(
        "LwF",
        "Li & Hoiem 2016, arXiv 1606.09282",
        options={"alpha": "lwf_alpha", "temperature": "lwf_temperature"},
        own_classes=True,
        carries=("lwf.prev_model",),
    ),
    "cwr": Recipe(
        "CWRStar",
        "Lomonaco & Maltoni 2017, arXiv 1705.03550; CWR* in arXiv 1907.03799",
        kind="bare",
        constants={"cwr_layer_name": "head"},
        carries=("saved_weights",),
    ),
    "ncm": Recipe(
        "Naive",
        "Mensink et al. 2013, on a backbone frozen after the first experience",
        kind="ncm",
        carries=("eval_classifier.class_means",),
    ),
    # Its statistics are of augmented images, those of ncm and fecam of the images themselves: as
    # Avalanche's strategies read them.
    "slda": Recipe(
        "MendedSLDA",
        "Hayes & Kanan 2020, arXiv 1909.01520",
        kind="slda",
        options={"shrinkage_param": "slda_shrinkage"},
        carries=("muK", "cK", "Sigma"),
    ),
    "fecam": Recipe(
        "Naive",
        "Goswami et al. 2023, arXiv 2309.14062",
        kind="fecam",
        options={"shrink1": "fecam_shrinkage", "shrink2": "fecam_shrinkage"},
        carries=("eval_classifier.class_means", "eval_classifier.class_covs"),
    ),
    "agem": Recipe(
        "Naive",
        "Chaudhry et al. 2019, arXiv 1812.00420",
        plugin="SharedAGEM",
        options={"sample_size": "batch_size"},
        memory="mem_size",
    ),
    "replay": Recipe("Replay", "ER: Chaudhry et al. 2019, arXiv 1902.10486", memory="mem_size"),
    "gdumb": Recipe(
        "GDumb",
        "Prabhu et al. 2020, ECCV",
        memory="mem_size",
        carries=("init_model",),
    ),
    "icarl": Recipe(
        "MendedICaRL",
        "Rebuffi et al. 2017, arXiv 1611.07725",
        kind="icarl",
        constants={"fixed_memory": True},
        memory="memory_size",
        carries=("old_model.feature_extractor", "old_model.train_classifier", "class_means"),
    ),
    "derpp": Recipe(
        "MendedDER",
        "Buzzega et al. 2020, arXiv 2004.07211",
        kind="whole",
        options={"alpha": "derpp_alpha", "beta": "derpp_beta", **_REPLAYED},
        memory="mem_size",
        carries=("storage_policy.buffer.logits",),
    ),
    "er_ace": Recipe(
        "MendedERACE",
        "Caccia et al. 2022, arXiv 2104.05025",
        options=_REPLAYED,
        memory="mem_size",
    ),
    "scr": Recipe(
        "MendedSCR",
        "Mai et al. 2021, arXiv 2103.13885",
        kind="scr",
        options={"temperature": "scr_temperature", **_REPLAYED},
        memory="mem_size",
        carries=("eval_classifier.class_means",),
    ),
    "bic": Recipe(
        "Naive",
        "Wu et al. 2019, arXiv 1905.13260",
        plugin="MendedBiC",
        options={
            "val_percentage": "bic_held_out",
            "stage_2_epochs": "bic_epochs",
            "T": "bic_temperature",
        },
        memory="mem_size",
        carries=("model_old", "bias_layer"),
    ),
    "cumulative": Recipe("Cumulative", "trained on, with all images so far", keeps_all=True),
    "joint": Recipe(
        "JointTraining", "the upper bound: trained anew on all images so far", afresh=True
    ),
}

# How a backbone that is to be frozen learns the first experience.
BACKBONE = Recipe("Naive", "as VAR's tokenizer and trunk do", kind="turned", plugin="Turns")
