"""Class groups: what grows, what learns, and that nothing earlier moves by a bit."""

import io
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cil.classify.likelihood import group_log_likelihoods
from cil.config import TrainerConfig
from cil.methods.seeding import seed_all
from cil.methods.var import VARMethod
from cil.methods.var_module import VARModule
from cil.methods.var_parts import build_model
from cil.models.class_groups import NULL_CLASS, ClassGroups, Incremental

pytestmark = pytest.mark.integration  # three experiences for each plasticity

PLASTICITIES = ["embedding", "adapter", "trunk", "copy", "scratch"]
FORGETTING = "trunk"


def test_new_embeddings_are_drawn_alike_wherever_the_model_lies() -> None:
    """What is drawn after them, too: a found trunk lies on the CPU, a learned one on its GPU."""
    here, elsewhere = ClassGroups(8), ClassGroups(8).to("meta")
    after = []
    for groups in (here, elsewhere):
        torch.manual_seed(0)
        groups.grow(3)
        after.append(torch.rand(4))
    assert torch.equal(*after)


def no_log(step: int, values: Any) -> None:
    pass


@dataclass(frozen=True)
class Snapshot:
    """A method as it was after an experience."""

    parameters: dict[str, Tensor]
    log_likelihoods: list[Tensor]  # a token, of each group's classes (B, n, L)
    state: bytes
    scores: Tensor


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def snapshot(method: VARMethod, images: Tensor) -> Snapshot:
    tokens = method.tokenizer.tokenize(images)
    inputs = method.tokenizer.var_input(tokens)
    groups = range(len(method.model.groups))
    file = io.BytesIO()
    torch.save(method.state(), file)
    return Snapshot(
        parameters(method.model)
        | {f"tokenizer.{n}": p for n, p in parameters(method.tokenizer).items()},
        [group_log_likelihoods(method.model, g, tokens, inputs) for g in groups],
        file.getvalue(),
        method.scores(images),
    )


def learn(method: VARMethod, stream: Any, index: int) -> None:
    seed_all(0, index)
    method.learn(stream.experiences[index], no_log)


@dataclass(frozen=True)
class Learned:
    method: VARMethod
    after: list[Snapshot]  # each of three experiences


@pytest.fixture(scope="module", params=PLASTICITIES)
def learned(
    request,
    tiny_stream,
    tiny_tokenizer_config,
    tiny_var_config,
    quiet_cpu,
    tiny_images,
    tmp_path_factory,
):
    """A method of each plasticity that has learned three experiences for real."""
    settings = replace(tiny_var_config, plasticity=request.param, lr=3e-2)
    seed_all(0)
    cache = tmp_path_factory.mktemp("cache")
    method = VARMethod("var", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache)
    after = []
    for index in range(3):
        learn(method, tiny_stream, index)
        after.append(snapshot(method, tiny_images))
    return Learned(method, after)


def moved(before: Snapshot, after: Snapshot) -> set[str]:
    """Names of the earlier parameters that are not the same bits any more."""
    assert before.parameters.keys() <= after.parameters.keys()
    pairs = {n: (p, after.parameters[n]) for n, p in before.parameters.items()}
    return {name for name, (old, new) in pairs.items() if not torch.equal(old, new)}


@pytest.mark.parametrize("later", [1, 2])
def test_a_later_group_moves_nothing_earlier_but_a_trunk_that_keeps_learning(learned, later):
    before, after = learned.after[later - 1], learned.after[later]
    assert len(before.log_likelihoods) == later
    pairs = zip(before.log_likelihoods, after.log_likelihoods[:later], strict=True)
    same = [torch.equal(old, new) for old, new in pairs]
    if learned.method.settings.plasticity == FORGETTING:
        trunk = {name for name in before.parameters if name.startswith("trunks.")}
        assert moved(before, after) == trunk | {"groups.null"}
        assert same == [False] * later
    else:
        assert moved(before, after) == set()
        assert same == [True] * later


@pytest.mark.parametrize("later", [1, 2])
def test_a_later_group_does_learn(learned, later):
    """What stands still beside it would be no news otherwise. Embeddings start 0.02 from null."""
    before, after = learned.after[later - 1].parameters, learned.after[later].parameters
    own = f"groups.embeddings.{later}"
    assert own in set(after) - set(before)
    assert (after[own] - before["groups.null"]).square().mean().sqrt() > 0.026


