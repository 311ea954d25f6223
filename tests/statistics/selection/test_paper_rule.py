from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from scipy.stats import ks_2samp

from rlgen_stats.toolkit.statistics.selection.paper_rule import n2_sizes, paper_rule, strata


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    values = rng.gamma(1, 1, (2, 40, 60)) * (rng.random((2, 40, 60)) < rng.random(60))
    values[1, :, :6] += 0.8
    prompts = {"a": np.arange(0, 15), "b": np.arange(15, 33)}
    return values, prompts


def apply_rule(values, prompts, **options):
    array = da.from_array(values, chunks=(-1, -1, options.pop("chunk", 60)))
    defaults = {"score_fraction": 0.2, "n_resamples": 999, "seed": 1}
    return paper_rule(array, (array > 0).astype(float), prompts, **(defaults | options))


def slow_size(d, prompts, fraction=0.2):
    kept = set(range(d.shape[1]))
    for index in prompts.values():
        score = [np.mean([d[i, k] for i in index]) for k in range(d.shape[1])]
        top = max(score)
        kept &= {k for k, s in enumerate(score) if top > 0 and s >= fraction * top}
    return len(kept)


def test_rule_and_n1_against_a_slow_loop(data):
    values, prompts = data
    rule = apply_rule(values, prompts)
    d = values[1] - values[0]
    assert rule.selected.sum() == slow_size(d, prompts)
    rng = np.random.default_rng(9)
    slow = [slow_size(d * rng.choice([-1, 1], size=(40, 1)), prompts) for _ in range(300)]
    # The same distribution of sizes from independent flips.
    assert ks_2samp(slow, rule.n1).pvalue > 0.001
    p = np.mean(np.array(slow) >= rule.selected.sum())
    assert rule.p_n1 == pytest.approx(p, abs=3 * np.sqrt(0.25 / 300))


def test_n2_is_permutation_within_strata(data):
    values, prompts = data
    rule = apply_rule(values, prompts)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 4, 60)
    slow = []
    for _ in range(2000):
        common = np.ones(60, dtype=bool)
        for row in rule.kept:
            shuffled = row.copy()
            for s in range(4):
                shuffled[codes == s] = rng.permutation(row[codes == s])
            common &= shuffled
        slow.append(common.sum())
    fast = n2_sizes(rule.kept, codes, 2000, seed=3)
    assert np.mean(fast) == pytest.approx(np.mean(slow), abs=4 * np.std(slow) * np.sqrt(2 / 2000))
    assert ks_2samp(slow, fast).pvalue > 0.001


def test_null_sizes_are_far_above_the_product_of_fractions():
    """One strong direction forces the intersection: multiplying kept fractions would call it significant."""
    rng = np.random.default_rng(2)
    direction = np.concatenate([np.full(20, 3.0), np.full(180, 0.1)])
    d = rng.normal(0, 1, (60, 1)) * direction + rng.normal(0, 0.05, (60, 200))
    values = np.stack([np.full((60, 200), 10.0), 10 + d])
    prompts = {str(t): np.arange(t * 15, t * 15 + 15) for t in range(4)}
    rule = apply_rule(values, prompts)
    product = 200 * np.prod(rule.kept.mean(axis=1))
    sizes = rule.n1[rule.n1 > 0]
    assert np.median(sizes) > 10 * min(product, 0.1 * 200 * 0.1**3) or product == 0
    # With no real shift, N1 does not reject.
    assert rule.p_n1 > 0.05


@pytest.mark.slow
def test_n1_is_calibrated_without_any_difference():
    rng = np.random.default_rng(4)
    p = []
    for s in range(120):
        values = rng.gamma(2, 1, (2, 24, 40))
        p.append(apply_rule(values, {"a": np.arange(12), "b": np.arange(12, 24)}, n_resamples=99, seed=s).p_n1)
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 120)
    assert min(p) > 0


def test_n2_sees_a_common_set_but_not_one_that_a_stratum_explains():
    kept = np.zeros((3, 200), dtype=bool)
    kept[:, :12] = True
    kept[0, 20:40] = kept[1, 60:80] = kept[2, 100:120] = True
    one = np.zeros(200, dtype=int)
    assert np.mean(n2_sizes(kept, one, 500, seed=0) >= 12) == 0
    everything = np.stack([np.ones(200, dtype=bool), kept[0]])
    assert set(n2_sizes(everything, one, 50, seed=0)) == {32}  # drawn without replacement
    explained = np.where(np.arange(200) < 12, 1, 0)
    assert np.all(n2_sizes(kept, explained, 500, seed=0) >= 12)


def test_strata_are_quantiles_and_silent_features_their_own():
    codes = strata(np.ones(100), np.arange(100.0))
    assert np.bincount(codes).tolist() == [20] * 5
    silent = strata(np.r_[np.zeros(7), np.full(100, 0.5)], np.r_[np.zeros(7), np.arange(100.0)])
    assert len(set(silent[:7])) == 1
    assert silent[0] not in silent[7:]


def test_chunks_and_clusters(data):
    values, prompts = data
    whole, parts = apply_rule(values, prompts), apply_rule(values, prompts, chunk=7)
    np.testing.assert_array_equal(whole.n1, parts.n1)
    np.testing.assert_array_equal(whole.n2, parts.n2)
    # One cluster per task: only four labellings exist, and two of them are the observed one or beat it rarely.
    tied = apply_rule(values, prompts, clusters=np.repeat([0, 1], [15, 25]))
    assert 0.2 < tied.p_n1 < 0.35
