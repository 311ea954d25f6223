"""Labels: lazy coordinates that select, on tokens and on prompts."""

import pickle
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.dims import SEGMENTS
from rlgen_stats.schemas.errors import InputError, StoreCorruptError, StoreError
from rlgen_stats.stores import (
    ActivationWriter,
    Provenance,
    append_model,
    create_activations,
    open_activations,
    open_features,
    open_study,
    open_tokens,
    select_tokens,
)
from rlgen_stats.stores import labels as labels_module
from rlgen_stats.stores.atomic import read_json, write_json
from rlgen_stats.stores.labels import TokenLabels, merge_ranges, positions_in
from tests.stores.conftest import feature_table, token_table
from tests.stores.test_seals import unseal

N, WIDTH = 2000, 3


@pytest.fixture
def filled(tmp_path: Path, provenance: Provenance) -> Path:
    path = tmp_path / "activations.zarr"
    create_activations(path, *token_table(N), provenance=provenance, shard_tokens=128)
    for i, model in enumerate(("base@0", "rl@80")):
        with ActivationWriter(path, model=model, site="block2", width=WIDTH) as writer:
            writer.append(np.random.default_rng(i).normal(size=(N, WIDTH)).astype("f4"))
    return path


def _no_compute(*_: object, **__: object) -> None:
    raise AssertionError("something computed")


def frame() -> pd.DataFrame:
    """The labels of every token, joined by pandas: the slow and obvious way."""
    tokens, prompts = token_table(N)
    return tokens.merge(prompts, on="prompt", how="left")


def test_selecting_grouping_and_masking_by_labels_stays_lazy(filled: Path) -> None:
    table = frame()
    with dask.config.set(scheduler=_no_compute):
        acts = open_activations(filled)
        one = acts.sel(model="rl@80", task="sciq")
        two = acts.sel(task=["math", "sciq"], segment="completion", domain="out")
        three = one.sel(segment="prompt")
        wrong = acts.where(acts.task == "math")
        groups = acts.activation.groupby("task").mean("token")
        halves = acts.isel(token=slice(100, 900)).sel(source="rl@80")
    stored = acts.activation.values
    np.testing.assert_array_equal(one.activation.values, stored[1, table.task == "sciq"])
    chosen = (table.segment == "completion") & (table.domain == "out")
    np.testing.assert_array_equal(two.activation.values, stored[:, chosen])
    np.testing.assert_array_equal(
        three.prompt.values, table.prompt[(table.task == "sciq") & (table.segment == "prompt")]
    )
    assert np.isnan(wrong.activation.values).any(axis=(0, 2)).sum() == (table.task != "math").sum()
    expected = stored[:, table.task == "math"].mean(axis=1)
    np.testing.assert_allclose(groups.sel(task="math").values, expected, atol=1e-6)
    inside = table.iloc[100:900].reset_index(drop=True)
    np.testing.assert_array_equal(halves.position.values, inside.position[inside.source == "rl@80"])


