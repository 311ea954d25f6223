"""Two models' graded completions: oracles, planted differences, what is refused."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import behaviour, compare_outcomes
from rlgen_stats.toolkit.statistics.kernels import pass_at_k


def table(correct, **columns) -> pd.DataFrame:
    return pd.DataFrame({"prompt": [f"p{i}" for i in range(len(correct))], "correct": correct} | columns)


def repeated(correct: np.ndarray, **columns) -> pd.DataFrame:
    """[prompt, sample] as rows."""
    n, k = correct.shape
    rows = {name: np.repeat(values, k) for name, values in columns.items()}
    prompts = np.repeat([f"p{i}" for i in range(n)], k)
    return pd.DataFrame({"prompt": prompts, "sample": np.tile(range(k), n), "correct": correct.ravel()} | rows)


def test_mcnemar_oracle():
    """docs/method.md O8: b = 33, c = 59, and any number of concordant prompts."""
    a = table([1] * 33 + [0] * 59 + [1] * 40 + [0] * 8)
    b = table([0] * 33 + [1] * 59 + [1] * 40 + [0] * 8)
    got = validate(compare_outcomes(a, b), "outcome_comparison").sel(task="all")
    assert float(got.p_value) == pytest.approx(0.00878093080698, rel=1e-9)
    assert (int(got.a_better), int(got.b_better), int(got.n_prompts)) == (33, 59, 140)
    assert float(got.difference) == pytest.approx(26 / 140)
    assert str(got.p_test.values) == "exact McNemar"
    swapped = compare_outcomes(b, a).sel(task="all")
    assert float(swapped.difference_low) == pytest.approx(-float(got.difference_high))


def test_tasks_against_statsmodels_and_holm():
    random = np.random.default_rng(0)
    task = np.array(["x", "y", "z"])[np.arange(300) % 3]
    right = [random.random(300) < 0.5 + shift * (task == "x") for shift in (0.0, 0.3)]
    a, b = (table(values.astype(int), task=task) for values in right)
    got = compare_outcomes(a, b)
    assert got.task.values.tolist() == ["x", "y", "z", "all"]
    for name in ("x", "y", "z"):
        one, two = (values[task == name] for values in right)
        counts = [[np.sum((one == i) & (two == j)) for j in (True, False)] for i in (True, False)]
        assert float(got.p_value.sel(task=name)) == pytest.approx(mcnemar(counts, exact=True).pvalue)
        interval = stats.ttest_rel(two.astype(int), one.astype(int)).confidence_interval()
        high = float(got.difference_high.sel(task=name))
        assert interval.high - 1e-12 <= high < interval.high + 0.02, "many changed prompts: about the t-interval"
    p = got.p_value.values[:3]
    assert got.p_holm.values[:3] == pytest.approx([min(1.0, (3 - np.sum(p < one)) * one) for one in p])
    assert got.p_holm.values[3] == got.p_value.values[3], "all tasks together are one test of their own"
    only = compare_outcomes(a, b, tasks=["y"])
    assert only.task.values.tolist() == ["y"]
    assert float(only.p_holm.item()) == float(only.p_value.item())


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_completion():
    random = np.random.default_rng(1)
    correct = (random.random((30, 5)) < random.random((30, 1))).astype(int)
    for k in (1, 2, 5):
        counted = [np.mean([row[list(s)].any() for s in combinations(range(5), k)]) for row in correct]
        assert pass_at_k(correct.sum(axis=1), 5, k) == pytest.approx(counted)
    other = np.ones_like(correct)
    got = compare_outcomes(repeated(correct), repeated(other), k=[1, 2, 5]).sel(task="all")
    assert got.pass_a.values == pytest.approx([pass_at_k(correct.sum(axis=1), 5, k).mean() for k in (1, 2, 5)])
    assert got.pass_b.values == pytest.approx([1, 1, 1])
    assert got.pass_difference.values == pytest.approx(1 - got.pass_a.values)
    assert float(got.pass_a.sel(k=1)) == pytest.approx(float(got.accuracy_a))
    assert (got.pass_difference_low < got.pass_difference).all()
    assert compare_outcomes(repeated(correct), repeated(other)).k.values.tolist() == [1, 2, 4]


def test_several_samples_are_one_prompt():
    """Copies of one completion add nothing: p and interval are those of one completion a prompt."""
    random = np.random.default_rng(2)
    right = (random.random((2, 80, 1)) < [[[0.4]], [[0.6]]]).astype(int)
    single = compare_outcomes(*map(repeated, right)).sel(task="all")
    copied = compare_outcomes(*map(repeated, np.repeat(right, 6, axis=2))).sel(task="all")
    for name in ("p_value", "difference", "difference_low", "difference_high", "a_better"):
        assert float(copied[name]) == pytest.approx(float(single[name]), rel=1e-9)
    assert int(copied.n_samples_b) == 6


def test_two_samples_against_all_flips():
    random = np.random.default_rng(3)
    a, b = (random.random((2, 12, 2)) < [[[0.3]], [[0.7]]]).astype(int)
    d = b.mean(axis=1) - a.mean(axis=1)
    flips = np.array(np.meshgrid(*[[1, -1]] * 12)).reshape(12, -1)
    by_hand = np.mean(np.abs(d @ flips) >= abs(d.sum()) - 1e-9)
    got = compare_outcomes(repeated(a), repeated(b)).sel(task="all")
    assert str(got.p_test.values) == "sign flip of prompts"
    assert float(got.p_value) == pytest.approx(by_hand)


def test_clusters_are_the_units():
    random = np.random.default_rng(4)
    right = (random.random((2, 30)) < [[0.3], [0.6]]).astype(int)
    single = compare_outcomes(*map(table, right)).sel(task="all")
    copies = [
        table(np.repeat(one, 5), cluster=np.repeat(np.arange(30), 5), passage=np.repeat(np.arange(30), 5))
        for one in right
    ]
    got = compare_outcomes(*copies)
    assert got.attrs["unit"] == "cluster"
    for name in ("p_value", "difference_low", "difference_high"):
        assert float(got[name].sel(task="all")) == pytest.approx(float(single[name]))
    assert int(got.n_clusters.item()) == 30
    assert compare_outcomes(*copies, clusters="passage").p_value.equals(got.p_value)
    alone = compare_outcomes(*copies, clusters=None)
    assert alone.attrs["unit"] == "prompt"
    assert float(alone.p_value.item()) < float(got.p_value.item())
    few = compare_outcomes(*(one.assign(cluster=np.arange(150) % 5) for one in copies))
    assert np.isnan(few.p_value.item()), "five clusters cannot reach .05"
    assert np.isfinite(compare_outcomes(*(one.assign(cluster=np.arange(150) % 6) for one in copies)).p_value.item())


def test_it_agrees_with_the_study_s_own_table(make_outcomes):
    random = np.random.default_rng(5)
    greedy = (random.random((2, 120)) < [[0.4], [0.6]]).astype(int)
    outcomes = make_outcomes(greedy, ["base@0", "rl@10"], per_cluster=3)
    own = behaviour(outcomes, n_bootstrap=9).sel(model="rl@10", task="a")
    a, b = (table(right, cluster=outcomes.cluster.values) for right in greedy)
    got = compare_outcomes(a, b).sel(task="all")
    for mine, theirs in (("p_value", "p_value"), ("difference_low", "difference_low"), ("b_better", "gained")):
        assert float(got[mine]) == float(own[theirs])


def test_order_does_not_matter():
    random = np.random.default_rng(6)
    a, b = (repeated((random.random((40, 3)) < 0.5).astype(int), cluster=np.arange(40) // 2) for _ in range(2))
    shuffled = compare_outcomes(a.sample(frac=1, random_state=1), b.sample(frac=1, random_state=2))
    for name, values in compare_outcomes(a, b).data_vars.items():
        if name != "p_test":
            assert shuffled[name].values == pytest.approx(values.values)


def test_scores_between_0_and_1_are_flipped_and_have_no_pass_at_k():
    a, b = table([0.0, 0.5, 0.25, 1.0, 0.5, 0.0, 0.5]), table([0.5, 0.5, 1.0, 1.0, 1.0, 0.25, 0.75])
    got = compare_outcomes(a, b)
    assert str(got.p_test.item()) == "sign flip of prompts"
    assert float(got.p_value.item()) == 2 / 2**5
    assert got.k.values.tolist() == [1]
    with pytest.raises(InputError, match="fewest that a prompt has here is 1"):
        compare_outcomes(a, b, k=[2])


def test_the_same_scores_in_another_order_are_a_tie():
    """.1 + .2 + .3 and .3 + .2 + .1 differ in the last digit: eight such prompts gave p = .008."""
    a = repeated(np.tile([0.1, 0.2, 0.3], (8, 1)))
    got = compare_outcomes(a, a.assign(correct=np.tile([0.3, 0.2, 0.1], 8))).sel(task="all")
    assert float(got.p_value) == 1
    assert int(got.a_better) == int(got.b_better) == 0


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (1, 0)])
def test_where_every_prompt_changed_alike_the_interval_is_not_of_width_0(a: int, b: int) -> None:
    """At most the exact upper share of prompts has another difference, and that is -1 or 1."""
    other = stats.binomtest(0, 20).proportion_ci(method="exact").high
    got = compare_outcomes(table([a] * 20), table([b] * 20)).sel(task="all")
    mean = b - a
    assert float(got.difference_low) == pytest.approx(mean - (mean + 1) * other)
    assert float(got.difference_high) == pytest.approx(mean + (1 - mean) * other)


def test_intervals_need_two_prompts_and_end_at_1() -> None:
    assert np.isnan(float(compare_outcomes(table([0]), table([1])).difference_low.item()))
    two = compare_outcomes(table([0, 0]), table([0, 1]))
    assert (float(two.difference_low.item()), float(two.difference_high.item())) == (-1, 1)


@pytest.mark.parametrize("n_better", [1, 6, 20])
def test_few_changed_prompts_have_the_exact_binomial_bound(n_better: int) -> None:
    """Changes of one sign, one prompt a cluster: Clopper and Pearson's, up to the error of 4,000 draws."""
    got = compare_outcomes(table([0] * 60), table([1] * n_better + [0] * (60 - n_better))).sel(task="all")
    exact = stats.binomtest(n_better, 60).proportion_ci(method="exact").high
    assert float(got.difference_high) == pytest.approx(exact, abs=0.006)
    assert "CR2" in compare_outcomes(table([0]), table([1])).attrs["interval"]