def test_each_plasticity_adds_what_it_may_change(learned):
    own = set(learned.after[2].parameters) - set(learned.after[1].parameters)
    kinds = {name.split(".2")[0].split(".3")[0] for name in own}  # the first trunk is extra
    expected = {"adapter": {"groups.adapters"}, "copy": {"trunks"}, "scratch": {"trunks"}}
    assert kinds == {"groups.embeddings"} | expected.get(learned.method.settings.plasticity, set())


def test_what_a_later_group_adds_learns_as_a_whole(learned):
    """All of an adapter and of a copy moves away from where it began."""
    last = learned.after[2].parameters
    plasticity = learned.method.settings.plasticity
    if plasticity == "adapter":
        ups = {
            n: p for n, p in last.items() if n.startswith("groups.adapters.2") and n.endswith(".up")
        }
        assert len(ups) == 2 * 5 + 3
        assert all(up.abs().max() > 0 for up in ups.values())
    elif plasticity in ("copy", "scratch"):
        copied = {n: p for n, p in last.items() if n.startswith("trunks.3")}
        first = {n: last[n.replace("trunks.3", "trunks.0")] for n in copied}
        assert [n for n, p in copied.items() if torch.equal(p, first[n])] == []


@pytest.mark.parametrize("everywhere", ["all", "adaln"])
@pytest.mark.parametrize("plasticity", PLASTICITIES)
def test_the_optimiser_holds_the_newest_group_alone(
    plasticity, everywhere, tiny_tokenizer_config, tiny_var_config
):
    settings = replace(tiny_var_config, plasticity=plasticity, adapter_layers=everywhere)
    model = build_model(tiny_tokenizer_config, settings)
    names: list[set[str]] = []
    for index in range(4):
        model.start(8) if index == 0 else model.grow(2)
        of = {id(p): name for name, p in model.named_parameters()}
        module = VARModule(model, None, settings, TrainerConfig(), steps=100)
        optimiser = module.configure_optimizers()["optimizer"]
        held = [of[id(p)] for group in optimiser.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        names.append(set(held))
    everything = {n for n in of.values() if n.startswith(("trunks.0", "groups.embeddings.0"))}
    assert names[0] == everything | {"groups.null"}
    for group in range(3):
        expected = {f"groups.embeddings.{group}"}
        if plasticity == "trunk":
            expected |= {n for n in of.values() if n.startswith("trunks.")} | {"groups.null"}
        own = (f"groups.adapters.{group}.", f"trunks.{group + 1}.")
        expected |= {n for n in of.values() if n.startswith(own)}
        assert names[group + 1] == expected
        has_own = {"adapter": own[0], "copy": own[1], "scratch": own[1]}.get(plasticity)
        assert has_own is None or any(n.startswith(has_own) for n in expected)


def test_a_trunk_from_scratch_begins_where_none_has_learned(tiny_tokenizer_config, tiny_var_config):
    seed_all(0)
    settings = replace(tiny_var_config, plasticity="scratch")
    model: Incremental = build_model(tiny_tokenizer_config, settings)
    first = parameters(model.trunks[0])
    for group in range(3):
        model.grow(2)
        assert all(torch.equal(p, first[n]) for n, p in model.trunk(group).named_parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)  # it learns
    assert all(torch.equal(p, first[n]) for n, p in model.trunks[0].named_parameters())


def test_only_matrices_of_layers_decay(tiny_tokenizer_config, tiny_var_config):
    model = build_model(tiny_tokenizer_config, tiny_var_config)
    model.start(2)
    module = VARModule(model, None, tiny_var_config, TrainerConfig(), steps=100)
    optimiser = module.configure_optimizers()["optimizer"]
    decayed = {id(p) for g in optimiser.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    layers = ["adaln", "attention.qkv", "attention.proj", "fc1", "fc2"]
    expected = {f"blocks.{i}.{layer}" for i in range(2) for layer in layers}
    expected |= {"embed", "head", "head_adaln"}
    assert names == {f"trunks.0.{layer}.weight" for layer in expected}


def test_learning_goes_on_from_a_state_as_if_never_interrupted(
    learned, tiny_stream, tiny_tokenizer_config, quiet_cpu, tiny_images, cache
):
    whole = learned.method
    for done in (1, 2):
        seed_all(123)  # another start: everything must come from the state
        sizes = (tiny_tokenizer_config, whole.settings, quiet_cpu, cache)
        resumed = VARMethod("var", tiny_stream, *sizes)
        before = learned.after[done - 1]
        resumed.load_state(torch.load(io.BytesIO(before.state), weights_only=True))
        assert resumed.classes_seen == 2 * done
        assert torch.equal(resumed.scores(tiny_images), before.scores)
        learn(resumed, tiny_stream, done)
        expected, found = learned.after[done], snapshot(resumed, tiny_images)
        assert found.parameters.keys() == expected.parameters.keys()
        assert moved(expected, found) == set()
        assert torch.equal(found.scores, expected.scores)


def test_size_counts_every_parameter_kept(learned):
    size = learned.method.size()
    counted = [value.numel() for value in learned.after[2].parameters.values()]
    assert size.parameters == sum(counted)
    copies = learned.method.settings.smoothing_samples
    assert (size.stored_images, size.likelihood_evaluations) == (0, 6 * copies)


def test_labels_and_conditions_count_in_order_of_arrival():
    torch.manual_seed(0)
    groups = ClassGroups(width=5)
    for classes in (2, 3, 1):
        groups.grow(classes)
    assert (len(groups), groups.sizes, groups.classes) == (3, [2, 3, 1], 6)
    assert [list(groups.labels(g)) for g in range(3)] == [[0, 1], [2, 3, 4], [5]]
    rows = torch.cat(list(groups.embeddings))
    assert torch.equal(groups.condition(torch.tensor([4, 0, 5])), rows[[4, 0, 5]])
    null = groups.condition(torch.tensor([NULL_CLASS, 1]))
    assert torch.equal(null, torch.stack([groups.null, rows[1]]))
    assert len(rows.unique(dim=0)) == 6


def test_new_embeddings_start_close_to_the_null_one():
    torch.manual_seed(0)
    groups = ClassGroups(width=64)
    groups.grow(4)
    distance = (groups.embeddings[0] - groups.null).detach()
    assert 0.015 < distance.std() < 0.025
    assert distance.abs().max() < 0.1


@pytest.mark.parametrize("plasticity", PLASTICITIES)
def test_the_classes_that_taught_the_trunk_leave_with_the_first_group(
    plasticity, tiny_tokenizer_config, tiny_var_config
):
    settings = replace(tiny_var_config, plasticity=plasticity)
    model: Incremental = build_model(tiny_tokenizer_config, settings)
    model.start(8)
    null = model.groups.null.clone()
    for _ in range(2):
        model.grow(2)
    assert model.groups.sizes == [2, 2]
    assert [list(model.groups.labels(g)) for g in range(2)] == [[0, 1], [2, 3]]
    assert torch.equal(model.groups.null, null)
    assert [e.requires_grad for e in model.groups.embeddings] == [False, True]


def test_a_model_with_groups_cannot_start_again(tiny_tokenizer_config, tiny_var_config):
    model = build_model(tiny_tokenizer_config, tiny_var_config)
    model.grow(2)
    with pytest.raises(ValueError, match="1 class groups already"):
        model.start(8)
    with pytest.raises(ValueError, match="1 class groups already"):
        model.adopt(torch.zeros(3, 16), torch.zeros(16))


@pytest.mark.parametrize("plasticity", PLASTICITIES)
def test_which_trunk_and_adapter_serve_a_group(plasticity, tiny_tokenizer_config, tiny_var_config):
    settings = replace(tiny_var_config, plasticity=plasticity)
    model: Incremental = build_model(tiny_tokenizer_config, settings)
    model.start(8)
    first_trunk, dropout = model.trunk(0), [model.trains_null]
    assert model.groups.adapter(0) is None
    for _ in range(3):
        model.grow(2)
        dropout.append(model.trains_null)
    own_trunk, own_adapter = plasticity in ("copy", "scratch"), plasticity == "adapter"
    trunks = [model.trunk(g) for g in range(3)]
    assert len({id(trunk) for trunk in trunks}) == (3 if own_trunk else 1)
    assert (first_trunk in trunks) != own_trunk
    adapters = [model.groups.adapter(g) for g in range(3)]
    assert [a is not None for a in adapters] == [own_adapter] * 3
    assert dropout == [True] + [plasticity in ("trunk", "scratch")] * 3
    without_class = [model.trunk_without_class(g) for g in range(3)]
    assert without_class == (trunks if plasticity == "scratch" else [first_trunk] * 3)
