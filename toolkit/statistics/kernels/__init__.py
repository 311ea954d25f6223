"""Estimators on numpy arrays: units on axis 0, features on the last axis; a frozen dataclass or an array out.

Arguments after the star are keyword-only. All randomness comes from ``seed``: draw b gives unit i a value that depends
on (seed, b, i) alone, so results do not change with the blocks of features, their order, or the number of workers.

Sign flips and joint tests::

    sign_flip_test(differences, *, alternative="two-sided", method="auto", n_resamples=9999, seed=0, clusters=None)
        -> SignFlipResult(statistic, p_value, p_max_t, n_nonzero, method, flag)
    max_t(differences, *, n_resamples=999, seed=0, step_down=True, clusters=None, alternative="two-sided",
          thresholds=(), unadjusted=True)
        -> MaxTResult(statistic, p_single_step, p_step_down, p_raw, maxima, exact, exceedances)
    max_t_p_value(statistic, maxima) -> array       # maxima may be combined over blocks of features
    fdp_bound(exceedances, thresholds, *, alpha=0.05) -> FdpResult(n_beyond, false_upper, fdp_upper)
    exceedance_counts(statistics, thresholds) -> array [threshold, flip]
    wild_cluster_bootstrap(values, clusters=None, *, n_resamples=9999, seed=0)
        -> WildResult(statistic, p_value, n_clusters)
    sign_flips(n_units, start, stop, *, seed) -> array        # rows of an unlimited table of signs
    flip_tail(magnitudes, total), saddlepoint_tail(magnitudes, total) -> array
    histogram_flip_test(hist_a, hist_b, *, statistic, n_resamples=9999, seed=0) -> HistogramResult(statistic, p_value)
    trend_contrast(x, *, kind) -> array                       # x [unit, checkpoint(, feature)]; kendall page
    trend_test(x, *, kind="kendall", alternative="two-sided", clusters=None, seed=0, method="auto", n_resamples=9999)
        -> TrendResult(tau, p_value, n_nonzero, flag)
    permutation_contrast(plus, minus, *, alternative="two-sided", n_resamples=9999, seed=0, min_count=1)
        -> ContrastResult(statistic, p_value, n_plus, n_minus)
    contrast_contributions(values, groups, weights) -> array  # of rows to a contrast of group means, to be flipped

Families and combinations of p-values::

    adjust(p, *, method, alpha=0.05) -> array                 # bonferroni holm hommel bh by bky storey
    family_size(p) -> FamilySize(n_tested, n_missing)
    storey(p, *, threshold=0.5) -> StoreyResult(pi0, q_value)
    partial_conjunction(p, *, u, combine) -> array            # bonferroni simes fisher
    cpss_bound(q, n_features, n_pairs, threshold, assumption="none") -> float   # none unimodal

Means, equivalence, counts, sets::

    bootstrap_t(x, *, alpha=0.05, n_resamples=999, seed=0, clusters=None)
        -> BootstrapResult(mean, low, high, standard_error)
    bootstrap_weights(n_units, n_resamples, *, seed) -> array [resample, unit]
    bounded_interval(values, clusters, *, alpha, limit=1.0) -> (mean, low, high)         # accuracies, few changes
    cluster_se(values, clusters, *, kind="CR1") -> ClusterResult(mean, standard_error, n_clusters, df)
    moderated_t(x, y=None) -> ModeratedResult(statistic, p_value, prior_variance, prior_dof, effect)
    delete_group_jackknife(replicates, estimate=None, *, alpha=0.05)
        -> JackknifeResult(estimate, standard_error, low, high, lower, upper)
    bagged_replicates(draws, counts) -> (estimate, replicates)            # of a statistic averaged over bootstrap draws
    pooled_mean(values, codes=None, *, alpha=0.05, within=None) -> Pooled          # values [dictionary, unit(, ...)]
    pooled_estimates(estimates, *, jackknife=None, draws=None, df_draws=inf, alpha=0.05)
        -> Pooled(mean, low, high, standard_error, df, between_sd, p_value, each_mean, n_dictionaries)
    pooled_intervals(estimates, lows, highs, *, alpha=0.05) -> (mean, low, high)
    same_direction(each_mean, pooled) -> array;  dictionaries_needed(n) -> int;  agreed(answers, otherwise) -> answer
    mover_weighted_sum(estimates, lows, highs, *, weights) -> (sum, low, high)
    tost_paired(x, y=0.0, *, low, high) -> array
    minimum_effect_test(x, reference, *, margin) -> MinimumEffectResult(effect, p_value)
    tost_chain(x, *, margin, alpha=0.05, relative=False, persist=0) -> TostChainResult(p_value, stabilized_at, p_beyond)
    mcnemar(gained, lost) -> McNemarResult(p_value, mid_p)
    wilson_interval(successes, n, *, alpha=0.05) -> (low, high)
    pass_at_k(right, n, k) -> array
    paired_wasserstein(a, b) -> array
    hurdle(mean_a, mean_b, firing_a, firing_b) -> HurdleResult(from_firing, from_magnitude, magnitude_change)
    rbo(first, second, persistence=0.9) -> RboResult(truncated, minimum, extrapolated)
    nogueira(selected) -> float
    set_overlap_pvalue(shared, n_features, size_a, size_b) -> float or array
"""

