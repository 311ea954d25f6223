"""Agreement of dictionaries where it is known: permuted copies agree wholly, independent ones at the random level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.replicability import decoded_agreement, drift_counts, matched_drift, set_agreement

MODELS = ["base@0", "sft@9", "rl@9"]
N = 60
MakeFeatures = Callable[..., xr.Dataset]


# -- what is decoded ---------------------------------------------------------------------------------------------------
def sums_of(change: np.ndarray, decoded: Sequence[np.ndarray]) -> xr.Dataset:
    """Products of one model's parts [token, channel]."""
    parts = np.stack([change, *decoded, *(change - one for one in decoded)])
    return xr.Dataset(
        {
            "products": (("model", "part", "other_part"), np.einsum("ptc,qtc->pq", parts, parts)[None]),
            "totals": (("model", "part", "channel"), parts.sum(axis=1)[None]),
            "n_tokens": len(change),
        },
        coords={"model": ["rl@9"]},
    )


def test_correlations_equal_those_of_the_values() -> None:
    random = np.random.default_rng(0)
    change = random.normal([3, 0, 0, -2, 1], size=(200, 5))
    decoded = [0.5 * change + random.normal(size=change.shape), 2 * change + 1 + random.normal(size=change.shape)]
    found = decoded_agreement(sums_of(change, decoded)).sel(model="rl@9")

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return cosine(a - a.mean(axis=0), b - b.mean(axis=0))

    for i, one in enumerate(decoded):
        assert float(found.true_cosine[i]) == pytest.approx(cosine(change, one), rel=1e-9)
        assert float(found.true_correlation[i]) == pytest.approx(correlation(change, one), rel=1e-9)
        for j, other in enumerate(decoded):
            errors = change - one, change - other
            assert float(found.decoded_cosine[i, j]) == pytest.approx(cosine(one, other), rel=1e-9)
            assert float(found.decoded_correlation[i, j]) == pytest.approx(correlation(one, other), rel=1e-9)
            assert float(found.error_cosine[i, j]) == pytest.approx(cosine(*errors), rel=1e-9)
            assert float(found.error_correlation[i, j]) == pytest.approx(correlation(*errors), rel=1e-9)
    assert float(found.true_cosine[0] - found.true_correlation[0]) != pytest.approx(0, abs=0.01)


def test_errors_can_agree_where_decoded_changes_differ_and_the_reverse() -> None:
    """Channels 0-1: decoded by the first only; 2-3: by the second only; 4-9: by neither. Then two with own noise."""
    random = np.random.default_rng(1)
    change = random.normal(size=(4000, 10))
    first, second = np.zeros_like(change), np.zeros_like(change)
    first[:, :2], second[:, 2:4] = change[:, :2], change[:, 2:4]
    found = decoded_agreement(sums_of(change, [first, second]))
    assert float(found.decoded_correlation[0, 1, 0]) == pytest.approx(0, abs=0.03)
    assert float(found.error_correlation[0, 1, 0]) == pytest.approx(6 / 8, abs=0.03)
    noisy = [change + 0.2 * random.normal(size=change.shape) for _ in range(2)]
    found = decoded_agreement(sums_of(change, noisy))
    assert float(found.decoded_correlation[0, 1, 0]) == pytest.approx(1 / 1.04, abs=0.01)
    assert float(found.error_correlation[0, 1, 0]) == pytest.approx(0, abs=0.03)


