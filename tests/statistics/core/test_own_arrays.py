"""Datasets that anyone makes from arrays: the declared layouts, and a sentence for every slip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.stores import Provenance, append_model, open_features, open_outcomes
from rlgen_stats.toolkit.statistics import drift_test, features_dataset, outcomes_dataset, select_features

N = 12
IDS = [f"p{i:02d}" for i in range(N)]
MEAN = np.random.default_rng(0).gamma(1.0, size=(2, N, 3)) * (np.arange(3) > 0)


def table(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"prompt": IDS} | columns)


def features(**changes: Any) -> xr.Dataset:
    given: dict[str, Any] = {"mean": {"base@0": MEAN[0], "rl@80": MEAN[1]}, "prompts": IDS, "scale": "raw"}
    return features_dataset(**given | changes)


def outcomes(**changes: Any) -> xr.Dataset:
    given: dict[str, Any] = {"greedy": {"base@0": [0, 1] * 6, "rl@80": [1] * N}, "prompts": IDS}
    return outcomes_dataset(**given | changes)


def test_only_the_means_are_needed_and_a_prompt_then_counts_as_one_token() -> None:
    data = validate(features(), "features")
    assert data["mean"].sel(model="rl@80").values.tolist() == MEAN[1].tolist()
    assert data.firing.sel(model="base@0").values.tolist() == [[0.0, 1.0, 1.0]] * N
    assert (data["max"] == data["mean"]).all()
    assert (data.n_tokens == 1).all()
    assert data.arm.values.tolist() == ["base", "rl"]
    assert data.task.values.tolist() == ["all"] * N
    assert data.cluster.values.tolist() == IDS
    assert sorted(data.split.values.tolist()) == ["selection"] * 6 + ["verification"] * 6


def test_whole_clusters_of_each_task_are_drawn_into_both_parts() -> None:
    cluster, task = [f"c{i // 2}" for i in range(N)], ["a"] * 8 + ["b"] * 4
    split = features(prompts=table(cluster=cluster, task=task)).split.to_series().groupby([task, cluster])
    assert (split.nunique() == 1).all()
    assert split.first().groupby(level=0).value_counts().unstack().to_numpy().tolist() == [[2, 2], [1, 1]]


def test_the_drawn_half_does_not_depend_on_the_order_of_rows() -> None:
    """Also where clusters hold prompts of two tasks, which count with one of them."""
    rng = np.random.default_rng(0)
    prompts = table(cluster=[f"c{i % 5}" for i in range(N)], task=["a", "b", "b"] * (N // 3))
    halves = {
        tuple(sorted(features(prompts=prompts.sample(frac=1, random_state=rng)).split.to_series().items()))
        for _ in range(20)
    }
    assert len(halves) == 1


def test_they_are_what_stores_hold(tmp_path: Path) -> None:
    for name, built, opened in (("features", features(), open_features), ("outcomes", outcomes(), open_outcomes)):
        for model in ("base@0", "rl@80"):
            append_model(tmp_path / f"{name}.zarr", name, built.sel(model=[model]), provenance=Provenance("s", "k"))
        stored = opened(tmp_path).load()
        assert set(stored.variables) == set(built.variables)
        for variable in built.variables:
            np.testing.assert_array_equal(stored[variable].values, built[variable].values)


def test_dask_stays_lazy() -> None:
    lazy = {
        model: da.from_array(values, chunks=(-1, 2)) for model, values in zip(("base@0", "rl@80"), MEAN, strict=True)
    }
    data = features(mean=lazy)
    assert data["mean"].chunks is not None
    assert data.firing.chunks is not None
    assert drift_test(data, models=["rl@80"], n_min=1).chunks
    whole, parts = drift_test(features(), models=["rl@80"], n_min=1), drift_test(data, models=["rl@80"], n_min=1)
    xr.testing.assert_identical(whole.p_value, parts.p_value.compute())


def test_tables_are_read_by_their_rows() -> None:
    frame = pd.DataFrame({"base@0": [0, 1] * 6, "rl@80": [1] * N}, index=IDS)
    xr.testing.assert_identical(outcomes(greedy=frame), outcomes())
    with pytest.raises(
        InputError, match=r"greedy of base@0 has other rows .* expected \['p00', 'p01', 'p02'\] and so on"
    ):
        outcomes(greedy=frame[::-1])
    assert outcomes(prompts=features()).split.values.tolist() == features().split.values.tolist()


@pytest.mark.parametrize(
    "reordered",
    [
        lambda values: pd.DataFrame(values)[::-1],  # its index counts down
        lambda values: xr.DataArray(values, dims=("prompt", "feature"), coords={"prompt": IDS})[::-1],
        lambda values: xr.DataArray(da.from_array(values), dims=("p", "f"), coords={"p": IDS[::-1]}),
    ],
)
def test_rows_in_another_order_are_refused(reordered: Any) -> None:
    with pytest.raises(InputError, match=r"mean of rl@80 has other rows than the prompts, or in another order"):
        features(mean={"base@0": MEAN[0], "rl@80": reordered(MEAN[1])})


def test_columns_in_another_order_are_refused() -> None:
    base, rl = (pd.DataFrame(values, columns=["a", "b", "c"]) for values in MEAN)
    with pytest.raises(InputError, match=r"mean of rl@80 has other columns .* expected \['a', 'b', 'c'\]"):
        features(mean={"base@0": base, "rl@80": rl[["c", "a", "b"]]})
    xr.testing.assert_identical(features(mean={"base@0": base, "rl@80": rl}), features())


def test_samples_in_another_order_are_refused() -> None:
    with pytest.raises(InputError, match="samples of rl@80 has other rows"):
        outcomes(samples={"rl@80": pd.DataFrame(np.ones((N, 2)), index=IDS[::-1])})


def test_labelled_and_whole_numbers_are_the_same_numbers() -> None:
    labelled = {
        m: xr.DataArray(x, dims=("prompt", "feature"), coords={"prompt": IDS})
        for m, x in zip(("base@0", "rl@80"), MEAN, strict=True)
    }
    xr.testing.assert_identical(features(mean=labelled), features())
    whole = {model: values > 1 for model, values in zip(("base@0", "rl@80"), MEAN, strict=True)}
    as_floats = {model: values.astype(float) for model, values in whole.items()}
    xr.testing.assert_identical(features(mean=whole), features(mean=as_floats))


def test_samples_may_be_fewer_or_missing() -> None:
    data = outcomes(samples={"rl@80": np.ones((N, 3))})
    assert data.correct.sel(model="base@0").values.tolist() == [[-1] * 3] * N
    assert data.correct.sel(model="rl@80").values.tolist() == [[1] * 3] * N
    data = outcomes(samples={"base@0": np.zeros((N, 1)), "rl@80": np.ones((N, 2))})
    assert data.correct.sel(model="base@0", prompt="p03").values.tolist() == [0, -1]
    assert outcomes(greedy={"base@0": [np.nan, 1] * 6}).greedy_correct.values.tolist() == [[-1, 1] * 6]


SLIPS = [
    ({"scale": "raw f"}, "scale is one of"),
    ({"mean": {}}, "arrays of at least one model, got none"),
    ({"mean": {"rl": MEAN[0]}}, r"a model id looks like 'rl@200' \(run@step\), got 'rl'"),
    ({"mean": {"rl@1": MEAN[0, :, 0]}}, r"mean of rl@1 has shape \(12,\) .* expected numbers of shape \(12, 1\)"),
    ({"mean": {"base@0": MEAN[0], "rl@1": MEAN[1, :, :2]}}, r"mean of rl@1 has shape \(12, 2\) .* \(12, 3\): a row"),
    ({"mean": {"rl@1": MEAN[0, 1:]}}, r"mean of rl@1 has shape \(11, 3\) .* a row for each prompt"),
    ({"mean": {"rl@1": MEAN[0].astype(str)}}, "and type <U32; expected numbers"),
    (
        {"mean": {"rl@1": np.where(MEAN[0] == MEAN[0, 4, 2], np.nan, MEAN[0])}},
        "column 2 of prompt 'p04', is nan; expected",
    ),
    ({"firing": {"base@0": MEAN[0]}}, r"firing has the models \['base@0'\]; expected \['base@0', 'rl@80'\]"),
    ({"firing": {"base@0": MEAN[0] * 0, "rl@80": MEAN[0] * 0 + 1.5}}, "firing of rl@80, column 0 .* from 0 to 1"),
    ({"n_tokens": {"base@0": [3] * N, "rl@80": [3] * 11 + [-1]}}, "n_tokens of rl@80, prompt 'p11', is -1; .* from 0"),
    ({"n_tokens": {"base@0": [0.5] * N, "rl@80": [3] * N}}, "n_tokens has fractions; expected how many"),
    ({"mean": {"rl@80": MEAN[0], "rl@080": MEAN[1]}}, "'rl@080' is a model that comes before under another id"),
    ({"features": [1, 1, 2]}, "mean has 3 features; expected as many different ids"),
    ({"decoder_norm": {"base@0": [1.0, 2.0]}}, r"as many norms in every view .* \[\(2,\)\]"),
    ({"arms": {"dpo": "rl"}}, r"arms names the run 'dpo'; the runs are \['base', 'rl'\]"),
    ({"prompts": [*IDS[:-1], "p00"]}, "prompt 'p00' comes twice; expected one row a prompt"),
    ({"prompts": [*IDS[:-1], None]}, "prompts: prompt of row 11 is nan; expected a text in every row"),
    ({"prompts": pd.DataFrame({"id": IDS})}, r"a column 'prompt' with an id a row, got \['id'\]"),
    ({"prompts": []}, "a column 'prompt' with an id a row"),
    (
        {"prompts": table(domain=["in"] * 11 + ["near"])},
        r"domain is one of \['in', 'out'\], got 'near' for prompt 'p11'",
    ),
    ({"prompts": table(split=["train"] * N)}, "split is one of .*, got 'train'"),
    ({"prompts": table(split=["selection"] * 11 + [np.nan])}, "prompts: split of row 11 is nan"),
    ({"prompts": table(task=["a"] * N, domain=["in", "out"] * 6)}, "task 'a' has prompts of more than one domain"),
    (
        {"prompts": table(cluster=["c"] * N, split=["selection", "trial"] * 6)},
        "cluster 'c' has prompts of more than one",
    ),
]


@pytest.mark.parametrize(("change", "message"), SLIPS)
def test_a_slip_in_features_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        features(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"greedy": {"base@0": [0.5] * N}}, "greedy of base@0, prompt 'p00', is 0.5; expected 0, 1, or NaN without"),
        ({"greedy": {"base@0": [0] * 5}}, r"greedy of base@0 has shape \(5,\) .* expected numbers of shape \(12,\)"),
        ({"samples": {"sft@1": np.ones((N, 2))}}, "samples has the model 'sft@1'; expected only those of greedy"),
        ({"samples": {"base@0": np.full((N, 2), 2)}}, "samples of base@0, column 0 of prompt 'p00', is 2.0"),
        ({"samples": {"base@0": np.ones(N)}}, r"samples of base@0 has shape \(12,\) .* \(12, 1\)"),
        ({"samples": {"base@0": [["yes"]] * N}}, "samples of base@0 has shape .* and type <U3; expected numbers"),
        ({"samples": {"base@0": 1}}, r"samples of base@0 has shape \(\)"),
    ],
)
def test_a_slip_in_outcomes_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        outcomes(**change)


def test_what_the_numbers_are_of_is_kept_and_compared() -> None:
    with pytest.raises(RefusedError, match="contribution scale"):
        select_features(features(), outcomes(), target="rl@80")
    with pytest.raises(RefusedError, match="study_id 'mine' and 'in memory' cannot be combined"):
        select_features(features(study="mine", scale="contribution"), outcomes(), target="rl@80")
    assert drift_test(features(readout="swap"), models=["rl@80"]).attrs["readout"] == "swap"
