"""What is computed from stored activations: labelled statistics over numpy kernels."""

from rlgen_stats.toolkit.statistics.behaviour import behaviour
from rlgen_stats.toolkit.statistics.comparison import compare_outcomes
from rlgen_stats.toolkit.statistics.core.correction import adjust_pvalues
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
from rlgen_stats.toolkit.statistics.specificity.decoder_norms import attribution, attribution_table, decoder_clusters
from rlgen_stats.toolkit.statistics.specificity.latent_scaling import classify_features, latent_scaling, scaling_table
from rlgen_stats.toolkit.statistics.specificity.matching import match_features, reappearance, subspace_overlap
from rlgen_stats.toolkit.statistics.timing.set_stability import set_stability
from rlgen_stats.toolkit.statistics.timing.stabilization import stabilization_test

__all__ = [
    "Design",
    "SelectionRule",
    "SelectionTests",
    "Simulation",
    "StabilityOptions",
    "adjust_pvalues",
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
    "latent_scaling",
    "match_features",
    "mean_shift",
    "model_separation",
    "power_at",
    "reappearance",
    "representation_drift",
    "required_prompts",
    "required_runs",
    "run_power",
    "scaling_table",
    "select_features",
    "selected_effects",
    "set_stability",
    "simulate_features",
    "stabilization_test",
    "subspace_overlap",
    "token_detectors",
    "write_simulation",
]
