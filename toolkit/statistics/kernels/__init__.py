"""Numpy-only estimators: units on axis 0, features on the last axis; arrays in, frozen dataclass or array out."""

from rlgen_stats.toolkit.statistics.kernels.adjust import StoreyResult, adjust, storey
from rlgen_stats.toolkit.statistics.kernels.bootstrap import BootstrapResult, bootstrap_t
from rlgen_stats.toolkit.statistics.kernels.combine import cpss_bound, partial_conjunction
from rlgen_stats.toolkit.statistics.kernels.equivalence import TostChainResult, tost_chain, tost_paired
from rlgen_stats.toolkit.statistics.kernels.histogram import HistogramResult, histogram_flip_test
from rlgen_stats.toolkit.statistics.kernels.maxt import MaxTResult, flip_statistics, joint_p, max_t
from rlgen_stats.toolkit.statistics.kernels.moderated import ModeratedResult, moderated_t
from rlgen_stats.toolkit.statistics.kernels.permutation import ContrastResult, permutation_contrast
from rlgen_stats.toolkit.statistics.kernels.proportions import (
    ClusterResult,
    McNemarResult,
    cluster_se,
    mcnemar,
    wilson_interval,
)
from rlgen_stats.toolkit.statistics.kernels.resampling import bootstrap_weights, sign_flips
from rlgen_stats.toolkit.statistics.kernels.saddlepoint import saddlepoint_tail
from rlgen_stats.toolkit.statistics.kernels.sets import RboResult, nogueira, rbo, set_overlap_pvalue
from rlgen_stats.toolkit.statistics.kernels.signflip import SignFlipResult, sign_flip_test

__all__ = [
    "BootstrapResult",
    "ClusterResult",
    "ContrastResult",
    "HistogramResult",
    "MaxTResult",
    "McNemarResult",
    "ModeratedResult",
    "RboResult",
    "SignFlipResult",
    "StoreyResult",
    "TostChainResult",
    "adjust",
    "bootstrap_t",
    "bootstrap_weights",
    "cluster_se",
    "cpss_bound",
    "flip_statistics",
    "histogram_flip_test",
    "joint_p",
    "max_t",
    "mcnemar",
    "moderated_t",
    "nogueira",
    "partial_conjunction",
    "permutation_contrast",
    "rbo",
    "saddlepoint_tail",
    "set_overlap_pvalue",
    "sign_flip_test",
    "sign_flips",
    "storey",
    "tost_chain",
    "tost_paired",
    "wilson_interval",
]