def test_a_dictionary_without_error_has_no_error_to_correlate() -> None:
    change = np.random.default_rng(2).normal(size=(50, 3))
    found = decoded_agreement(sums_of(change, [change, 0 * change]))
    assert np.isnan(found.error_correlation[0]).all()
    assert float(found.error_correlation[1, 1, 0]) == 1.0
    assert np.isnan(found.decoded_correlation[1]).all()
    still = decoded_agreement(sums_of(change, [change + 0.1, np.full_like(change, 0.1)]))
    assert np.isnan(still.decoded_correlation[1]).all(), "what is left of a constant is rounding"
    assert np.isnan(still.error_correlation[0]).all()
    assert np.isfinite(still.decoded_cosine[1]).all()
    assert decoded_agreement(sums_of(change, [change + 0.1])).sizes["dictionary"] == 1
    with pytest.raises(InputError, match="got 1 parts"):
        decoded_agreement(sums_of(change, [change]).isel(part=[0], other_part=[0]))
    four = sums_of(change, [change, change]).isel(part=range(4), other_part=range(4))
    with pytest.raises(InputError, match="got 4 parts"):
        decoded_agreement(four)
    with pytest.raises(InputError, match="got 2 parts"):
        decoded_agreement(sums_of(change, [change]).isel(part=[0, 1], other_part=[0, 1]))


# -- matched features --------------------------------------------------------------------------------------------------
def matching_of(match: np.ndarray, matched: np.ndarray, similarity: float | np.ndarray = 1.0) -> xr.Dataset:
    """[replicate, feature]; the last five features never fire."""
    shown = np.arange(N) < N - 5
    return xr.Dataset(
        {
            "match": (("replicate", "feature"), np.where(shown, match, -1)),
            "matched": (("replicate", "feature"), matched & shown),
            "similarity": (("replicate", "feature"), np.broadcast_to(similarity, match.shape)),
            "reappearance": ("feature", np.where(shown, matched.mean(axis=0), np.nan)),
        },
        coords={"replicate": [f"main.{i + 2}" for i in range(len(match))], "feature": np.arange(N)},
    )


def effects_of(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("model", "feature"), coords={"model": MODELS[1:], "feature": np.arange(N)})


def test_a_permuted_copy_shares_everything() -> None:
    random = np.random.default_rng(3)
    effect = random.normal(size=(2, N))
    effect[:, N - 5 :] = np.nan
    order = random.permutation(N)  # feature k of the first is order[k] of the second
    other = np.empty_like(effect)
    other[:, order] = effect
    table = matching_of(order[None], np.ones((1, N), dtype=bool))
    found = matched_drift(table, {1: effects_of(effect), 2: effects_of(other)}, top_k=10, n_permutations=20)
    assert found.n_matched.values.tolist() == [[N - 5]] * 2
    assert found.attrs["n_features"] == N - 5
    assert found.matched_share.values.tolist() == [[1.0]] * 2
    assert found.matched_energy.values == pytest.approx(1.0)
    assert found.top_shared.values.tolist() == [[[10, 10]]] * 2
    assert found.top_expected.values == pytest.approx(100 / (N - 5))


def test_few_matches_can_carry_most_of_the_drift() -> None:
    effect = np.full((2, N), 1.0)
    effect[0, :4], effect[1, 10:14] = 9.0, -9.0
    matched = np.zeros((2, N), dtype=bool)
    matched[0, :4] = matched[1, :2] = True
    other = np.ones((2, N))
    other[0, [0, 1]] = 5.0
    table = matching_of(np.tile(np.arange(N), (2, 1)), matched)
    found = matched_drift(
        table, {1: effects_of(effect), 2: effects_of(other), 3: effects_of(effect)}, top_k=4, n_permutations=400
    ).sel(model="sft@9", criterion="close")
    total = 4 * 81 + (N - 9)
    assert found.matched_share.values == pytest.approx(np.array([4, 2]) / (N - 5))
    assert found.matched_energy.values == pytest.approx(np.array([4, 2]) * 81 / total)
    assert found.matched_energy_random.values == pytest.approx(np.array([4, 2]) / (N - 5), abs=0.03)
    assert (found.matched_energy_random_high.values > found.matched_energy_random.values).all()
    assert (found.matched_energy_random_high.values < 0.6 * found.matched_energy.values).all()
    assert found.top_shared.values.tolist() == [4, 2]  # ones that tie for the other's top: the earlier features
    assert found.top_expected.values == pytest.approx(np.array([4 * 4, 4 * 2]) / (N - 5))


