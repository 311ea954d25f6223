"""What to change in a crosscoder that failed a check. Advice: it decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from rlgen_stats.stores import read_json
from rlgen_stats.stores.atomic import explain_damage
from rlgen_stats.stores.crosscoder_weights import CURVE, SPEC
from rlgen_stats.stores.health_records import READOUT_MODELS

RISING: Final = 0.01
"""Variance explained that the last quarter of training gained over the quarter before, above which more steps help."""


def failures(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """One line a failed check: what was measured, what is needed, what to change.

    Parameters
    ----------
    folder
        Of the crosscoder, with its spec.json and curve.json.
    record
        Its health.json. Records of earlier releases, whose checks are not listed, give their reasons.
    """
    checks = [*record.get("checks", []), *record.get(READOUT_MODELS, {}).get("checks", [])]
    failed = [check for check in checks if not check["ok"]]
    if not failed:
        return [reason for reason in str(record["reasons"]).split("; ") if reason != "ok"]
    with explain_damage(folder / SPEC):
        settings = read_json(folder / SPEC)["facts"].get("spec") or {} if (folder / SPEC).exists() else {}
    with explain_damage(folder / CURVE):
        gained = _gained(read_json(folder / CURVE)) if (folder / CURVE).exists() else 0.0
    return [f"{check['reason']}; {remedy(check, settings, gained)}" for check in failed]


def remedy(check: Mapping[str, Any], settings: Mapping[str, Any], gained: float) -> str:
    """What to change for one failed check.

    Parameters
    ----------
    check
        ``name``, ``value`` and ``limit``.
    settings
        Of the crosscoder in study.yaml, defaults included; empty where it was trained elsewhere.
    gained
        Variance explained that the last quarter of training gained.
    """
    name, too_high = check["name"], check["value"] > check["limit"]
    if name == "one_base":
        return "correct base.path, or the run's checkpoints"
    if name == "readout_artefact":
        return "use a readout that encodes every model alike: swap or fit"
    if not settings or settings.get("weights") is not None:
        return "trained elsewhere: use other weights"
    l1 = settings["sparsity"] == "l1"
    steps, features = f"more steps (now {settings['steps']:,})", f"n_features (now {settings['n_features']:,})"
    sparsity = "l1_coefficient" if l1 else "k"
    lower, higher = (f"{word} {sparsity} (now {settings[sparsity]:g})" for word in ("smaller", "larger"))
    denser, sparser = (lower, higher) if l1 else (higher, lower)
    if name in ("fve", "ce_recovered", "kl_recovered", "readout_fve"):
        if gained > RISING:
            return f"train {steps}: the last quarter still gained {gained:.3f} of variance explained"
        return f"take a {denser}, or more {features}"
    if name in ("readout_dfve", "readout_code_r2"):
        joint = settings["objective"] == "joint"
        return "train with objective: both" if joint else f"train {steps}, or take a {denser}"
    if name == "dead_fraction":
        return f"take fewer {features}, or train {steps}"
    if name == "dense_fraction":
        return f"take a {sparser}"
    if name == "l0" and l1:
        return f"take a {sparser if too_high else denser}"
    if name == "reconstruction_bias" and l1:
        return f"take a {denser}, or sparsity: batchtopk, which does not shrink"
    return f"train {steps}, for the threshold to settle"


def _gained(curve: Sequence[Mapping[str, Any]]) -> float:
    """Mean variance explained in the last quarter of training less that in the quarter before; 0 if too short."""
    explained = np.array([np.mean(list(point["fve"].values())) for point in curve if point.get("fve")])
    quarter = len(explained) // 4
    return float(explained[-quarter:].mean() - explained[-2 * quarter : -quarter].mean()) if quarter else 0.0
