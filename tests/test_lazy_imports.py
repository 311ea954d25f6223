"""Statistics and kernels import what they need and no more."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from types import ModuleType
from typing import Final

import pytest

from rlgen_stats.toolkit import extraction, statistics

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


def test_what_judges_formulas_in_a_process_of_its_own_imports_neither_arrays_nor_models() -> None:
    assert imported_by("import rlgen_stats.toolkit.extraction.graders.formulas") == ["sympy"]


@pytest.mark.parametrize("package", [statistics, extraction], ids=lambda package: package.__name__)
def test_names_are_the_same_objects_however_they_are_reached(package: ModuleType) -> None:
    named = {name for names in package._NAMES_OF.values() for name in names}
    assert named == set(package.__all__) <= set(dir(package))
    for module, names in package._NAMES_OF.items():
        for name in names:
            assert getattr(package, name) is getattr(import_module(module, package.__name__), name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = package.nonsense
