"""Content hashes and the seeds derived from them."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def content_hash(value: Any) -> str:
    """SHA-256 (hex, 64 characters) of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(seed: int, *names: object) -> int:
    """A 31-bit seed for one purpose, independent of the order in which purposes are served.

    Parameters
    ----------
    seed
        The study's seed.
    names
        What the seed is for, e.g. ``("posttrain", "rl")``.
    """
    digest = hashlib.sha256("\x1f".join([str(int(seed)), *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 1)
