"""The shuffled reader: every token once, paired, deterministic, whatever the buffer."""

from pathlib import Path

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores import ActivationWriter, PairedReader

from .conftest import N_TOKENS, WIDTH

ROW = 2 * WIDTH * 4 * 8192


@pytest.fixture
def pair(store: Path) -> Path:
    rows = np.repeat(np.arange(N_TOKENS, dtype=np.float32)[:, None], WIDTH, axis=1)
    for model, shift in (("base@0", 0.0), ("rl@80", 0.5)):
        with ActivationWriter(store, model=model, site="block2", width=WIDTH) as writer:
            writer.append(rows + shift)
    return store


def reader(path: Path, **options: object) -> PairedReader:
    return PairedReader(path, ["base@0", "rl@80"], "block2", **({"batch_size": 100, "seed": 3} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("buffer", [1, ROW, 2 * ROW, 10 * ROW])
def test_every_token_once_and_views_paired(pair: Path, buffer: int) -> None:
    batches = list(reader(pair, buffer_bytes=buffer).epoch(0))
    rows = np.concatenate(batches)
    assert {b.shape for b in batches} == {(100, 2, WIDTH)}
    np.testing.assert_array_equal(rows[:, 1], rows[:, 0] + 0.5)
    assert sorted(rows[:, 0, 0]) == list(range(N_TOKENS))
    assert abs(np.corrcoef(rows[:, 0, 0], np.arange(N_TOKENS))[0, 1]) < (0.03 if buffer > 2 * ROW else 0.9)


def test_order_depends_on_seed_and_epoch_only(pair: Path) -> None:
    first = np.concatenate(list(reader(pair).epoch(4)))
    again = reader(pair)
    list(again.epoch(0))
    np.testing.assert_array_equal(first, np.concatenate(list(again.epoch(4))))
    assert not np.array_equal(first, np.concatenate(list(reader(pair).epoch(5))))
    assert not np.array_equal(first, np.concatenate(list(reader(pair, seed=4).epoch(4))))


@pytest.mark.parametrize("buffer", [1, 10 * ROW])
def test_mask_selects_tokens(pair: Path, buffer: int) -> None:
    mask = np.arange(N_TOKENS) % 7 == 2
    chosen = reader(pair, mask=mask, buffer_bytes=buffer)
    assert chosen.n_tokens == mask.sum()
    seen = np.concatenate(list(chosen.epoch(0)))[:, 0, 0]
    assert len(seen) == mask.sum() // 100 * 100
    assert set(seen) <= set(np.flatnonzero(mask))
    assert len(set(seen)) == len(seen)
    np.testing.assert_array_equal(np.concatenate(list(chosen.sequential(64)))[:, 0, 0], np.flatnonzero(mask))


def test_refusals(pair: Path) -> None:
    with pytest.raises(StoreError, match=r"no complete activations of \['sft@9'\]"):
        PairedReader(pair, ["sft@9"], "block2", batch_size=1, seed=0)
    with pytest.raises(InputError, match="one entry a token"):
        reader(pair, mask=np.ones(3, bool))
    with pytest.raises(InputError, match="leaves 5 tokens, fewer than one batch of 100"):
        reader(pair, mask=np.arange(N_TOKENS) < 5)
