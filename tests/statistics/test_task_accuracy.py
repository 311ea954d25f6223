from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import behaviour
from rlgen_stats.toolkit.statistics.kernels import bounded_interval
from rlgen_stats.toolkit.statistics.task_accuracy import domain_accuracy

MODELS = ["base@0", "sft@10", "rl@10"]
TASKS = ["math", "quiz", "facts", "noise"]
DOMAINS = {"math": "in", "quiz": "out", "facts": "out", "noise": "out"}


@pytest.fixture
def world(make_outcomes):
    rng = np.random.default_rng(0)
    greedy = np.stack([rng.random(160) < 0.5, rng.random(160) < 0.55, rng.random(160) < 0.8]).astype(int)
    correct = (rng.random((3, 160, 4)) < 0.5).astype(int)
    return lambda **options: make_outcomes(greedy, MODELS, tasks=TASKS, domains=DOMAINS, correct=correct, **options)


def run(outcomes, **options):
    return behaviour(outcomes, **({"roles": {"noise": "control", "facts": "held_out"}, "n_bootstrap": 99} | options))


def test_layout_and_rows(world):
    out = validate(run(world()), "behaviour")
    assert out.task.values.tolist() == [*TASKS, "all:in", "all:out"]
    assert out.role.values.tolist() == ["in_domain", "out_of_domain", "held_out", "control", "pooled", "pooled"]
    # The control task is in no pooled row.
    assert out.n_prompts.sel(model="rl@10").values.tolist() == [40, 40, 40, 40, 40, 80]
    assert out.attrs["family_size"] == 8
    assert out.attrs["family_size_pooled"] == 4


def test_counts_and_tests_against_loops(world):
    outcomes = world()
    out = run(outcomes)
    for task, model in product(TASKS, MODELS[1:]):
        index = np.flatnonzero(outcomes.task.values == task)
        base = outcomes.greedy_correct.sel(model="base@0").values[index]
        other = outcomes.greedy_correct.sel(model=model).values[index]
        table = np.array([[sum((base == b) & (other == o)) for o in (1, 0)] for b in (1, 0)])
        got = out.sel(task=task, model=model)
        cells = [got.kept_right, got.forgotten, got.gained, got.kept_wrong]
        assert [int(c) for c in cells] == table.ravel().tolist()
        assert float(got.p_value) == pytest.approx(mcnemar(table, exact=True).pvalue)
        low, high = proportion_confint(other.sum(), 40, method="wilson")
        assert float(got.accuracy_low) == pytest.approx(low)
        assert float(got.accuracy_high) == pytest.approx(high)
        _, low, high = bounded_interval((other - base)[:, None], np.arange(40), alpha=0.05)
        assert float(got.difference_low) == pytest.approx(low.item())
        assert float(got.difference_high) == pytest.approx(high.item())
        passes = outcomes.correct.sel(model=model).values[index].mean()
        assert float(got.sampled_accuracy) == pytest.approx(passes)
        assert float(got.sampled_low) < passes < float(got.sampled_high)


def test_family_is_all_models_and_tasks(world):
    out = run(world())
    p = out.p_value.sel(model=MODELS[1:], task=TASKS)
    q = out.q_value.sel(model=MODELS[1:], task=TASKS)
    assert q.values.ravel() == pytest.approx(stats.false_discovery_control(p.values.ravel()))
    assert not np.allclose(p, q)
    assert np.isnan(out.p_value.sel(model="base@0")).all()
    assert np.isnan(out.difference.sel(model="base@0")).all()


def test_models_outside_the_family_are_not_corrected_with_it(world):
    """Their p-values stay; the family has the q-values of a study without them."""
    outcomes, compared = world(), ["base@0", "sft@10"]
    found, without = run(outcomes, family=["sft@10"]), run(outcomes.sel(model=compared))
    assert found.q_value.sel(model="sft@10").values == pytest.approx(without.q_value.sel(model="sft@10").values)
    assert not np.allclose(found.q_value.sel(model="sft@10"), run(outcomes).q_value.sel(model="sft@10"))
    assert np.isnan(found.q_value.sel(model="rl@10")).all()
    assert not np.isnan(found.p_value.sel(model="rl@10")).any()
    assert (found.attrs["family_size"], found.attrs["family_size_pooled"]) == (4, 2)
    with pytest.raises(InputError, match="gone@1"):
        run(outcomes, family=["gone@1"])


