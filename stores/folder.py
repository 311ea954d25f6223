"""Paths inside one study folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rlgen_stats.schemas.dims import of_dictionary

CONTRASTS: Final = "contrasts"
"""Folder of the analyses of further contrasts, below the study's."""


@dataclass(frozen=True)
class StudyFolder:
    """Paths inside one study folder; nothing is created by asking for them."""

    root: Path
    study: Path | None = None
    """Folder of the study.yaml, where that is another: the one that a further contrast is part of."""

    @property
    def spec(self) -> Path:
        """study.yaml."""
        return (self.study or self.root) / "study.yaml"

    def contrast(self, name: str) -> StudyFolder:
        """Folder of a further contrast of this study."""
        return StudyFolder(self.root / CONTRASTS / name, self.root)

    @property
    def activations(self) -> Path:
        """Activation store."""
        return self.root / "activations.zarr"

    @property
    def outcomes(self) -> Path:
        """Outcome store."""
        return self.root / "outcomes.zarr"

    @property
    def completions(self) -> Path:
        """Folder of parquet files with every completion's text, one file a model."""
        return self.root / "completions"

    @property
    def imported(self) -> Path:
        """Folder of parquet files with completions sampled elsewhere, one file a model; all contrasts share it."""
        return (self.study or self.root) / "imported"

    @property
    def features(self) -> Path:
        """Prompt summaries of the first dictionary's features."""
        return self.features_of(1)

    def features_of(self, dictionary: int) -> Path:
        """Prompt summaries of one of the encoded crosscoder's dictionaries, counted from 1: features.2.zarr, ..."""
        return self.root / f"{of_dictionary('features', dictionary)}.zarr"

    @property
    def results(self) -> Path:
        """Results, one group an analysis."""
        return self.root / "results.zarr"

    @property
    def report(self) -> Path:
        """Report folder."""
        return self.root / "report"

    @property
    def stages(self) -> Path:
        """Records of finished stages."""
        return self.root / "stages"

    @property
    def forced(self) -> Path:
        """How often each stage of the study, in all its contrasts, was forced to run anew."""
        return (self.study or self.root) / "stages" / "forced.json"

    def run(self, name: str) -> Path:
        """Folder of a run's checkpoints."""
        return self.root / "models" / name

    def crosscoder(self, name: str) -> Path:
        """Folder of one crosscoder: weights.safetensors, spec.json, health.json."""
        return self.root / "crosscoder" / name

    def contexts(self, crosscoder: str) -> Path:
        """Contexts in which a crosscoder's features fire."""
        return self.crosscoder(crosscoder) / "contexts.parquet"

    def logits(self, crosscoder: str) -> Path:
        """Tokens that a crosscoder's features promote and suppress."""
        return self.crosscoder(crosscoder) / "logits.parquet"

    def resolve(self, path: str) -> Path:
        """A path of the spec: absolute, or relative to the study folder."""
        return (self.study or self.root) / path
