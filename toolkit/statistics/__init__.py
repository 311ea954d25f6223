"""What is computed from stored activations: labelled statistics over numpy kernels."""

from rlgen_stats.toolkit.statistics.adjusting import adjust_pvalues
from rlgen_stats.toolkit.statistics.contrast import attribution_contrast
from rlgen_stats.toolkit.statistics.decoders import attribution, attribution_table, decoder_clusters
from rlgen_stats.toolkit.statistics.drift import drift_test
from rlgen_stats.toolkit.statistics.representation import representation_drift
from rlgen_stats.toolkit.statistics.selection import select_features
from rlgen_stats.toolkit.statistics.sets import set_stability
from rlgen_stats.toolkit.statistics.stabilization import stabilization_test
from rlgen_stats.toolkit.statistics.transitions import behaviour

__all__ = [
    "adjust_pvalues",
    "attribution",
    "attribution_contrast",
    "attribution_table",
    "behaviour",
    "decoder_clusters",
    "drift_test",
    "representation_drift",
    "select_features",
    "set_stability",
    "stabilization_test",
]