def test_a_match_beyond_chance_need_not_be_close() -> None:
    effect = np.ones((2, N))
    effect[:, :5] = 3.0
    effect[:, 5:10] = np.nan  # not tested: carry no drift
    similarity = np.where(np.arange(N) < 2, 0.7, 0.69)[None]
    table = matching_of(np.arange(N)[None], np.arange(N)[None] < 5, similarity)
    found = matched_drift(table, {1: effects_of(effect), 2: effects_of(effect)}, top_k=5, n_permutations=300)
    matched, close = (found.sel(criterion=name, model="rl@9") for name in ("matched", "close"))
    assert (matched.n_matched.item(), close.n_matched.item()) == (5, 2)
    assert matched.matched_energy.item() == pytest.approx(45 / (45 + N - 15))
    assert close.matched_energy.item() == pytest.approx(18 / (45 + N - 15))
    assert close.matched_energy_random.item() == pytest.approx(2 / (N - 5), abs=0.02)
    assert (matched.top_shared.item(), close.top_shared.item()) == (5, 2)
    assert (matched.top_expected.item(), close.top_expected.item()) == (pytest.approx(25 / 55), pytest.approx(10 / 55))
    assert found.attrs["close_cosine"] == 0.7


def test_matches_at_random_are_at_the_random_level() -> None:
    random = np.random.default_rng(4)
    shares, counts, expected = [], [], []
    for seed in range(60):
        effect = random.standard_t(3, size=(2, N))
        matched = random.random((1, N)) < 0.3
        table = matching_of(random.permutation(N)[None], matched)
        other = effects_of(random.standard_t(3, size=(2, N)))
        found = matched_drift(table, {1: effects_of(effect), 2: other}, top_k=15, n_permutations=50, seed=seed)
        shares.append(found.matched_energy.values - found.matched_energy_random.values)
        counts.append(found.top_shared.values)
        expected.append(found.top_expected.values)
    assert np.mean(shares) == pytest.approx(0, abs=0.04)
    assert np.mean(counts) == pytest.approx(np.mean(expected), abs=0.25)


def test_draws_are_those_of_the_seed_and_do_not_depend_on_the_other_dictionaries() -> None:
    random = np.random.default_rng(5)
    effects = {n: effects_of(random.normal(size=(2, N))) for n in (1, 2, 3)}
    matched = random.random((2, N)) < 0.3
    table = matching_of(np.tile(np.arange(N), (2, 1)), matched)
    both = matched_drift(table, effects, top_k=5, n_permutations=30, seed=1)
    xr.testing.assert_identical(both, matched_drift(table, effects, top_k=5, n_permutations=30, seed=1))
    energy = np.square(effects[1].values[0, : N - 5])
    n_matched = int(both.n_matched[0, 0])
    shares = [energy[stream(1, b).permutation(N - 5)[:n_matched]].sum() / energy.sum() for b in range(30)]
    assert float(both.matched_energy_random[0, 0, 0]) == pytest.approx(np.mean(shares))
    assert float(both.matched_energy_random_high[0, 0, 0]) == pytest.approx(np.quantile(shares, 0.95))
    alone = matched_drift(table.isel(replicate=[1]), {1: effects[1], 2: effects[3]}, top_k=5, n_permutations=30, seed=1)
    xr.testing.assert_allclose(both.isel(replicate=[1]), alone, rtol=1e-12)
    again = matched_drift(table, effects, top_k=5, n_permutations=30, seed=2)
    assert not np.array_equal(again.matched_energy_random, both.matched_energy_random)
    with pytest.raises(InputError, match=r"expected effects of 3 dictionaries, numbered from 1, got \[1, 2\]"):
        matched_drift(table, {1: effects[1], 2: effects[2]}, top_k=5)


