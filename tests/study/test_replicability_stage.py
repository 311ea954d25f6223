"""The replicability stage where there is nothing to compare."""

from __future__ import annotations

from pathlib import Path

import yaml

from rlgen_stats.toolkit.progress import Progress
from rlgen_stats.toolkit.study import open_for_run
from rlgen_stats.toolkit.study.replicability_stage import ONE_DICTIONARY, replicability
from rlgen_stats.toolkit.study.stage_graph import BY_NAME
from tests.study.conftest import MAIN, PAIR, spec_dict


class Logged(Progress):
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


def test_one_dictionary_has_no_results_and_says_why(study_folder: Path) -> None:
    (study_folder / "study.yaml").write_text(yaml.safe_dump(spec_dict(crosscoders=[MAIN | {"replicates": 1}, PAIR])))
    progress = Logged()
    study = open_for_run(study_folder)
    assert replicability(study, "key", progress) == {"replicability": ONE_DICTIONARY}
    assert "one dictionary (replicates: 1)" in progress.lines[0]
    assert not (study_folder / "results.zarr").exists()
    assert study.outputs(BY_NAME["replicability"]) == []
