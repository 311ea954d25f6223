"""Small seeded numbers of the faults that ``make faults`` counts at length: nothing is lost, nothing silently wrong."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from tests.faults.damaged_stores import count_flips, count_kills, count_misplaced, prepare
from tests.faults.kills import elsewhere
from tests.faults.table import BEGIN, END, updated, written


def test_killed_writers_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    counted = elsewhere(partial(count_kills, tmp_path, n=3, seed=0, log=print), start="spawn")
    assert counted == Counter(harmless=counted.total())
    assert counted.total() >= 3


def test_flipped_bits_are_named(tmp_path: Path) -> None:
    assert count_flips(prepare(tmp_path), n=20, seed=0, log=print) == Counter(named=20)


def test_sound_pieces_in_the_wrong_place_are_named(tmp_path: Path) -> None:
    assert count_misplaced(prepare(tmp_path), n=20, seed=0, log=print) == Counter(named=20)


def test_rows_are_replaced_by_their_title() -> None:
    text = f"a\n{BEGIN}\nx\n|---|\n| one | 1 |\n| two | 2 |\n{END}\nb\n"
    new = updated(text, {"two": written("two", Counter(named=3, lost=1)), "three": written("three", Counter(named=1))})
    assert new.startswith(f"a\n{BEGIN}\n| faults | counted | named")
    assert "| one | 1 |\n| two | 4 | 3 | 0 | 1 | 0 |\n| three | 1 | 1 | 0 | 0 | 0 |\n" in new
    assert new.endswith(f"{END}\nb\n")
