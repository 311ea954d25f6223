"""Stores of a study: Zarr folders that plain xarray opens, written so that a crash loses nothing that was committed."""

from rlgen_stats.schemas.dims import stored_model
from rlgen_stats.stores.activation_store import complete_models, open_activations, open_tokens, select_tokens
from rlgen_stats.stores.atomic import read_json, replacing, write_json
from rlgen_stats.stores.creation import create_activations
from rlgen_stats.stores.dashboards import read_contexts, read_logits
from rlgen_stats.stores.describe import describe
from rlgen_stats.stores.folder import StudyFolder
from rlgen_stats.stores.locations import place
from rlgen_stats.stores.migrate import migrate
from rlgen_stats.stores.provenance import Provenance, git_commit, package_versions
from rlgen_stats.stores.reader import MixedReader, PairedReader
from rlgen_stats.stores.results import open_by_dictionary, open_results, result_groups, write_results
from rlgen_stats.stores.study_tree import open_study
from rlgen_stats.stores.tables import append_model, committed_models, open_features, open_outcomes
from rlgen_stats.stores.trial_completions import open_arms
from rlgen_stats.stores.verify import VerifyReport, verify
from rlgen_stats.stores.writer import ActivationWriter

__all__ = [
    "ActivationWriter",
    "MixedReader",
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
    "migrate",
    "open_activations",
    "open_arms",
    "open_by_dictionary",
    "open_features",
    "open_outcomes",
    "open_results",
    "open_study",
    "open_tokens",
    "package_versions",
    "place",
    "read_contexts",
    "read_json",
    "read_logits",
    "replacing",
    "result_groups",
    "select_tokens",
    "stored_model",
    "verify",
    "write_json",
    "write_results",
]