# -- sets --------------------------------------------------------------------------------------------------------------
def worlds(make_features: MakeFeatures, *, common: float, seed: int = 6) -> tuple[dict[int, xr.Dataset], dict]:
    """Three dictionaries of 80 features; 1 and 2 hold the same set at other numbers, 3 an independent one.

    The set's features drift by what is ``common`` to all of a prompt's features and by their own.
    """
    random = np.random.default_rng(seed)
    shape = (3, 160, 80)

    def one() -> np.ndarray:
        mean = random.exponential(size=shape)
        mean[1:] += common * random.normal(size=160)[None, :, None]
        return mean

    first, third = one(), one()
    order = random.permutation(80)
    second = np.empty_like(first)
    second[:, :, order] = first
    tasks = ["a", "b"]
    features = {
        n: make_features(mean, MODELS, tasks=tasks, domains={"a": "in", "b": "out"}, chunk=32)
        for n, mean in zip((1, 2, 3), (first, second, third), strict=True)
    }
    sets = {1: list(range(8)), 2: order[:8].tolist(), 3: list(range(20, 28))}
    return features, sets


def test_a_set_at_other_numbers_is_the_same_set(make_features: MakeFeatures) -> None:
    features, sets = worlds(make_features, common=0.3)
    found = set_agreement(features, sets, models=MODELS[1:], n_random=19)
    assert found.attrs["n_prompts"] == 80
    for kind in ("set_correlation", "set_within"):
        assert found[kind].sel(dictionary=1, other=2).values == pytest.approx(1.0)
        assert np.abs(found[kind].sel(dictionary=1, other=3).values).max() < 0.35
        random, high = (found[f"{kind}_{level}"].sel(dictionary=1, other=2) for level in ("random", "random_high"))
        assert (random.values < high.values).all()
        assert (high.values < 0.95).all()
        assert (random.values > 0.3).all(), "all features of 1 and 2 share what is common to a prompt"
        assert np.abs(found[f"{kind}_random"].sel(dictionary=1, other=3).values).max() < 0.2
    assert found.n_set.values.tolist() == [8, 8, 8]


def test_numbers_equal_the_textbook_and_task_means_can_be_all_there_is(make_features: MakeFeatures) -> None:
    random = np.random.default_rng(7)
    task = np.arange(160) % 2
    mean = random.exponential(size=(2, 3, 160, 60))
    mean[:, 2] += 5 * task[None, :, None]
    features = {n: make_features(mean[n - 1], MODELS, tasks=["a", "b"], domains={"a": "in", "b": "in"}) for n in (1, 2)}
    sets = {1: [3, 5], 2: [7]}
    found = set_agreement(features, sets, models=["rl@9"], n_random=9).sel(model="rl@9")
    used = features[1].split.values == "verification"
    drift = [(one[2] - one[0])[used][:, sets[n]].sum(axis=1) for n, one in zip((1, 2), mean, strict=True)]
    assert float(found.set_correlation[0, 1]) == pytest.approx(np.corrcoef(drift)[0, 1])
    left = [d - np.array([d[task[used] == t].mean() for t in task[used]]) for d in drift]
    assert float(found.set_within[0, 1]) == pytest.approx(np.corrcoef(left)[0, 1])
    assert float(found.set_correlation[0, 1]) > 0.7 > abs(float(found.set_within[0, 1]))


