"""Released checkpoints: their names and shapes, against a plain re-computation."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classify.likelihood import group_log_likelihoods
from cil.errors import UserError
from cil.models.class_groups import NULL_CLASS
from cil.models.official import load

# As small as group normalisation in 32 groups allows; six scales share four phis unevenly.
CHANNELS, MULTIPLIERS, BLOCKS, Z, V, PHIS = 32, (1, 2), 1, 4, 16, 4
SCALES = (1, 2, 3, 4, 5, 6)
L = sum(p * p for p in SCALES)
DEPTH, WIDTH, HEADS, CLASSES = 2, 8, 2, 5


def conv(name: str, out: int, into: int, side: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def residual(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    shapes = norm(f"{name}.norm1", into) | conv(f"{name}.conv1", out, into, 3)
    shapes |= norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out, 3)
    return shapes | (conv(f"{name}.nin_shortcut", out, into, 1) if out != into else {})


def attention(name: str, c: int) -> dict[str, tuple[int, ...]]:
    return (
        norm(f"{name}.norm", c)
        | conv(f"{name}.qkv", 3 * c, c, 1)
        | conv(f"{name}.proj_out", c, c, 1)
    )


def tokenizer_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of a small `vae_ch160v4096z32.pth`."""
    low, high = (CHANNELS * m for m in MULTIPLIERS)
    shapes = conv("encoder.conv_in", low, 3, 3) | conv("decoder.conv_in", high, Z, 3)
    shapes |= residual("encoder.down.0.block.0", low, low)
    shapes |= conv("encoder.down.0.downsample.conv", low, low, 3)
    shapes |= residual("encoder.down.1.block.0", high, low) | attention(
        "encoder.down.1.attn.0", high
    )
    for i in range(2):
        into = high if i == 0 else low
        shapes |= residual(f"decoder.up.0.block.{i}", low, into)
        shapes |= residual(f"decoder.up.1.block.{i}", high, high)
        shapes |= attention(f"decoder.up.1.attn.{i}", high)
    shapes |= conv("decoder.up.1.upsample.conv", high, high, 3)
    for side in ("encoder", "decoder"):
        shapes |= residual(f"{side}.mid.block_1", high, high)
        shapes |= attention(f"{side}.mid.attn_1", high)
        shapes |= residual(f"{side}.mid.block_2", high, high)
    shapes |= norm("encoder.norm_out", high) | conv("encoder.conv_out", Z, high, 3)
    shapes |= norm("decoder.norm_out", low) | conv("decoder.conv_out", 3, low, 3)
    shapes |= conv("quant_conv", Z, Z, 3) | conv("post_quant_conv", Z, Z, 3)
    shapes |= {"quantize.embedding.weight": (V, Z)}
    shapes |= {"quantize.ema_vocab_hit_SV": (len(SCALES), V)}
    for i in range(PHIS):
        shapes |= conv(f"quantize.quant_resi.qresi_ls.{i}", Z, Z, 3)
    return shapes


