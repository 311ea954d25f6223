"""Edits inside a live model, and the trial that decides whether a feature set causes what it is said to cause."""

from rlgen_stats.toolkit.edits.edit import EditSite, FeatureEdit
from rlgen_stats.toolkit.edits.hooks import ActiveEdit, Donor, amplify, disable, editing
from rlgen_stats.toolkit.statistics.causal.controls import MatchedControls, match_controls
from rlgen_stats.toolkit.statistics.causal.criteria import Settings
from rlgen_stats.toolkit.statistics.causal.outcome_table import Condition, OutcomeTable
from rlgen_stats.toolkit.statistics.causal.verdict import Verdict, judge
from rlgen_stats.toolkit.trial.arms import choose_prompts, plan_arms
from rlgen_stats.toolkit.trial.covariates import feature_covariates, near_duplicates
from rlgen_stats.toolkit.trial.parts import feature_effects
from rlgen_stats.toolkit.trial.plan import TrialPlan, plan_trial
from rlgen_stats.toolkit.trial.verify_causally import verify_causally

__all__ = [
    "ActiveEdit",
    "Condition",
    "Donor",
    "EditSite",
    "FeatureEdit",
    "MatchedControls",
    "OutcomeTable",
    "Settings",
    "TrialPlan",
    "Verdict",
    "amplify",
    "choose_prompts",
    "disable",
    "editing",
    "feature_covariates",
    "feature_effects",
    "judge",
    "match_controls",
    "near_duplicates",
    "plan_arms",
    "plan_trial",
    "verify_causally",
]
