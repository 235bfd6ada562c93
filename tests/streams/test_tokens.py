"""Token maps of real digits: made once, found again, and made again when something is wrong."""

import errno
import multiprocessing
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cil import cache as cache_module
from cil.errors import UserError
from cil.files import lock
from cil.methods.var_parts import build_tokenizer
from cil.streams.tokens import (
    EncodedImages,
    Encoding,
    Turned,
    Views,
    encode_once,
    floats_of,
    in_memory,
    shuffled,
    shuffled_images,
    tokens_of,
)

VIEWS = 3
CPU = torch.device("cpu")


class Counting:
    """A tokenizer that counts the images it was given."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.images = tokenizer, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return self.tokenizer.tokenize(images)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_config):
    torch.manual_seed(0)
    return build_tokenizer(tiny_tokenizer_config, 1).eval().requires_grad_(False)


@pytest.fixture
def images(tiny_stream):
    return tiny_stream.experiences[0].train


def made(
    images, tokenizer, folder: Path, workers: int = 0, **key
) -> tuple[EncodedImages, dict, int]:
    """Token maps, their facts and how many images were encoded for them."""
    counting = Counting(tokenizer)
    row = tokens_of(tokenizer.tokens)
    encoding = Encoding(counting, row, CPU, workers, progress=False, unreadable=list)
    key = {"views": VIEWS, **key}
    path = cache_module.place(folder, "digits", key, ".npy")
    maps, facts = encode_once(Views(images, VIEWS, seed=0), encoding, path, key)
    return maps, facts, counting.images


def content(maps: EncodedImages) -> tuple[Tensor, Tensor]:
    return maps[list(range(len(maps)))]


def test_they_are_the_tokens_of_every_view(images, tokenizer, cache):
    maps, facts, encoded = made(images, tokenizer, cache)
    tokens, labels = content(maps)
    assert len(maps) == encoded == VIEWS * len(images)
    assert tokens.shape == (len(maps), 30)
    assert tokens.dtype == torch.int16
    assert labels.tolist() == VIEWS * images.targets
    first, second, _ = tokens.chunk(VIEWS)
    assert not torch.equal(first, second)  # augmented afresh
    assert facts["codes"] == len(tokens.unique())
    plain = tiny_plain(images)
    maps, _, _ = made(plain, tokenizer, cache, plain=True)
    expected = tokenizer.tokenize(in_memory(plain)[0])
    assert torch.equal(content(maps)[0].long(), expected.repeat(VIEWS, 1))


def tiny_plain(images):
    return type(images)(images.base, images.indices, range(10))


def test_the_second_time_they_are_found(images, tokenizer, cache):
    first, made_facts, _ = made(images, tokenizer, cache)
    second, facts, encoded = made(images, tokenizer, cache)
    assert encoded == 0
    assert all(map(torch.equal, content(first), content(second)))
    assert made_facts["saved"] == 0
    assert facts["saved"] == made_facts["seconds"] > 0
    _, _, encoded = made(images, tokenizer, cache, digest="another")
    assert encoded == VIEWS * len(images)


def test_other_code_is_not_served(images, tokenizer, cache, monkeypatch):
    made(images, tokenizer, cache)
    monkeypatch.setattr(cache_module, "_code", lambda: "changed")
    _, _, encoded = made(images, tokenizer, cache)
    assert encoded == VIEWS * len(images)


def test_whoever_loads_them_they_are_the_same(images, tokenizer, tmp_path):
    torch.manual_seed(1)
    alone, _, _ = made(images, tokenizer, tmp_path / "alone")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    helped, _, _ = made(images, tokenizer, tmp_path / "helped", workers=2)
    assert all(map(torch.equal, content(alone), content(helped)))
    made(images, tokenizer, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)  # nor does anything else depend on it


@pytest.mark.parametrize("damage", ["a byte", "cut off", "no file", "half a note", "a fact"])
def test_damage_is_noticed_and_mended(damage, images, tokenizer, cache, capsys):
    maps, _, _ = made(images, tokenizer, cache)
    expected = [part.clone() for part in content(maps)]
    data = bytearray(maps.path.read_bytes())
    note = maps.path.with_suffix(".json")
    if damage == "a byte":
        data[-7] ^= 1
        maps.path.write_bytes(data)
    elif damage == "cut off":
        maps.path.write_bytes(data[:-100])
    elif damage == "no file":
        maps.path.unlink()
    elif damage == "half a note":
        note.write_bytes(note.read_bytes()[:20])
    else:
        note.write_text(note.read_text().replace('"codes": ', '"codes": 1'))
    again, _, encoded = made(images, tokenizer, cache)
    assert encoded == len(again)
    assert "damaged" in capsys.readouterr().err
    assert all(map(torch.equal, content(again), expected))


def test_what_was_cut_short_does_not_count(images, tokenizer, cache):
    def dies(_: Tensor) -> Tensor:
        raise RuntimeError("killed")

    encoding = Encoding(
        dies, tokens_of(tokenizer.tokens), torch.device("cpu"), 0, progress=False, unreadable=list
    )
    path = cache_module.place(cache, "digits", {"views": VIEWS}, ".npy")
    with pytest.raises(RuntimeError, match="killed"):
        encode_once(Views(images, VIEWS, seed=0), encoding, path, {"views": VIEWS})
    assert not path.exists()
    _, _, encoded = made(images, tokenizer, cache)
    assert encoded == VIEWS * len(images)


def test_a_loading_process_that_lives_on_holds_nobody_up(tmp_path):
    path = tmp_path / "tokens.npy"
    with cache_module.alone(path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        assert lock(tmp_path / ".tokens.npy.lock") is None
    deadline = time.monotonic() + 20  # it lets go as soon as it runs
    while (held := lock(tmp_path / ".tokens.npy.lock")) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.is_alive()
    child.kill()
    assert held is not None
    held.close()


def test_who_waits_for_another_run_saves_the_rest_only(images, tokenizer, cache, monkeypatch):
    _, first, _ = made(images, tokenizer, cache)
    alone = cache_module.alone

    @contextmanager
    def after_waiting(path):
        with alone(path):
            yield 5.0

    monkeypatch.setattr(cache_module, "alone", after_waiting)
    _, facts, _ = made(images, tokenizer, cache)
    assert facts["saved"] == pytest.approx(first["seconds"] - 5.0)


def test_a_full_disk_is_one_sentence(images, tokenizer, cache, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cil.files.os.fsync", full)
    with pytest.raises(UserError, match=r"disk is full.*digits"):
        made(images, tokenizer, cache)


def test_batches_hold_every_row_once(images, tokenizer, cache):
    maps, _, _ = made(images, tokenizer, cache)
    torch.manual_seed(0)
    batches = list(shuffled(maps, 36))
    assert [len(labels) for _, labels in batches] == 5 * [36]
    seen = Counter(tuple(row.tolist()) for tokens, _ in batches for row in tokens)
    assert seen == Counter(tuple(row.tolist()) for row in content(maps)[0])
    assert not torch.equal(batches[0][0], next(iter(shuffled(maps, 36)))[0])


def test_turned_images_are_classes_of_their_own(tiny_stream):
    images = tiny_stream.experiences[0].test
    turned = Views(Turned(images, 4, classes=2), 4, seed=0)
    quarters = set()
    for row in range(len(turned)):
        image, label = turned[row]
        original, its_label = images[row % len(images)]
        quarter, rest = divmod(label, 2)
        assert rest == its_label
        assert np.array_equal(image.numpy(), np.rot90(original.numpy(), quarter, (1, 2)))
        quarters.add(quarter)
    assert quarters == {0, 1, 2, 3}


def test_images_come_in_a_new_order_each_pass(images):
    torch.manual_seed(0)
    loader = shuffled_images(images, 20, workers=0)
    first, second = (torch.cat([labels for _, labels in loader]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(images.targets)
    assert first != second


def test_latents_are_kept_in_16_bits_and_know_their_spread(images, tokenizer, cache, monkeypatch):
    monkeypatch.setattr("cil.streams.tokens._CHUNK", 7)  # no divisor of their number
    encoding = Encoding(tokenizer.encode, floats_of((4, 4, 4)), CPU, 0, False, list)
    key = {"views": VIEWS}
    path = cache_module.place(cache, "latents", key, ".npy")
    plain = tiny_plain(images)
    rows, facts = encode_once(Views(plain, VIEWS, seed=0), encoding, path, key)
    found, labels = content(rows)
    assert found.dtype == torch.float16
    assert facts["codes"] == 0
    assert labels.tolist() == VIEWS * plain.targets
    expected = tokenizer.encode(in_memory(plain)[0])
    torch.testing.assert_close(found.float(), expected.repeat(VIEWS, 1, 1, 1), rtol=1e-3, atol=1e-4)
    mean_Z, std_Z = rows.moments()
    values = found.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean_Z, values.mean(1))
    torch.testing.assert_close(std_Z, values.std(1, correction=0))
