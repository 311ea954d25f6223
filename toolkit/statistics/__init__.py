"""What is computed from stored activations: labelled statistics over numpy kernels.

A name is imported when it is first asked for: a kernel needs numpy and scipy alone, and so takes no longer to import.
"""

from typing import TYPE_CHECKING, Final

from rlgen_stats.toolkit.lazy_names import lazy_names

if TYPE_CHECKING:
    from rlgen_stats.toolkit.statistics.causal.own_arms import arms_table
    from rlgen_stats.toolkit.statistics.causal.verdict import judge
    from rlgen_stats.toolkit.statistics.claim_verdicts import selection_claim, specificity_claim, timing_claim
    from rlgen_stats.toolkit.statistics.comparison import compare_outcomes
    from rlgen_stats.toolkit.statistics.core.correction import adjust_pvalues
    from rlgen_stats.toolkit.statistics.core.own_arrays import features_dataset, outcomes_dataset
    from rlgen_stats.toolkit.statistics.drift.feature_drift import drift_test
    from rlgen_stats.toolkit.statistics.drift.mean_shift import mean_shift
    from rlgen_stats.toolkit.statistics.drift.representation import representation_drift
    from rlgen_stats.toolkit.statistics.planning.planted_truth import Simulation
    from rlgen_stats.toolkit.statistics.planning.power import (
        Design,
        detectable_effect,
        power_at,
        required_prompts,
        required_runs,
        run_power,
    )
    from rlgen_stats.toolkit.statistics.planning.simulate import simulate_features, write_simulation
    from rlgen_stats.toolkit.statistics.selection.options import SelectionRule, SelectionTests, StabilityOptions
    from rlgen_stats.toolkit.statistics.selection.probe import correctness_probe
    from rlgen_stats.toolkit.statistics.selection.select_features import select_features
    from rlgen_stats.toolkit.statistics.selection.selected_effects import selected_effects
    from rlgen_stats.toolkit.statistics.selection.separation import model_separation
    from rlgen_stats.toolkit.statistics.selection.token_detectors import token_detectors
    from rlgen_stats.toolkit.statistics.specificity.arm_contrast import attribution_contrast
    from rlgen_stats.toolkit.statistics.specificity.decoder_norms import (
        attribution,
        attribution_table,
        decoder_clusters,
    )
    from rlgen_stats.toolkit.statistics.specificity.latent_scaling import (
        classify_features,
        latent_scaling,
        scaling_table,
    )
    from rlgen_stats.toolkit.statistics.specificity.matching import match_features, reappearance, subspace_overlap
    from rlgen_stats.toolkit.statistics.task_accuracy import behaviour
    from rlgen_stats.toolkit.statistics.timing.run_contrast import timing_contrast
    from rlgen_stats.toolkit.statistics.timing.set_stability import set_stability
    from rlgen_stats.toolkit.statistics.timing.stabilization import stabilization_test

__all__ = [
    "Design",
    "SelectionRule",
    "SelectionTests",
    "Simulation",
    "StabilityOptions",
    "adjust_pvalues",
    "arms_table",
    "attribution",
    "attribution_contrast",
    "attribution_table",
    "behaviour",
    "classify_features",
    "compare_outcomes",
    "correctness_probe",
    "decoder_clusters",
    "detectable_effect",
    "drift_test",
    "features_dataset",
    "judge",
    "latent_scaling",
    "match_features",
    "mean_shift",
    "model_separation",
    "outcomes_dataset",
    "power_at",
    "reappearance",
    "representation_drift",
    "required_prompts",
    "required_runs",
    "run_power",
    "scaling_table",
    "select_features",
    "selected_effects",
    "selection_claim",
    "set_stability",
    "simulate_features",
    "specificity_claim",
    "stabilization_test",
    "subspace_overlap",
    "timing_claim",
    "timing_contrast",
    "token_detectors",
    "write_simulation",
]
_NAMES_OF: Final = {
    ".causal.own_arms": ("arms_table",),
    ".causal.verdict": ("judge",),
    ".claim_verdicts": ("selection_claim", "specificity_claim", "timing_claim"),
    ".comparison": ("compare_outcomes",),
    ".core.correction": ("adjust_pvalues",),
    ".core.own_arrays": ("features_dataset", "outcomes_dataset"),
    ".drift.feature_drift": ("drift_test",),
    ".drift.mean_shift": ("mean_shift",),
    ".drift.representation": ("representation_drift",),
    ".planning.planted_truth": ("Simulation",),
    ".planning.power": ("Design", "detectable_effect", "power_at", "required_prompts", "required_runs", "run_power"),
    ".planning.simulate": ("simulate_features", "write_simulation"),
    ".selection.options": ("SelectionRule", "SelectionTests", "StabilityOptions"),
    ".selection.probe": ("correctness_probe",),
    ".selection.select_features": ("select_features",),
    ".selection.selected_effects": ("selected_effects",),
    ".selection.separation": ("model_separation",),
    ".selection.token_detectors": ("token_detectors",),
    ".specificity.arm_contrast": ("attribution_contrast",),
    ".specificity.decoder_norms": ("attribution", "attribution_table", "decoder_clusters"),
    ".specificity.latent_scaling": ("classify_features", "latent_scaling", "scaling_table"),
    ".specificity.matching": ("match_features", "reappearance", "subspace_overlap"),
    ".task_accuracy": ("behaviour",),
    ".timing.run_contrast": ("timing_contrast",),
    ".timing.set_stability": ("set_stability",),
    ".timing.stabilization": ("stabilization_test",),
}

if not TYPE_CHECKING:  # a type checker would take every name for a known one
    __getattr__, __dir__ = lazy_names(__name__, _NAMES_OF)
