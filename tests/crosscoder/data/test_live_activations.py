"""Training from live models: the same numbers as a store, every token once, bounded memory, exact resumption."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.crosscoder import (
    LiveActivations,
    load_crosscoder,
    train_crosscoder,
    train_crosscoders,
    train_replicates,
)
from rlgen_stats.toolkit.crosscoder.data import live_activations as live_module
from rlgen_stats.toolkit.crosscoder.training import stage as stage_module
from rlgen_stats.toolkit.extraction import find_model, load_model
from rlgen_stats.toolkit.extraction.activations import read_texts
from tests.crosscoder.planted import LAYER, PROVENANCE, WORDS, crosscoder_spec, save_model

Study = tuple[StudySpec, StudyFolder]
RANDOM = np.random.default_rng(0)
TEXTS = [  # no two begin alike, so that every token's activation is its own
    [2 + i % 8, 2 + i // 8, *RANDOM.integers(2, len(WORDS), size=1 + i % 9).tolist()] for i in range(40)
]


@pytest.fixture(scope="module")
def models(stored: Study) -> list[Any]:
    return [load_model(find_model(name, *stored)) for name in ("base@0", "rl@4")]


def reader(models: list[Any], texts: list[list[int]] = TEXTS, **how: Any) -> LiveActivations:
    how = {"layer": LAYER, "pad": 0, "batch_size": 16, "seed": 4, "skip_first": 1, "buffer_tokens": 60} | how
    return LiveActivations(models, texts, **how)


@pytest.fixture(scope="module")
def slow(models: list[Any]) -> np.ndarray:
    """[token, view, channel], one text at a time, the first token of each left out."""
    rows = [np.stack([read_texts(model, [text], LAYER, 0)[0][1:] for model in models], axis=1) for text in TEXTS]
    return np.concatenate(rows)


def order_of(rows: np.ndarray, slow: np.ndarray) -> np.ndarray:
    """Which token of ``slow`` each row is."""
    distance = np.abs(rows[:, None, 0] - slow[None, :, 0]).max(axis=-1)
    nearest = distance.argmin(axis=1)
    np.testing.assert_allclose(rows, slow[nearest], rtol=1e-4, atol=1e-5)
    return nearest


def test_every_token_comes_once_with_the_activations_of_all_views(models: list[Any], slow: np.ndarray) -> None:
    live = reader(models)
    assert live.n_tokens == len(slow)
    assert live.n_batches == len(slow) // 16
    np.testing.assert_allclose(np.concatenate(list(live.sequential(7))), slow, rtol=1e-4, atol=1e-5)
    orders = []
    for epoch in (0, 1):
        batches = list(live.epoch(epoch))
        assert {len(batch) for batch in batches} == {16}
        assert len(batches) == live.n_batches
        orders.append(order_of(np.concatenate(batches), slow))
        assert len(set(orders[-1])) == len(orders[-1])
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (
        np.abs(np.corrcoef(orders[0], np.arange(len(orders[0])))[0, 1]) < 0.5
    )  # texts come in random order, 40 of them
    again = np.concatenate(list(reader(models).epoch(1)))
    np.testing.assert_array_equal(again, np.concatenate(batches))


@pytest.mark.parametrize("start", [1, 3, 4, 9, 14])
def test_going_on_from_a_batch_gives_the_same_bits(models: list[Any], start: int) -> None:
    whole = list(reader(models).epoch(2))
    rest = list(reader(models).epoch(2, start_batch=start))
    assert len(rest) == len(whole) - start
    for one, two in zip(rest, whole[start:], strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_comes_before_is_not_computed_and_memory_is_bounded(
    models: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    read = LiveActivations._read

    def watch(self: LiveActivations, group: Any) -> Any:
        rows = read(self, group)
        held.append(len(rows[0]))
        return rows

    monkeypatch.setattr(LiveActivations, "_read", watch)
    live = reader(models)
    last = list(live.epoch(0, start_batch=live.n_batches - 1))
    assert len(last) == 1
    assert len(held) <= 2
    held.clear()
    list(live.epoch(0))
    assert sum(held) == live.n_tokens
    assert len(held) >= live.n_tokens // 60
    assert max(held) <= 60 + max(map(len, TEXTS))


def test_texts_that_fit_are_read_once(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def count(*args: Any) -> Any:
        calls.append(args)
        return read_texts(*args)

    monkeypatch.setattr(live_module, "read_texts", count)
    kept = reader(models, buffer_tokens=10_000)
    first, second = (list(kept.epoch(number)) for number in (0, 1))
    passes = len(calls)
    again = reader(models, buffer_tokens=10_000)
    for one, two in zip(first + second, [*again.epoch(0), *again.epoch(1)], strict=True):
        np.testing.assert_array_equal(one, two)
    assert len(calls) == 2 * passes  # one reading each, however many epochs
    list(kept.epoch(2))
    assert len(calls) == 2 * passes
    small = reader(models, buffer_tokens=kept.n_tokens - 1)
    list(small.epoch(0))
    once = len(calls)
    list(small.epoch(1))
    assert len(calls) > once


def test_views_of_other_widths_and_other_batches(models: list[Any], tmp_path: Path, slow: np.ndarray) -> None:
    save_model(tmp_path / "wide", 9, width=24)
    from transformers import AutoModelForCausalLM

    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").eval()
    first, second = next(iter(reader([models[0], wide]).epoch(0)))
    assert (first.shape, second.shape) == ((16, 16), (16, 24))
    noise = np.concatenate(list(reader([models[0]] * 2, text_batch=[8, 3]).sequential(50)))
    np.testing.assert_allclose(noise[:, 0], noise[:, 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"one number per view, 2, got 1"):
        reader(models, text_batch=[8])
    with pytest.raises(InputError, match=r"the texts leave 2 tokens, fewer than one batch of 16; give more texts"):
        reader(models, [[3, 4, 5], [6]])


def test_training_from_live_models_is_training_from_their_activations(models: list[Any], slow: np.ndarray) -> None:
    """The first views' moments and the planted order are the reader's own; FVE follows from what was read."""
    spec = crosscoder_spec(batch_size=16, steps=200, n_features=32, k=4, learning_rate=1e-2)
    crosscoder = train_crosscoder(reader(models), spec, views=("base@0", "rl@4"), seed=1)
    scale = np.sqrt(16) / np.linalg.norm(slow, axis=-1).mean(axis=0)
    np.testing.assert_allclose(crosscoder.scale.numpy(), scale, rtol=1e-4)
    with torch.no_grad():
        x = crosscoder.normalise(torch.from_numpy(slow))
        error = (x - crosscoder.decode(crosscoder.encode(x))).square().sum()
    assert 1 - float(error / (x - x.mean(dim=0)).square().sum()) > 0.5


# -- through the study ------------------------------------------------------------------------------------------------


def corpus_study(copied: Study, n_texts: int = 80, **changes: Any) -> Study:
    spec, folder = copied
    rng = np.random.default_rng(1)
    lines = [" ".join(WORDS[i] for i in rng.integers(2, len(WORDS), 12)) for _ in range(n_texts)]
    (folder.root / "corpus.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    content = spec.model_dump(mode="json")
    content["crosscoders"] = [content["crosscoders"][0] | {"corpus": "corpus.jsonl", "steps": 40} | changes]
    return StudySpec.model_validate(content), folder


def test_a_study_trains_on_a_corpus_without_storing_it(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = corpus_study(copied)
    before = {p.relative_to(folder.root) for p in folder.activations.rglob("*")}
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    assert {p.relative_to(folder.root) for p in folder.activations.rglob("*")} == before
    first = load_crosscoder(folder.crosscoder("main"))
    assert first.facts["data_tokens"] == 80 * 11
    health = json.loads((folder.crosscoder("main") / "health.json").read_text())
    assert len(health["fve"]) == 3
    with monkeypatch.context() as patch:
        patch.setattr(live_module, "LiveActivations", None)  # nothing is read where nothing changed
        train_crosscoders(spec, folder, provenance=PROVENANCE)
    corpus_study(copied, n_texts=90)
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    assert load_crosscoder(folder.crosscoder("main")).facts["data_tokens"] == 90 * 11


@pytest.mark.slow
def test_interrupted_training_on_a_corpus_ends_with_the_same_weights(
    copied: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stage_module, "train_replicates", partial(train_replicates, save_every=10))
    monkeypatch.setattr(live_module, "LiveActivations", partial(LiveActivations, buffer_tokens=200))
    spec, folder = corpus_study(copied)
    shutil.copytree(folder.root, tmp_path / "cut")
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    whole = load_crosscoder(folder.crosscoder("main"))

    cut, read = StudyFolder(tmp_path / "cut"), LiveActivations._read
    calls = []

    def stop(self: LiveActivations, group: Any) -> Any:
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return read(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(LiveActivations, "_read", stop)
        with pytest.raises(KeyboardInterrupt):
            train_crosscoders(spec, cut, provenance=PROVENANCE)
    assert (cut.crosscoder("main") / "training.safetensors").exists()
    train_crosscoders(spec, cut, provenance=PROVENANCE)
    assert load_crosscoder(cut.crosscoder("main")).weights_sha256 == whole.weights_sha256


def test_bad_corpora_are_named(copied: Study) -> None:
    spec, folder = corpus_study(copied)
    (folder.root / "corpus.jsonl").write_text('{"words": "what is"}\n')
    with pytest.raises(InputError, match=r"corpus.jsonl needs a column 'text', got words"):
        train_crosscoders(spec, folder, provenance=PROVENANCE)
    (folder.root / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"no corpus at .*corpus.jsonl; correct crosscoders.main.corpus"):
        train_crosscoders(spec, folder, provenance=PROVENANCE)
