"""Replicates read the same tokens in orders of their own."""

from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from rlgen_stats.toolkit.crosscoder import ArrayReader
from rlgen_stats.toolkit.crosscoder.data import paired
from rlgen_stats.toolkit.crosscoder.data.paired import in_orders, joined

N, SIZE, CHANNELS = 70, 10, 3
BATCH_BYTES = 4 * SIZE * 2 * CHANNELS
DATA = np.arange(N * 2 * CHANNELS, dtype=np.float32).reshape(N, 2, CHANNELS)


def read(orders: list[int | None], n: int, *, start: int = 0) -> list[list[NDArray[np.float32]]]:
    reader = ArrayReader(DATA, batch_size=SIZE, seed=5)
    return list(islice(in_orders(reader, orders, batch_bytes=BATCH_BYTES, start=start), n))


def tokens(batches: list[NDArray[np.float32]]) -> list[int]:
    """Numbers of the tokens, whose rows must be whole."""
    rows = np.concatenate(batches)
    numbers = (rows[:, 0] / (2 * CHANNELS)).astype(int)
    np.testing.assert_array_equal(rows, DATA.reshape(N, -1)[numbers])
    return numbers.tolist()


def test_every_order_has_every_token_once_an_epoch_and_none_is_another() -> None:
    as_read, one, two, again = (tokens(list(each)) for each in zip(*read([None, 1, 2, 1], 2 * 7), strict=True))
    epochs = (order[i * N : (i + 1) * N] for order in (as_read, one, two) for i in range(2))
    assert [sorted(epoch) for epoch in epochs] == [list(range(N))] * 6
    assert again == one
    firsts = [frozenset(order[start : start + SIZE]) for order in (as_read, one, two) for start in (0, N)]
    assert len(set(firsts)) == 6, "other batches in every order and epoch"


@pytest.mark.parametrize("orders", [[None], [None, None], [3], [None, 3]])
def test_the_readers_order_is_its_own_and_any_batch_can_be_the_first(orders: list[int | None]) -> None:
    batches = read(orders, 16)
    own = [joined(batch) for epoch in range(3) for batch in ArrayReader(DATA, batch_size=SIZE, seed=5).epoch(epoch)]
    for number, batch in enumerate(batches):
        (from_here,) = read(orders, 1, start=number)
        for order, rows, same in zip(orders, batch, from_here, strict=True):
            np.testing.assert_array_equal(rows, same)
            assert (order is not None) or np.array_equal(rows, own[number])


@pytest.mark.parametrize(
    ("room", "least", "n_batches"),
    [(3 * BATCH_BYTES, 1, 3), (4 * BATCH_BYTES - 1, 1, 3), (1, 1, 1), (1, 2, 2), (3 * BATCH_BYTES, 2, 3)],
)
def test_tokens_are_dealt_out_within_blocks_that_fit(
    room: int, least: int, n_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired, "BLOCK_BYTES", room)
    monkeypatch.setattr(paired, "BLOCK_BATCHES", least)
    batches = read([None, 1], 6)
    for start in range(0, 6, n_batches):
        as_read, own = (tokens(list(each)) for each in zip(*batches[start : start + n_batches], strict=True))
        assert sorted(as_read) == sorted(own)
        assert as_read != own
    first = [set(tokens([batch[order]])) for batch in batches[:1] for order in (0, 1)]
    assert (first[0] == first[1]) is (n_batches == 1)
