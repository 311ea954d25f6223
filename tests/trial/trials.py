"""Trials of the planted study, and what its tests read of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, append_model, open_features
from rlgen_stats.toolkit.intervention import feature_covariates, verify_causally
from rlgen_stats.toolkit.progress import SILENT, Progress
from tests.trial.planted import (
    F_BRAKE,
    F_GATE,
    PROVENANCE,
    planted_crosscoder,
    planted_summaries,
)


def covariates_without(folder: StudyFolder, feature: int) -> xr.Dataset:
    """Covariates in which one feature counts as dead, so that it cannot be drawn as a control."""
    result = feature_covariates(
        planted_crosscoder(), open_features(folder.features), models=["base@0", "rl@1"], view="rl@1"
    )
    result["log_firing"].values[feature] = -np.inf
    return result


def run(study: Any, features: list[int], dead: int) -> tuple[xr.Dataset, xr.Dataset]:
    spec, folder = study
    return verify_causally(spec, folder, features, covariates_without(folder, dead), provenance=PROVENANCE)


def pick(dataset: xr.Dataset, name: str, direction: str, condition: str) -> float:
    return float(dataset[name].sel(direction=direction, condition=condition))


def trial_arm(folder: StudyFolder, direction: str, name: str) -> Any:
    """Condition of a stored arm."""
    path = folder.root / "intervention" / direction / f"{name}.parquet"
    return json.loads(pq.read_schema(path).metadata[b"rlgen_stats_condition"])


def copy_of(folder: StudyFolder, root: Path) -> StudyFolder:
    """The study without its finished arms."""
    shutil.copytree(folder.root, root / "copy", ignore=shutil.ignore_patterns("intervention"))
    return StudyFolder(root / "copy")


def small(study: Any, root: Path, **changes: Any) -> Any:
    spec, folder = study
    intervention = spec.intervention.model_copy(update={"max_prompts": 40, **changes})
    return spec.model_copy(update={"intervention": intervention}), copy_of(folder, root)


class Counted:
    """Progress that adds up what was done now and what before."""

    def __init__(self) -> None:
        self.now = self.before = 0.0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Counted]:
        yield self

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        self.now += amount

    def skip(self, amount: float, **facts: object) -> None:
        self.before += amount

    def log(self, message: str) -> None:
        pass


def without_controls(
    study: Any, features: list[int], provenance: Provenance = PROVENANCE, progress: Progress = SILENT
) -> xr.Dataset:
    """A short trial: nothing matches, so no random sets are run."""
    spec, folder = study
    covariates = covariates_without(folder, F_BRAKE).copy(deep=True)
    covariates["log_firing"].values[F_BRAKE] = covariates["log_firing"].values[F_GATE]
    covariates["contribution_energy"].values[features] += 40
    return verify_causally(spec, folder, features, covariates, provenance=provenance, progress=progress)[0]


def two_dictionaries(study: Any, tmp_path: Path) -> tuple[StudySpec, StudyFolder]:
    """The planted study with a second dictionary: the same features in reverse order, and few random sets."""
    spec, folder = study[0], StudyFolder(shutil.copytree(study[1].root, tmp_path / "study"))
    primary = spec.primary_crosscoder.model_copy(update={"replicates": 2})
    few = spec.intervention.model_copy(update={"n_controls": 2, "early_stop": False})
    spec = spec.model_copy(update={"crosscoders": (primary,), "intervention": few})
    other = planted_crosscoder()
    with torch.no_grad():
        for name, axis in (("encoder_matrix", 1), ("decoder_matrix", 0), ("encoder_bias", 0)):
            weights = getattr(other, name)
            weights.copy_(weights.flip(axis))
    other.save(folder.crosscoder("main.2"))
    for view in ("base@0", "rl@1"):
        append_model(folder.features_of(2), "features", planted_summaries(other, view), provenance=PROVENANCE)
    return spec, folder
