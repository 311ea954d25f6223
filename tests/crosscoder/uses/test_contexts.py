"""Contexts and promoted tokens of features, against slow recomputation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_tokens, read_contexts, read_logits
from rlgen_stats.toolkit.crosscoder import Crosscoder, load_crosscoder, logit_effects, write_contexts
from rlgen_stats.toolkit.crosscoder.uses.contexts import QUANTILES, SAMPLE, window
from rlgen_stats.toolkit.crosscoder.uses.top_entries import Entries, TopEntries, random_keys
from rlgen_stats.toolkit.extraction import find_model, load_model, load_tokenizer, token_mask
from tests.crosscoder.planted import WORDS, slow_contribution

Study = tuple[StudySpec, StudyFolder]
MODELS = ("base@0", "sft@4", "rl@4")


@pytest.fixture(scope="module")
def truth(encoded: Study, main: Crosscoder, activations: xr.Dataset) -> dict[str, np.ndarray]:
    """Contributions [token, feature] by model, zero at tokens that are not trained on, one token at a time."""
    mask = token_mask(open_tokens(encoded[1].activations), encoded[0].extraction, "train")
    return {
        model: mask[:, None]
        * np.array([slow_contribution(main, raw) for raw in activations.activation.sel(model=model).values])
        for model in MODELS
    }


def place(tokens: xr.Dataset, row: pd.Series) -> int:
    """The token that a row is about."""
    where = np.flatnonzero(
        (tokens.prompt.values == row["prompt"])
        & (tokens.source.values == row["source"])
        & (tokens.position.values == row["position"])
    )
    assert len(where) == 1
    return int(where[0])


def test_the_strongest_prompts_of_every_feature(encoded: Study, truth: dict[str, np.ndarray]) -> None:
    tokens = open_tokens(encoded[1].activations)
    table = read_contexts(encoded[1], "main")
    table = table[table["kind"] == "top"]
    alive = set()
    for model, x in truth.items():
        peaks = pd.DataFrame(x).groupby(tokens.prompt.values).max()
        for feature in range(x.shape[1]):
            best = peaks[feature].nlargest(3)
            best = best[best > 0]
            rows = table[(table["feature"] == feature) & (table["model"] == model)]
            assert list(rows["rank"]) == list(range(1, 1 + len(best)))
            np.testing.assert_allclose(rows["activation"], best, rtol=1e-4)
            alive |= {feature} if len(best) else set()
    assert len(alive) > 20
    for _, row in table.iloc[:: max(1, len(table) // 150)].iterrows():
        at = place(tokens, row)
        for other, x in truth.items():
            assert row[f"activation:{other}"] == pytest.approx(x[at, row["feature"]], rel=1e-4)
        assert row["token"] == WORDS[int(tokens.token_id.values[at])]
        assert f"⟦{row['token']}⟧" in row["text"]
        assert row["segment"] == tokens.segment.values[at]
        assert row["task"] == tokens.task.values[at]


@pytest.mark.slow
def test_the_sample_covers_the_distribution(encoded: Study, truth: dict[str, np.ndarray]) -> None:
    tokens = open_tokens(encoded[1].activations)
    table = read_contexts(encoded[1], "main")
    table = table[table["kind"] == "quantile"]
    ranks = []
    for (model, feature), rows in table.groupby(["model", "feature"]):
        fires = np.sort(truth[model][truth[model][:, feature] > 0, feature])
        values = rows["activation"].to_numpy(np.float64)
        assert all(one >= two for one, two in pairwise(values))
        nearest = np.rint((1 - np.array(QUANTILES)) * (min(len(fires), SAMPLE) - 1))
        assert len(rows) == len(np.unique(nearest))  # of 6 tokens two quantiles are nearest to the same one
        assert len({place(tokens, row) for _, row in rows.iterrows()}) == len(rows)
        np.testing.assert_allclose(fires[np.abs(fires[:, None] - values).argmin(axis=0)], values, rtol=1e-4)
        if len(fires) > SAMPLE:
            share = np.searchsorted(fires, values * (1 + 1e-5)) / len(fires)
            ranks.append(share - rows["quantile"].to_numpy(np.float64))
    off = np.array(ranks)
    assert len(off) >= 10
    assert np.abs(off).max() < 4.5 * 0.5 / np.sqrt(SAMPLE), "a sample quantile's share has sd sqrt(q (1 - q) / n)"
    assert np.abs(off.mean()) < 0.04


@pytest.mark.slow
def test_blocks_do_not_matter(copied: Study, encoded: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = copied[0], StudyFolder(copied[1].root)
    (folder.root / "crosscoder").symlink_to(encoded[1].root / "crosscoder")
    whole = read_contexts(encoded[1], "main")
    monkeypatch.setattr("rlgen_stats.toolkit.crosscoder.uses.contexts.BLOCK_BYTES", 1)
    monkeypatch.setattr("rlgen_stats.toolkit.crosscoder.uses.contexts.GROUP_FEATURES", 7)
    monkeypatch.setattr(StudyFolder, "contexts", lambda self, name: self.root / f"{name}.parquet")
    write_contexts(spec, folder, n=3)
    pieces = read_contexts(folder, "main")
    same = [name for name in whole.columns if name not in ("prompt", "task", "source", "position", "text")]
    pd.testing.assert_frame_equal(pieces[same], whole[same], rtol=1e-4)  # prompts with one beginning may tie
    assert (pieces["prompt"] == whole["prompt"]).mean() > 0.98


def test_some_features_and_none(encoded: Study, tmp_path: Path) -> None:
    whole = read_contexts(encoded[1], "main")
    some = read_contexts(str(encoded[1].root), "main", [5, 0])
    pd.testing.assert_frame_equal(some, whole[whole["feature"].isin([0, 5])].reset_index(drop=True))
    assert read_contexts(encoded[1], "main", []).empty
    with pytest.raises(StoreError, match=r"contexts.parquet, which is not there; the encode stage writes it"):
        read_contexts(tmp_path, "main")


def test_blocks_in_which_nothing_fires_change_nothing() -> None:
    kept = TopEntries(8, 5, 2)
    none = np.zeros(0, np.int64)
    kept.update(Entries(none, none, np.zeros((0, 2), np.float32)), np.zeros(0), none)
    kept.flush()
    assert np.isinf(kept.key).all()


@pytest.mark.parametrize("groups", [3, 12, 100_000])
def test_top_entries_are_the_smallest_whatever_the_blocks(groups: int) -> None:
    rng = np.random.default_rng(0)
    feature, key = rng.integers(0, 7, 400), rng.integers(0, 50, 400).astype(np.float64)
    token = np.arange(400)
    values, group = rng.random((400, 2)).astype(np.float32), rng.integers(0, groups, 400)
    kept = TopEntries(8, 5, 2)
    for block in np.split(np.arange(400), [1, 90, 91, 300]):
        kept.update(Entries(feature[block], token[block], values[block]), key[block], group[block])
    kept.flush()
    for k in range(7):
        own = np.flatnonzero(feature == k)
        best = pd.DataFrame({"key": key[own], "group": group[own]}, own).sort_values("key", kind="stable")
        best = best.drop_duplicates("group").index.to_numpy()[:5]
        n = len(best)
        np.testing.assert_array_equal(kept.token[k, :n], best)
        np.testing.assert_array_equal(kept.key[k, :n], key[best])
        np.testing.assert_array_equal(kept.values[k, :n], values[best])
        assert (kept.token[k, n:] == -1).all()
    assert (kept.token[7] == -1).all()


def test_random_keys_are_uniform_and_independent_of_order() -> None:
    n = 20_000
    entries = Entries(np.tile([3, 4], n), np.repeat(np.arange(n), 2), np.zeros((2 * n, 1), np.float32))
    keys = random_keys(entries, seed=5)
    shuffled = np.random.default_rng(0).permutation(2 * n)
    np.testing.assert_array_equal(random_keys(entries[shuffled], seed=5), keys[shuffled])
    assert (random_keys(entries, seed=6) != keys).all()
    counts = np.histogram(keys, bins=50, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 85.4, "chi squared, 49 degrees of freedom, 0.1%"
    assert abs(np.corrcoef(keys[::2], keys[1::2])[0, 1]) < 3.3 / np.sqrt(n)
    assert abs(np.corrcoef(keys[:-2:2], keys[2::2])[0, 1]) < 3.3 / np.sqrt(n)


def test_window_marks_the_peak_and_its_neighbours(encoded: Study) -> None:
    tokenizer = load_tokenizer(find_model("base@0", *encoded))
    ids = np.array([5, 6, 10, 4, 11, 3, 12])
    assert window(tokenizer, ids, 3) == ("what is 2 ", "plus", " 3 ans 4")
    assert window(tokenizer, ids, 0) == ("", "what", " is 2 plus 3 ans 4")
    assert window(tokenizer, ids, 6) == ("what is 2 plus 3 ans ", "4", "")


def test_logit_effects_are_derivatives_of_the_logits_at_the_final_norm(encoded: Study, main: Crosscoder) -> None:
    spec, folder = encoded
    model = load_model(find_model("rl@4", spec, folder))
    everything = list(range(main.n_features))
    effect = logit_effects(model, main, "rl@4", everything).numpy()
    unembed, gain = model.lm_head.weight.detach().double().numpy(), model.model.norm.weight.detach().double().numpy()
    for row, feature in zip(effect, everything, strict=True):
        direction = main.feature_direction("rl@4")[feature].double().numpy()
        wanted = unembed @ (gain * direction) / float(main.contribution_norm()[feature])
        np.testing.assert_allclose(row, wanted - wanted.mean(), rtol=1e-4, atol=1e-6)
    table = read_logits(folder, "main")
    assert len(table) == main.n_features * 3 * 2 * 4
    for feature in (2, 7, 40):
        rows = table[(table["feature"] == feature) & (table["model"] == "rl@4")]
        for sign in (1, -1):
            own = rows[rows["sign"] == sign]
            best = np.argsort(-sign * effect[feature])[:4]
            np.testing.assert_allclose(own["effect"], effect[feature][best], rtol=1e-5)
            assert list(own["token"]) == [WORDS[i] for i in best]


def test_the_joint_code_promotes_by_its_views_decoder_and_single_models_by_the_shared_one(encoded: Study) -> None:
    shared = load_crosscoder(encoded[1].crosscoder("main"))
    shared.share_decoder()
    model = load_model(find_model("rl@4", *encoded))
    unembed = model.lm_head.weight.detach().double()
    outward = (unembed - unembed.mean(dim=0)) * model.model.norm.weight.detach().double()
    own, mean = shared.decoder[2, 7] / shared.scale[2], (shared.decoder[:, 7] / shared.scale[:, None]).mean(dim=0)
    for readout, direction, norm in (
        ("joint", own, shared.decoder[2, 7].norm()),
        ("swap", mean, shared.decoder[:, 7].norm()),
    ):
        effect = logit_effects(model, shared, "rl@4", [7], readout=readout)[0]
        wanted = outward @ (direction.double() / norm)
        np.testing.assert_allclose(effect.numpy(), wanted.numpy(), rtol=1e-3, atol=1e-5)


def test_a_view_without_a_decoder_promotes_no_tokens(encoded: Study) -> None:
    silent = load_crosscoder(encoded[1].crosscoder("main"))
    with torch.no_grad():
        silent.decoder_matrix[3] = 0
        silent.share_decoder()
    model = load_model(find_model("rl@4", *encoded))
    assert (logit_effects(model, silent, "rl@4", [3]) == 0).all()
