"""What a failed check advises."""

from pathlib import Path
from typing import Any

import pytest

from rlgen_stats.schemas.errors import StageError
from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.stores import StudyFolder, write_json
from rlgen_stats.toolkit.crosscoder.uses.health import require_healthy
from rlgen_stats.toolkit.crosscoder.uses.remedies import RISING, failures, remedy

SETTINGS = CrosscoderSpec(name="main", views=("base@0", "rl@2"), n_features=512, k=16, steps=1500).model_dump()
L1 = SETTINGS | {"sparsity": "l1", "l1_coefficient": 2.0}


@pytest.mark.parametrize(
    ("name", "value", "limit", "settings", "advice"),
    [
        ("fve", 0.6, 0.8, SETTINGS, "take a larger k (now 16), or more n_features (now 512)"),
        ("fve", 0.6, 0.8, L1, "take a smaller l1_coefficient (now 2), or more n_features (now 512)"),
        ("l0", 20.0, 16.0, SETTINGS, "train more steps (now 1,500), for the threshold to settle"),
        ("l0", 0.0, 32.0, L1, "take a smaller l1_coefficient (now 2)"),
        ("l0", 40.0, 32.0, L1, "take a larger l1_coefficient (now 2)"),
        ("dense_fraction", 0.2, 0.1, SETTINGS, "take a smaller k (now 16)"),
        ("dense_fraction", 0.2, 0.1, L1, "take a larger l1_coefficient (now 2)"),
        ("dead_fraction", 0.5, 0.25, SETTINGS, "take fewer n_features (now 512), or train more steps (now 1,500)"),
        ("reconstruction_bias", 0.8, 1.0, L1, "take a smaller l1_coefficient (now 2), or sparsity: batchtopk, which "),
        ("readout_dfve", 0.1, 0.3, SETTINGS | {"objective": "joint"}, "train with objective: both"),
        (
            "readout_dfve",
            0.1,
            0.3,
            SETTINGS | {"objective": "both"},
            "train more steps (now 1,500), or",
        ),
        ("readout_artefact", 0.5, 0.1, SETTINGS, "use a readout that encodes every model alike: swap or fit"),
        ("one_base", 0.1, 0.5, SETTINGS, "correct base.path, or the run's checkpoints"),
        ("fve", 0.6, 0.8, {}, "trained elsewhere: use other weights"),
        ("fve", 0.6, 0.8, SETTINGS | {"weights": "elsewhere"}, "trained elsewhere: use other weights"),
    ],
)
def test_advice_follows_the_check_and_the_settings(
    name: str, value: float, limit: float, settings: dict[str, Any], advice: str
) -> None:
    assert remedy({"name": name, "value": value, "limit": limit}, settings, 0.0).startswith(advice)


def write_crosscoder(folder: Path, gained: float) -> dict[str, Any]:
    """Files of a crosscoder that failed two checks of three; its last quarter of training gained this much."""
    write_json(folder / "spec.json", {"facts": {"spec": SETTINGS}})
    explained = [0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6 + gained, 0.6 + gained]
    write_json(folder / "curve.json", [{"fve": {"base@0": x, "rl@2": x}} for x in explained])
    checks = [
        {"name": "fve", "view": "rl@2", "value": 0.6, "limit": 0.8, "ok": False, "reason": "explained 0.600"},
        {"name": "dead_fraction", "view": "", "value": 0.5, "limit": 0.25, "ok": False, "reason": "dead 0.500"},
        {"name": "l0", "view": "", "value": 16.0, "limit": 16.0, "ok": True, "reason": "L0 16.00"},
    ]
    record = {"healthy": False, "reasons": "explained 0.600; dead 0.500", "weights_sha256": "w", "checks": checks}
    write_json(folder / "health.json", record)
    return record


@pytest.mark.parametrize(
    ("gained", "advice"),
    [
        (RISING * 1.01, "train more steps (now 1,500): the last quarter still gained 0.010 of variance explained"),
        (RISING * 0.99, "take a larger k (now 16), or more n_features (now 512)"),
    ],
)
def test_more_steps_only_where_training_still_gained(tmp_path: Path, gained: float, advice: str) -> None:
    record = write_crosscoder(tmp_path, gained)
    lines = failures(tmp_path, record)
    assert lines[0] == f"explained 0.600; {advice}"
    assert len(lines) == 2


def test_a_refusal_has_one_line_a_failed_check(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    write_crosscoder(folder.crosscoder("main"), 0.0)
    with pytest.raises(StageError) as refused:
        require_healthy(folder, {"main": False}, stage="encode", force=False)
    first, *checks, last = str(refused.value).splitlines()
    assert first == "crosscoder 'main' failed its health check:"
    assert [line.split("; ")[0] for line in checks] == ["  explained 0.600", "  dead 0.500"]
    assert "rlgen-stats encode --force, or accept_unhealthy: true" in last
