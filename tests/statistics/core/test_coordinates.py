from __future__ import annotations

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.core.coordinates import run_models


def test_runs_are_ordered_by_step(make_features):
    features = make_features(np.ones((4, 4, 2)), ["base@0", "rl@100", "rl@20", "sft@3"])
    assert run_models(features, "rl") == ["rl@20", "rl@100"]
    with pytest.raises(
        InputError, match=r"run 'dpo' has no checkpoint in the data; the runs are \['base', 'rl', 'sft'\]"
    ):
        run_models(features, "dpo")