def test_labels_are_read_when_touched_and_not_before(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[object] = []
    real = labels_module._DecodedLabels._read
    monkeypatch.setattr(labels_module._DecodedLabels, "_read", lambda self, key: reads.append(key) or real(self, key))
    tokens = open_tokens(filled)
    acts = open_activations(filled).sel(task="sciq", segment="completion").isel(token=slice(0, 700))
    repr(tokens)
    repr(acts)
    pickle.loads(pickle.dumps(acts))  # noqa: S301 - our own bytes
    assert reads == []
    assert acts.prompt.values[0] == "p0"
    assert len(reads) == 1


@pytest.mark.parametrize("rows", [slice(3, 90), slice(0, 2000, 7), np.array([5, 1999, 3]), np.arange(2000) % 3 == 0])
def test_every_subset_keeps_its_labels_and_still_selects(filled: Path, rows: object) -> None:
    table = frame().iloc[rows].reset_index(drop=True)  # type: ignore[call-overload]
    subset = open_tokens(filled).isel(token=rows)
    for name in ("prompt", "task", "domain", "split", "cluster", "source", "position", "token_id", "segment"):
        np.testing.assert_array_equal(subset[name].values, table[name].to_numpy())
    chosen = subset.sel(domain="in", segment="completion")
    keep = (table.domain == "in") & (table.segment == "completion")
    np.testing.assert_array_equal(chosen.prompt.values, table.prompt[keep])
    assert subset.isel(token=0).prompt.item() == table.prompt[0]


def test_pieces_put_together_keep_their_labels(filled: Path) -> None:
    tokens = open_tokens(filled)
    whole = xr.concat([tokens.isel(token=slice(0, 700)), tokens.isel(token=np.arange(700, N))], dim="token")
    np.testing.assert_array_equal(whole.prompt.values, tokens.prompt.values)
    assert whole.sel(task="math").sizes == tokens.sel(task="math").sizes


def test_two_subsets_align_only_if_they_are_the_same_tokens(filled: Path) -> None:
    acts = open_activations(filled).activation
    difference = acts.sel(model="rl@80", task="sciq") - acts.sel(model="base@0", task="sciq")
    np.testing.assert_array_equal(difference.task.values, "sciq")
    with pytest.raises((ValueError, NotImplementedError)):
        acts.sel(task="sciq") - acts.sel(task="math")


def test_ranges_equal_the_slow_way_for_random_labels(tmp_path: Path, provenance: Provenance) -> None:
    random = np.random.default_rng(0)
    for round_ in range(15):
        n, k = int(random.integers(1, 400)), int(random.integers(1, 9))
        prompt = np.sort(random.integers(0, k, n)) if round_ % 2 else random.integers(0, k, n)
        tokens = pd.DataFrame(
            {
                "prompt": [f"p{i}" for i in prompt],
                "source": random.choice(["base@0", "rl@1"], n),
                "position": 0,
                "token_id": 1,
                "segment": random.choice(SEGMENTS, n),
            }
        )
        prompts = pd.DataFrame({"prompt": [f"p{i}" for i in range(k)]}).assign(
            task=random.choice(["a", "b"], k), domain="in", split="selection", cluster="c"
        )
        path = tmp_path / f"{round_}.zarr"
        create_activations(path, tokens, prompts, provenance=provenance)
        where = {"segment": str(random.choice(tokens.segment)), "task": list(prompts.task.unique()[:1])}
        joined = tokens.merge(prompts, on="prompt", how="left")
        expected = np.flatnonzero((joined.segment == where["segment"]) & joined.task.isin(where["task"]))
        ranges = select_tokens(path, **where)
        np.testing.assert_array_equal(positions_in(ranges), expected)
        assert (ranges[1:, 0] > ranges[:-1, 1]).all()  # disjoint, joined, sorted


def test_merging_joins_what_touches() -> None:
    ranges = np.array([[0, 3], [3, 5], [7, 8], [8, 9], [11, 12]])
    assert merge_ranges(ranges).tolist() == [[0, 5], [7, 9], [11, 12]]
    assert merge_ranges(np.empty((0, 2), np.int64)).shape == (0, 2)


def test_unknown_labels_are_explained(filled: Path) -> None:
    with pytest.raises(InputError, match=r"no task is called 'maths'; there are math, sciq"):
        open_activations(filled).sel(task="maths")
    with pytest.raises(InputError, match=r"tokens are selected by prompt, task.*got 'colour'"):
        select_tokens(filled, colour="red")
    with pytest.raises(InputError, match="not by slice"):
        open_tokens(filled).sel(task=slice("a", "b"))


def test_prompts_that_base_got_wrong_select_tokens(filled: Path) -> None:
    wrong = xr.DataArray([True, False] * 20, dims="prompt", coords={"prompt": [f"p{i}" for i in range(40)]})
    ranges = select_tokens(filled, prompt=wrong.prompt[wrong], domain="out", segment="completion")
    table = frame()
    keep = table.prompt.isin(wrong.prompt[wrong].values) & (table.domain == "out") & (table.segment == "completion")
    np.testing.assert_array_equal(positions_in(ranges), np.flatnonzero(keep))


# -- prompts: outcomes, features, results ---------------------------------------------------------------------------


@pytest.fixture
def features(tmp_path: Path, provenance: Provenance) -> Path:
    path = tmp_path / "features.zarr"
    for i, model in enumerate(("base@0", "rl@200")):
        table = feature_table(model, float(i), prompts=("p0", "p1", "p2", "p3"))
        table = table.assign_coords(
            task=("prompt", ["math", "sciq", "math", "sciq"]), domain=("prompt", ["in", "in", "out", "out"])
        )
        append_model(path, "features", table, provenance=provenance)
    return path


def test_features_select_by_model_and_labels_lazily(features: Path) -> None:
    with dask.config.set(scheduler=_no_compute):
        dataset = open_features(features)
        one = dataset.sel(model="rl@200", task="sciq")
        two = dataset.sel(task="math", domain="out")
        masked = dataset.where((dataset.task == "math") & (dataset.domain == "in"), drop=True)
        means = dataset["mean"].groupby("task").mean("prompt")
    assert one.prompt.values.tolist() == ["p1", "p3"]
    assert (one["mean"].values == 1).all()
    assert two.prompt.values.tolist() == ["p2"]
    assert masked.prompt.values.tolist() == ["p0"]
    assert means.sizes == {"model": 2, "task": 2, "feature": 5}
    with pytest.raises(InputError, match=r"no task is called 'gsm8k'; there are math, sciq"):
        dataset.sel(task="gsm8k")


def test_aligning_different_prompts_works_as_without_the_index(features: Path) -> None:
    dataset = open_features(features)
    plain = dataset.drop_indexes(["task", "domain", "split", "cluster"])
    few, other = dataset.isel(prompt=[2, 0]), dataset.isel(prompt=[0, 1, 2])
    for how in ("inner", "outer"):
        with xr.set_options(arithmetic_join=how):
            ours = (few["mean"] - other["mean"]).compute()
            theirs = (plain.isel(prompt=[2, 0])["mean"] - plain.isel(prompt=[0, 1, 2])["mean"]).compute()
        xr.testing.assert_equal(
            ours.drop_vars(["task", "domain", "split", "cluster"]),
            theirs.drop_vars(["task", "domain", "split", "cluster"], errors="ignore"),
        )
        expected = dict(zip(dataset.prompt.values, dataset.task.values, strict=True))
        assert ours.task.values.tolist() == [expected[p] for p in ours.prompt.values]
    mixed = few["mean"] - plain["mean"]
    assert mixed.sizes["prompt"] == 2
    scalar = dataset.isel(prompt=1)
    assert scalar.task.item() == "sciq"
    both = xr.concat([dataset.isel(prompt=[0, 1]), dataset.isel(prompt=[2, 3])], dim="prompt", data_vars="minimal")
    assert both.prompt.values.tolist() == ["p0", "p1", "p2", "p3"]


def test_a_study_opens_with_its_indexes(features: Path, provenance: Provenance) -> None:
    (features.parent / "study.yaml").write_text("name: x\n")
    study = open_study(features.parent)
    assert study["features"].to_dataset().sel(task="math").sizes["prompt"] == 2
    with pytest.raises(StoreError, match="not a study folder"):
        open_study(features.parent / "nothing")


@pytest.mark.slow
def test_labels_can_come_in_any_blocks(tmp_path: Path, provenance: Provenance, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlgen_stats.stores.creation as creation

    tokens, prompts = token_table(N)
    create_activations(tmp_path / "whole.zarr", tokens, prompts, provenance=provenance)
    reference = TokenLabels(tmp_path / "whole.zarr")
    monkeypatch.setattr(creation, "LABEL_BLOCK", 256)
    for size in (1, 77, 256, 1999):
        path = tmp_path / f"{size}.zarr"
        frames = (tokens.iloc[i : i + size] for i in range(0, N, size))
        create_activations(path, frames, prompts, provenance=provenance)
        xr.testing.assert_identical(TokenLabels(path).spans, reference.spans)
        assert open_tokens(path).attrs["labels_hash"] == open_tokens(tmp_path / "whole.zarr").attrs["labels_hash"]
        np.testing.assert_array_equal(open_tokens(path).position.values, tokens.position)


def test_samples_of_one_prompt_begin_where_the_first_began(tmp_path: Path, provenance: Provenance) -> None:
    tokens, prompts = token_table(6)
    same = {name: tokens[name].iloc[0] for name in ("prompt", "source", "segment")}
    create_activations(
        tmp_path / "a.zarr", tokens.assign(**same, position=[2, 3, 2, 3, 4, 2]), prompts, provenance=provenance
    )
    with pytest.raises(InputError, match="token 2 has position 1 after 3"):
        create_activations(
            tmp_path / "b.zarr", tokens.assign(**same, position=[2, 3, 1, 2, 3, 4]), prompts, provenance=provenance
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p: (t.drop(columns="token_id"), p), r"tokens table lacks the column\(s\) \['token_id'\]"),
        (lambda t, p: (t.assign(extra=1), p), r"tokens table has the unknown column\(s\) \['extra'\]"),
        (lambda t, p: (t, p.assign(note="x")), r"prompts table has the unknown column\(s\) \['note'\]"),
        (lambda t, p: (t, p.drop(columns="task")), r"prompts table lacks the column\(s\) \['task'\]"),
        (lambda t, p: (t, pd.concat([p, p.iloc[:1]])), r"prompt ids must be unique, 'p0' comes 1 more time"),
        (lambda t, p: (t, p.iloc[1:]), r"1 prompt id\(s\) of the tokens are not in the prompts table, e.g. 'p0'"),
        (lambda t, p: (t.assign(segment="middle"), p), r"segments are .*got \['middle'\]"),
        (lambda t, p: (t.assign(position=-1), p), r"positions start at 0, got a negative one at token 0"),
        (lambda t, p: (t.iloc[[0, 2, 1, *range(3, N)]], p), r"ascend within a text, token 2 has position 1 after 2"),
        (lambda t, p: (t.iloc[::-1], p), r"ascend within a text, token 1 has position \d+ after"),
        (lambda t, p: (t.assign(position=0.5), p), r"'position' of the tokens holds integers, got float64"),
        (lambda t, p: (t.iloc[:0], p), r"tokens table is empty"),
        (lambda t, p: (t, p.iloc[:0]), r"prompts table is empty"),
        (lambda t, p: (t, p.assign(task=None)), r"prompts table has missing values in \['task'\]"),
    ],
)
def test_wrong_labels_are_refused_and_nothing_is_made(
    tmp_path: Path, provenance: Provenance, change, message: str
) -> None:  # type: ignore[no-untyped-def]
    tokens, prompts = change(*token_table(N))
    with pytest.raises(InputError, match=message):
        create_activations(tmp_path / "a.zarr", tokens, prompts, provenance=provenance)
    assert not (tmp_path / "a.zarr").exists()


