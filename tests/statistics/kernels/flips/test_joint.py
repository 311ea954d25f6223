"""Joint max-T: the definition in loops, ties, blocks of flips and features, one side, refusals, calibration."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels import max_t, max_t_p_value, sign_flip_test, sign_flips, unit_tables
from rlgen_stats.toolkit.statistics.kernels.flips import maxt as maxt_module
from rlgen_stats.toolkit.statistics.kernels.flips import signflip as signflip_module
from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import flip_count, flip_table, walsh_hadamard
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
    found = max_t(d)
    np.testing.assert_allclose(found.p_single_step, single, rtol=1e-12)
    np.testing.assert_allclose(found.p_step_down, down, rtol=1e-12)
    np.testing.assert_allclose(found.p_raw, raw, rtol=1e-12)
    np.testing.assert_allclose(found.p_raw, sign_flip_test(d).p_value, rtol=1e-12)


def test_a_sum_that_cancels_is_reached_by_every_flip() -> None:
    """0.1 + 0.2 - 0.3 is 5e-17, and a slack relative to it would miss the flips that give 0."""
    found = max_t(np.array([[0.1, 1.0], [0.2, 1.0], [-0.3, 1.0]]))
    assert found.p_raw.tolist() == [1.0, 0.25]
    assert found.p_single_step[0] == 1.0


def test_many_flips_equal_one_product() -> None:
    """2,500 flips are rounded up to 4,095 and 1,100 features are many blocks; the counts are those of all products."""
    d = np.random.default_rng(31).normal(size=(25, 1100))
    found = max_t(d, n_resamples=2500, seed=6)
    patterns = slow.flip_group(sign_flips(25, 0, 12, seed=6))
    table = np.abs(patterns @ d) / np.sqrt((d**2).sum(axis=0))
    np.testing.assert_allclose(found.maxima, table.max(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(found.p_raw, (table >= found.statistic - 1e-9).mean(axis=0))
    single = (table.max(axis=1)[:, None] >= found.statistic - 1e-9).mean(axis=0)
    np.testing.assert_array_equal(found.p_single_step, single)
    order = np.argsort(found.statistic)
    running = np.maximum.accumulate(table[:, order], axis=1)
    down = (running >= found.statistic[order] - 1e-9).mean(axis=0)
    np.testing.assert_array_equal(found.p_step_down[order], np.maximum.accumulate(down[::-1])[::-1])


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
    found = max_t(against, alternative="greater")
    assert 0.5 < found.p_single_step[0] < 1
    np.testing.assert_array_equal(found.p_single_step, found.p_raw)


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
    found = {}
    for name, density in (("sparse", 1.1), ("dense", 0.0)):
        monkeypatch.setattr(maxt_module, "SPARSE_DENSITY", density)
        found[name] = max_t(d, **how)
    for name in ("p_single_step", "p_step_down", "p_raw"):
        np.testing.assert_array_equal(getattr(found["sparse"], name), getattr(found["dense"], name))
    np.testing.assert_allclose(found["sparse"].statistic, found["dense"].statistic, rtol=1e-12)
    np.testing.assert_allclose(found["sparse"].maxima, found["dense"].maxima, rtol=1e-12)
    assert np.isnan(found["sparse"].statistic[[7, 11]]).all()
    alone = max_t(d[:, [13]], **how)
    np.testing.assert_allclose(found["sparse"].p_raw[13], alone.p_raw[0])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_float32_differences_are_tested_as_their_float64_values(dtype: str) -> None:
    d = np.random.default_rng(0).normal(0.1, 1, (40, 30)).astype(dtype)
    np.testing.assert_array_equal(max_t(d).p_step_down, max_t(d.astype("f8")).p_step_down)
    np.testing.assert_array_equal(sign_flip_test(d).p_value, sign_flip_test(d.astype("f8")).p_value)


def test_features_do_not_depend_on_the_blocks_they_are_packed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    d = np.where(rng.random((200, 70)) < rng.random(70), rng.normal(0.1, 1, (200, 70)), 0.0)
    whole = sign_flip_test(d)
    monkeypatch.setattr(unit_tables, "BLOCK_UNITS", 1)
    monkeypatch.setattr(signflip_module, "feature_blocks", lambda n, f: (slice(i, i + 1) for i in range(f)))
    single = sign_flip_test(d)
    np.testing.assert_array_equal(whole.p_value, single.p_value)
    np.testing.assert_array_equal(whole.statistic, single.statistic)
    np.testing.assert_array_equal(whole.method, single.method)


# -- the random group of flips ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "n_resamples"), [(13, 999), (40, 63), (200, 1000), (7, 10)])
def test_flips_are_a_group_that_does_not_depend_on_other_units(n: int, n_resamples: int) -> None:
    table = flip_table(n, n_resamples, seed=4)
    index = np.arange(len(table))[:, None]
    patterns = 1.0 - 2.0 * (np.bitwise_count(index & table.codes) & 1)
    assert len(table) == len(patterns) == flip_count(n, n_resamples) > n_resamples
    assert (patterns[0] == 1).all()
    known = {row.tobytes() for row in patterns}
    for i in (1, 5, 11):
        assert {row.tobytes() for row in patterns * patterns[i]} == known
    longer = flip_table(n + 50, n_resamples, seed=4, exact=False)
    if not table.exhaustive:
        np.testing.assert_array_equal(longer.codes[:n], table.codes)
        np.testing.assert_array_equal(patterns, slow.flip_group(sign_flips(n, 0, table.n_generators, seed=4)))


@pytest.mark.parametrize("m", [1, 4, 5, 6, 10, 11])
def test_transform_is_the_sum_over_signs(m: int) -> None:
    cells = np.random.default_rng(m).normal(size=(2**m, 3))
    index = np.arange(2**m)
    signs = (-1.0) ** np.array([[bin(a & b).count("1") for b in index] for a in index[:64]])
    np.testing.assert_allclose(walsh_hadamard(cells.copy())[:64], signs @ cells, atol=1e-11)


def test_monte_carlo_error_is_that_of_independent_flips() -> None:
    """The group's patterns are dependent, but pairwise independent: the variance of p over seeds is binomial."""
    d = np.random.default_rng(8).normal(0.25, 1, 30)
    truth = float(sign_flip_test(d, method="saddlepoint").p_value)
    found = np.array([sign_flip_test(d, method="monte-carlo", n_resamples=255, seed=s).p_value for s in range(600)])
    assert abs(found.mean() - (truth * 255 + 1) / 256) < 4 * np.sqrt(truth / 256 / 600)
    assert 0.8 < found.var() / (truth * (1 - truth) / 256) < 1.25


def test_a_random_group_keeps_the_level_with_few_flips() -> None:
    """With 19 flips beside the identity the test is exact: a rejection at 1/32 happens with probability 1/32."""
    random = np.random.default_rng(9)
    d = random.standard_t(2, size=(25, 4000))
    p = np.concatenate(
        [sign_flip_test(d[:, i : i + 40], method="monte-carlo", n_resamples=31, seed=i).p_value
         for i in range(0, 4000, 40)]
    )  # fmt: skip
    for level in (1 / 32, 2 / 32, 8 / 32):
        assert abs((p <= level + 1e-12).mean() - level) < 4 * np.sqrt(level * (1 - level) / 4000)
