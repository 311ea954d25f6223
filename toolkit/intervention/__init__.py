"""Edits of features inside a live model, and the trial that decides whether a feature set changes accuracy as claimed.

Public names of :mod:`rlgen_stats.toolkit.edits`, :mod:`rlgen_stats.toolkit.trial` and
:mod:`rlgen_stats.toolkit.statistics.causal`, in one place. Importing this imports torch; a plan alone needs only
:mod:`rlgen_stats.toolkit.trial.plan`, a verdict only :mod:`rlgen_stats.toolkit.statistics.causal`.
"""

import warnings
from typing import Any

from rlgen_stats.toolkit.edits.edit import FeatureEdit
from rlgen_stats.toolkit.edits.hooks import ActiveEdit, SourceModel, amplify, disable, editing, editing_rows
from rlgen_stats.toolkit.edits.site import EditSite
from rlgen_stats.toolkit.statistics.causal.controls import MatchedControls, match_controls
from rlgen_stats.toolkit.statistics.causal.covariates import feature_covariates, near_duplicates
from rlgen_stats.toolkit.statistics.causal.criteria import Settings
from rlgen_stats.toolkit.statistics.causal.outcome_table import Condition, DirectionOutcomes, OutcomeTable
from rlgen_stats.toolkit.statistics.causal.result_datasets import judge_trial
from rlgen_stats.toolkit.statistics.causal.verdict import Verdict, judge
from rlgen_stats.toolkit.trial.arms import choose_prompts, plan_arms
from rlgen_stats.toolkit.trial.parts import measure_parts
from rlgen_stats.toolkit.trial.plan import TrialPlan, plan_trial
from rlgen_stats.toolkit.trial.run_trial import LiveTrial, run_trial
from rlgen_stats.toolkit.trial.verify_causally import (
    DictionaryTrials,
    feature_effects,
    verify_causally,
    verify_in_dictionaries,
)

__all__ = [
    "ActiveEdit",
    "Condition",
    "DictionaryTrials",
    "DirectionOutcomes",
    "EditSite",
    "FeatureEdit",
    "LiveTrial",
    "MatchedControls",
    "OutcomeTable",
    "Settings",
    "SourceModel",
    "TrialPlan",
    "Verdict",
    "amplify",
    "choose_prompts",
    "disable",
    "editing",
    "editing_rows",
    "feature_covariates",
    "feature_effects",
    "judge",
    "judge_trial",
    "match_controls",
    "measure_parts",
    "near_duplicates",
    "plan_arms",
    "plan_trial",
    "run_trial",
    "verify_causally",
    "verify_in_dictionaries",
]

_RENAMED = {"Donor": "SourceModel"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"{__name__}.{name} is now called {_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
