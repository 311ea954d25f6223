"""Studies at several layers or of several contrasts: each answer beside the first has a folder like a study's.

The first layer and contrast are answered in the study's folder, others in layers/N, contrasts/FIRST+SECOND and
layers/N/contrasts/FIRST+SECOND. What is the same there (models and outcomes; of one layer also activations,
dictionaries and drift; with the same second run the selected set and its trial) is a link.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.atomic import remove_folder
from rlgen_stats.stores.folder import CONTRASTS, LAYERS, study_of
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.study.fingerprints import Fingerprints
from rlgen_stats.toolkit.study.spec_file import read_spec
from rlgen_stats.toolkit.study.stage_graph import STAGES, Study

_LINKS_REFUSED: Final = 1314
"""What Windows answers to those who may not make symbolic links."""


def open_for_run(path: Path | str, *, exact: bool = True, progress: Progress = SILENT) -> Study:
    """The study in a folder, or what it answers at a further layer or for a further contrast, in a folder below it.

    Parameters
    ----------
    path
        The folder.
    exact
        Whether files that were only copied or touched are hashed again (``fingerprints.py``).
    progress
        Receiver of progress while files are hashed.

    Raises
    ------
    SpecError
        As :func:`~rlgen_stats.toolkit.study.spec_file.read_spec`.
    InputError
        If the study does not ask that.
    """
    path = Path(path)
    root = study_of(path)
    if root is not None:
        linked = {one.folder.root: one for one in open_for_run(root, exact=exact, progress=progress).linked}
        if path not in linked:
            raise InputError(
                f"the study in {root} does not ask {path.relative_to(root)}; further answers are "
                f"{', '.join(one.folder.linked_as for one in linked.values()) or 'none'}."
            )
        return linked[path]
    spec = read_spec(path)
    folder = StudyFolder(path)
    fingerprints = Fingerprints(folder.fingerprints, exact=exact, progress=progress)
    study = Study(folder, spec.answering(1), fingerprints=fingerprints)
    study.linked = tuple(_linked(study, spec, number) for number in range(2, len(spec.answers) + 1))
    return study


def _linked(study: Study, spec: StudySpec, number: int) -> Study:
    """What a study answers at place ``number`` of ``spec.answers``; no run's name has a plus."""
    (first_layer, first_pair), (layer, pair) = spec.answers[0], spec.answers[number - 1]
    parts = [f"{LAYERS}/{layer}"] if layer != first_layer else []
    parts += [f"{CONTRASTS}/{'+'.join(pair)}"] if pair is not None and pair != first_pair else []
    return Study(study.folder.linked("/".join(parts)), spec.answering(number), part_of=study)


def owners(studies: Sequence[Study], stage: str) -> list[Study]:
    """Of a study and those linked to it, the first of every key of a stage: where it runs, the others have links."""
    first: dict[str, Study] = {}
    for one in studies:
        first.setdefault(one.key(stage), one)
    return list(first.values())


def link_shared(linked: Study, earlier: Sequence[Study]) -> set[str]:
    """Link what a study shares with earlier ones (stages of equal keys); the names of the stages that are its own."""
    linked.forget_keys()
    links, own = dict[Path, Path](), set[str]()
    for stage in STAGES:
        source = next((one for one in earlier if one.key(stage.name) == linked.key(stage.name)), None)
        if source is None:
            own.add(stage.name)
            continue
        owned = (source.folder.root / name for name in stage.owned)
        paths = [path for path in (*source.stores(stage), *owned, source.file(stage.name)) if path.exists()]
        links |= {linked.folder.root / path.relative_to(source.folder.root): path for path in paths}
    _unlink(linked.folder.root, keep=links)
    for path, target in links.items():
        _link(path, target)
    return own


def _unlink(root: Path, keep: Collection[Path]) -> None:
    """Take away links of an earlier run: what they led to may be another answer's by now, or gone."""
    for folder in (root, root / "results.zarr", root / "stages"):
        for path in folder.iterdir() if folder.exists() else ():
            if path.is_symlink() and path not in keep:
                path.unlink()


def _link(path: Path, target: Path) -> None:
    """A relative link, so that the study can be moved; in place of what was there."""
    to = os.path.relpath(target, path.parent)
    if path.is_symlink() and os.readlink(path) == to:  # processes that read it go on
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(to, target_is_directory=target.is_dir())
    except OSError as error:
        if getattr(error, "winerror", None) != _LINKS_REFUSED:
            raise
        raise StoreError(
            f"{path} cannot be a link to {target}, which studies of several layers or contrasts need; Windows lets you "
            "make links in Developer Mode (Settings, For developers), or as administrator."
        ) from error
