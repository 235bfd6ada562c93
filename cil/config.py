"""The schema of every experiment: of its YAML, of the command line and of their help.

`command_line.py` reads them. No import here may cost seconds: `--help` goes through it.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class StreamConfig:
    """Where the images come from and in which class groups they arrive."""

    source: str = "digits"
    """Image source: digits (scikit-learn's 1,797 real handwritten digits, shown at 16 px),
    glyphs100 (100 characters drawn from matplotlib's fonts at 32 px), image_folder, or, through
    torchvision, cifar10, cifar100, mnist or fashion_mnist."""
    root: str | None = None
    """Folder of an image_folder, with train/ and val/ (or test/, which goes before) and in them a
    folder a class; or of what torchvision reads and downloads (null: in the cache)."""
    class_list: str | None = None
    """Classes of an image_folder: ucir, cmc or podnet (the three lists called ImageNet-100),
    tiny_imagenet100 (half of Tiny ImageNet's), or a text file with one a line; null takes every
    class there is."""
    image_size: int | None = None
    """Side in pixels, 4 to 1024, to which an image_folder's images are cut and resized."""
    protocol: str = "b0-2"
    """Class groups: b0-10 is groups of 10 classes, b50-10 is 50 classes and then groups of 10."""
    class_order: list[int] | None = None
    """Original class ids in order of arrival; null draws them from order_seed."""
    order_seed: int = 1993
    """Seed of the class order (numpy RandomState permutation; 1993 is the literature's)."""
    validation: float = 0.15
    """Share of the training images held out for everything that is tuned or fitted."""
    evaluate: Literal["test", "validation"] = "test"
    """Images that methods are evaluated on; validation, to choose settings by, leaves the test
    images unseen."""
    stop_after: int | None = None
    """Experiences after which the stream ends; null goes through all of them."""
    augment: bool = True
    """Whether training images are varied at random: digits and glyphs a little rotated, shifted and
    scaled, others shifted and, where that leaves their class the same, mirrored."""
    mirror: bool = False
    """Whether a mirrored image of an image_folder is still one of its class, and training shows it
    so; of the other sources, cifar10, cifar100 and fashion_mnist are mirrored always, digits,
    glyphs100 and mnist never."""


@dataclass
class TokenizerConfig:
    """The multi-scale tokenizer, trained on the first experience alone and then frozen."""

    channels: int = 16
    """Channels of the encoder's and decoder's finest level."""
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Width of each level in units of channels; every level but the first halves the side."""
    residual_blocks: int = 0
    """Residual blocks a level."""
    latent_channels: int = 8
    """Channels of a code vector."""
    vocabulary: int = 64
    """Number of code vectors."""
    scales: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """Side of each scale's token map, coarse to fine; the last is the latents' side."""
    phis: int = 4
    """Number of convolutions that mend up-sampled scales, shared among the scales."""
    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 32
    """Images a step."""
    lr: float = 2.0e-3
    """Peak learning rate (AdamW, one cycle)."""


@dataclass
class VARConfig:
    """The class-conditional VAR and how its class groups learn."""

    plasticity: Literal["embedding", "adapter", "trunk", "copy", "scratch"] = "adapter"
    """What a class group may change: its embedding, also an adapter, the trunk, or a copy of it;
    scratch: a trunk of its own that has learned nothing before."""
    depth: int = 3
    """Transformer blocks."""
    width: int = 64
    """Features a token."""
    heads: int = 2
    """Attention heads a block; must divide width."""
    condition_from: int = 0
    """First block that sees the class; those before it run once an image and not once a class."""
    drop_path: float = 0.0
    """Stochastic depth of the last block in training."""
    adapter_rank: int = 16
    """Rank of an adapter's low-rank updates."""
    adapter_layers: Literal["all", "adaln"] = "all"
    """Layers an adapter updates: every linear one, or only those that read the class."""
    views: int = 24
    """Augmented views of each training image, tokenized once and cached."""
    first_steps: int = 500
    """Optimiser steps of the trunk, which learns before the first class group."""
    steps: int = 300
    """Optimiser steps of every class group."""
    batch_size: int = 24
    """Token maps a step."""
    lr: float = 8.0e-3
    """Peak learning rate (AdamW, one cycle)."""
    weight_decay: float = 0.05
    """Weight decay of a trunk's matrices; vectors, embeddings and adapters have none."""
    condition_dropout: float = 0.1
    """Share of training images shown with the null class while the trunk learns."""
    cca_steps: int = 0
    """Optimiser steps of condition contrastive alignment (A-VARC+), once a class group has learned:
    its classes' likelihoods learn to differ; 0: none."""
    cca_lr: float = 1.0e-3
    """Peak learning rate of the alignment."""
    cca_beta: float = 0.02
    """How soon a changed likelihood is enough; for images of 680 tokens, of fewer it is larger."""
    cca_lambda: float = 50.0
    """Weight of making other classes of the group less likely, against the image's own more so."""
    rotations: bool = True
    """Whether tokenizer and trunk learn images turned by random quarters, each turn its classes."""
    scale_weights: bool = True
    """Whether classification weights the scales (fitted on held-out images of experience 0)."""
    schedule: Literal["varc", "a_varc", "adaptive"] = "varc"
    """varc: all classes on all scales; a_varc: ten after the coarse ones, three smoothed;
    adaptive: those near the best after every scale, by margins fitted on held-out images."""
    smoothing_samples: int = 4
    """Copies of an image whose likelihoods are averaged, the clean one counted; 1: no smoothing."""
    smoothing: Literal["noise", "views"] = "noise"
    """What the other copies are: noise puts some on the tokenizer's latents, as published; views
    varies the image itself at random, as in training."""
    smoothing_mean: Literal["log_likelihoods", "probabilities"] = "log_likelihoods"
    """Of what the copies are averaged: A-VARC's public code and its text differ."""
    smoothing_sigma: float = 0.04
    """Standard deviation of the noise on the tokenizer's latents of the other copies; views have
    none."""


@dataclass
class DiffusionConfig:
    """The class-conditional diffusion model (DiT), learned as the VAR is, and its classifier."""

    plasticity: Literal["embedding", "adapter", "trunk", "copy", "scratch"] = "adapter"
    """What a class group may change: its embedding, also an adapter, the trunk, or a copy of it;
    scratch: a trunk of its own that has learned nothing before."""
    space: Literal["latents", "pixels"] = "latents"
    """What is denoised: the tokenizer's continuous latents, before quantisation, or the pixels;
    either in units of its own spread over the first experience."""
    objective: Literal["noise", "flow"] = "noise"
    """What is predicted: the noise (DDPM), or the velocity of the straight path from noise to data
    (rectified flow)."""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """How noise grows over the 1000 timesteps of objective noise."""
    size: Literal["S", "B", "L", "XL"] | None = None
    """A published size of DiT, which sets depth, width and heads; null leaves them to the next
    three keys."""
    depth: int = 3
    """Transformer blocks."""
    width: int = 64
    """Features a token; a multiple of four."""
    heads: int = 2
    """Attention heads a block; must divide width."""
    patch: int = 2
    """Side of the square of latents or pixels that makes a token."""
    adapter_rank: int = 16
    """Rank of an adapter's low-rank updates."""
    adapter_layers: Literal["all", "adaln"] = "all"
    """Layers an adapter updates: every linear one, or only those that read the class."""
    views: int = 24
    """Augmented views of each training image, encoded once and cached."""
    first_steps: int = 800
    """Optimiser steps of the trunk, which learns before the first class group."""
    steps: int = 600
    """Optimiser steps of every class group."""
    batch_size: int = 64
    """Images a step, each at a timestep of its own."""
    lr: float = 4.0e-3
    """Peak learning rate (AdamW, one cycle)."""
    weight_decay: float = 0.05
    """Weight decay of a trunk's matrices; vectors, embeddings and adapters have none."""
    condition_dropout: float = 0.1
    """Share of training images shown with the null class while the trunk learns."""
    rotations: bool = True
    """Whether tokenizer and trunk learn images turned by random quarters, each turn its classes."""
    schedule: Literal["dc_25", "dc_25_250"] | list[list[int]] = "dc_25"
    """dc_25: every class at 25 timesteps; dc_25_250: then the best five at 225 more; or any list
    of such stages, [timesteps, classes kept], as [[10,4],[40,1]]."""


@dataclass
class DiscriminativeConfig:
    """The discriminative baselines: a CNN trained by Avalanche (cil/methods/recipes.py)."""

    backbone: Literal["auto", "cnn", "resnet18", "resnet50"] = "auto"
    """The network: auto is a small CNN up to 16 px and a ResNet18 above; up to 64 px a ResNet
    begins with a 3x3 convolution of stride 1 and no pooling, as usual on CIFAR."""
    epochs: int = 8
    """Passes over each experience's training images."""
    batch_size: int = 32
    """Images a step; methods that store images add as many of those. The fewer that are left over
    at the end of a pass make a step that is as much smaller."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """What the CNN is trained by; for ResNets the literature takes sgd with lr 0.1, momentum 0.9
    and weight_decay 5e-4."""
    lr: float = 5.0e-3
    """Learning rate at the start of an experience (half a cosine down to zero)."""
    weight_decay: float = 0.0
    """Weight decay of all parameters, as part of the gradient."""
    momentum: float = 0.9
    """Momentum of sgd."""
    stored_images: int = 200
    """Images that agem, replay, gdumb, icarl, derpp, er_ace, scr and bic may store, shared evenly
    by the classes."""
    backbone_epochs: int = 100
    """cwr, ncm, slda and fecam: passes over the first experience's images, turned by random
    quarters, that their backbone learns by before it is frozen; those that would learn the same
    one share it."""
    ewc_lambda: float = 100.0
    """ewc: strength of the penalty (its paper reports 400 to 5,000, of other losses)."""
    si_lambda: float = 1.0
    """si: strength of the penalty (its authors' code tries 0.01 to 1)."""
    mas_lambda: float = 1.0
    """mas: strength of the penalty (its paper: 1)."""
    mas_alpha: float = 0.5
    """mas: weight of the earlier importances against the newest (its paper: their mean)."""
    lwf_alpha: float = 1.0
    """lwf: weight of the distillation loss (its paper: 1)."""
    lwf_temperature: float = 2.0
    """lwf: temperature of the distillation (its paper: 2)."""
    slda_shrinkage: float = 1.0e-4
    """slda: shrinkage of the covariance (its paper: 1e-4)."""
    fecam_shrinkage: float = 0.1
    """fecam: shrinkage of every class's covariance, diagonal and beside it (its paper: 1)."""
    derpp_alpha: float = 0.1
    """derpp: weight of the stored logits (its paper: 0.1 to 0.5)."""
    derpp_beta: float = 0.5
    """derpp: weight of the stored labels (its paper: 0.5 to 1)."""
    scr_temperature: float = 0.1
    """scr: temperature of the contrastive loss (its paper: 0.1)."""
    bic_held_out: float = 0.1
    """bic: share of the stored images that its bias is fitted on (its paper: 0.1), and the most of
    a class's images that it takes for that."""
    bic_epochs: int = 200
    """bic: passes over those that its bias is fitted on; the learning rate falls after 50, 100 and
    150 of them."""
    bic_temperature: float = 2.0
    """bic: temperature of the distillation (its paper: 2)."""


@dataclass
class SamplesConfig:
    """What generative methods draw after each experience: a grid with a row for every class."""

    per_class: int = 8
    """Images of every class seen, from the same seeds each time; 0 draws none."""
    guidance: float = 1.5
    """Strength of classifier-free guidance; 0 draws from the model as it is."""
    steps: int = 50
    """Steps of a diffusion model (DDIM); a VAR takes one a scale."""


@dataclass
class TrainerConfig:
    """Where it runs."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind; auto takes a GPU where there is one."""
    devices: int = 1
    """GPUs on each node, or on CPUs processes; every batch_size is shared among all of them."""
    num_nodes: int = 1
    """Machines; with several, torchrun starts the command on each of them."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices train: ddp gives each of them the whole model and a share of every
    batch; auto takes it."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Of training and scoring VAR and DiT: auto is bf16-mixed on a GPU and 32-true on a CPU. Images
    become tokens in 32 bits always, so that they are the same tokens in training and scoring."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether a VAR or DiT goes through torch.compile: auto compiles, on a GPU, trunks of 5
    million parameters or more; smaller ones are done before they are compiled."""
    jobs: int = 1
    """Runs (a method with a seed) that learn at the same time, each in a process of its own; they
    share the cores and the GPU, and of a line of several the last one has no more threads than
    before, since their number decides the last bits. On several devices runs learn one after the
    other."""
    workers: int | None = None
    """Processes that read images; null takes all cores, or none where there is little to read. Of
    the discriminative methods their number changes how images are varied at random."""
    progress: bool = True
    """Whether to show progress bars."""
    keep_checkpoints: bool = False
    """Whether the checkpoint of every experience stays, and not the newest alone: what a method
    whose earlier classes change was like in between (`experiments.ood`) is in no other file."""


@dataclass
class WandbConfig:
    """Weights & Biases: one run a method and seed, grouped by experiment."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto logs online where an account is configured and to local files where none is."""
    project: str = "cil"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is the account's default."""


@dataclass
class Config:
    """One experiment: a stream, the methods that learn it, and where the records go."""

    methods: list[str] | str = field(default_factory=lambda: ["var", "finetune", "replay", "joint"])
    """Methods to compare, as [var,joint]: var (or var-embedding, var-adapter, var-trunk, var-copy,
    var-scratch), diffusion (or diffusion-embedding, ...), finetune, ewc, si, mas, lwf, cwr, ncm,
    slda, fecam, agem, replay, gdumb, icarl, derpp, er_ace, scr, bic, cumulative, joint; or the sets
    all, generative, discriminative, exemplar_free."""
    seeds: list[int] | int = field(default_factory=lambda: [0])
    """Random seeds; every method runs once with each; as [0,1,2]."""
    runs: str = "runs"
    """Folder of the records; a run lands in RUNS/EXPERIMENT/METHOD/seedK."""
    cache: str = "cache"
    """Folder of what is made once and used again: scans of image folders, drawn glyphs, tokenizers,
    trunks, token maps, latents and frozen backbones. Delete it whenever no run is using it."""
    tuned: dict[str, dict[str, int | float | str | bool]] = field(default_factory=dict)
    """Settings of single methods, laid over all others: {ewc: {discriminative.ewc_lambda: 10.0}};
    experiments/tune.py writes them. Over the experiment's come the plain values of a --config file,
    then what that has tuned, then the line; --tuned there replaces all."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    var: VARConfig = field(default_factory=VARConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    discriminative: DiscriminativeConfig = field(default_factory=DiscriminativeConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
