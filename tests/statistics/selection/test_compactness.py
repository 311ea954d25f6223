"""The share of the rise that few features carry, whether any rise can matter, and what merely accompanies answers."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.units import jackknife_groups
from rlgen_stats.toolkit.statistics.kernels import delete_group_jackknife
from rlgen_stats.toolkit.statistics.selection.compactness import (
    MIN_EXCESS,
    accompanying_p,
    carried_share,
    no_rise_p,
)
from rlgen_stats.toolkit.statistics.selection.task_prompts import TaskPrompts


def task(gain: np.ndarray, loss: np.ndarray, kept: np.ndarray) -> TaskPrompts:
    return TaskPrompts(gain, loss, kept, np.sort(np.concatenate([gain, loss, kept])))


def two_tasks(n: int) -> list[TaskPrompts]:
    """Of ``n`` prompts of each task 40% are gains, 10% losses, 40% both right."""
    tasks = []
    for start in (0, n):
        cut = start + np.array([0, 4 * n // 10, n // 2, 9 * n // 10])
        tasks.append(task(*(np.arange(*cut[i : i + 2]) for i in range(3))))
    return tasks


def world(n: int, excess: np.ndarray, seed: int = 0, noise: float = 0.5) -> tuple[np.ndarray, list[TaskPrompts]]:
    """[base and target, prompt, feature]: a common part, noise, and the excess on gains."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((1, 2 * n, len(excess))) + noise * random.standard_normal((2, 2 * n, len(excess)))
    tasks = two_tasks(n)
    for of_task in tasks:
        values[1, of_task.gain] += excess
    return values, tasks


def carried(values: np.ndarray, tasks: list[TaskPrompts], members: list[int], most: int, **options):
    rising = options.pop("rising", np.ones(values.shape[-1], dtype=bool))
    return carried_share(
        da.from_array(values, chunks=(2, values.shape[1], options.pop("chunk", 7))),
        tasks,
        np.array(members, dtype=np.int64),
        rising,
        most=most,
        codes=options.pop("codes", None),
        alpha=0.05,
        seed=3,
    )


def test_the_share_against_loops() -> None:
    values, tasks = world(60, np.r_[1.0, 0.8, np.zeros(10)])
    d = values[1] - values[0]
    squares = np.zeros(12)
    for k in range(12):
        means, error = [], 0.0
        for of_task in tasks:
            gain, kept = d[of_task.gain, k], d[of_task.kept, k]
            means.append(gain.mean() - kept.mean())
            error += gain.var(ddof=1) / len(gain) + kept.var(ddof=1) / len(kept)
        squares[k] = np.mean(means) ** 2 - error / 4
    got = carried(values, tasks, [1, 5], most=3)
    assert got.share == pytest.approx(squares[[1, 5]].sum() / squares.sum())
    assert got.best == pytest.approx(np.sort(squares)[-3:].sum() / squares.sum())
    assert (got.low < got.share < got.high, got.n_features) == (True, 2)
    assert carried(values, tasks, [1, 5], most=3, chunk=12) == got


def test_the_interval_is_the_jackknifes_over_twenty_groups() -> None:
    values, tasks = world(60, np.r_[1.0, 0.8, np.zeros(10)])
    used = np.sort(np.concatenate([rows for t in tasks for rows in (t.gain, t.kept)]))
    groups = jackknife_groups(used, 20, derive_seed(3, "selection", "carried"))
    shares = []
    for group in range(-1, 20):
        kept = used[groups != group]
        left = [task(*(rows[np.isin(rows, kept)] for rows in (t.gain, t.loss, t.kept))) for t in tasks]
        shares.append(carried(values, left, [1, 5], most=3).share)
    expected = delete_group_jackknife(np.array(shares[1:]), shares[0], alpha=0.05)
    got = carried(values, tasks, [1, 5], most=3)
    assert (got.low, got.high) == pytest.approx((float(expected.low), float(expected.high)))


def test_the_true_share_is_covered_and_the_best_choice_bounded() -> None:
    """Ten of forty features rise alike and five are named: a half; and no five carry more."""
    covered = below = 0
    for seed in range(40):
        got = carried(*world(150, np.r_[np.full(10, 0.6), np.zeros(30)], seed=seed), [0, 1, 2, 3, 4], most=5)
        covered += got.low <= 0.5 <= got.high
        below += got.best_high < 0.5
    assert covered >= 34
    assert below <= 4


def test_more_prompts_do_not_lower_the_share() -> None:
    """The number of confirmed features grows with the prompts; what five of them carry does not change."""
    shares = [
        carried(*world(n, np.r_[np.full(10, 0.6), np.zeros(30)], seed=1), [0, 1, 2, 3, 4], most=5) for n in (100, 2000)
    ]
    assert abs(shares[1].share - 0.5) < 0.02
    assert shares[1].high - shares[1].low < shares[0].high - shares[0].low


