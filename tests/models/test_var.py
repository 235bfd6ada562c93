"""The trunk against a plain re-computation; what sees what; where the class enters."""

import math

import pytest
import torch
from torch import Tensor

from cil.models.class_groups import Adapter
from cil.models.tokenizer import MultiScaleTokenizer
from cil.models.var import VAR

SCALES = (1, 2, 3)
L, Z, D, HEADS, V = 14, 4, 8, 2, 11
SCALE_OF = [0] + [1] * 4 + [2] * 9


def make(shake, depth: int = 2, drop_path: float = 0.0) -> VAR:
    torch.manual_seed(0)
    var = VAR(
        vocabulary=V,
        latent_channels=Z,
        scales=SCALES,
        depth=depth,
        width=D,
        heads=HEADS,
        drop_path=drop_path,
    )
    shake(var)
    return var.eval()


def batch(images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(images, L - 1, Z, generator=generator)
    return inputs, torch.randn(images, D, generator=generator)


def normed(x_D: Tensor) -> Tensor:
    centred = x_D - x_D.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Plain:
    """One image through a VAR of one block, one token and one head at a time, in float64."""

    def __init__(self, var: VAR, adapter: Adapter | None = None) -> None:
        self.p = {name: value.double() for name, value in var.state_dict().items()}
        if adapter is not None:
            for place, updates in adapter.places.items():
                for layer, update in updates.items():
                    where = f"blocks.{place}." if place != "trunk" else ""
                    within = "attention." if layer in ("qkv", "proj") else ""
                    self.p[f"{where}{within}{layer}.weight"] += (update.up @ update.down).double()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return self.p[f"{name}.weight"] @ x + self.p[f"{name}.bias"]

    def attention(self, x_LD: list[Tensor]) -> list[Tensor]:
        a, head = "blocks.0.attention", D // HEADS
        q_bias, v_bias = self.p[f"{a}.q_bias"], self.p[f"{a}.v_bias"]
        triples = [(self.p[f"{a}.qkv.weight"] @ x).split(D) for x in x_LD]
        out = []
        for i in range(L):
            heads = []
            for h in range(HEADS):
                own = slice(h * head, (h + 1) * head)
                seen = [j for j in range(L) if SCALE_OF[j] <= SCALE_OF[i]]
                q = (triples[i][0] + q_bias)[own]
                temperature = min(self.p[f"{a}.log_scale"].flatten()[h].exp().item(), 100.0)
                cosines = [
                    (q @ triples[j][1][own]) / (q.norm() * triples[j][1][own].norm()) for j in seen
                ]
                weights = (temperature * torch.stack(cosines)).exp()
                values = torch.stack([(triples[j][2] + v_bias)[own] for j in seen])
                heads.append((weights[:, None] * values).sum(0) / weights.sum())
            out.append(self.linear(torch.cat(heads), f"{a}.proj"))
        return out

    def logits(self, inputs_LZ: Tensor, condition_D: Tensor) -> Tensor:
        c, inputs_LZ = condition_D.double(), inputs_LZ.double()
        tokens = [c + self.p["start"][0], *(self.linear(x, "embed") for x in inputs_LZ)]
        places = zip(tokens, self.p["position"], SCALE_OF, strict=True)
        x_LD = [x + position + self.p["level.weight"][k] for x, position, k in places]
        silu = c / (1 + (-c).exp())
        gate1, gate2, scale1, scale2, shift1, shift2 = self.linear(silu, "blocks.0.adaln").split(D)
        attended = self.attention([normed(x) * (1 + scale1) + shift1 for x in x_LD])
        x_LD = [x + gate1 * a for x, a in zip(x_LD, attended, strict=True)]
        hidden = [
            gelu(self.linear(normed(x) * (1 + scale2) + shift2, "blocks.0.fc1")) for x in x_LD
        ]
        x_LD = [
            x + gate2 * self.linear(h, "blocks.0.fc2") for x, h in zip(x_LD, hidden, strict=True)
        ]
        scale, shift = self.linear(silu, "head_adaln").split(D)
        return torch.stack([self.linear(normed(x) * (1 + scale) + shift, "head") for x in x_LD])


@pytest.mark.parametrize("log_scale", [0.5, 6.0])  # 6.0 is beyond the published maximum, log 100
@torch.no_grad()
def test_one_block_is_the_published_one(shake, log_scale):
    var, (inputs, condition) = make(shake, depth=1), batch()
    var.blocks[0].attention.log_scale[:, 1] = log_scale
    logits = var(inputs, condition)
    assert logits.shape == (3, L, V)
    for image in range(3):
        expected = Plain(var).logits(inputs[image], condition[image])
        torch.testing.assert_close(logits[image].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("everywhere", [False, True])
@torch.no_grad()
def test_an_adapter_adds_up_times_down_to_its_layers(shake, everywhere):
    var, (inputs, condition) = make(shake, depth=1), batch()
    adapter = var.new_adapter(rank=2, everywhere=everywhere)
    layers = {name for updates in adapter.places.values() for name in updates}
    all_layers = {"adaln", "qkv", "proj", "fc1", "fc2", "embed", "head", "head_adaln"}
    assert layers == (all_layers if everywhere else {"adaln", "head_adaln"})
    shake(adapter, amount=0.4, seed=2)
    logits = var(inputs, condition, adapter)
    expected = Plain(var, adapter).logits(inputs[0], condition[0])
    torch.testing.assert_close(logits[0].double(), expected, atol=1e-4, rtol=1e-4)
    assert (logits - var(inputs, condition)).abs().max() > 0.1


@torch.no_grad()
def test_a_new_adapter_changes_no_bit(shake):
    var, (inputs, condition) = make(shake), batch()
    adapter = var.new_adapter(rank=2, everywhere=True)
    assert torch.equal(var(inputs, condition, adapter), var(inputs, condition))


def test_a_new_adapter_can_learn(shake):
    var, (inputs, condition) = make(shake), batch()
    adapter = var.new_adapter(rank=2, everywhere=True)
    var(inputs, condition, adapter).square().mean().backward()
    ups = {name: p for name, p in adapter.named_parameters() if name.endswith("up")}
    assert len(ups) == 2 * 5 + 3
    assert [name for name, up in ups.items() if not up.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("scale", [0, 1, 2])
@torch.no_grad()
def test_a_changed_token_changes_finer_scales_alone(shake, scale):
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(
        channels=4,
        multipliers=(1,),
        residual_blocks=1,
        latent_channels=Z,
        vocabulary=V,
        scales=SCALES,
    )
    var, (_, condition) = make(shake), batch()
    tokens = torch.randint(V, (3, L))
    before = var(tokenizer.var_input(tokens), condition)
    first = SCALE_OF.index(scale)
    tokens[:, first] = (tokens[:, first] + 1) % V
    after = var(tokenizer.var_input(tokens), condition)
    finer = torch.tensor(SCALE_OF) > scale
    assert torch.equal(before[:, ~finer], after[:, ~finer])
    assert ((before - after)[:, finer].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("scale", [1, 2])
@torch.no_grad()
def test_a_token_sees_all_inputs_of_its_own_scale(shake, scale):
    var, (inputs, condition) = make(shake), batch()
    changed = inputs.clone()
    changed[:, SCALE_OF.index(scale) - 1] += 1  # the start token has no input
    differs = ((var(inputs, condition) - var(changed, condition)).abs().amax(-1) > 1e-6).all(0)
    assert differs.tolist() == [k >= scale for k in SCALE_OF]


@torch.no_grad()
def test_the_start_token_depends_on_the_class(shake):
    var, (inputs, condition) = make(shake), batch()
    for layer in (*(block.adaln for block in var.blocks), var.head_adaln):
        layer.weight.zero_()
    inputs, condition = inputs[:1].expand(2, -1, -1), condition[:2]
    # With AdaLN blind and no branch open, the class can only be read from the first token.
    closed = [block.adaln.bias[: 2 * D].clone() for block in var.blocks]
    for block in var.blocks:
        block.adaln.bias[: 2 * D] = 0
    one, other = var(inputs, condition)
    assert (one[0] - other[0]).abs().max() > 0.01
    assert torch.equal(one[1:], other[1:])
    for block, gates in zip(var.blocks, closed, strict=True):
        block.adaln.bias[: 2 * D] = gates
    one, other = var(inputs, condition)
    assert ((one - other).abs().amax(-1) > 1e-6).all()  # attention passes it on


@torch.no_grad()
def test_the_class_also_enters_through_every_adaln(shake):
    var, (inputs, condition) = make(shake), batch()
    differences = []
    for layer in (*(block.adaln for block in var.blocks), var.head_adaln):
        kept, before = layer.weight.clone(), var(inputs, condition)
        layer.weight.zero_()
        differences.append((before - var(inputs, condition)).abs().max().item())
        layer.weight.copy_(kept)
    assert min(differences) > 1e-3


@torch.no_grad()
def test_drop_path_leaves_evaluation_alone(shake):
    inputs, condition = batch()
    plain, dropping = make(shake), make(shake, drop_path=0.5)
    assert torch.equal(plain(inputs, condition), dropping(inputs, condition))
    plain.train()
    assert torch.equal(plain(inputs, condition), dropping(inputs, condition))


@torch.no_grad()
def test_drop_path_drops_whole_branches_of_single_images(shake):
    var, (inputs, condition) = make(shake, drop_path=0.4), batch()
    inputs, condition = inputs[:1].expand(400, -1, -1), condition[:1].expand(400, -1)
    second = var.blocks[1].adaln  # close its MLP: one branch is left to drop
    second.weight[D : 2 * D] = 0
    second.bias[D : 2 * D] = 0
    both = var.features(inputs[:1], condition[:1])[0]
    dropping = var.train().features(inputs, condition)
    var.blocks = var.blocks[:1]  # the first block never drops: its share grows from 0
    without = var.features(inputs[:1], condition[:1])[0]
    kept = (dropping - without).abs().amax((1, 2)) > 1e-4
    assert 0.5 < kept.float().mean() < 0.7
    expected = without + (both - without) / (1 - 0.4)  # the mean is that of evaluation
    torch.testing.assert_close(dropping[kept], expected.expand(int(kept.sum()), -1, -1))
    torch.testing.assert_close(dropping[~kept], without.expand(int((~kept).sum()), -1, -1))


@torch.no_grad()
def test_an_untrained_trunk_finds_all_tokens_alike():
    torch.manual_seed(0)
    var = VAR(
        vocabulary=V, latent_channels=Z, scales=SCALES, depth=2, width=64, heads=2, drop_path=0.0
    )
    inputs, condition = torch.randn(4, L - 1, Z), torch.randn(4, 64) * (1 / 192) ** 0.5
    probabilities = var(inputs, condition).softmax(-1)
    torch.testing.assert_close(
        probabilities, torch.full_like(probabilities, 1 / V), atol=0.02, rtol=0
    )
