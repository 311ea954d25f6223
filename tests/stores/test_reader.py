"""The shuffled reader: every token once, paired, deterministic, whatever the buffer."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores import ActivationWriter, MixedReader, PairedReader
from rlgen_stats.stores.shards import ShardArray
from tests.stores.conftest import N_TOKENS, WIDTH

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


@pytest.mark.parametrize("buffer", [1, ROW, 3 * ROW, 10 * ROW])
def test_an_epoch_taken_up_in_the_middle_goes_on_as_if_never_stopped(pair: Path, buffer: int) -> None:
    whole = list(reader(pair, buffer_bytes=buffer, batch_size=333).epoch(2))
    for start in (0, 1, 17, 59, 60, 61):
        rest = list(reader(pair, buffer_bytes=buffer, batch_size=333).epoch(2, start_batch=start))
        assert len(rest) == max(0, len(whole) - start)
        for one, two in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(one, two)


def test_only_shards_with_wanted_tokens_are_read(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = ShardArray.shard
    monkeypatch.setattr(ShardArray, "shard", lambda self, index: reads.append(index) or real(self, index))
    chosen = reader(pair, where={"prompt": ["p3", "p180"], "segment": "completion"}, batch_size=10)
    assert reads == []
    rows = np.concatenate(list(chosen.epoch(0)))[:, 0, 0]
    assert sorted(rows) == [*range(155, 200), *range(9005, 9050)]
    assert sorted(set(reads)) == [0, 1]  # of three shards, and whole ones: never a row at a time
    assert len(reads) == 4
    mask = np.arange(N_TOKENS) < 160
    both = reader(pair, where={"prompt": ["p3", "p180"], "segment": "completion"}, mask=mask, batch_size=1)
    assert sorted(np.concatenate(list(both.epoch(0)))[:, 0, 0]) == [*range(155, 160)]
    with pytest.raises(InputError, match="no segment is called 'middle'"):
        reader(pair, where={"segment": "middle"})


def test_reading_ahead_restarts_only_from_where_it_is_needed(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = ShardArray.shard
    monkeypatch.setattr(ShardArray, "shard", lambda self, index: reads.append(index) or real(self, index))
    last = N_TOKENS // 100 - 1
    assert len(list(reader(pair, buffer_bytes=1).epoch(0, start_batch=last))) == 1
    assert len(reads) == 2  # one shard of three, in two views


def test_views_of_several_widths_come_side_by_side(store: Path) -> None:
    rows = np.arange(N_TOKENS, dtype=np.float32)[:, None]
    for model, width in (("base@0", 2), ("rl@80", 5)):
        with ActivationWriter(store, model=model, site="block2", width=width) as writer:
            writer.append(np.repeat(rows, width, axis=1))
    both = reader(store)
    one, two = next(both.epoch(0))
    assert (one.shape, two.shape) == ((100, 2), (100, 5))
    np.testing.assert_array_equal(one[:, 0], two[:, 4])
    with pytest.raises(StoreError, match=r"widths \(2, 5\)"):
        both.width  # noqa: B018


@pytest.mark.parametrize("last", [True, False])
def test_a_last_short_batch_is_dropped_or_given(pair: Path, last: bool) -> None:
    sizes = [len(batch) for batch in reader(pair, batch_size=333, drop_last=not last).epoch(0)]
    assert sizes == [333] * 60 + ([20] if last else [])
    assert reader(pair, batch_size=333, drop_last=not last).n_batches == len(sizes)


def test_positions_in_the_order_are_uniform_over_epochs(pair: Path) -> None:
    """One token's place in the epoch, over many epochs, is uniform (a Kolmogorov-Smirnov test at a fixed seed)."""
    small = np.arange(N_TOKENS) % 40 == 0
    wanted = float(np.flatnonzero(small)[123])
    chosen = reader(pair, mask=small, batch_size=1)
    places = []
    for epoch in range(200):
        rows = np.concatenate(list(chosen.epoch(epoch)))[:, 0, 0]
        places.append(int(np.flatnonzero(rows == wanted)[0]) / len(rows))
    assert stats.kstest(places, "uniform").pvalue > 0.001


def mixed(path: Path, **weights: float) -> MixedReader:
    sources = {
        name: reader(path, where={"task": task}, batch_size=64, buffer_bytes=ROW)
        for name, task in (("a", "math"), ("b", "sciq"))
    }
    return MixedReader(sources, weights or {"a": 3, "b": 1}, seed=5)


def test_mixtures_keep_their_shares_and_give_every_token_before_any_twice(pair: Path) -> None:
    mix = mixed(pair)
    batches = [batch for epoch in (0, 1) for batch in mix.epoch(epoch)]
    rows = np.concatenate(batches)[:, 0, 0].astype(int)
    math = (rows // 50) % 2 == 1
    assert abs(math.mean() - 0.75) < 0.01
    for source in (rows[math], rows[~math]):
        size = N_TOKENS // 2
        once = source[: size - 64]  # rows are shuffled within a batch, also in the one where a source begins anew
        assert len(set(once)) == len(once)
        if len(source) > size + 64:
            assert len(set(source[: size + 64])) == size
    again = list(mixed(pair).epoch(1, start_batch=100))
    for one, two in zip(again, batches[mix.n_batches + 100 :], strict=True):
        np.testing.assert_array_equal(one, two)


def test_mixtures_that_cannot_be_mixed_are_explained(pair: Path) -> None:
    one, two = reader(pair), reader(pair, batch_size=50)
    with pytest.raises(InputError, match="every source needs a positive weight"):
        MixedReader({"a": one}, {"b": 1.0}, seed=0)
    with pytest.raises(InputError, match="every source needs a positive weight"):
        mixed(pair, a=1.0, b=0.0)
    with pytest.raises(InputError, match="source 'b' differs from the first"):
        MixedReader({"a": one, "b": two}, {"a": 1.0, "b": 1.0}, seed=0)


def test_two_epochs_at_once_do_not_share_their_buffers(pair: Path) -> None:
    both = reader(pair, buffer_bytes=2 * ROW)
    alone = [list(both.epoch(epoch)) for epoch in (0, 1)]
    for _ in range(2):  # the second time the buffers are those of the epochs before
        together = list(zip(both.epoch(0), both.epoch(1), strict=True))
        for i in (0, 1):
            np.testing.assert_array_equal(np.stack([batches[i] for batches in together]), np.stack(alone[i]))
    next(both.epoch(0))  # given up in the middle
    np.testing.assert_array_equal(np.stack(list(both.epoch(1))), np.stack(alone[1]))
