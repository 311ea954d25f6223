"""Edits inside a live model, and the trial that decides whether a feature set causes what it is said to cause."""

from rlgen_stats.toolkit.intervention.arms import choose_prompts, plan_arms
from rlgen_stats.toolkit.intervention.controls import MatchedControls, match_controls
from rlgen_stats.toolkit.intervention.covariates import feature_covariates, near_duplicates
from rlgen_stats.toolkit.intervention.criteria import Settings
from rlgen_stats.toolkit.intervention.edit import EditSite, FeatureEdit
from rlgen_stats.toolkit.intervention.live import ActiveEdit, Donor, amplify, disable, editing
from rlgen_stats.toolkit.intervention.outcomes import Condition, OutcomeTable
from rlgen_stats.toolkit.intervention.parts import feature_effects
from rlgen_stats.toolkit.intervention.plan import TrialPlan, plan_trial
from rlgen_stats.toolkit.intervention.verdict import Verdict, judge
from rlgen_stats.toolkit.intervention.verify import verify_causally

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