def test_random_sets_are_matched_in_firing_rate_and_seeded(make_features: MakeFeatures) -> None:
    """Features that always fire share one drift, rare ones have none: a match of a rare set is a rare set."""
    random = np.random.default_rng(8)
    mean = np.zeros((3, 160, 100))
    mean[:, :, 60:] = random.exponential(size=(3, 160, 40)) * (random.random((3, 160, 40)) < 0.2)
    mean[:, :, :60] = 1 + 0.01 * random.random((3, 160, 60))
    mean[1:, :, :60] += random.normal(size=160)[None, :, None]
    rate = (mean > 0) * np.linspace(1.0, 0.5, 100)  # of a feature's tokens; those of the rare ones are rarer still
    features = {n: make_features(mean, MODELS, firing=rate) for n in (1, 2)}
    rare = {1: [80, 81], 2: [82, 83]}
    found = set_agreement(features, rare, models=MODELS[1:], n_random=29, seed=1)
    assert (found.set_correlation_random.sel(dictionary=1, other=2) < 0.5).all()
    common = set_agreement(features, {1: [30, 31], 2: [32, 33]}, models=MODELS[1:], n_random=29, seed=1)
    assert (common.set_correlation_random.sel(dictionary=1, other=2) > 0.95).all()
    xr.testing.assert_identical(found, set_agreement(features, rare, models=MODELS[1:], n_random=29, seed=1))
    turned = {n: one.isel(prompt=slice(None, None, -1)).chunk(feature=7) for n, one in features.items()}
    xr.testing.assert_allclose(found, set_agreement(turned, rare, models=MODELS[1:], n_random=29, seed=1), rtol=1e-9)
    one_turned = {1: features[1], 2: turned[2]}
    xr.testing.assert_allclose(
        found, set_agreement(one_turned, rare, models=MODELS[1:], n_random=29, seed=1), rtol=1e-9
    )
    other = set_agreement(features, rare, models=MODELS[1:], n_random=29, seed=2)
    assert not np.array_equal(other.set_correlation_random, found.set_correlation_random)


def test_what_has_no_set_or_no_others_has_no_number(make_features: MakeFeatures) -> None:
    features, sets = worlds(make_features, common=0.3)
    found = set_agreement(features, sets | {2: [], 3: list(range(40))}, models=MODELS[1:], n_random=9)
    assert np.isnan(found.set_correlation.sel(dictionary=2)).all()
    assert np.isfinite(found.set_correlation.sel(dictionary=1, other=3)).all()
    assert np.isnan(found.set_correlation_random.sel(dictionary=1, other=3)).all(), "40 of 80: no random sets"
    with pytest.raises(InputError, match="feature 80 of the set is not in the features"):
        set_agreement(features, sets | {1: [80]}, models=MODELS[1:])
    with pytest.raises(InputError, match=r"of the same dictionaries, got \[1, 2, 3\] and \[1\]"):
        set_agreement(features, {1: [0]}, models=MODELS[1:])
    with pytest.raises(InputError, match="must be of the same prompts"):
        set_agreement(features | {2: features[2].isel(prompt=slice(0, 100))}, sets, models=MODELS[1:])
    verification = np.flatnonzero(features[1].split.values == "verification")
    three, two = ({n: one.isel(prompt=verification[:k]) for n, one in features.items()} for k in (3, 2))
    assert set_agreement(three, sets, models=MODELS[1:]).attrs["n_prompts"] == 3
    with pytest.raises(InputError, match="at least 3 prompts, got 2 of split"):
        set_agreement(two, sets, models=MODELS[1:])
    with pytest.raises(InputError, match="at least 3 prompts, got 0 of split 'trial'"):
        set_agreement(features, sets, models=MODELS[1:], split="trial")


# -- counts ------------------------------------------------------------------------------------------------------------
def test_counts_of_drift() -> None:
    calls = {}
    for number, count in ((1, 10), (2, 14), (3, 18)):
        values = np.full((2, N), "UNDETERMINED")
        values[0, :count] = "DRIFT"
        calls[number] = effects_of(values)
    found = drift_counts(calls)
    assert found.n_drift.values.tolist() == [[10, 0], [14, 0], [18, 0]]
    assert found.n_drift_mean.values.tolist() == [14, 0]
    assert float(found.n_drift_high[0]) == pytest.approx(14 + 4.302653 * 4 / np.sqrt(3))
    assert float(found.n_drift_low[0]) == pytest.approx(14 - 4.302653 * 4 / np.sqrt(3))
    wide = drift_counts({1: calls[1], 2: calls[3]})
    assert (float(wide.n_drift_low[0]), float(wide.n_drift_high[0])) == (0, pytest.approx(14 + 12.7062 * 4))
    assert float(drift_counts(calls, alpha=0.5).n_drift_high[0]) < float(found.n_drift_high[0])
    alone = drift_counts({1: calls[1]})
    assert np.isnan(alone.n_drift_low).all()
    with pytest.raises(InputError, match="got 0 and"):
        drift_counts({})
