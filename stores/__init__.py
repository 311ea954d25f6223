"""Where things live: Zarr stores that plain xarray opens, written so that a crash loses nothing announced."""

from rlgen_stats.stores.activations import (
    ActivationWriter,
    complete_models,
    create_activations,
    open_activations,
    open_tokens,
)
from rlgen_stats.stores.describe import describe
from rlgen_stats.stores.durable import read_json, replacing, write_json
from rlgen_stats.stores.folder import StudyFolder
from rlgen_stats.stores.provenance import Provenance, git_commit, package_versions
from rlgen_stats.stores.reader import PairedReader
from rlgen_stats.stores.results import open_results, result_groups, write_results
from rlgen_stats.stores.study import open_study
from rlgen_stats.stores.tables import append_model, committed_models, open_features, open_outcomes
from rlgen_stats.stores.verify import VerifyReport, verify

__all__ = [
    "ActivationWriter",
    "PairedReader",
    "Provenance",
    "StudyFolder",
    "VerifyReport",
    "append_model",
    "committed_models",
    "complete_models",
    "create_activations",
    "describe",
    "git_commit",
    "open_activations",
    "open_features",
    "open_outcomes",
    "open_results",
    "open_study",
    "open_tokens",
    "package_versions",
    "read_json",
    "replacing",
    "result_groups",
    "verify",
    "write_json",
    "write_results",
]
