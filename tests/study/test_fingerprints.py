"""Fingerprints of input files: read whole once, then looked at; what changed is found."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.errors import StoreCorruptError
from rlgen_stats.toolkit.study import fingerprints
from rlgen_stats.toolkit.study.fingerprints import SAMPLE_BYTES, SAMPLES, Fingerprints

WHOLE = SAMPLES * SAMPLE_BYTES
"""Size up to which the sample is the file."""


class Hashed:
    """Names of the files that were read whole, and of the tasks shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        self.shown: list[str] = []
        read = fingerprints._sha256

        def noting(file: Path, advance: Any) -> str:
            self.files.append(file.name)
            return read(file, advance)

        monkeypatch.setattr(fingerprints, "_sha256", noting)

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Any]:
        self.shown.append(description)
        yield fingerprints.SILENT.task("").__enter__()  # type: ignore[attr-defined]

    def log(self, message: str) -> None: ...


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    return Hashed(monkeypatch)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, size in (("config.json", 100), ("model.safetensors", WHOLE + 16 * SAMPLES), ("README.md", 10)):
        (folder / name).write_bytes(np.random.default_rng(size).bytes(size))
    return folder


def change(file: Path, offset: int) -> None:
    """One byte, with the times of the file kept."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_is_as_remembered_is_not_read_again(tmp_path: Path, checkpoint: Path, hashed: Hashed) -> None:
    record = tmp_path / "fingerprints.json"
    first = Fingerprints(record).of(checkpoint)
    assert hashed.files == ["config.json", "model.safetensors"]  # small files too; the README is none of the model's
    assert Fingerprints(record).of(checkpoint) == first
    assert len(hashed.files) == 2


def test_touched_files_are_read_again_only_where_the_hash_must_be_exact(
    tmp_path: Path, checkpoint: Path, hashed: Hashed
) -> None:
    record = tmp_path / "fingerprints.json"
    first = Fingerprints(record).of(checkpoint)
    os.utime(checkpoint / "model.safetensors")
    hashed.files.clear()
    assert Fingerprints(record, exact=False).of(checkpoint) == first
    assert hashed.files == []
    assert Fingerprints(record).of(checkpoint) == first
    assert hashed.files == ["model.safetensors"]
    assert Fingerprints(record).of(checkpoint) == first
    assert hashed.files == ["model.safetensors"]  # its new time is remembered


@pytest.mark.parametrize("exact", [True, False])
def test_a_change_in_a_sample_is_found_although_size_and_time_are_the_same(
    tmp_path: Path, checkpoint: Path, exact: bool
) -> None:
    weights, record = checkpoint / "model.safetensors", tmp_path / "fingerprints.json"
    size = weights.stat().st_size
    seen = {Fingerprints(record).of(checkpoint)}
    for offset in (0, SAMPLE_BYTES - 1, size // 2 + SAMPLE_BYTES // 2, size - SAMPLE_BYTES, size - 1):
        change(weights, offset)
        seen.add(Fingerprints(record, exact=exact).of(checkpoint))
    assert len(seen) == 6


def test_files_up_to_the_size_of_the_sample_are_looked_at_whole(tmp_path: Path) -> None:
    """Just inside: every byte counts. Just outside: the bytes between the pieces are read when the time changes."""
    file, record = tmp_path / "weights", tmp_path / "fingerprints.json"
    file.write_bytes(bytes(WHOLE))
    first = Fingerprints(record).of(file)
    change(file, SAMPLE_BYTES + 5)
    assert Fingerprints(record, exact=False).of(file) != first
    file.write_bytes(bytes(WHOLE + 16 * SAMPLES))
    first = Fingerprints(record).of(file)
    change(file, SAMPLE_BYTES + 5)
    assert Fingerprints(record).of(file) == first
    os.utime(file)
    assert Fingerprints(record).of(file) != first


def test_hashing_is_shown_from_a_size_on(
    tmp_path: Path, checkpoint: Path, hashed: Hashed, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 100 + (checkpoint / "model.safetensors").stat().st_size
    monkeypatch.setattr(fingerprints, "_SHOWN", size + 1)
    Fingerprints(tmp_path / "one.json", progress=hashed).of(checkpoint)
    assert hashed.shown == []
    monkeypatch.setattr(fingerprints, "_SHOWN", size)
    Fingerprints(tmp_path / "two.json", progress=hashed).of(checkpoint)
    assert hashed.shown == ["hash model"]


@pytest.mark.parametrize("content", ["{", "[]", "null", "5", '{"%s": 5}', '{"%s": [100, 1, "two"]}'])
def test_a_damaged_record_is_made_anew(tmp_path: Path, checkpoint: Path, hashed: Hashed, content: str) -> None:
    record = tmp_path / "fingerprints.json"
    record.write_text(content.replace("%s", str(checkpoint / "config.json")))
    first = Fingerprints(record).of(checkpoint)
    assert Fingerprints(record).of(checkpoint) == first
    assert len(hashed.files) == 2


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    record = tmp_path / "file" / "fingerprints.json"
    assert Fingerprints(record).of(checkpoint) == Fingerprints(tmp_path / "other.json").of(checkpoint)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.timeout(60)
def test_pipes_and_devices_are_refused_and_not_read(tmp_path: Path, checkpoint: Path) -> None:
    os.mkfifo(tmp_path / "prompts.csv")
    for path in (tmp_path / "prompts.csv", Path("/dev/zero")):
        with pytest.raises(StoreCorruptError, match=rf"{path} is a pipe, a socket or a device, expected a file"):
            Fingerprints(tmp_path / "record.json").of(path)
    os.mkfifo(checkpoint / "tokenizer.json")
    with pytest.raises(StoreCorruptError, match=r"tokenizer\.json is a pipe"):
        Fingerprints(tmp_path / "record.json").of(checkpoint)