def test_without_a_rise_there_is_no_share() -> None:
    values, tasks = world(100, np.zeros(20), seed=2)
    assert np.isnan(carried(values, tasks, [0, 1], most=2).share)
    assert np.isnan(carried(values, [], [0, 1], most=2).best_high)
    nobody = carried(*world(100, np.r_[1.0, np.zeros(19)], seed=2), [], most=2)
    assert (np.isnan(nobody.share), np.isfinite(nobody.best_high)) == (True, True)
    assert np.isnan(carried(values, tasks, [0, 1], most=2, rising=np.zeros(20, dtype=bool)).share)


def test_clusters_are_left_out_as_wholes() -> None:
    """Every prompt four times over: the same share, and an interval as wide as without the copies."""
    values, tasks = world(50, np.r_[1.0, 0.8, np.zeros(10)])
    copied = np.repeat(values, 4, axis=1)
    of_copies = [
        task(*(np.flatnonzero(np.isin(np.arange(400) // 4, rows)) for rows in (t.gain, t.loss, t.kept))) for t in tasks
    ]
    once = carried(values, tasks, [0], most=1)
    clustered = carried(copied, of_copies, [0], most=1, codes=np.arange(400) // 4)
    naive = carried(copied, of_copies, [0], most=1)
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.2)
    assert naive.high - naive.low < 0.7 * (once.high - once.low)


def rise(values: np.ndarray, tasks: list[TaskPrompts], u: int = 2, codes: np.ndarray | None = None) -> float:
    testable = np.ones(values.shape[-1], dtype=bool)
    return no_rise_p(da.from_array(values), tasks, testable, u=u, codes=codes)


def test_no_rise_is_shown_by_data_and_not_by_their_absence() -> None:
    assert rise(*world(40, np.zeros(8))) > 0.05
    assert rise(*world(4000, np.zeros(8))) < 0.001
    one_rises = np.r_[np.zeros(7), 2 * MIN_EXCESS]
    assert rise(*world(4000, one_rises)) > 0.99
    assert np.isnan(rise(*world(40, np.zeros(8)), u=3))


def test_at_the_margin_no_rise_is_shown_at_its_level() -> None:
    """One feature whose excess is exactly the margin, among features without any."""
    spread = np.sqrt(1.25)
    for _ in range(3):  # the excess itself widens the spread
        spread = np.sqrt(1.25 + 0.5 * (0.25 * (MIN_EXCESS * spread) ** 2))
    p = [rise(*world(400, np.r_[MIN_EXCESS * spread, 0.0], seed=seed)) for seed in range(150)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


def test_the_margin_of_one_feature_is_welchs_test() -> None:
    values, tasks = world(300, np.array([0.1]))
    d, p = values[1] - values[0], []
    for of_task in tasks:
        gain, kept = d[of_task.gain, 0], d[of_task.kept, 0]
        inside = values[:, np.r_[of_task.gain, of_task.kept], 0]
        margin = 0.2 * np.sqrt(inside.var(axis=1, ddof=1).mean())
        error = np.sqrt(gain.var(ddof=1) / len(gain) + kept.var(ddof=1) / len(kept))
        p.append(stats.t.cdf((gain.mean() - kept.mean() - margin) / error, min(len(gain), len(kept)) - 1))
    assert rise(values, tasks) == pytest.approx(2 * min(p))  # of two tasks one is enough to leave fewer than two
    assert rise(values, tasks, u=1) == pytest.approx(max(p))


def test_accompanying_features_are_as_high_on_gains_as_where_both_are_right() -> None:
    p = {"accompanies": [], "changed": []}
    for seed in range(60):
        values, tasks = world(100, np.zeros(6), seed=seed)
        right = np.zeros((2, 200), dtype=bool)
        for of_task in tasks:
            right[1, of_task.gain] = right[0, of_task.loss] = right[:, of_task.kept] = True
        accompanies = values + 0.5 * right[..., None]
        changed, _ = world(100, np.full(6, 0.6), seed=seed)
        for name, x in (("accompanies", accompanies), ("changed", changed)):
            p[name].append(accompanying_p(da.from_array(x), tasks, np.arange(4), codes=None, seed=1))
    assert stats.kstest(p["accompanies"], "uniform").pvalue > 0.01
    assert max(p["changed"]) < 0.01
    assert np.isnan(accompanying_p(da.from_array(values), tasks, np.arange(0), codes=None, seed=1))
