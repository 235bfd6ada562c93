"""Reads released VAR checkpoints (arXiv 2404.02905): `vae_ch160v4096z32.pth`, `var_d16.pth`.

Sizes are inferred from the tensors. Reading is strict: every tensor of the files is used or is one
of the known buffers, and every parameter of the models is filled.
"""

import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cil.errors import UserError
from cil.models.class_groups import Incremental, Plasticity
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import VAR

REPOSITORY = "FoundationVision/var"  # on Hugging Face

# Their names, and ours. {i} counts blocks or phis; a trailing dot stands for weight and bias.
TOKENIZER_NAMES = {
    "encoder.conv_in.": "encoder.conv_in.",
    "encoder.norm_out.": "encoder.norm_out.",
    "encoder.conv_out.": "encoder.conv_out.",
    "decoder.conv_in.": "decoder.conv_in.",
    "decoder.norm_out.": "decoder.norm_out.",
    "decoder.conv_out.": "decoder.conv_out.",
    "quant_conv.": "before.",
    "post_quant_conv.": "after.",
    "quantize.embedding.weight": "codebook",
    "quantize.quant_resi.qresi_ls.{i}.": "phis.{i}.conv.",
}
# Within a layer of the encoder or decoder; other names are the same on both sides.
LAYER_NAMES = {"shortcut": "nin_shortcut", "proj": "proj_out"}
VAR_NAMES = {
    "word_embed.": "embed.",
    "pos_start": "start",
    "pos_1LC": "position",
    "lvl_embed.weight": "level.weight",
    "shared_ada_lin.1.": "shared_adaln.",
    "blocks.{i}.ada_lin.1.": "blocks.{i}.adaln.",
    "blocks.{i}.ada_gss": "blocks.{i}.own_modulation",
    "blocks.{i}.attn.mat_qkv.weight": "blocks.{i}.attention.qkv.weight",
    "blocks.{i}.attn.q_bias": "blocks.{i}.attention.q_bias",
    "blocks.{i}.attn.v_bias": "blocks.{i}.attention.v_bias",
    "blocks.{i}.attn.scale_mul_1H11": "blocks.{i}.attention.log_scale",
    "blocks.{i}.attn.proj.": "blocks.{i}.attention.proj.",
    "blocks.{i}.ffn.fc1.": "blocks.{i}.fc1.",
    "blocks.{i}.ffn.fc2.": "blocks.{i}.fc2.",
    "head_nm.ada_lin.1.": "head_adaln.",
    "head.": "head.",
}
CLASSES = "class_emb.weight"  # the last row is the null class
LEVELS = "lvl_1L"  # the scale of every token
# Buffers that hold nothing learned.
TOKENIZER_BUFFERS = {"quantize.ema_vocab_hit_SV"}
VAR_BUFFERS = {LEVELS, "attn_bias_for_masking", "blocks.{i}.attn.zero_k_bias"}

Tensors = Mapping[str, Tensor]


def load(
    tokenizer_path: str | Path,
    var_path: str | Path,
    *,
    plasticity: Plasticity = "adapter",
    adapter_rank: int = 16,
    adapter_everywhere: bool = True,
) -> tuple[MultiScaleTokenizer, Incremental]:
    """The released tokenizer, frozen, and the released VAR with its classes as one class group.

    A path is that of a file, or "FoundationVision/var/FILE" to fetch it from Hugging Face (needs
    the `hub` extra). `var_path` may also be a checkpoint of the authors' trainer.

    Raises:
        UserError: a file is missing or damaged, or a tensor is missing, left over or of another
            shape; the message names it. Or plasticity is scratch.
    """
    if plasticity == "scratch":
        raise UserError(
            "plasticity is scratch, but a released trunk has learned already: choose copy."
        )
    theirs = _Checkpoint(var_path, inner=("trainer", "var_wo_ddp"))
    scales = _scales(theirs)
    tokenizer = _load_tokenizer(_Checkpoint(tokenizer_path, ("trainer", "vae_local")), scales)
    trunk = _load_trunk(theirs, scales, tokenizer)
    classes = theirs.shaped(CLASSES, axes=2).float()
    if classes.shape[1] != trunk.width:
        raise UserError(
            f"{theirs.path}: {CLASSES} has shape {tuple(classes.shape)}, but {trunk.width} columns "
            "are needed."
        )
    model = Incremental(trunk, trunk.width, plasticity, adapter_rank, adapter_everywhere)
    model.adopt(classes[:-1], null_D=classes[-1])
    return tokenizer.eval().requires_grad_(False), model.eval()


