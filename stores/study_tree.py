"""A whole study as one lazy ``xarray.DataTree``."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path

import xarray as xr

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.stores.activation_store import complete_models, open_activations
from rlgen_stats.stores.folder import StudyFolder, study_of
from rlgen_stats.stores.locations import explain_access_errors, place
from rlgen_stats.stores.results import open_results, result_groups
from rlgen_stats.stores.tables import committed_models, open_features, open_outcomes


def open_study(path: Path | str) -> xr.DataTree:
    """Everything a study has so far: nodes ``outcomes``, ``activations``, ``features``, ``results/<analysis>``, lazily.

    Of the encoded crosscoder's other dictionaries: ``features.2``, ``results/<analysis>.2`` and so on.

    Raises
    ------
    StoreError
        If the folder has no study.yaml.

    Examples
    --------
    >>> study = open_study("runs/demo")  # doctest: +SKIP
    >>> study["results/drift"].to_dataset().q_value.sel(model="rl@80")  # doctest: +SKIP
    """
    root = place(path)
    folder = StudyFolder(root, study_of(root))
    with explain_access_errors(folder.root):
        is_study = folder.spec.exists()
    if not is_study:
        raise StoreError(
            f"{path} is not a study folder: expected a study.yaml in it; start one with 'rlgen-stats init'."
        )
    nodes: dict[str, xr.Dataset] = {}
    if committed_models(folder.outcomes):
        nodes["outcomes"] = open_outcomes(folder.outcomes)
    if folder.activations.exists() and complete_models(folder.activations):
        nodes["activations"] = open_activations(folder.activations)
    for path in takewhile(committed_models, map(folder.features_of, count(1))):
        nodes[path.stem] = open_features(path)
    nodes |= {f"results/{group}": open_results(folder.results, group) for group in result_groups(folder.results)}
    return xr.DataTree.from_dict(nodes, name=folder.root.name)
