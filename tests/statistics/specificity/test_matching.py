from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.optimize import linear_sum_assignment

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics import match_features, reappearance, subspace_overlap
from rlgen_stats.toolkit.statistics.specificity import matching as module
from rlgen_stats.toolkit.statistics.specificity.matching import decoy_q_values

WIDTH = 24


def dictionary(
    rows: np.ndarray, firing: np.ndarray | None = None, views: tuple[str, ...] = ("base@0", "rl@9")
) -> xr.Dataset:
    """Decoders of rows [feature, view * channel]."""
    decoder = rows.reshape(len(rows), len(views), -1).transpose(1, 0, 2)
    return xr.Dataset(
        {
            "decoder": (("view", "feature", "channel"), decoder.astype(np.float32)),
            "firing": ("feature", np.full(len(rows), 0.1) if firing is None else firing),
        },
        coords={"view": list(views), "feature": np.arange(len(rows))},
    )


def random_rows(n: int, seed: int, *, skewed: bool = True) -> np.ndarray:
    random = np.random.default_rng(seed)
    scale = np.geomspace(1, 0.1, WIDTH) if skewed else np.ones(WIDTH)
    return np.asarray(random.normal(size=(n, WIDTH)) * scale)


def test_common_features_are_found_and_others_left_alone() -> None:
    common, random = random_rows(60, 0), np.random.default_rng(1)
    a = np.concatenate([common, random_rows(40, 2)])
    b = np.concatenate(
        [common * random.uniform(0.5, 2, (60, 1)) + 0.02 * random.normal(size=common.shape), random_rows(50, 3)]
    )
    order = random.permutation(len(b))
    matches = match_features(dictionary(a), dictionary(b[order]), seed=0)
    place = np.argsort(order)
    assert (matches["match"].values[:60] == place[:60]).mean() > 0.95
    assert matches.matched.values[:60].mean() > 0.95
    assert matches.matched.values[60:].mean() < 0.1
    assert matches.attrs["n_compared"] == [100, 110]
    partners = matches["match"].values[matches["match"].values >= 0]
    assert len(np.unique(partners)) == len(partners)


def test_assignment_is_the_best_one_to_one() -> None:
    """Against the dense assignment, whose optimum lies among the candidates when dictionaries are small."""
    a, b = random_rows(9, 4), random_rows(10, 5)
    matches = match_features(dictionary(a), dictionary(b))
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    rows, columns = linear_sum_assignment(-(cosine + 2.0))
    np.testing.assert_array_equal(matches["match"].values[rows], columns)
    np.testing.assert_allclose(matches.similarity.values, cosine[rows, columns], rtol=1e-5)
    np.testing.assert_allclose(matches.best_similarity.values, cosine.max(axis=1), rtol=1e-5)


def test_unrelated_dictionaries_are_rarely_matched() -> None:
    """Any claim at all about two dictionaries of one covariance but no common feature is false."""
    any_match = [
        bool(
            match_features(
                dictionary(random_rows(80, 2 * i)), dictionary(random_rows(80, 2 * i + 1)), seed=i
            ).matched.any()
        )
        for i in range(60)
    ]
    assert np.mean(any_match) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)


