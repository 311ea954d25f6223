"""Reporting formats, it decides nothing: no module of it can compute a test, an interval or a quantile."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlgen_stats.toolkit import reporting

MODULES = sorted(Path(reporting.__file__).parent.rglob("*.py"))
FORBIDDEN = (
    "scipy",
    "statsmodels",
    "sklearn",
    "statistics",
    "random",
    "numpy.random",
    "rlgen_stats.toolkit.statistics.core",
    "rlgen_stats.toolkit.statistics.kernels",
)
"""Packages that hold tests, quantiles, resampling, or our own kernels."""
FORBIDDEN_CALLS = {"quantile", "nanquantile", "percentile", "nanpercentile", "default_rng", "std", "var", "average"}


def violations(source: str) -> Iterator[str]:
    """Imports and calls by which a module could infer something."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names for root in FORBIDDEN if name == root or name.startswith(f"{root}."))
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_CALLS:
            yield node.attr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_reporting_computes_no_statistics(path: Path) -> None:
    assert not list(violations(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "from statistics import NormalDist",
        "import scipy.stats",
        "from rlgen_stats.toolkit.statistics.kernels import adjust",
        "from rlgen_stats.toolkit.statistics import kernels",
        "low = np.quantile(x, 0.025)",
    ],
)
def test_the_rule_can_fail(source: str) -> None:
    assert list(violations(source))


def test_statistics_of_results_may_be_imported() -> None:
    assert not list(violations("from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict"))
