"""Joint max-T: the definition in loops, ties, blocks of flips and features, one side, refusals, calibration."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels import (
    max_t,
    max_t_p_value,
    sign_flip_test,
    sign_flips,
)
from rlgen_stats.toolkit.statistics.kernels.flips import maxt as maxt_module
from tests.oracles import slow


@pytest.mark.parametrize("values", ["normal", "ties", "sparse"])
def test_equals_the_definition(values: str) -> None:
    random = np.random.default_rng(30)
    d = random.normal(0.3, size=(8, 6))
    if values == "ties":
        d = random.integers(-2, 4, (8, 6)) / 10
    if values == "sparse":
        d[random.random(d.shape) < 0.6] = 0
        d[0] += 0.2
    single, down, raw = slow.max_t_p(d)
    result = max_t(d)
    np.testing.assert_allclose(result.p_single_step, single, rtol=1e-12)
    np.testing.assert_allclose(result.p_step_down, down, rtol=1e-12)
    np.testing.assert_allclose(result.p_raw, raw, rtol=1e-12)
    np.testing.assert_allclose(result.p_raw, sign_flip_test(d).p_value, rtol=1e-12)


def test_a_sum_that_cancels_is_reached_by_every_flip() -> None:
    """0.1 + 0.2 - 0.3 is 5e-17, and a slack relative to it would miss the flips that give 0."""
    result = max_t(np.array([[0.1, 1.0], [0.2, 1.0], [-0.3, 1.0]]))
    assert result.p_raw.tolist() == [1.0, 0.25]
    assert result.p_single_step[0] == 1.0


def test_many_flips_equal_one_product() -> None:
    """2,500 flips are rounded up to 4,095 and 1,100 features are many blocks; the counts are those of all products."""
    d = np.random.default_rng(31).normal(size=(25, 1100))
    result = max_t(d, n_resamples=2500, seed=6)
    patterns = slow.flip_group(sign_flips(25, 0, 12, seed=6))
    table = np.abs(patterns @ d) / np.sqrt((d**2).sum(axis=0))
    np.testing.assert_allclose(result.maxima, table.max(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(result.p_raw, (table >= result.statistic - 1e-9).mean(axis=0))
    single = (table.max(axis=1)[:, None] >= result.statistic - 1e-9).mean(axis=0)
    np.testing.assert_array_equal(result.p_single_step, single)
    order = np.argsort(result.statistic)
    running = np.maximum.accumulate(table[:, order], axis=1)
    down = (running >= result.statistic[order] - 1e-9).mean(axis=0)
    np.testing.assert_array_equal(result.p_step_down[order], np.maximum.accumulate(down[::-1])[::-1])


def test_blocks_of_features_combine_to_the_whole() -> None:
    random = np.random.default_rng(32)
    for n in (10, 40):  # every flip, random flips
        d = random.normal(0.1, size=(n, 90))
        d[:, 50] = 0
        whole = max_t(d, n_resamples=300, seed=2)
        parts = [max_t(d[:, s], n_resamples=300, seed=2, step_down=False) for s in (slice(0, 17), slice(17, 90))]
        maxima = np.maximum(parts[0].maxima, parts[1].maxima)
        statistic = np.concatenate([part.statistic for part in parts])
        p = max_t_p_value(statistic, maxima)
        np.testing.assert_array_equal(p, whole.p_single_step)
        assert np.isnan(p[50])
        np.testing.assert_array_equal(max_t_p_value(statistic.reshape(9, 10), maxima).ravel(), whole.p_single_step)


def test_repeated_single_steps_reject_what_step_down_rejects() -> None:
    d = np.random.default_rng(33).normal(size=(30, 220)) + np.repeat([1.2, 0.7, 0.0], [180, 30, 10])
    whole = max_t(d, n_resamples=499)
    left = np.arange(220)
    while True:
        p = max_t(d[:, left], n_resamples=499, step_down=False).p_single_step
        if not (p <= 0.05).any():
            break
        left = left[p > 0.05]
    np.testing.assert_array_equal(np.flatnonzero(whole.p_step_down > 0.05), left)
    assert (whole.p_single_step > 0.05).sum() > len(left)


def test_one_sided_families() -> None:
    d = np.random.default_rng(34).normal(0.4, size=(10, 5))
    greater, less = max_t(d, alternative="greater"), max_t(-d, alternative="less")
    np.testing.assert_array_equal(greater.p_step_down, less.p_step_down)
    np.testing.assert_allclose(greater.statistic, -less.statistic)
    np.testing.assert_allclose(greater.p_raw, sign_flip_test(d, alternative="greater").p_value, rtol=1e-12)
    np.testing.assert_array_equal(sign_flip_test(d, alternative="greater").p_max_t, greater.p_single_step)
    assert (max_t(-np.abs(d), alternative="greater").p_single_step == 1).all()
    against = -d[:, [0]]  # alone, a feature that goes the other way has its own p, though the sum is negative
    result = max_t(against, alternative="greater")
    assert 0.5 < result.p_single_step[0] < 1
    np.testing.assert_array_equal(result.p_single_step, result.p_raw)


def test_clusters_flip_whole_and_few_are_refused() -> None:
    d = np.random.default_rng(35).normal(size=(24, 4))
    clusters = np.arange(24) % 8
    totals = np.array([d[clusters == c].sum(axis=0) for c in range(8)])
    np.testing.assert_array_equal(max_t(d, clusters=clusters).p_step_down, max_t(totals).p_step_down)
    np.testing.assert_array_equal(sign_flip_test(d, clusters=clusters).p_max_t, max_t(totals).p_single_step)
    with pytest.raises(RefusedError, match="at least 6, got 5"):
        max_t(d, clusters=np.arange(24) % 5)
    with pytest.raises(InputError, match="two-sided, greater or less"):
        max_t(d, alternative="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("step_down", [False, True])
def test_memory_does_not_grow_with_the_features(step_down: bool) -> None:
    peaks = []
    for n_features in (300, 1200):
        d = np.random.default_rng(36).normal(size=(50, n_features))
        tracemalloc.start()
        max_t(d, n_resamples=8000, step_down=step_down)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 300 * 8192 * 8 / 3  # a third of the table of sums of the fewer features


def test_an_untestable_feature_leaves_the_family() -> None:
    d = np.random.default_rng(37).normal(0.3, size=(30, 5))
    alone = max_t(d, n_resamples=200)
    with_dead = max_t(np.column_stack([d[:, :2], np.zeros(30), np.full(30, np.nan), d[:, 2:]]), n_resamples=200)
    for name in ("statistic", "p_raw", "p_single_step", "p_step_down"):
        value = getattr(with_dead, name)
        np.testing.assert_array_equal(np.delete(value, [2, 3]), getattr(alone, name))
        assert np.isnan(value[2:4]).all()


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("step_down", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_sparse_and_dense_paths_agree(
    monkeypatch: pytest.MonkeyPatch, alternative: Any, clustered: bool, step_down: bool, missing: bool
) -> None:
    rng = np.random.default_rng(5)
    d = np.where(rng.random((300, 90)) < 0.05, rng.normal(0.2, 1, (300, 90)), 0.0)
    d[:, 7] = 0.0
    d[:, 11] = np.nan if missing else 0.0
    d[:3, 13] = 0.1 + 0.2 - 0.3  # rounding beside real values is no difference
    d[5, 13] = 1.0
    clusters = np.arange(300) // 3 if clustered else None
    how: Any = {"n_resamples": 199, "seed": 3, "alternative": alternative, "step_down": step_down, "clusters": clusters}
    result = {}
    for name, density in (("sparse", 1.1), ("dense", 0.0)):
        monkeypatch.setattr(maxt_module, "SPARSE_DENSITY", density)
        result[name] = max_t(d, **how)
    for name in ("p_single_step", "p_step_down", "p_raw"):
        np.testing.assert_array_equal(getattr(result["sparse"], name), getattr(result["dense"], name))
    np.testing.assert_allclose(result["sparse"].statistic, result["dense"].statistic, rtol=1e-12)
    np.testing.assert_allclose(result["sparse"].maxima, result["dense"].maxima, rtol=1e-12)
    assert np.isnan(result["sparse"].statistic[[7, 11]]).all()
    alone = max_t(d[:, [13]], **how)
    np.testing.assert_allclose(result["sparse"].p_raw[13], alone.p_raw[0])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_float32_differences_are_tested_as_their_float64_values(dtype: str) -> None:
    d = np.random.default_rng(0).normal(0.1, 1, (40, 30)).astype(dtype)
    np.testing.assert_array_equal(max_t(d).p_step_down, max_t(d.astype("f8")).p_step_down)
    np.testing.assert_array_equal(sign_flip_test(d).p_value, sign_flip_test(d.astype("f8")).p_value)


def test_max_t_does_not_depend_on_order_or_blocks_or_density() -> None:
    random = np.random.default_rng(8)
    d = random.normal(size=(40, 2300)) * (random.random((40, 2300)) < 0.1)
    d[:, :1500] += random.normal(size=(40, 1500))
    whole = max_t(d, n_resamples=200, seed=3)
    order = random.permutation(d.shape[1])
    shuffled = max_t(d[:, order], n_resamples=200, seed=3)
    for name in ("p_single_step", "p_step_down", "p_raw"):
        np.testing.assert_allclose(getattr(shuffled, name), getattr(whole, name)[order], rtol=1e-12)
    blocks = [max_t(d[:, part], n_resamples=200, seed=3).maxima for part in (slice(0, 700), slice(700, None))]
    np.testing.assert_allclose(np.maximum(*blocks), whole.maxima, rtol=1e-12)
    flips = slow.flip_group(sign_flips(40, 0, 8, seed=3))
    alive = (d != 0).any(axis=0)
    assert np.count_nonzero(d[:, 1500:]) < 0.15 * d[:, 1500:].size
    direct = np.abs(flips @ d[:, alive]) / np.sqrt((d[:, alive] ** 2).sum(axis=0))
    np.testing.assert_allclose(whole.maxima, direct.max(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(whole.p_raw[alive], (direct >= whole.statistic[alive] - 1e-9).mean(axis=0))


def test_max_t_controls_the_family_where_raw_p_does_not() -> None:
    random = np.random.default_rng(9)
    wrong_joint = wrong_raw = 0
    for trial in range(200):
        shared = random.normal(size=(20, 1))
        d = 0.7 * shared + random.normal(size=(20, 30))
        result = max_t(d, n_resamples=99, seed=trial)
        wrong_joint += bool((result.p_step_down <= 0.05).any())
        wrong_raw += bool((result.p_raw <= 0.05).any())
    assert wrong_joint / 200 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert wrong_raw / 200 > 0.2


def test_step_down_is_at_least_as_powerful_and_monotone() -> None:
    d = np.random.default_rng(10).normal(size=(30, 20)) + np.linspace(0, 1.2, 20)
    result = max_t(d, n_resamples=499)
    assert (result.p_step_down <= result.p_single_step + 1e-12).all()
    assert (result.p_step_down < result.p_single_step - 1e-12).any()
    order = np.argsort(-result.statistic)
    assert (np.diff(result.p_step_down[order]) >= 0).all()
