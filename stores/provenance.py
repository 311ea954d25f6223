"""Provenance of a store: study, spec, versions, seeds, parents."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.layout import LAYOUT_VERSION

_PACKAGES: Final = (
    "rlgen-stats",
    "torch",
    "transformers",
    "trl",
    "zarr",
    "xarray",
    "dask",
    "numpy",
    "scipy",
    "statsmodels",
)


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages on which numbers depend, read without importing them."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


@cache
def git_commit() -> str:
    """Commit of the source tree the package runs from, or ``"unknown"`` for an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        # An installed wheel may lie inside some other repository, which does not track this file.
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() if tracked.returncode == 0 else "unknown"


@dataclass(frozen=True)
class Provenance:
    """Origin of a store, written into its attributes."""

    study_id: str
    """Hash that identifies the study: name, seed, base and data."""
    spec_hash: str
    """Hash of everything this store was computed from."""
    details: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping: seeds, parents, stage."""

    def attrs(self) -> dict[str, Any]:
        """Store attributes; ``provenance`` is JSON text so that every Zarr reader keeps it whole."""
        facts = {"git_commit": git_commit(), "packages": package_versions(), **self.details}
        return {
            "schema_version": LAYOUT_VERSION,
            "study_id": self.study_id,
            "spec_hash": self.spec_hash,
            "provenance": json.dumps(facts, sort_keys=True, default=str),
        }
