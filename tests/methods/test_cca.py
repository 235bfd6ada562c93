"""Condition contrastive alignment: its loss, and what it does to the newest group and no other."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cil.classify.likelihood import token_log_likelihoods
from cil.config import Config, VARConfig
from cil.methods.cca_module import CCAModule
from cil.methods.registry import settings
from cil.methods.seeding import seed_all
from cil.methods.var import VARMethod
from cil.methods.var_parts import build_model, build_tokenizer
from cil.streams.digits import digits
from cil.streams.stream import Stream, build_stream

pytestmark = pytest.mark.integration  # most tests learn


@pytest.fixture(scope="module")
def learn(tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, tmp_path_factory):
    """A method after one experience of a stream, with so many steps of alignment."""
    cache = tmp_path_factory.mktemp("cache")

    def learn(cca_steps: int, stream: Stream = tiny_stream, **more) -> tuple[VARMethod, list]:
        more = {"cca_steps": cca_steps, "cca_lr": 1e-2, "cca_lambda": 1.0, **more}
        chosen = replace(tiny_var_config, **more)
        seed_all(0)
        method = VARMethod("var", stream, tiny_tokenizer_config, chosen, quiet_cpu, cache)
        rows: list[tuple[int, dict[str, float]]] = []
        method.learn(stream.experiences[0], lambda step, values: rows.append((step, dict(values))))
        return method, rows

    return learn


@pytest.mark.parametrize("weight", [0.5, 50.0])
def test_the_loss_is_that_of_the_paper(weight, tiny_tokenizer_config, tiny_var_config, quiet_cpu):
    torch.manual_seed(0)
    chosen = replace(tiny_var_config, plasticity="embedding", cca_steps=1, cca_lambda=weight)
    tokenizer, model = (
        build_tokenizer(tiny_tokenizer_config, 1),
        build_model(tiny_tokenizer_config, chosen),
    )
    tokenizer.eval().requires_grad_(False)
    model.grow(3)
    model.eval()
    torch.nn.init.normal_(model.trunks[0].head.weight)  # or no class would make a difference
    torch.nn.init.normal_(model.trunks[0].head_adaln.weight)
    tokens = torch.randint(tokenizer.codebook.shape[0], (4, tokenizer.tokens))
    labels = torch.tensor([0, 1, 1, 2])  # the third image's other class is its own
    module = CCAModule(model, tokenizer, chosen, quiet_cpu)
    module.record = lambda values, show: None  # no trainer is there to log to
    module.on_fit_start()

    def likelihoods() -> torch.Tensor:
        return token_log_likelihoods(model, tokens, tokenizer.var_input(tokens)).sum(-1)

    before = likelihoods()
    with torch.no_grad():
        model.groups.embeddings[0] += 0.5
    ratios = (likelihoods() - before) * 0.02 * 680 / tokenizer.tokens
    assert ratios.abs().min() > 1e-3
    own, other = ratios[range(4), labels], ratios[range(4), labels.roll(1)]
    terms = -F.logsigmoid(own) - weight * F.logsigmoid(-other)
    terms[2] = -2 * F.logsigmoid(own[2])
    expected = terms.mean() / max(weight, 1)
    found = module.training_step([tokens.to(torch.int16), labels], 0)
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    learned = [name for name, p in model.named_parameters() if p.grad is not None]
    assert learned == ["groups.embeddings.0"]


@pytest.mark.parametrize("plasticity", ["adapter", "trunk"])
def test_it_drives_the_likelihoods_of_a_group_apart(plasticity, learn, tiny_images, tiny_stream):
    # Enough steps to tell two digits apart.
    more = {"plasticity": plasticity, "first_steps": 60, "steps": 30, "cca_lr": 3e-3}
    (plain, _), (aligned, rows) = learn(0, **more), learn(20, **more)
    labels = torch.tensor(tiny_stream.experiences[0].test.targets)  # 0 and 1

    def apart(method: VARMethod) -> float:
        values = method.log_likelihood(tiny_images)
        first_over_second = values[:, 0] - values[:, 1]
        return float(torch.where(labels == 0, first_over_second, -first_over_second).mean())

    assert apart(plain) > 0
    assert apart(aligned) > 1.2 * apart(plain)
    # Its steps count on from the group's own.
    group = max(step for step, values in rows if "var/nats_a_token" in values)
    steps = [step for step, values in rows if "cca/loss" in values]
    assert min(steps) > group
    assert max(steps) == group + 20


def test_a_later_group_changes_no_earlier_one(learn, tiny_stream, tiny_images):
    method, _ = learn(5)
    before = method.log_likelihood(tiny_images)
    method.learn(tiny_stream.experiences[1], lambda step, values: None)
    assert torch.equal(method.log_likelihood(tiny_images)[:, :2], before)


def test_its_cost_counts(learn):
    (plain, _), (aligned, _) = learn(0), learn(5)
    longer, _ = learn(0, steps=plain.settings.steps + 5)
    usual = longer.learning_macs - plain.learning_macs  # three forward passes an image
    assert aligned.learning_macs - plain.learning_macs == pytest.approx(usual * 8 / 3)


def test_a_group_of_one_class_has_nothing_to_differ_from(learn):
    source = digits(validation=0.15, augment=True, image_size=8)
    _, rows = learn(5, build_stream(source, "b0-1", tuple(range(10))))
    assert not any("cca/loss" in values for _, values in rows)


def test_without_it_a_run_does_not_depend_on_its_settings():
    plain = settings("var", Config(var=VARConfig()), seed=0)
    other = settings("var", Config(var=VARConfig(cca_lr=1.0, cca_beta=1.0)), seed=0)
    assert plain == other
    aligned = settings("var", Config(var=VARConfig(cca_steps=5, cca_lr=1.0)), seed=0)
    assert aligned["var"]["cca_lr"] == 1.0
    assert aligned["var"]["cca_steps"] == 5
