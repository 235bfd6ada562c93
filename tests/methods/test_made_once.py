"""A tokenizer and a trunk are learned once and serve every method that is built upon them."""

from dataclasses import replace

import pytest
import torch

from cil.methods.seeding import seed_all
from cil.methods.training import fit
from cil.methods.var import VARMethod

pytestmark = pytest.mark.integration  # every test learns


@pytest.fixture
def titles(monkeypatch) -> list[str]:
    """What is really learned, in order."""
    learned: list[str] = []

    def noting(*args, title, **options):
        learned.append(title)
        return fit(*args, title=title, **options)

    for room in ("groundwork", "var", "diffusion"):
        monkeypatch.setattr(f"cil.methods.{room}.fit", noting)
    return learned


@pytest.fixture
def learn(tiny_stream, tiny_tokenizer_config, tiny_var_config, quiet_cpu, cache):
    """Learns the first group with changed settings -> (method, log, seconds saved)."""

    def run(seed: int = 0, tokenizer: dict | None = None, **var):
        settings = replace(tiny_var_config, **var)
        sizes = replace(tiny_tokenizer_config, **(tokenizer or {}))
        rows: list[tuple[int, dict[str, float]]] = []
        seed_all(seed)
        method = VARMethod("var", tiny_stream, sizes, settings, quiet_cpu, cache)
        seed_all(seed, 0)
        saved = method.learn(
            tiny_stream.experiences[0], lambda step, values: rows.append((step, dict(values)))
        )
        return method, rows, saved

    return run


def test_what_is_found_is_what_would_have_been_learned(learn, titles, tmp_path, cache):
    first, rows, saved = learn()
    assert saved == 0
    assert titles == ["var tokenizer", "var trunk", "var experience 1/3"]
    titles.clear()
    second, again, saved = learn()
    assert titles == ["var experience 1/3"]
    assert again == rows
    assert saved > 0
    ours, theirs = second.state(), first.state()
    assert all(torch.equal(ours["model"][name], v) for name, v in theirs["model"].items())
    assert torch.equal(ours["scale_weights"], theirs["scale_weights"])
    cache.rename(tmp_path / "elsewhere")
    third, _, saved = learn()
    assert saved == 0
    assert all(torch.equal(third.state()["model"][n], v) for n, v in theirs["model"].items())


@pytest.mark.parametrize(
    ("change", "learned"),
    [
        ({"plasticity": "copy"}, ["experience 1/3"]),
        ({"plasticity": "scratch"}, ["experience 1/3"]),  # it needs no trunk
        ({"plasticity": "scratch", "seed": 1}, ["tokenizer", "experience 1/3"]),
        ({"steps": 3, "adapter_rank": 1, "smoothing_samples": 2}, ["experience 1/3"]),
        ({"first_steps": 3}, ["trunk", "experience 1/3"]),
        ({"tokenizer": {"steps": 3}}, ["tokenizer", "trunk", "experience 1/3"]),
        ({"seed": 1}, ["tokenizer", "trunk", "experience 1/3"]),
    ],
)
def test_only_what_a_change_touches_is_learned_again(change, learned, learn, titles):
    learn()
    titles.clear()
    learn(**change)
    assert titles == [f"var {title}" for title in learned]


def test_a_damaged_trunk_is_learned_again(learn, titles, cache, capsys):
    first, _, _ = learn()
    (trunk,) = (cache / "trunks").glob("*.pt")
    trunk.write_bytes(trunk.read_bytes()[:-9])
    titles.clear()
    second, _, _ = learn()
    assert titles == ["var trunk", "var experience 1/3"]
    assert "damaged" in capsys.readouterr().err
    theirs = first.state()["model"]
    assert all(torch.equal(v, theirs[name]) for name, v in second.state()["model"].items())
