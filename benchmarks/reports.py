"""Tables, goals, and what the numbers depend on."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("numpy", "scipy", "zarr", "xarray", "dask", "torch", "zarrs", "tensorstore", "nilearn", "mne")
"""Packages whose versions go into the report."""


@dataclass(frozen=True)
class Goal:
    """A bound the issue asks for, and what was measured."""

    what: str
    measured: float
    bound: float
    at_least: bool = True
    met: bool = field(init=False)

    def __post_init__(self) -> None:
        met = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        object.__setattr__(self, "met", bool(met))

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'met   ' if self.met else 'MISSED'} {self.what}: {self.measured:.3g} (goal {sign} {self.bound:g})"


def machine(folder: Path) -> dict[str, Any]:
    """What the numbers depend on: processor, memory, file system, versions; nothing that names the machine."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "file_system": _file_system(folder),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str:
    """Installed version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _file_system(folder: Path) -> str:
    if not Path("/proc/mounts").exists():
        return "unknown"
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    above = {str(parent) for parent in (folder.resolve(), *folder.resolve().parents)}
    return max((mount for mount in mounts if mount[0] in above), key=lambda mount: len(mount[0]))[1]


def report(
    options: argparse.Namespace,
    folder: Path,
    benchmark: str,
    *,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    goals: Sequence[Goal],
) -> None:
    """Print the rows as a Markdown table and the goals below; write all of it as JSON if asked."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    size = "QUICK: numbers mean nothing" if options.quick else f"median of {options.repetitions}"
    print(f"\n{benchmark} ({size}); {', '.join(f'{name} {value}' for name, value in settings.items())}\n")
    for line in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    print()
    for goal in goals:
        print(goal)
    if options.json:
        found = {"benchmark": benchmark, "quick": options.quick, "repetitions": options.repetitions}
        found |= {"machine": machine(folder), "settings": dict(settings), "rows": list(rows)}
        found |= {"goals": [asdict(goal) for goal in goals]}
        options.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
