"""The diffusion method: it learns, forgets nothing it should not, resumes, and shares its cache."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, folders
from torch import Tensor

from cil import run
from cil.config import DiffusionConfig, TokenizerConfig, TrainerConfig
from cil.errors import UserError
from cil.methods.diffusion import DiffusionMethod
from cil.methods.diffusion_module import DiffusionModule
from cil.methods.diffusion_parts import build_model, check_settings
from cil.methods.seeding import seed_all
from cil.methods.var import VARMethod
from cil.models.latents import Latents
from cil.records import read_runs

pytestmark = pytest.mark.integration  # most of them learn

PLASTICITIES = ["embedding", "adapter", "trunk", "copy", "scratch"]


def no_log(step: int, values: Any) -> None:
    pass


@pytest.fixture(scope="module")
def make(tiny_stream, tiny_tokenizer_config, tiny_diffusion_config, quiet_cpu, tmp_path_factory):
    """A method with changed settings, ready for the first experience."""
    shared = tmp_path_factory.mktemp("cache")

    def build(cache: Path = shared, **changes) -> DiffusionMethod:
        settings = replace(tiny_diffusion_config, **changes)
        seed_all(0)
        return DiffusionMethod(
            "diffusion", tiny_stream, tiny_tokenizer_config, settings, quiet_cpu, cache
        )

    return build


def learn(method, stream, index: int, log=no_log) -> float:
    seed_all(0, index)
    saved: float = method.learn(stream.experiences[index], log)
    return saved


def snapshot(method, images: Tensor) -> tuple[dict[str, Tensor], Tensor, bytes]:
    """Parameters, scores and the state as it goes to disk."""
    file = io.BytesIO()
    torch.save(method.state(), file)
    modules = {"model": method.model, "latents": method.latents}
    named = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    return {k: v.clone() for k, v in named.items()}, method.scores(images), file.getvalue()


@pytest.fixture(scope="module", params=PLASTICITIES)
def learned(request, make, tiny_stream, tiny_images):
    """A method of each plasticity, and what it was after each of three experiences."""
    method = make(plasticity=request.param, lr=3e-2)
    after = []
    for index in range(3):
        learn(method, tiny_stream, index)
        after.append(snapshot(method, tiny_images))
    return method, after


@pytest.mark.parametrize("later", [1, 2])
def test_a_later_group_moves_nothing_earlier_but_a_trunk_that_keeps_learning(learned, later):
    method, after = learned
    (before, scores, _), (now, later_scores, _) = after[later - 1], after[later]
    moved = {name for name, value in before.items() if not torch.equal(value, now[name])}
    same = torch.equal(later_scores[:, : 2 * later], scores)
    if method.settings.plasticity == "trunk":
        trainable = {f"model.{n}" for n, _ in method.model.named_parameters()}
        trunk = {n for n in before if n.startswith("model.trunks.") and n in trainable}
        assert moved == trunk | {"model.groups.null"}
        assert not same
    else:
        assert moved == set()
        assert same
    new = f"model.groups.embeddings.{later}"
    assert (now[new] - before["model.groups.null"]).square().mean().sqrt() > 0.026  # it learned


def test_each_plasticity_adds_what_it_may_change(learned):
    method, after = learned
    own = set(after[2][0]) - set(after[1][0])
    kinds = {name.split(".2")[0].split(".3")[0] for name in own}  # the first trunk is extra
    own_trunk = {"model.trunks"}
    expected = {"adapter": {"model.groups.adapters"}, "copy": own_trunk, "scratch": own_trunk}
    extra = expected.get(method.settings.plasticity, set())
    assert kinds == {"model.groups.embeddings"} | extra
    size = method.size()
    kept = [p.numel() for m in (method.model, method.latents) for p in m.parameters()]
    # Four timesteps of each of six classes.
    assert (size.parameters, size.stored_images) == (sum(kept), 0)
    assert size.likelihood_evaluations == 24


def test_learning_goes_on_from_a_state_as_if_never_interrupted(
    learned, make, tiny_stream, tiny_images
):
    whole, after = learned
    resumed = make(plasticity=whole.settings.plasticity, lr=3e-2)
    seed_all(123)  # another start: everything must come from the state
    resumed.load_state(torch.load(io.BytesIO(after[0][2]), weights_only=True))
    assert resumed.classes_seen == 2
    assert torch.equal(resumed.scores(tiny_images), after[0][1])
    learn(resumed, tiny_stream, 1)
    found, scores, _ = snapshot(resumed, tiny_images)
    assert found.keys() == after[1][0].keys()
    assert all(torch.equal(value, after[1][0][name]) for name, value in found.items())
    assert torch.equal(scores, after[1][1])


def test_a_score_depends_on_its_image_alone(learned, tiny_images):
    method, after = learned
    scores = method.scores(tiny_images[5:7])
    torch.testing.assert_close(scores, after[2][1][5:7])
    assert torch.equal(method.scores(tiny_images), after[2][1])


@pytest.mark.parametrize(
    ("changes", "before"),
    [
        ({}, 15),  # steps of the tokenizer
        ({"objective": "flow"}, 15),
        ({"space": "pixels", "noise_schedule": "cosine", "first_steps": 400, "steps": 250}, 0),
    ],
    ids=["latents", "flow", "pixels"],
)
def test_it_tells_two_digits_apart(changes, before, make, tiny_stream, tiny_images, cache):
    enough = {"width": 32, "first_steps": 150, "steps": 100, "views": 4, "schedule": [[10, 1]]}
    method = make(cache, **(enough | changes))
    rows: list[tuple[int, float]] = []
    name = "diffusion/squared_error"
    learn(method, tiny_stream, 0, lambda s, v: rows.append((s, v[name])) if name in v else None)
    labels = torch.tensor(tiny_stream.experiences[0].test.targets)
    assert (method.scores(tiny_images).argmax(1) == labels).float().mean() > 0.9
    learned = method.settings.first_steps + method.settings.steps
    assert [step for step, _ in rows] == list(range(before + 9, before + learned, 10))
    losses = [loss for _, loss in rows[:15]]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    images = torch.stack([image for image, _ in tiny_stream.experiences[0].train_plain])
    units = method.latents.encode(images)
    assert units.mean().abs() < 0.2
    assert 0.7 < units.std() < 1.3
    assert (cache / "tokenizers").exists() == (before > 0)


def test_latents_are_encoded_once_and_the_tokenizer_is_that_of_the_var(
    make, tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache, monkeypatch
):
    seed_all(0)
    var = VARMethod("var", tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache)
    learn(var, tiny_stream, 0)
    method, (tokenizer,) = make(cache), (cache / "tokenizers").glob("*.pt")
    assert learn(method, tiny_stream, 0) > 0
    assert list((cache / "tokenizers").glob("*.pt")) == [tokenizer]
    ours, theirs = method.latents.tokenizer.state_dict(), var.tokenizer.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert len(list((cache / "trunks").glob("*.pt"))) == 2
    # Another plasticity finds the trunk and the latents, and reads no image again.
    monkeypatch.setattr(Latents, "raw", lambda *_: pytest.fail("it encodes anew"))
    other = make(cache, plasticity="copy")
    assert learn(other, tiny_stream, 0) > 0
    assert torch.equal(other.latents.mean_Z11, method.latents.mean_Z11)
    first = [m.model.trunks[0].state_dict() for m in (method, other)]
    assert all(torch.equal(value, first[1][name]) for name, value in first[0].items())


def test_divergence_and_too_little_memory_say_what_to_do(make, tiny_stream, monkeypatch):
    with pytest.raises(UserError, match="diffusion trunk diverged"):
        learn(make(lr=1e30), tiny_stream, 0)

    def full(*_):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    monkeypatch.setattr(DiffusionModule, "training_step", full)
    with pytest.raises(UserError, match=r"does not fit .* lower diffusion\.batch_size"):
        learn(make(batch_size=8), tiny_stream, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile_", ["never", "always"])
def test_on_a_gpu_16_bits_find_the_same_classes(
    compile_, tiny_stream, tiny_tokenizer_config, tiny_diffusion_config, make, tiny_images, cache
):
    trainer = TrainerConfig(accelerator="gpu", progress=False, compile=compile_)
    enough = {"width": 32, "first_steps": 150, "steps": 100, "views": 4, "schedule": [[10, 1]]}
    settings = replace(tiny_diffusion_config, **enough)
    method = DiffusionMethod(
        "diffusion", tiny_stream, tiny_tokenizer_config, settings, trainer, cache
    )
    for index in range(2):
        learn(method, tiny_stream, index)
        found = method.scores(tiny_images.cuda()).cpu()
        assert found.isfinite().all()
    exact = make(cache, **enough)
    exact.load_state(method.state())
    expected = exact.scores(tiny_images)
    assert (found.argmax(1) == expected.argmax(1)).double().mean() >= 0.95
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, r"diffusion\.heads is 5"),
        ({"width": 66}, r"diffusion\.width is 66"),
        ({"patch": 3}, r"diffusion\.patch is 3.* latents, 4"),
        ({"patch": 3, "space": "pixels"}, "pixels, 16"),
        ({"size": "S", "patch": 0}, r"diffusion\.patch is 0"),
        ({"steps": 0}, r"diffusion\.steps is 0"),
        ({"condition_dropout": 1.5}, "from 0 to 0.99"),
        ({"schedule": [[10, 2], [0, 1]]}, "no schedule of timesteps"),
        ({"lr": float("nan")}, r"diffusion\.lr"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message, tiny_stream):
    stream = replace(tiny_stream, image_size=16)
    check_settings(stream, TokenizerConfig(), DiffusionConfig())
    with pytest.raises(UserError, match=message):
        check_settings(stream, TokenizerConfig(), replace(DiffusionConfig(), **changes))


def test_a_published_size_stands_for_depth_width_and_heads(tiny_stream, tiny_tokenizer_config):
    settings = DiffusionConfig(size="S", depth=1, width=66, heads=5, space="pixels", patch=4)
    check_settings(tiny_stream, tiny_tokenizer_config, settings)
    trunk = build_model(Latents(None, 1, 8), settings).trunks[0]
    assert (len(trunk.blocks), trunk.width, trunk.blocks[0].attention.heads) == (12, 384, 6)
    assert trunk.tokens == 4


def test_a_tokenizer_of_another_size_only_matters_to_latents(tiny_stream):
    with pytest.raises(UserError, match="8 px"):
        check_settings(tiny_stream, TokenizerConfig(), DiffusionConfig())
    check_settings(tiny_stream, TokenizerConfig(), DiffusionConfig(space="pixels", patch=2))


def test_the_whole_command(tmp_path):
    names = "--methods=[diffusion-adapter,diffusion-embedding]"
    command = ["split_digits", *TINY, *folders(tmp_path / "runs"), names, "--stream.protocol=b8-2"]
    assert run.main(command) == 0
    adapter, embedding = read_runs(tmp_path / "runs")
    assert (adapter.method, embedding.method) == ("diffusion-adapter", "diffusion-embedding")
    assert adapter.config["diffusion"]["plasticity"] == "adapter"
    assert adapter.summary["parameters"] > embedding.summary["parameters"]
    assert adapter.summary["likelihood_evaluations"] == 20  # two timesteps of ten classes
    assert adapter.summary["prediction_macs"] > adapter.summary["prediction_attention_macs"] > 0
    assert len(list((tmp_path / "runs-cache" / "trunks").glob("*.pt"))) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods=[diffusion-adaptor]"], "did you mean diffusion-adapter?"),
        (["--methods=[diffusion]", "--diffusion.heads=7"], "diffusion.heads is 7"),
        (["--methods=[diffusion]", "--diffusion.schedule=[[5]]"], "no schedule of timesteps"),
        (["--methods=[diffusion]", "--diffusion.schedule=dc_9"], "diffusion.schedule"),
        (["--methods=[diffusion]", "--trainer.devices=3"], "tokenizer.batch_size is 32"),
        (["--methods=[diffusion]", "--trainer.devices=3", "--tokenizer.batch_size=3"],
         "diffusion.batch_size is 64"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    line = ["split_digits", *TINY, *folders(tmp_path), *arguments]
    assert run.main(line) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
