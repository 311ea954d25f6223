"""A trial on two worker processes: the arms' files and the results of one process, byte for byte."""

from pathlib import Path
from typing import Any

import pytest

from rlgen_stats.toolkit.intervention import verify_causally
from rlgen_stats.toolkit.workers import local_workers, tasks_on
from tests.trial.planted import F_BRAKE, F_GATE, PROVENANCE
from tests.trial.trials import covariates_without, small

pytestmark = pytest.mark.slow


def test_two_workers_leave_the_arms_and_results_of_one_process(study: Any, tmp_path: Path) -> None:
    """Early stopping included: what workers ran beyond it is removed."""
    files, results = [], []
    with local_workers("cpu,cpu") as client:
        for where in (client, None):
            root = tmp_path / ("there" if where else "here")
            root.mkdir()
            spec, folder = small(study, root, n_controls=25)
            with tasks_on(where, folder.spec):
                covariates = covariates_without(folder, F_BRAKE)
                results.append(verify_causally(spec, folder, [F_GATE], covariates, provenance=PROVENANCE))
            arms = folder.root / "intervention"
            files.append({file.relative_to(arms): file.read_bytes() for file in arms.rglob("*") if file.is_file()})
    assert files[0] == files[1]
    for there, here in zip(*results, strict=True):
        assert there.identical(here)
