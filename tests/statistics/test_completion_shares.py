"""Shares of completions that ended, and that hold an answer, and what is warned about."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.toolkit.statistics.completion_shares import (
    N_EXAMPLES,
    completion_shares,
    share_warnings,
    too_often_unread,
    unread_examples,
)


def outcomes(name: str, n_not: int) -> xr.Dataset:
    """100 samples of task a, of which ``n_not`` are not so, and 200 of task b."""
    values = np.ones((1, 60, 5), dtype=bool)
    values[0, :20] = (np.arange(100) >= n_not).reshape(20, 5)
    coords = {"model": ["rl@8"], "task": ("prompt", ["a"] * 20 + ["b"] * 40)}
    dims = ("model", "prompt", "sample")
    return xr.Dataset({name: (dims, values), "completion_tokens": (dims, values + 3)}, coords=coords)


@pytest.mark.parametrize(
    ("name", "n_not", "warning"),
    [
        ("terminated", 5, None),
        (
            "terminated",
            6,
            "6% of rl@8's completions of task a were cut off by the length limit and count as wrong; raise",
        ),
        ("answered", 10, None),
        (
            "answered",
            11,
            "11% of rl@8's completions of task a have no answer that its grader can read and count as wrong",
        ),
    ],
)
def test_too_many_are_warned_about_and_not_one_less(name: str, n_not: int, warning: str | None) -> None:
    shares = completion_shares(outcomes(name, n_not))
    assert shares[name].values.tolist() == [[pytest.approx(1 - n_not / 100), 1.0]]
    warnings = share_warnings(shares)
    assert len(warnings) == (warning is not None)
    assert warning is None or warnings[0].startswith(warning)
    assert too_often_unread(shares) == {"rl@8": ["a"] if warning and name == "answered" else []}


def test_a_model_is_warned_about_once_with_all_its_tasks() -> None:
    """A report of eleven models and nine tasks began with fifty sentences."""
    answered = [[0.5, 0.95, 0.7], [0.9, 0.9, 0.9]]
    shares = xr.Dataset(
        {"answered": (("model", "task"), answered)}, coords={"model": ["base@0", "rl@8"], "task": ["a", "b", "c"]}
    )
    (warning,) = share_warnings(shares)
    assert warning.startswith("50% of base@0's completions of task a, 30% of c have no answer")
    for sampled, how in ((["base@0"], "sampled"), (["rl@8"], "greedy")):
        (warning,) = share_warnings(shares, sampled=sampled)
        assert warning.startswith(f"50% of base@0's {how} completions of task a")


def test_a_task_that_may_be_cut_off_is_not_warned_about() -> None:
    cut, unread = (completion_shares(outcomes(name, 11)) for name in ("terminated", "answered"))
    assert share_warnings(cut, may_be_cut=("a",)) == []
    assert len(share_warnings(cut, may_be_cut=("b",))) == len(share_warnings(unread, may_be_cut=("a",))) == 1


def test_older_outcomes_have_no_shares_and_rows_may_be_chosen() -> None:
    older = outcomes("terminated", 6).drop_vars("terminated")
    assert list(completion_shares(older).data_vars) == []
    assert share_warnings(completion_shares(older)) == []
    both = completion_shares(outcomes("answered", 30), {"both": np.arange(60), "none": np.array([], dtype=int)})
    np.testing.assert_allclose(both["answered"].values, [[0.9, np.nan]])
    assert share_warnings(both) == []


def test_examples_are_the_first_sampled_completions_that_were_not_read() -> None:
    n = 3 * N_EXAMPLES
    table = pd.DataFrame(
        {
            "prompt": [f"p{i // 3}" for i in range(3 * n)],
            "sample": [-1, 0, 1] * n,
            "text": [f"text {i} \n" + "x" * (200 if i == 4 else 0) for i in range(3 * n)],
            "answered": [False, False, True] * n,
        }
    )
    assert unread_examples(table, ["p0", "p1"]) == [("p0", "text 1"), ("p1", "x" * 120)]
    assert len(unread_examples(table, table["prompt"].tolist())) == N_EXAMPLES