def test_decoys_without_the_covariance_would_match_nothing_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard bites: against isotropic decoys, unrelated but anisotropic dictionaries look alike."""

    def isotropic(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return module._unit(rng.standard_normal(rows.shape, dtype=np.float32))

    pairs = [(dictionary(random_rows(80, 2 * i)), dictionary(random_rows(80, 2 * i + 1))) for i in range(10)]
    good = np.mean([float(match_features(*pair, seed=0).matched.mean()) for pair in pairs])
    monkeypatch.setattr(module, "_gaussian_decoys", isotropic)
    bad = np.mean([float(match_features(*pair, seed=0).matched.mean()) for pair in pairs])
    assert good < 0.05
    assert bad > 0.15


def test_q_values_follow_their_definition() -> None:
    random = np.random.default_rng(0)
    similarity, decoy = random.normal(1, 1, 50), random.normal(0, 1, 50)
    similarity[7] = np.nan
    q = decoy_q_values(similarity, decoy)
    raw = {s: min(1.0, (1 + np.sum(decoy >= s)) / np.sum(similarity >= s)) for s in similarity[np.isfinite(similarity)]}
    for s, value in zip(similarity, q, strict=True):
        assert np.isnan(value) if np.isnan(s) else value == min(r for t, r in raw.items() if t <= s)
    assert q.shape == (50,)


def test_blocks_and_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = dictionary(random_rows(70, 6)), dictionary(random_rows(75, 7))
    whole = match_features(a, b, seed=2)
    monkeypatch.setattr(module, "MATCH_BLOCK", 16)
    again = match_features(a, b, seed=2)
    np.testing.assert_array_equal(again["match"], whole["match"])
    order = np.random.default_rng(0).permutation(70)
    turned = match_features(a.isel(feature=order), b, seed=2)
    np.testing.assert_array_equal(turned["match"].values, whole["match"].values[order])


def test_activations_match_what_decoders_cannot() -> None:
    """Two layers: other widths and directions, the same prompts."""
    random = np.random.default_rng(8)
    activity = random.gamma(0.5, size=(300, 40))
    noisy = activity[:, ::-1] * 3 + 0.1 * random.normal(size=activity.shape)
    shallow = dictionary(random_rows(40, 1))
    deep = dictionary(np.random.default_rng(9).normal(size=(40, 2 * WIDTH)))
    activations = {
        "activations_a": xr.DataArray(activity, dims=("prompt", "feature"), coords={"prompt": np.arange(300)}),
        "activations_b": xr.DataArray(noisy, dims=("prompt", "feature"), coords={"prompt": np.arange(300)}),
    }
    matches = match_features(shallow, deep, by="activation", **activations)
    assert (matches["match"].values == np.arange(40)[::-1]).all()
    assert matches.matched.all()
    assert (matches.correlation > 0.9).all()
    unrelated = match_features(
        shallow,
        deep,
        by="activation",
        **(activations | {"activations_b": activations["activations_b"].roll(prompt=57)}),
    )
    assert unrelated.matched.mean() < 0.1
    with pytest.raises(InputError, match=r"views .*match them by='activation'"):
        match_features(shallow, deep)
    with pytest.raises(InputError, match=r"needs activations_a= and activations_b="):
        match_features(shallow, deep, by="activation")


def test_silent_features_take_no_part() -> None:
    rows = random_rows(30, 3)
    firing = np.where(np.arange(30) < 5, 0.0, 0.1)
    matches = match_features(dictionary(rows, firing), dictionary(rows))
    assert (matches.flag.values[:5] == "DEAD").all()
    assert (matches["match"].values[:5] == -1).all()
    assert not matches.matched.values[:5].any()
    assert (matches["match"].values[5:] == np.arange(5, 30)).all()


def test_reappearance_is_the_share_of_replicates() -> None:
    rows = random_rows(40, 0)
    half = np.concatenate([rows[:20], random_rows(20, 9)])
    one = dictionary(rows)
    table = reappearance({"two": match_features(one, dictionary(rows)), "three": match_features(one, dictionary(half))})
    assert (table.reappearance.values[:20] == 1).all()
    assert np.isin(table.reappearance.values[20:], [0.5]).mean() > 0.9
    assert table.subspace_overlap.sel(replicate="two").item() == pytest.approx(1)
    with pytest.raises(InputError, match="at least one matched dictionary"):
        reappearance({})


def test_subspace_overlap_of_random_dictionaries_is_chance() -> None:
    overlaps = [
        subspace_overlap(
            dictionary(random_rows(8, 2 * i, skewed=False)), dictionary(random_rows(8, 2 * i + 1, skewed=False)), rank=6
        )
        for i in range(80)
    ]
    assert np.mean([o for o, _ in overlaps]) == pytest.approx(6 / WIDTH, abs=0.02)
    assert overlaps[0][1] == 6 / WIDTH
    rows = random_rows(8, 1)
    assert subspace_overlap(dictionary(rows), dictionary(rows))[0] == pytest.approx(1)


def test_errors() -> None:
    a = dictionary(random_rows(10, 0))
    with pytest.raises(InputError, match=r"'decoder' or 'activation', got 'cosine'"):
        match_features(a, a, by="cosine")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"needs decoder\[view, feature, channel\] and firing"):
        match_features(a, a.drop_vars("firing"))
    prompts = xr.DataArray(np.ones((5, 10)), dims=("prompt", "feature"), coords={"prompt": list("abcde")})
    with pytest.raises(InputError, match=r"the same prompts in the same order"):
        match_features(a, a, activations_a=prompts, activations_b=prompts.isel(prompt=slice(None, None, -1)))