def var_shapes(shared: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a small `var_d16.pth`, or with `shared` of `var_d36.pth`."""
    d = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "word_embed.weight": (d, Z),
        "word_embed.bias": (d,),
        "class_emb.weight": (CLASSES + 1, d),
        "pos_start": (1, 1, d),
        "pos_1LC": (1, L, d),
        "lvl_embed.weight": (len(SCALES), d),
        "head_nm.ada_lin.1.weight": (2 * d, d),
        "head_nm.ada_lin.1.bias": (2 * d,),
        "head.weight": (V, d),
        "head.bias": (V,),
    }
    adaln = {"weight": (6 * d, d), "bias": (6 * d,)}
    if shared:
        shapes |= {f"shared_ada_lin.1.{part}": shape for part, shape in adaln.items()}
    for i in range(DEPTH):
        block = f"blocks.{i}"
        if shared:
            shapes[f"{block}.ada_gss"] = (1, 1, 6, d)
        else:
            shapes |= {f"{block}.ada_lin.1.{part}": shape for part, shape in adaln.items()}
        shapes |= {
            f"{block}.attn.scale_mul_1H11": (1, HEADS, 1, 1),
            f"{block}.attn.q_bias": (d,),
            f"{block}.attn.v_bias": (d,),
            f"{block}.attn.zero_k_bias": (d,),
            f"{block}.attn.mat_qkv.weight": (3 * d, d),
            f"{block}.attn.proj.weight": (d, d),
            f"{block}.attn.proj.bias": (d,),
            f"{block}.ffn.fc1.weight": (4 * d, d),
            f"{block}.ffn.fc1.bias": (4 * d,),
            f"{block}.ffn.fc2.weight": (d, 4 * d),
            f"{block}.ffn.fc2.bias": (d,),
        }
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        spread = 0.5 if len(shape) == 1 or "emb" in name else fan_in**-0.5
        state[name] = spread * torch.randn(shape, generator=generator)
    return state


def tokenizer_state() -> dict[str, Tensor]:
    return random_state(tokenizer_shapes(), seed=0)


def var_state(shared: bool = False) -> dict[str, Tensor]:
    state = random_state(var_shapes(shared), seed=1)
    levels = torch.cat([torch.full((p * p,), k) for k, p in enumerate(SCALES)])
    state["lvl_1L"] = levels[None]
    seen = levels[:, None] >= levels[None]
    state["attn_bias_for_masking"] = torch.where(seen, 0.0, -torch.inf)[None, None]
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.zero_k_bias"].zero_()
        # One head beyond the published maximum of the attention's scale, log 100.
        state[f"blocks.{i}.attn.scale_mul_1H11"] = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    return state


def write(folder: Path, tokenizer: object, var: object) -> tuple[Path, Path]:
    paths = folder / "vae_ch160v4096z32.pth", folder / "var_d16.pth"
    for path, content in zip(paths, (tokenizer, var), strict=True):
        torch.save(content, path)
    return paths


class PlainTokenizer:
    """The authors' tokenizer on their own tensors, in float64, one vector at a time."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.p = {name: value.double() for name, value in state.items()}

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.p[f"{name}.weight"]
        padding = 0 if stride == 2 else weight.shape[-1] // 2
        return F.conv2d(x, weight, self.p[f"{name}.bias"], stride=stride, padding=padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        groups = x.view(len(x), 32, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        return unit.view_as(x) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    def swish_norm(self, x: Tensor, name: str) -> Tensor:
        x = self.norm(x, name)
        return x * torch.sigmoid(x)

    def residual(self, x: Tensor, name: str) -> Tensor:
        h = self.conv(self.swish_norm(x, f"{name}.norm1"), f"{name}.conv1")
        h = self.conv(self.swish_norm(h, f"{name}.norm2"), f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.p:
            x = self.conv(x, f"{name}.nin_shortcut")
        return x + h

    def attention(self, x: Tensor, name: str) -> Tensor:
        qkv = self.conv(self.norm(x, f"{name}.norm"), f"{name}.qkv").flatten(2)
        channels = qkv.shape[1] // 3
        out = torch.zeros_like(qkv[:, :channels])
        for image in range(len(x)):
            q, k, v = qkv[image].split(channels)
            for place in range(q.shape[1]):
                weights = (q[:, place] @ k / channels**0.5).softmax(0)
                out[image, :, place] = v @ weights
        return x + self.conv(out.view_as(x), f"{name}.proj_out")

    def middle(self, x: Tensor, side: str) -> Tensor:
        x = self.residual(x, f"{side}.mid.block_1")
        x = self.attention(x, f"{side}.mid.attn_1")
        return self.residual(x, f"{side}.mid.block_2")

    def encode(self, images: Tensor) -> Tensor:
        h = self.conv(images.double(), "encoder.conv_in")
        h = self.residual(h, "encoder.down.0.block.0")
        padded = F.pad(h, (0, 1, 0, 1))
        h = self.conv(padded, "encoder.down.0.downsample.conv", stride=2)
        h = self.residual(h, "encoder.down.1.block.0")
        h = self.attention(h, "encoder.down.1.attn.0")
        h = self.middle(h, "encoder")
        h = self.conv(self.swish_norm(h, "encoder.norm_out"), "encoder.conv_out")
        return self.conv(h, "quant_conv")

    def decode(self, latents: Tensor) -> Tensor:
        h = self.conv(self.conv(latents, "post_quant_conv"), "decoder.conv_in")
        h = self.middle(h, "decoder")
        for i in range(2):
            h = self.residual(h, f"decoder.up.1.block.{i}")
            h = self.attention(h, f"decoder.up.1.attn.{i}")
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        h = self.conv(h, "decoder.up.1.upsample.conv")
        for i in range(2):
            h = self.residual(h, f"decoder.up.0.block.{i}")
        h = self.conv(self.swish_norm(h, "decoder.norm_out"), "decoder.conv_out")
        return h.clamp(-1, 1)

    def phi(self, x: Tensor, k: int) -> Tensor:
        # The phis stand at 1/12, 13/36, 23/36 and 11/12; the scales at 0, 0.2, 0.4, 0.6, 0.8 and 1.
        i = [0, 0, 1, 2, 3, 3][k]
        return 0.5 * x + 0.5 * self.conv(x, f"quantize.quant_resi.qresi_ls.{i}")

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents -> tokens (B, L), their sum (B, Z, h, w), VAR's input (B, L - 1, Z)."""
        codes, side = self.p["quantize.embedding.weight"], SCALES[-1]
        rest, total = latents.clone(), torch.zeros_like(latents)
        tokens, inputs = [], []
        for k, p in enumerate(SCALES):
            small = F.interpolate(rest, size=(p, p), mode="area") if p < side else rest
            if k > 0:
                read = F.interpolate(total, size=(p, p), mode="area") if p < side else total
                inputs.append(read.flatten(2).transpose(1, 2))
            ids = torch.zeros(len(latents), p, p, dtype=torch.long)
            for image in range(len(latents)):
                for row in range(p):
                    for column in range(p):
                        distance = (codes - small[image, :, row, column]).square().sum(1)
                        ids[image, row, column] = distance.argmin()
            vectors = codes[ids].permute(0, 3, 1, 2)
            if p < side:
                vectors = F.interpolate(vectors, size=(side, side), mode="bicubic")
            added = self.phi(vectors, k)
            rest, total = rest - added, total + added
            tokens.append(ids.flatten(1))
        return torch.cat(tokens, 1), total, torch.cat(inputs, 1)


class PlainVAR:
    """The authors' transformer on their own tensors, in float64, one token and head at a time."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.p = {name: value.double() for name, value in state.items()}
        self.level = state["lvl_1L"][0].tolist()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return self.p[f"{name}.weight"] @ x + self.p[f"{name}.bias"]

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-6).sqrt()

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def six(self, condition: Tensor, i: int) -> tuple[Tensor, ...]:
        silu = condition * torch.sigmoid(condition)
        if f"blocks.{i}.ada_gss" in self.p:
            shared = self.linear(silu, "shared_ada_lin.1").view(6, WIDTH)
            return (shared + self.p[f"blocks.{i}.ada_gss"][0, 0]).unbind(0)
        return self.linear(silu, f"blocks.{i}.ada_lin.1").view(6, WIDTH).unbind(0)

    def attend(self, x: list[Tensor], i: int) -> list[Tensor]:
        name, head = f"blocks.{i}.attn", WIDTH // HEADS
        bias = torch.cat([self.p[f"{name}.q_bias"], torch.zeros(WIDTH), self.p[f"{name}.v_bias"]])
        triples = [
            (self.p[f"{name}.mat_qkv.weight"] @ token + bias).view(3, HEADS, head) for token in x
        ]
        out = []
        for here, (q, _, _) in enumerate(triples):
            seen = [there for there in range(L) if self.level[there] <= self.level[here]]
            mixed = []
            for h in range(HEADS):
                scale = min(self.p[f"{name}.scale_mul_1H11"][0, h].item(), math.log(100))
                keys = torch.stack([triples[there][1][h] for there in seen])
                cosines = keys @ q[h] / (keys.norm(dim=1) * q[h].norm())
                weights = (math.exp(scale) * cosines).softmax(0)
                mixed.append(weights @ torch.stack([triples[there][2][h] for there in seen]))
            out.append(self.linear(torch.cat(mixed), f"{name}.proj"))
        return out

    def logits(self, inputs: Tensor, label: int) -> Tensor:
        """inputs (L - 1, Z) of one image -> (L, V) under one class; the null class is the last."""
        condition = self.p["class_emb.weight"][label]
        x = [condition + self.p["pos_start"][0, 0]]
        x += [self.linear(token, "word_embed") for token in inputs]
        for place, level in enumerate(self.level):
            x[place] = x[place] + self.p["lvl_embed.weight"][level] + self.p["pos_1LC"][0, place]
        for i in range(DEPTH):
            gate1, gate2, scale1, scale2, shift1, shift2 = self.six(condition, i)
            mixed = self.attend([self.norm(t) * (1 + scale1) + shift1 for t in x], i)
            x = [t + gate1 * m for t, m in zip(x, mixed, strict=True)]
            for place, token in enumerate(x):
                h = self.norm(token) * (1 + scale2) + shift2
                h = self.gelu(self.linear(h, f"blocks.{i}.ffn.fc1"))
                x[place] = token + gate2 * self.linear(h, f"blocks.{i}.ffn.fc2")
        silu = condition * torch.sigmoid(condition)
        scale, shift = self.linear(silu, "head_nm.ada_lin.1").view(2, WIDTH)
        return torch.stack([self.linear(self.norm(t) * (1 + scale) + shift, "head") for t in x])


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_numbers_are_those_of_the_authors_model(tmp_path, images, shared):
    paths = write(tmp_path, tokenizer_state(), var_state(shared))
    tokenizer, model = load(*paths)
    plain = PlainTokenizer(tokenizer_state())
    latents = plain.encode(images)
    torch.testing.assert_close(tokenizer.encode(images).double(), latents, atol=1e-4, rtol=1e-4)

    tokens, total, inputs = plain.quantise(latents)
    assert len(tokens.unique()) > 8
    assert torch.equal(tokenizer.tokenize(images), tokens)
    torch.testing.assert_close(tokenizer.var_input(tokens).double(), inputs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        tokenizer.decode(tokens).double(), plain.decode(total), atol=1e-4, rtol=1e-4
    )

    var = PlainVAR(var_state(shared))
    for label, theirs in ((3, 3), (NULL_CLASS, CLASSES)):
        found = model(inputs.float(), torch.full((2,), label), group=0)
        expected = torch.stack([var.logits(image, theirs) for image in inputs])
        assert expected.std() > 0.1
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_old_files_and_half_precision_are_read_too(tmp_path, images):
    half = {name: value.half() for name, value in var_state().items() if name != "lvl_1L"}
    paths = write(tmp_path, tokenizer_state(), half | {"lvl_1L": var_state()["lvl_1L"]})
    torch.save(tokenizer_state(), paths[0], _use_new_zipfile_serialization=False)
    tokenizer, model = load(*paths)
    tokens = tokenizer.tokenize(images)
    assert group_log_likelihoods(model, 0, tokens, tokenizer.var_input(tokens)).dtype == torch.float


@torch.no_grad()
def test_checkpoints_of_the_trainer_are_read_too(tmp_path, images):
    plain = load(*write(tmp_path, tokenizer_state(), var_state()))
    trained = {"epoch": 3, "trainer": {"var_wo_ddp": var_state(), "vae_local": tokenizer_state()}}
    nested = load(*write(tmp_path, trained, trained))
    for before, after in zip(plain, nested, strict=True):
        expected = before.state_dict()
        assert expected.keys() == after.state_dict().keys()
        assert all(torch.equal(expected[n], value) for n, value in after.state_dict().items())


def test_a_released_trunk_is_not_learned_from_scratch(tmp_path):
    paths = write(tmp_path, tokenizer_state(), var_state())
    with pytest.raises(UserError, match="plasticity is scratch, but a released"):
        load(*paths, plasticity="scratch")


@pytest.mark.parametrize("plasticity", ["embedding", "adapter", "copy"])
def test_new_groups_join_the_released_classes(tmp_path, images, plasticity):
    paths = write(tmp_path, tokenizer_state(), var_state())
    tokenizer, model = load(*paths, plasticity=plasticity, adapter_rank=2)
    assert model.groups.sizes == [CLASSES]
    tokens = tokenizer.tokenize(images)
    inputs = tokenizer.var_input(tokens)
    before = group_log_likelihoods(model, 0, tokens, inputs)
    model.grow(3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        logits = model(inputs, torch.tensor([5, 7]), group=1)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimiser.step()
    assert torch.equal(group_log_likelihoods(model, 0, tokens, inputs), before)
    assert group_log_likelihoods(model, 1, tokens, inputs).shape == (2, 3, L)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("var", {"blocks.1.attn.q_bias": None}, r"no tensor blocks\.1\.attn\.q_bias"),
        ("var", {"class_emb.weight": None}, r"no tensor class_emb\.weight"),
        ("var", {"blocks.0.more": torch.zeros(1)}, r"of no known use: blocks\.0\.more"),
        ("var", {"head.bias": torch.zeros(V + 1)}, r"head\.bias has shape \(17,\)"),
        ("var", {"lvl_1L": torch.zeros(1, L)}, "square scales"),
        ("var", {"lvl_1L": torch.zeros(1, 0)}, "square scales"),
        ("var", {"class_emb.weight": torch.zeros(6, 7)}, r"class_emb\.weight has shape \(6, 7\)"),
        ("var", {"word_embed.weight": torch.zeros(6)}, r"word_embed\.weight has shape \(6,\)"),
        ("var", {"blocks.0.attn.scale_mul_1H11": torch.zeros(1, 3, 1, 1)}, "3 heads"),
        ("tokenizer", {"encoder.conv_in.weight": torch.zeros(3)}, r"conv_in\.weight has shape"),
        ("tokenizer", {"quant_conv.bias": None}, r"no tensor quant_conv\.bias"),
        ("tokenizer", {"encoder.extra": torch.zeros(1)}, r"encoder\.extra"),
        ("tokenizer", {"quantize.embedding.weight": torch.zeros(V + 2, Z)}, "16 codes"),
        ("tokenizer", {"decoder.conv_out.bias": torch.zeros(4)}, r"decoder\.conv_out\.bias"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, file, change, message):
    states = {"tokenizer": tokenizer_state(), "var": var_state()}
    states[file] = {n: v for n, v in (states[file] | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        load(*write(tmp_path, states["tokenizer"], states["var"]))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    paths = write(tmp_path, tokenizer_state(), var_state())
    with pytest.raises(UserError, match=r"there is no file .*elsewhere\.pth"):
        load(tmp_path / "elsewhere.pth", paths[1])
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load(paths[0], tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no tensors by name"):
        load(paths[0], tmp_path / "other.pth")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    paths = write(tmp_path, tokenizer_state(), {"head.bias": Harmful()})
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load(*paths)
    assert not (tmp_path / "touched").exists()


def test_the_repository_is_fetched_from_only_when_named(tmp_path, monkeypatch):
    paths = write(tmp_path, tokenizer_state(), var_state())
    asked = []
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *what: asked.append(what) or paths[1])
    load(*paths)
    assert asked == []
    load(paths[0], "FoundationVision/var/var_d16.pth")
    assert asked == [("FoundationVision/var", "var_d16.pth")]