from rlgen_stats.toolkit.statistics.kernels.draws import sign_flips
from rlgen_stats.toolkit.statistics.kernels.effects import HurdleResult, hurdle, paired_wasserstein
from rlgen_stats.toolkit.statistics.kernels.equivalence import (
    MinimumEffectResult,
    TostChainResult,
    minimum_effect_test,
    tost_chain,
    tost_paired,
)
from rlgen_stats.toolkit.statistics.kernels.flips.group_contrast import contrast_contributions
from rlgen_stats.toolkit.statistics.kernels.flips.histogram import HistogramResult, histogram_flip_test
from rlgen_stats.toolkit.statistics.kernels.flips.maxt import MaxTResult, max_t, max_t_p_value
from rlgen_stats.toolkit.statistics.kernels.flips.permutation import ContrastResult, permutation_contrast
from rlgen_stats.toolkit.statistics.kernels.flips.saddlepoint import flip_tail, saddlepoint_tail
from rlgen_stats.toolkit.statistics.kernels.flips.signflip import SignFlipResult, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.flips.wild import WildResult, wild_cluster_bootstrap
from rlgen_stats.toolkit.statistics.kernels.intervals.bootstrap import BootstrapResult, bootstrap_t, bootstrap_weights
from rlgen_stats.toolkit.statistics.kernels.intervals.bounded import bounded_interval
from rlgen_stats.toolkit.statistics.kernels.intervals.clustered import ClusterResult, cluster_se
from rlgen_stats.toolkit.statistics.kernels.intervals.jackknife import (
    JackknifeResult,
    bagged_replicates,
    delete_group_jackknife,
)
from rlgen_stats.toolkit.statistics.kernels.intervals.recovered import (
    mover_weighted_sum,
)
from rlgen_stats.toolkit.statistics.kernels.moderated import ModeratedResult, moderated_t
from rlgen_stats.toolkit.statistics.kernels.multiplicity.adjust import (
    FamilySize,
    StoreyResult,
    adjust,
    family_size,
    storey,
)
from rlgen_stats.toolkit.statistics.kernels.multiplicity.fdp import FdpResult, exceedance_counts, fdp_bound
from rlgen_stats.toolkit.statistics.kernels.multiplicity.partial_conjunction import partial_conjunction
from rlgen_stats.toolkit.statistics.kernels.multiplicity.stability_bound import cpss_bound
from rlgen_stats.toolkit.statistics.kernels.pooling import (
    Pooled,
    agreed,
    dictionaries_needed,
    pooled_estimates,
    pooled_intervals,
    pooled_mean,
    same_direction,
)
from rlgen_stats.toolkit.statistics.kernels.proportions import McNemarResult, mcnemar, pass_at_k, wilson_interval
from rlgen_stats.toolkit.statistics.kernels.set_overlap import RboResult, nogueira, rbo, set_overlap_pvalue
from rlgen_stats.toolkit.statistics.kernels.trend import TrendResult, trend_contrast, trend_test

__all__ = [
    "BootstrapResult",
    "ClusterResult",
    "ContrastResult",
    "FamilySize",
    "FdpResult",
    "HistogramResult",
    "HurdleResult",
    "JackknifeResult",
    "MaxTResult",
    "McNemarResult",
    "MinimumEffectResult",
    "ModeratedResult",
    "Pooled",
    "RboResult",
    "SignFlipResult",
    "StoreyResult",
    "TostChainResult",
    "TrendResult",
    "WildResult",
    "adjust",
    "agreed",
    "bagged_replicates",
    "bootstrap_t",
    "bootstrap_weights",
    "bounded_interval",
    "cluster_se",
    "contrast_contributions",
    "cpss_bound",
    "delete_group_jackknife",
    "dictionaries_needed",
    "exceedance_counts",
    "family_size",
    "fdp_bound",
    "flip_tail",
    "histogram_flip_test",
    "hurdle",
    "max_t",
    "max_t_p_value",
    "mcnemar",
    "minimum_effect_test",
    "moderated_t",
    "mover_weighted_sum",
    "nogueira",
    "paired_wasserstein",
    "partial_conjunction",
    "pass_at_k",
    "permutation_contrast",
    "pooled_estimates",
    "pooled_intervals",
    "pooled_mean",
    "rbo",
    "saddlepoint_tail",
    "same_direction",
    "set_overlap_pvalue",
    "sign_flip_test",
    "sign_flips",
    "storey",
    "tost_chain",
    "tost_paired",
    "trend_contrast",
    "trend_test",
    "wild_cluster_bootstrap",
    "wilson_interval",
]
