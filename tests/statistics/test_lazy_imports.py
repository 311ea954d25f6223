"""Statistics and kernels import what they need and no more."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

from rlgen_stats.toolkit import statistics

ARRAYS: Final = ("xarray", "pandas", "dask", "zarr", "statsmodels", "sklearn", "pyarrow", "fsspec")
MODELS: Final = ("torch", "transformers", "trl", "datasets", "matplotlib", "sympy")


def imported_by(code: str) -> list[str]:
    """Heavy packages that are there after some code ran in a fresh process."""
    look = f"; import sys; print(*(name for name in {(*ARRAYS, *MODELS)} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code + look], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_kernels_import_numpy_and_scipy_alone() -> None:
    assert imported_by("from rlgen_stats.toolkit.statistics.kernels import max_t, adjust, wilson_interval") == []


def test_a_labelled_statistic_imports_arrays_and_no_model() -> None:
    imported = set(imported_by("from rlgen_stats.toolkit.statistics import drift_test"))
    assert "xarray" in imported
    assert imported <= set(ARRAYS)


def test_names_are_the_same_objects_however_they_are_reached() -> None:
    code = (
        "import rlgen_stats.toolkit.statistics.task_accuracy as module; from rlgen_stats.toolkit import statistics;"
        "assert statistics.behaviour is module.behaviour; assert callable(statistics.behaviour)"
    )
    imported_by(code)
    assert set(statistics._MODULE_OF) == set(statistics.__all__) <= set(dir(statistics))
    for name in statistics.__all__:
        assert getattr(statistics, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = statistics.nonsense  # type: ignore[attr-defined]