@pytest.mark.parametrize("column", ["prompt", "task", "cluster"])
def test_a_whole_number_is_one_label_whether_a_table_holds_it_as_1_or_1_0(column: str) -> None:
    whole = table([0, 1] * 6, task="t", cluster=np.arange(12) // 2).assign(prompt=range(12))
    whole = whole.assign(task=1) if column == "task" else whole
    read_with_gaps = whole.assign(**{column: whole[column].astype(float)})
    as_text = whole.assign(**{column: whole[column].astype(str)})
    for other in (read_with_gaps, as_text):
        assert compare_outcomes(whole, other).p_value.equals(compare_outcomes(whole, whole).p_value)
    half = whole.assign(**{column: whole[column] + 0.5})
    with pytest.raises(InputError, match="another cluster in A than in B" if column == "cluster" else "0 prompts pair"):
        compare_outcomes(whole, half)


def test_ungraded_and_unpaired_are_counted():
    a = table([1, 0, np.nan, 1, 0, 1, 1, 0])
    b = table([1, 1, 1, 1, 0, 0, 1, 1])
    with pytest.raises(
        InputError, match=r"7 prompts pair, 0 are graded only in A and 1 only in B \(e.g. 'p2' of 'all'"
    ):
        compare_outcomes(a, b)
    got = compare_outcomes(a, b, unpaired="drop")
    assert int(got.n_prompts.item()) == 7
    assert (got.attrs["n_ungraded_a"], got.attrs["n_unpaired_a"], got.attrs["n_unpaired_b"]) == (1, 0, 1)
    assert (got.attrs["ungraded_a"], got.attrs["ungraded_b"]) == ("'p2' of 'all'", "")
    fewer = repeated(np.tile([1, 0], (8, 1))).drop(index=0)
    assert compare_outcomes(fewer, repeated(np.ones((8, 2)))).attrs["null"] == "mean difference 0"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.drop(columns="correct"), {}, "B lacks the column 'correct'; it has prompt"),
        (lambda t: t.iloc[:0], {}, "B has no rows"),
        (
            lambda t: t[["prompt", "correct", "correct"]],
            {},
            "B has the column 'correct' more than once; rename or drop",
        ),
        (lambda t: t.assign(correct=[2, 1] * 4), {}, r"B has the score '2' \(4 such rows\); expected 1 \(right\)"),
        (lambda t: t.assign(correct="yes"), {}, r"B has the score 'yes' \(8 such rows\)"),
        (
            lambda t: pd.concat([t, t[:2]]),
            {},
            r"B has prompt 'p0' of task 'all' more than once \(2 such rows\); number",
        ),
        (
            lambda t: pd.concat([t, t[:1]]).assign(sample=0),
            {},
            "B has sample 0 of prompt 'p0' of task 'all' more than once .*; remove",
        ),
        (lambda t: t.assign(prompt=t.prompt + "x"), {}, "0 prompts pair, 8 are graded only in A and 8 only in B"),
        (lambda t: t.assign(content="other"), {}, "8 prompts have another content in A than in B, e.g. 'p0'"),
        (lambda t: t.assign(metric="acc"), {}, "another metric in A than in B.*'exact' and 'acc'"),
        (lambda t: t, {"tasks": ["maths"]}, "A has no task 'maths'; it has all"),
        (lambda t: t, {"clusters": "passage"}, "A lacks the column 'passage' of clusters"),
        (lambda t: t, {"unpaired": "keep"}, "unpaired must be error or drop, got 'keep'"),
        (lambda t: t, {"k": [0]}, "pass@0 needs"),
        (lambda t: t, {"alpha": 1.0}, "alpha must lie between 0 and 1, got 1"),
        (lambda t: t.assign(task=["x"] * 7 + [None]), {}, "B has 1 rows without task; fill it in"),
        (lambda t: t.assign(prompt=[None] * 2 + list(t.prompt[2:])), {}, "B has 2 rows without prompt"),
        (lambda t: t.assign(prompt=range(8)), {}, r"8 only in B \(e.g. 'p0' of 'all', .*'0' of 'all'"),
        (
            lambda t: pd.concat([t.assign(sample=0), t.assign(sample=1, cluster=np.arange(8))]).assign(
                cluster=range(16)
            ),
            {},
            "B gives prompt 'p0' of task 'all' more than one cluster",
        ),
    ],
)
def test_what_is_refused(change, options, message):
    a = table([0, 1] * 4, content="text", metric="exact")
    with pytest.raises(InputError, match=message):
        compare_outcomes(a, change(a.copy()), **options)


def test_a_task_may_not_be_called_like_the_row_of_all():
    a = table([0, 1] * 4, task=["all", "other"] * 4)
    with pytest.raises(InputError, match="a task is called 'all'"):
        compare_outcomes(a, a)