def test_other_tokens_than_the_stores_are_refused(filled: Path, provenance: Provenance) -> None:
    tokens, prompts = token_table(N)
    create_activations(filled, tokens, prompts, provenance=provenance)
    for other in (
        (tokens.assign(token_id=0), prompts),
        (tokens, prompts.assign(task="x")),
        (tokens.iloc[:-1], prompts),
    ):
        with pytest.raises(StoreError, match="holds other tokens than the ones given"):
            create_activations(filled, *other, provenance=provenance)
    with pytest.raises(StoreError, match="written for another study or settings"):
        create_activations(filled, tokens, prompts, provenance=Provenance("another", "key-one"))


def test_opening_reads_no_label(store: Path) -> None:
    """The text of a million prompts took seconds and half a gigabyte, whatever was asked."""
    for name in ("prompts", "spans", "tokens"):
        for chunk in (store / name).glob("*/c/*"):
            chunk.unlink()
    tokens = open_tokens(store)
    assert (tokens.prompt.dtype, tokens.task.dtype, tokens.segment.dtype) == ("<U4", "<U4", "<U10")
    with pytest.raises(StoreCorruptError, match="lacks the chunk"):
        tokens.task[:3].values  # noqa: B018


def test_selecting_reads_only_the_labels_it_needs(store: Path) -> None:
    expected = select_tokens(store, task="math")
    for unneeded in ("prompts/cluster/c/0", "prompts/prompt/c/0", "spans/segment/c/0", "tokens/prompt/c/0"):
        (store / unneeded).unlink()
    np.testing.assert_array_equal(select_tokens(store, task="math"), expected)


def test_a_store_that_does_not_say_how_long_its_text_is(store: Path) -> None:
    """Stores of earlier releases: read instead."""
    unseal(store)
    sound = open_tokens(store)
    for name in ("prompt", "task", "domain", "split", "cluster"):
        document = read_json(store / "prompts" / name / "zarr.json")
        del document["attributes"]["longest"]
        write_json(store / "prompts" / name / "zarr.json", document)
    xr.testing.assert_identical(open_tokens(store), sound)
    assert open_tokens(store).prompt.dtype == sound.prompt.dtype


@pytest.mark.parametrize("longest", [3, 5])
def test_text_is_never_cut_to_a_wrong_length(store: Path, longest: int) -> None:
    unseal(store)
    document = read_json(store / "prompts/prompt/zarr.json")
    assert document["attributes"]["longest"] == 4
    document["attributes"]["longest"] = longest
    write_json(store / "prompts/prompt/zarr.json", document)
    with pytest.raises(StoreCorruptError, match="does not hold text of the length it announces"):
        open_tokens(store).prompt[0].values  # noqa: B018