def test_clusters_widen_intervals_and_replace_mcnemar(make_outcomes):
    """Eight copies of the same prompt are one prompt."""
    rng = np.random.default_rng(2)
    small = np.stack([rng.random(12) < 0.3, rng.random(12) < 0.8]).astype(int)
    single = behaviour(make_outcomes(small, MODELS[:2], tasks=["a"]), n_bootstrap=99)
    copied = behaviour(
        make_outcomes(np.repeat(small, 8, axis=1), MODELS[:2], tasks=["a"], per_cluster=8), n_bootstrap=99
    )
    naive = behaviour(
        make_outcomes(np.repeat(small, 8, axis=1), MODELS[:2], tasks=["a"], per_cluster=8),
        clusters=None,
        n_bootstrap=99,
    )
    a, b, c = (x.sel(model="sft@10", task="a") for x in (single, copied, naive))
    assert int(b.n_clusters) == 12
    assert float(b.p_value) == pytest.approx(float(a.p_value))  # the sign flip of equal clusters is McNemar's test
    assert float(c.p_value) < float(b.p_value)
    for name in ("difference_low", "difference_high"):
        assert float(b[name]) == pytest.approx(float(a[name]))
    assert float(c.accuracy_high - c.accuracy_low) < 0.5 * float(b.accuracy_high - b.accuracy_low)
    assert str(copied.p_test.sel(task="a").item()).startswith("sign flip")


def test_all_right_is_not_certainty(make_outcomes):
    for per_cluster in (1, 4):
        outcomes = make_outcomes(np.ones((2, 40)), MODELS[:2], per_cluster=per_cluster)
        got = behaviour(outcomes, n_bootstrap=9).sel(model="sft@10", task="a")
        assert float(got.accuracy_high) == pytest.approx(1)
        method = "wilson" if per_cluster == 1 else "beta"  # Clopper and Pearson over clusters
        low = proportion_confint(40 // per_cluster, 40 // per_cluster, method=method)[0]
        assert float(got.accuracy_low) == pytest.approx(low)
        assert float(got.difference_low) < 0 < float(got.difference_high)
        assert float(got.p_value) == 1.0


def test_interval_coverage(make_outcomes):
    rng = np.random.default_rng(7)
    hits = []
    for _ in range(60):
        rate = np.repeat(rng.beta(2, 2, 25), 4)  # clusters share a rate; the overall one is .5
        right = (rng.random(100) < rate).astype(int)
        out = behaviour(make_outcomes(np.stack([right, right]), MODELS[:2], per_cluster=4), n_bootstrap=99)
        got = out.sel(model="base@0", task="a")
        hits.append(
            [
                bool(got.accuracy_low <= 0.5 <= got.accuracy_high),
                bool(got.sampled_low <= 0.5 <= got.sampled_high),
            ]
        )
    # 3 binomial standard errors; the percentile bootstrap of 25 clusters is known to run a little short.
    assert np.all(np.mean(hits, axis=0) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 60) - 0.02)


def test_ungraded_prompts_are_left_out(world):
    outcomes = world()
    outcomes["greedy_correct"][2, :8] = -1
    outcomes["correct"][2, :4] = -1
    got = run(outcomes).sel(model="rl@10", task="math")
    assert int(got.n_prompts) == 38
    assert int(got.kept_right + got.forgotten + got.gained + got.kept_wrong) == 38


def test_a_missing_domain_is_not_estimable(make_outcomes):
    out = behaviour(make_outcomes(np.ones((2, 20)), MODELS[:2]), n_bootstrap=9)
    assert int(out.n_prompts.sel(task="all:out", model="sft@10")) == 0
    assert np.isnan(out.accuracy.sel(task="all:out")).all()


def test_errors(world):
    with pytest.raises(InputError, match=r"model 'ppo@1' is not in the data"):
        run(world(), reference="ppo@1")
    with pytest.raises(InputError, match="task 'maths', which is not in the outcomes"):
        run(world(), roles={"maths": "control"})
    with pytest.raises(InputError, match="role of task 'math' must be one of"):
        run(world(), roles={"math": "pooled"})


@pytest.mark.parametrize(("model", "domain"), list(product(MODELS, ["in", "out"])))
def test_domain_accuracy_is_the_pooled_row_or_pools_the_tasks(world, model, domain):
    out = run(world())
    row = out.sel(model=model, task=f"all:{domain}")
    given = domain_accuracy(out, model, domain)
    pooled = domain_accuracy(out.isel(task=slice(4)), model, domain)
    assert given.run == model.split("@")[0]
    assert (given.accuracy, given.low, given.high) == (row.accuracy, row.accuracy_low, row.accuracy_high)
    for one in (given, pooled):
        assert (one.n_prompts, one.gained, one.forgotten) == (row.n_prompts, row.gained, row.forgotten)
        assert one.accuracy == pytest.approx(float(row.accuracy))
    if model != "base@0":
        assert given.p_value == row.p_value
        assert pooled.difference == pytest.approx(float(row.difference))
        assert np.isnan(pooled.p_value) == (domain == "out"), "one task keeps its p-value, pooled tasks have none"
    # Wald-like: the half-widths of the tasks add in quadrature, weighted by prompts.
    tasks = {"in": ["math"], "out": ["quiz", "facts"]}[domain]
    halves = [float(out.accuracy_high.sel(model=model, task=t) - out.accuracy.sel(model=model, task=t)) for t in tasks]
    assert pooled.high - pooled.accuracy == pytest.approx(np.linalg.norm(halves) / len(tasks))


def test_domain_without_tasks_has_no_accuracy(world):
    out = run(world())
    assert domain_accuracy(out.sel(task=["math", "noise"]), "rl@10", "out") is None
