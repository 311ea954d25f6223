"""Studies that ask several contrasts: the first is answered in the study's folder, each other one below contrasts/.

A further contrast has a folder like a study's. What does not depend on the contrast (models, activations,
dictionaries, drift; with the same second run also the selected set and its trial) is there as links into the study's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.atomic import remove_folder
from rlgen_stats.stores.folder import CONTRASTS
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.study.fingerprints import Fingerprints
from rlgen_stats.toolkit.study.spec_file import read_spec
from rlgen_stats.toolkit.study.stage_graph import FINGERPRINTS, STAGES, Study


def contrast_name(spec: StudySpec) -> str:
    """Name of the contrast a spec answers: FIRST+SECOND (no run's name has a plus)."""
    return "+".join(run.name for run in spec.contrasted)


def open_for_run(path: Path | str, *, exact: bool = True, progress: Progress = SILENT) -> Study:
    """The study in a folder, or one of its further contrasts (contrasts/FIRST+SECOND below it).

    Parameters
    ----------
    path
        The folder.
    exact
        Whether files that were only copied or touched are hashed again (:class:`~.fingerprints.Fingerprints`).
    progress
        Receiver of progress while files are hashed.

    Raises
    ------
    SpecError
        As :func:`~rlgen_stats.toolkit.study.spec_file.read_spec`.
    InputError
        If the study does not ask that contrast.
    """
    path = Path(path)
    if path.parent.name != CONTRASTS or not (path.parent.parent / "study.yaml").exists():
        folder = StudyFolder(path)
        fingerprints = Fingerprints(folder.stages / FINGERPRINTS, exact=exact, progress=progress)
        return Study(folder, read_spec(path).answering(1), fingerprints)
    whole = open_for_run(path.parent.parent, exact=exact, progress=progress)
    further = {one.folder.root.name: one for one in further_contrasts(whole)}
    if path.name not in further:
        raise InputError(
            f"the study in {path.parent.parent} does not ask the contrast {path.name!r}; "
            f"its further contrasts are {', '.join(further) or 'none'}."
        )
    return further[path.name]


def further_contrasts(study: Study) -> list[Study]:
    """The analyses of all contrasts but the first, in the spec's order; none of a study that asks one."""
    found: list[Study] = []
    if study.folder.study is not None:
        return found
    for number in range(2, len(study.spec.contrasts) + 1):
        spec = read_spec(study.folder.root).answering(number)
        further = Study(study.folder.contrast(contrast_name(spec)), spec, study.fingerprints)
        further.forced, further.times_forced = study.forced, study.times_forced
        found.append(further)
    return found


def link_shared(further: Study, earlier: Sequence[Study]) -> set[str]:
    """Link what a further contrast shares with earlier ones (stages of equal keys); the names of its own stages."""
    _unlink(further.folder.root)
    own = set()
    for stage in STAGES:
        source = next((one for one in earlier if one.key(stage.name) == further.key(stage.name)), None)
        if source is None:
            own.add(stage.name)
            continue
        owned = (source.folder.root / name for name in stage.owned)
        for path in (*source.stores(stage), *owned, source.file(stage.name)):
            if path.exists():
                _link(further.folder.root / path.relative_to(source.folder.root), path)
    return own


def _unlink(root: Path) -> None:
    """Take away every link of an earlier run: what it led to may be another contrast's by now, or gone."""
    for folder in (root, root / "results.zarr", root / "stages"):
        for path in folder.iterdir() if folder.exists() else ():
            if path.is_symlink():
                path.unlink()


def _link(path: Path, target: Path) -> None:
    """A relative link, so that the study can be moved; in place of what the contrast had there of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent), target_is_directory=target.is_dir())
