"""Records and completions that are damaged: whoever reads them names the file, in one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from rlgen_stats.cli.stages import print_verdicts
from rlgen_stats.schemas.errors import StoreCorruptError
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.study_models import ModelRef
from rlgen_stats.toolkit.crosscoder.uses.remedies import failures
from rlgen_stats.toolkit.extraction.completion_parts import Part, joined
from rlgen_stats.toolkit.extraction.model_shape import check_weight_files
from rlgen_stats.toolkit.extraction.outcomes import read_completions
from rlgen_stats.toolkit.posttrain.train_run import _steps_in
from rlgen_stats.toolkit.reporting import examples, other_answers
from rlgen_stats.toolkit.reporting.prompt_pages import model_source


def base(root: Path) -> ModelRef:
    return ModelRef(model="base@0", run="base", step=0, arm="base", path=root)


FAILED = {"checks": [{"name": "fve", "ok": False, "value": 0.1, "limit": 0.8, "reason": "low"}]}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "verdicts": ("report.json", print_verdicts),
    "verdicts of a layer": ("report/report.json", lambda root: other_answers._verdicts(StudyFolder(root))),
    "settings of a crosscoder": ("spec.json", lambda root: failures(root, FAILED)),
    "curve of a crosscoder": ("curve.json", lambda root: failures(root, FAILED)),
    "index of shards": (
        "model.safetensors.index.json",
        lambda root: check_weight_files(base(root)),
    ),
    "record of training": ("training.json", lambda root: _steps_in(root / "training.json")),
    "completions": ("completions/rl@2.parquet", lambda root: read_completions(StudyFolder(root), "rl@2")),
    "greedy completions": ("completions/rl@2.parquet", lambda root: examples._greedy(StudyFolder(root), "rl@2")),
    "completions of a page": (
        "completions/rl@2.parquet",
        lambda root: model_source(StudyFolder(root), "rl@2").read("text"),
    ),
    "part of the completions": (
        "0-1.parquet",
        lambda root: joined([Part(base(root), pd.DataFrame(), root / "0-1.parquet")]),
    ),
}
WRONG_TYPES = {"claims": [1], "facts": 3, "weight_map": [1], "steps": "x"}
DAMAGE = (b"", b"3", b'"x"', b"null", b"[[[", b"[7]", b"[" * 100_000, b"\xff\xfe{", json.dumps(WRONG_TYPES).encode())


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:12]))
@pytest.mark.parametrize("reader", READERS)
def test_damage_is_one_error_that_names_the_file(reader: str, damage: bytes, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(StoreCorruptError, match=Path(name).name):
        read(tmp_path)