class _Checkpoint:
    """The tensors of a file, by their own names; a missing one is named in the error."""

    def __init__(self, path: str | Path, inner: tuple[str, ...]) -> None:
        self.path = _find(path)
        mapped = zipfile.is_zipfile(self.path)  # files of torch 1.5 and older are no archives
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            raise UserError(
                f"{self.path} is not a readable checkpoint: it is damaged, or holds more than "
                "tensors and plain values."
            ) from None
        for name in inner:
            if isinstance(content, Mapping) and name in content:
                content = content[name]
        if not isinstance(content, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise UserError(f"{self.path} holds no tensors by name.")
        self.tensors: Tensors = content

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor {name}.")
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shaped(self, name: str, axes: int) -> Tensor:
        """A tensor that sizes are read from."""
        if self[name].dim() != axes:
            shape = tuple(self[name].shape)
            raise UserError(f"{self.path}: {name} has shape {shape}, but {axes} axes are needed.")
        return self[name]

    def count(self, pattern: str) -> int:
        """How many i from 0 on have a tensor whose name starts with the pattern."""
        i = 0
        while any(name.startswith(pattern.format(i=i)) for name in self.tensors):
            i += 1
        if i == 0:
            raise UserError(f"{self.path} has no tensor {pattern.format(i=0)}*.")
        return i

    def fill(self, model: nn.Module, names: Mapping[str, str], buffers: set[str]) -> None:
        """Give the model, by its own names, the tensors of `names` (their name to ours)."""
        own = model.state_dict()
        wanted = {theirs: ours for theirs, ours in names.items() if ours in own}
        missing = sorted(wanted.keys() - self.tensors.keys())
        unknown = sorted(self.tensors.keys() - wanted.keys() - buffers)
        if missing:
            raise UserError(f"{self.path} has no tensor {', '.join(missing)}.")
        if unknown:
            raise UserError(f"{self.path} has tensors of no known use: {', '.join(unknown)}.")
        state = {}
        for theirs, ours in wanted.items():
            tensor, shape = self.tensors[theirs], own[ours].shape
            if _squeezed(tensor.shape) != _squeezed(shape):
                raise UserError(
                    f"{self.path}: {theirs} has shape {tuple(tensor.shape)}, but "
                    f"{tuple(shape)} is needed."
                )
            state[ours] = tensor.float().reshape(shape).clone()
        model.load_state_dict(state, strict=True, assign=True)


def _find(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    if not str(path).startswith(f"{REPOSITORY}/"):
        raise UserError(
            f"there is no file {str(path)!r}; the released ones are at "
            f"huggingface.co/{REPOSITORY}, and {REPOSITORY}/FILE in place of a path fetches one."
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f"fetching {path} needs huggingface_hub: pip install 'cil[hub]'.") from None
    try:
        return Path(hf_hub_download(REPOSITORY, str(path).removeprefix(f"{REPOSITORY}/")))
    except Exception as error:  # the library raises of its own, of requests' and of the system's
        raise UserError(f"{path} could not be fetched: {error}") from None


def _scales(theirs: _Checkpoint) -> tuple[int, ...]:
    levels = theirs[LEVELS].flatten().long()
    if not len(levels) or levels.min() < 0:
        raise UserError(f"{theirs.path}: {LEVELS} does not describe square scales in order.")
    sides = [math.isqrt(n) for n in levels.bincount().tolist()]
    expected = torch.cat([torch.full((p * p,), k) for k, p in enumerate(sides)])
    if not torch.equal(levels, expected):
        raise UserError(f"{theirs.path}: {LEVELS} does not describe square scales in order.")
    return tuple(sides)


def _load_tokenizer(theirs: _Checkpoint, scales: tuple[int, ...]) -> MultiScaleTokenizer:
    first = theirs.shaped("encoder.conv_in.weight", axes=4)
    levels, blocks = theirs.count("encoder.down.{i}."), theirs.count("encoder.down.0.block.{i}.")
    widths = [len(theirs[f"encoder.down.{i}.block.0.conv2.weight"]) for i in range(levels)]
    vocabulary, latent_channels = theirs.shaped("quantize.embedding.weight", axes=2).shape
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(
            image_channels=first.shape[1],
            channels=len(first),
            multipliers=[width // len(first) for width in widths],
            residual_blocks=blocks,
            latent_channels=latent_channels,
            vocabulary=vocabulary,
            scales=scales,
            phis=theirs.count("quantize.quant_resi.qresi_ls.{i}."),
        )
    names = dict(_expand(TOKENIZER_NAMES, len(tokenizer.phis)))
    for side, layers in (
        ("encoder", _encoder_layers(levels, blocks)),
        ("decoder", _decoder_layers(levels, blocks + 1)),
    ):
        modules = getattr(tokenizer, side).layers
        for n, (layer, module) in enumerate(zip(layers, modules, strict=True)):
            for ours, _ in module.named_parameters():
                part, *rest = ours.split(".")
                their_part = LAYER_NAMES.get(part, part)
                names[".".join([side, layer, their_part, *rest])] = f"{side}.layers.{n}.{ours}"
    theirs.fill(tokenizer, names, TOKENIZER_BUFFERS)
    return tokenizer


def _encoder_layers(levels: int, blocks: int) -> list[str]:
    """Their names of the encoder's layers, in the order in which they run."""
    names = []
    for level in range(levels):
        names += _level(f"down.{level}", blocks, attention=level == levels - 1)
        if level < levels - 1:
            names.append(f"down.{level}.downsample")
    return [*names, "mid.block_1", "mid.attn_1", "mid.block_2"]


def _decoder_layers(levels: int, blocks: int) -> list[str]:
    """The decoder's; its level 0 is the finest and runs last."""
    names = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    for level in reversed(range(levels)):
        names += _level(f"up.{level}", blocks, attention=level == levels - 1)
        if level > 0:
            names.append(f"up.{level}.upsample")
    return names


def _level(name: str, blocks: int, attention: bool) -> list[str]:
    kinds = ["block", "attn"] if attention else ["block"]
    return [f"{name}.{kind}.{i}" for i in range(blocks) for kind in kinds]


def _load_trunk(
    theirs: _Checkpoint, scales: tuple[int, ...], tokenizer: MultiScaleTokenizer
) -> VAR:
    width, latent_channels = theirs.shaped("word_embed.weight", axes=2).shape
    vocabulary = len(theirs["head.weight"])
    if (vocabulary, latent_channels) != tuple(tokenizer.codebook.shape):
        raise UserError(
            f"{theirs.path} is for {vocabulary} codes of {latent_channels} channels, but the "
            f"tokenizer has {tuple(tokenizer.codebook.shape)}."
        )
    depth = theirs.count("blocks.{i}.")
    heads = theirs.shaped("blocks.0.attn.scale_mul_1H11", axes=4).shape[1]
    if width % heads:
        raise UserError(f"{theirs.path} has {heads} heads, which do not divide its width {width}.")
    with torch.device("meta"):
        trunk = VAR(
            vocabulary=vocabulary,
            latent_channels=latent_channels,
            scales=scales,
            depth=depth,
            width=width,
            heads=heads,
            shared_adaln="shared_ada_lin.1.weight" in theirs,
        )
    buffers = {name for name, _ in _expand({b: b for b in VAR_BUFFERS}, depth)}
    theirs.fill(trunk, dict(_expand(VAR_NAMES, depth)), buffers | {CLASSES})
    return trunk


def _expand(table: Mapping[str, str], count: int) -> Iterator[tuple[str, str]]:
    """The table with {i} counted up and the dots at the end spelled out."""
    for theirs, ours in table.items():
        for i in range(count if "{i}" in theirs else 1):
            pair = theirs.format(i=i), ours.format(i=i)
            if theirs.endswith("."):
                yield from ((pair[0] + part, pair[1] + part) for part in ("weight", "bias"))
            else:
                yield pair


def _squeezed(shape: torch.Size) -> Any:
    """Their tables carry axes of length one, and AdaLN vectors an axis of six: (6, D) is (6 D,)."""
    sides = [side for side in shape if side > 1]
    return [math.prod(sides)] if len(sides) == 2 and sides[0] == 6 else sides
