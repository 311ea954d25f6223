"""Records of stages, with values of other types."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from rlgen_stats.schemas.errors import StoreCorruptError, StoreError
from rlgen_stats.stores.owners import is_outdated
from rlgen_stats.stores.stage_records import read_record, read_times_forced
from rlgen_stats.stores.verify import _check_record

SOUND: dict[str, Any] = {
    "stage": "drift",
    "study_id": "s",
    "key": "k",
    "finished": True,
    "seconds": 3,
    "earlier": ["k"],
    "needs": {"encode": "e"},
    "stores": {"results.zarr/drift": []},
    "dictionaries": {"results.zarr/drift": "crosscoder/main"},
    "forced": 1,
    "facts": {"anything": [1, None]},
}
READERS: dict[str, Callable[[Path], object]] = {
    "record": read_record,
    "verify": lambda file: _check_record(file.parent.parent, file),
    "what needed it": lambda file: is_outdated(file.parent.parent, {"needs": {"drift": "k"}}),
}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    (tmp_path / "stages").mkdir()
    return tmp_path / "stages/drift.json"


def test_a_sound_record_is_read_as_it_is(record: Path) -> None:
    record.write_text(json.dumps(SOUND | {"a later release": {"adds": 1}}))
    assert read_record(record) == SOUND | {"a later release": {"adds": 1}}
    for name, read in READERS.items():
        with pytest.raises(StoreError, match=r"results\.zarr/drift is missing") if name == "verify" else nullcontext():
            read(record)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (None, 3, [], {})) for name in ("stage", "study_id", "key")),
        ("finished", ("yes", 1, None)),
        ("seconds", ("x", [], -1, True, None)),
        ("earlier", (3, ["x", 3], {})),
        ("needs", (["a"], {"encode": None}, "x")),
        ("stores", ([], None, 3, "x", {"results.zarr/drift": 5}, {"results.zarr/drift": None})),
        ("dictionaries", (["x"], {"results.zarr/drift": 3})),
        ("forced", ("x", True, 0, 1.5)),
        ("facts", ([], 3)),
    ],
)
def test_a_value_of_another_type_is_damage(record: Path, reader: str, name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        record.write_text(json.dumps(SOUND | {name: value}))
        with pytest.raises(StoreCorruptError, match=rf"drift\.json: {name}.*; restore it or delete it and run again"):
            READERS[reader](record)


@pytest.mark.parametrize("missing", ["stage", "study_id", "key"])
def test_a_record_says_whose_it_is(record: Path, missing: str) -> None:
    record.write_text(json.dumps({name: value for name, value in SOUND.items() if name != missing}))
    with pytest.raises(StoreCorruptError, match=rf"drift\.json: {missing}: field required"):
        read_record(record)


@pytest.mark.parametrize("times", [{"outcomes": "x"}, {"outcomes": True}, {"outcomes": 0}, {"outcomes": 1.5}])
def test_how_often_stages_were_forced_is_a_number(tmp_path: Path, times: dict[str, Any]) -> None:
    file = tmp_path / "forced.json"
    file.write_text(json.dumps({"outcomes": 2}))
    assert read_times_forced(file) == {"outcomes": 2}
    file.write_text(json.dumps(times))
    with pytest.raises(StoreCorruptError, match=r"forced\.json: outcomes: .*; restore it or delete it"):
        read_times_forced(file)


@pytest.mark.parametrize(("name", "damage"), [("forced.json", {"outcomes": True}), ("fingerprints.json", [1])])
def test_other_files_among_the_records_are_no_records(tmp_path: Path, name: str, damage: Any) -> None:
    (tmp_path / "stages").mkdir()
    file = tmp_path / "stages" / name
    file.write_text(json.dumps({"outcomes": 2}))
    _check_record(tmp_path, file)
    file.write_text(json.dumps(damage))
    with pytest.raises(StoreCorruptError, match=name):
        _check_record(tmp_path, file)
