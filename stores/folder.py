"""Paths inside one study folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from rlgen_stats.schemas.dims import of_dictionary
from rlgen_stats.stores.atomic import ZARR_JSON
from rlgen_stats.stores.locations import explain_access_errors, place

LAYERS: Final = "layers"
"""Folder of what a study finds at its further layers, below the study's."""
CONTRASTS: Final = "contrasts"
"""Folder of the analyses of further contrasts, below the study's or a layer's."""
_STORE: Final = ".zarr"
"""How names of stores end."""


def study_of(path: Path) -> Path | None:
    """Folder of the study that ``path`` answers at a further layer or for a further contrast; None of any other."""
    root = path
    while root.parent.name in (LAYERS, CONTRASTS):
        root = root.parent.parent
        if StudyFolder(root).spec.exists():
            return root
    return None


def linked_folders(root: Path) -> Iterator[Path]:
    """Folders of further layers and contrasts that are below a study's."""
    for name in (LAYERS, CONTRASTS):
        below = (child for child in (root / name).iterdir() if child.is_dir()) if (root / name).is_dir() else ()
        for child in sorted(below, key=str):
            yield child
            yield from linked_folders(child)


def store_of(where: StudyFolder | Path | str, store: str) -> Path:
    """A store that is named by its own path, or by that of the study it is in.

    Parameters
    ----------
    where
        Study folder, or the store itself: a path that ends in ``.zarr`` or holds a Zarr group.
    store
        Which of the study's stores: ``activations``, ``outcomes``, ``features`` or ``results``.
    """
    folder = where
    if not isinstance(folder, StudyFolder):
        path = place(folder)
        with explain_access_errors(path):
            if path.suffix == _STORE or (path / ZARR_JSON).exists():
                return path
        folder = StudyFolder(path)
    return cast(Path, getattr(folder, store))


def study_folder(where: StudyFolder | Path | str) -> StudyFolder:
    """The folder of a study that is named by its path, or by that of one of its stores."""
    if isinstance(where, StudyFolder):
        return where
    path = place(where)
    return StudyFolder(path.parent if path.suffix == _STORE else path)


@dataclass(frozen=True)
class StudyFolder:
    """Paths inside one study folder; nothing is created by asking for them."""

    root: Path
    study: Path | None = None
    """Folder of the study.yaml, where that is another: the one of which this answers a further layer or contrast."""

    @property
    def spec(self) -> Path:
        """study.yaml."""
        return (self.study or self.root) / "study.yaml"

    @property
    def linked_as(self) -> str:
        """Path below the study's folder, such as layers/8; empty of that folder itself."""
        return "" if self.study is None else self.root.relative_to(self.study).as_posix()

    def linked(self, path: str) -> StudyFolder:
        """Folder of a further layer or contrast of this study, by its path below."""
        return StudyFolder(self.root / path, self.root)

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
        """Parquet files with completions sampled elsewhere, one file a model, for all layers and contrasts."""
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
    def fingerprints(self) -> Path:
        """Remembered hashes of the files that the study reads."""
        return self.stages / "fingerprints.json"

    @property
    def forced(self) -> Path:
        """How often each stage of the study, at all its layers and for all its contrasts, was forced to run anew."""
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
