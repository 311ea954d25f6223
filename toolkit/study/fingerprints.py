"""Content hashes of the files a study reads, remembered so that asking again reads next to nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores.atomic import read_json, write_json
from rlgen_stats.stores.hub import MODEL_FILES
from rlgen_stats.stores.locations import check_regular
from rlgen_stats.toolkit.progress import SILENT, Progress

SAMPLES: Final = 8
"""Pieces of a file that are read to see whether it is still the same, evenly spaced from its first byte to its last."""
SAMPLE_BYTES: Final = 1 << 16
"""Size of such a piece; files up to all of them together are read whole."""
_SHOWN: Final = 1 << 24
"""Bytes from which on hashing is shown: less takes a fraction of a second."""


class Fingerprints:
    """Content hashes of files and folders.

    A file whose size, modification time and sample (``SAMPLES`` pieces) are as remembered has the remembered hash.
    Everything else is read whole, and progress is shown.

    Parameters
    ----------
    record
        JSON file that remembers them. It is a cache: where it is damaged or cannot be written, files are read again.
    exact
        Whether a file with another modification time is read whole although its size and its sample are as remembered
        (it was copied or touched, as a rule). To say what is up to date they suffice; what is computed is kept under
        exact hashes.
    progress
        Receiver of progress.
    """

    def __init__(self, record: Path, *, exact: bool = True, progress: Progress = SILENT) -> None:
        self._record, self._exact, self._progress = record, exact, progress
        known: Any = None
        with suppress(StoreError, OSError):
            known = read_json(record)
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """Hash of a file, or of names and contents of a folder's files; of a checkpoint's, those that are read."""
        files = sorted(check_regular(p) for p in path.rglob("*") if not p.is_dir()) if path.is_dir() else [path]
        check_regular(path)
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            files = [file for file in files if MODEL_FILES.fullmatch(file.name)]
        hashes = {file: self._remembered(file) for file in files}
        unknown = [file for file, known in hashes.items() if known is None]
        if unknown:
            hashes |= self._read(unknown, path.name)
        return content_hash([(file.relative_to(path).as_posix(), hashes[file]) for file in files])

    def _remembered(self, file: Path) -> str | None:
        known = self._known.get(str(file.resolve()))
        if not isinstance(known, list) or len(known) != 4:
            return None
        stat = file.stat()
        size, modified, sample, digest = known
        same = stat.st_size == size and (stat.st_mtime_ns == modified or not self._exact) and _sample(file) == sample
        return str(digest) if same else None

    def _read(self, files: list[Path], name: str) -> dict[Path, str]:
        """Hash whole files and remember them."""
        size = sum(file.stat().st_size for file in files)
        progress, found = self._progress if size >= _SHOWN else SILENT, {}
        with progress.task(f"hash {name}", total=size / 1e6, unit="MB") as task:
            for file in files:
                stat, sample = file.stat(), _sample(file)  # before the hash: a change meanwhile is noticed next time
                found[file] = _sha256(file, task.advance)
                self._known[str(file.resolve())] = [stat.st_size, stat.st_mtime_ns, sample, found[file]]
        with suppress(StoreError, OSError):
            write_json(self._record, self._known)
        return found


def _sample(file: Path) -> str:
    """SHA-256 of evenly spaced pieces of a file; of all of it, if it is small."""
    digest = hashlib.sha256()
    last = max(0, file.stat().st_size - SAMPLE_BYTES)
    with file.open("rb") as handle:
        for i in range(SAMPLES):
            handle.seek(last * i // (SAMPLES - 1))
            digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _sha256(file: Path, advance: Callable[[float], None]) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 24):
            digest.update(block)
            advance(len(block) / 1e6)
    return digest.hexdigest()
