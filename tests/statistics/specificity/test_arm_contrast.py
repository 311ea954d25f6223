from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import attribution_contrast
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict, specificity_verdict

DIMS = ("crosscoder", "feature")


def table(shares, n=400, seed=0, noise=0.0, targets=None, dictionaries=None):
    """Attribution table in which a share of each crosscoder's features has NRN .95, the rest about .5."""
    rng = np.random.default_rng(seed)
    nrn = np.stack([np.where(rng.random(n) < share, 0.95, 0.5) for share in shares.values()])
    nrn = np.where(nrn < 0.9, nrn + noise * rng.standard_normal(nrn.shape), nrn)
    names = list(shares)
    coords = {
        "crosscoder": np.array(names),
        "target": ("crosscoder", np.array([(targets or {}).get(name, f"{name}@10") for name in names])),
        "dictionary": ("crosscoder", [(dictionaries or {}).get(name, 1) for name in names]),
    }
    alive = {"alive": (DIMS, np.ones_like(nrn, dtype=bool))}
    return xr.Dataset(dict.fromkeys(("nrn_l1", "nrn_l2"), (DIMS, nrn)) | alive, coords=coords)


def singletons(t):
    return {str(name): np.arange(t.sizes["feature"]) for name in t.crosscoder.values}


def movement(shifts, kl=None):
    models = list(shifts)
    return xr.Dataset(
        {
            "activation_shift": ("model", np.array(list(shifts.values()))),
            "kl_from_base": ("model", np.array([(kl or shifts)[model] for model in models])),
        },
        coords={
            "model": np.array(models),
            "run": ("model", np.array([m.split("@")[0] for m in models])),
            "step": ("model", np.array([int(m.split("@")[1]) for m in models])),
        },
    )


def health(t, fve=0.9, l0=10.0, dead=0.1, **other):
    names, targets = t.crosscoder.values.tolist(), t.target.values.tolist()
    rows = [other.get(name, (fve, l0, dead)) for name in names]
    values = np.full((len(names), len(set(targets))), np.nan)
    views = sorted(set(targets))
    for row, target, fit in zip(values, targets, rows, strict=True):
        row[views.index(target)] = fit[0]
    return xr.Dataset(
        {
            "fve": (("crosscoder", "view"), values),
            "l0": ("crosscoder", [r[1] for r in rows]),
            "dead_fraction": ("crosscoder", [r[2] for r in rows]),
        },
        coords={"crosscoder": np.array(names), "view": np.array(views)},
    )


def contrast(t, clusters=None, **options):
    return attribution_contrast(
        t, clusters or singletons(t), **({"sft": "sft", "rl": "rl", "n_bootstrap": 499} | options)
    )


def final(out):
    return out.sel(comparison="final")


def tail(t, name, tau=0.7):
    return float((t.nrn_l1.sel(crosscoder=name) > tau).mean())


EQUAL = {"sft@10": 1.0, "rl@10": 1.0}


def test_masses_floors_and_layout():
    t = table({"sft": 0.3, "rl": 0.1, "again": 0.02, "halves": 0.05, "halves.2": 0.07}, dictionaries={"halves.2": 2})
    floors = {"base read again": ["again"], "halves": ["halves", "halves.2"]}
    out = validate(contrast(t, floors=floors, movement=movement(EQUAL)), "attribution_contrast")
    one = final(out)
    assert one.tail_sft.values == pytest.approx(tail(t, "sft"))
    assert one.effect.values == pytest.approx(tail(t, "sft") - tail(t, "rl"))
    assert out.tail_floor.sel(floor="base read again").values == pytest.approx(tail(t, "again"))
    assert out.tail_floor.sel(floor="halves").values == pytest.approx((tail(t, "halves") + tail(t, "halves.2")) / 2)
    assert one.tail_null.values == pytest.approx(out.tail_floor.max("floor").values), "the largest floor"
    assert one.excess_rl.values == pytest.approx(tail(t, "rl") - one.tail_null.values)
    assert np.all((one.effect_low < 0.2) & (one.effect_high > 0.2))
    assert np.all(one.p_value < 0.01)
    assert "these two models" in out.attrs["scope"]
    assert out.attrs["decided_by"] == "final"


def test_without_a_floor_there_is_none():
    out = validate(contrast(table({"sft": 0.3, "rl": 0.1})), "attribution_contrast")
    assert np.isnan(out.tail_null).all()
    assert "tail_floor" not in out


def test_features_that_latent_scaling_refutes_are_counted_apart():
    """All of SFT's specific features are artefacts, none of RL's."""
    t = table({"sft": 0.3, "rl": 0.1, "null": 0.02})
    agrees = np.ones_like(t.alive.values)
    agrees[0] = False
    t["scaling_agrees"] = (DIMS, agrees)
    floors = {"null": ["null"]}
    plain = contrast(t.drop_vars("scaling_agrees"), floors=floors)
    out = validate(contrast(t, floors=floors), "attribution_contrast")
    for name in plain.data_vars:
        xr.testing.assert_identical(out[name], plain[name])
    one = final(out)
    assert (one.agreed_tail_sft == 0).all()
    np.testing.assert_array_equal(one.agreed_tail_rl, one.tail_rl)
    assert (one.agreed_effect_high < 0).all()
    assert (one.agreed_p_value < 0.01).all()
    assert (one.effect_low > 0).all()


def test_single_features_would_be_overconfident():
    """A hundred copies of one direction are one piece of evidence."""
    t = table({"sft": 0.0, "rl": 0.0})
    t.nrn_l1[0, :100] = 0.95
    copies = np.concatenate([np.zeros(100, dtype=int), np.arange(1, 301)])
    alone, clustered = (contrast(t, singletons(t) | more, taus=(0.7,)) for more in ({}, {"sft": copies}))
    assert final(alone).p_value.item() < 0.01
    assert final(clustered).p_value.item() > 0.1
    assert final(clustered).superiority.item() < 0.52 < 0.6 < final(alone).superiority.item()


def test_a_share_is_resampled_as_a_share():
    """Clusters of unequal size that all hit have mass 1 in every draw."""
    t = table({"sft": 1.0, "rl": 0.5}, n=60)
    sizes = np.repeat(np.arange(6), [1, 2, 4, 8, 15, 30])
    one = final(contrast(t, {"sft": sizes, "rl": sizes}, n_bootstrap=2999))
    assert one.tail_sft_low.values == pytest.approx(1)
    assert one.tail_sft_high.values == pytest.approx(1)
    # and otherwise as numerator and denominator together
    nrn = t.nrn_l1.values[1] > 0.7
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(3000):
        members = np.concatenate([np.flatnonzero(sizes == c) for c in rng.integers(0, 6, 6)])
        draws.append(nrn[members].mean())
    half = 1.96 * np.std(draws)
    assert one.tail_rl_low.values[0] == pytest.approx(max(nrn.mean() - half, 0), abs=0.03)
    assert one.tail_rl_high.values[0] == pytest.approx(min(nrn.mean() + half, 1), abs=0.03)


@pytest.mark.slow
def test_coverage_of_the_cluster_bootstrap():
    hits, sims = 0, 120
    for s in range(sims):
        one = final(contrast(table({"sft": 0.3, "rl": 0.2}, n=150, seed=s), taus=(0.7,), n_bootstrap=199, seed=s))
        hits += float(one.effect_low[0]) <= 0.1 <= float(one.effect_high[0])
    assert abs(hits / sims - 0.95) < 3 * np.sqrt(0.95 * 0.05 / sims) + 0.01


def test_no_specific_feature_anywhere_is_not_certainty():
    one = final(contrast(table({"sft": 0.0, "rl": 0.0}, n=50)))
    assert np.all(one.p_value == 1.0)
    assert np.all((one.effect_low < -0.02) & (one.effect_high > 0.02))


def test_superiority_is_what_counting_pairs_gives():
    t = table({"sft": 0.0, "rl": 0.0}, n=41, noise=0.05)
    t.nrn_l1[0] += 0.02  # the scale of a whole view is taken off
    clusters = {"sft": np.repeat(np.arange(21), 2)[:41], "rl": np.arange(41)}
    one = final(contrast(t, clusters))
    lean = [np.log(x / (1 - x)) for x in t.nrn_l1.values]
    lean = [x - np.median(x) for x in lean]
    size = np.bincount(clusters["sft"])[clusters["sft"]]
    total = weight = 0.0
    for k in np.flatnonzero(lean[0] >= 0):
        for j in np.flatnonzero(lean[1] >= 0):
            weight += 1 / size[k]
            total += (1.0 if lean[0][k] > lean[1][j] else 0.5 if lean[0][k] == lean[1][j] else 0.0) / size[k]
    assert one.superiority.item() == pytest.approx(total / weight)
    assert one.superiority_low.item() < total / weight < one.superiority_high.item()


def test_superiority_sees_what_lies_below_every_threshold():
    t = table({"sft": 0.0, "rl": 0.0}, noise=0.01)
    t.nrn_l1[0] = 0.5 + 3 * (t.nrn_l1[0] - 0.5)
    one = final(contrast(t))
    assert one.effect.values.tolist() == [0.0, 0.0]
    assert one.superiority_low.item() > 0.6


def test_the_variance_between_dictionaries_is_in_the_interval():
    """Three dictionaries with shares that differ by far more than their features tell."""
    shares = {"sft": 0.3, "sft.2": 0.5, "sft.3": 0.1, "rl": 0.1, "rl.2": 0.1, "rl.3": 0.1}
    number = {name: int(name[-1]) for name in shares if "." in name}
    targets = {name: f"{name.split('.')[0]}@10" for name in shares}
    t = table(shares, targets=targets, dictionaries=number)
    out = validate(contrast(t), "attribution_contrast")
    one, alone = final(out), final(contrast(table({"sft": 0.3, "rl": 0.1})))
    each = [tail(t, f"sft{d}") - tail(t, f"rl{d}") for d in ("", ".2", ".3")]
    assert one.effect_each.sel(tau=0.7).values == pytest.approx(each)
    assert one.effect.values == pytest.approx(np.mean(each))
    assert alone.effect_low.values[0] > 0
    assert one.effect_low.values[0] < 0, "two of the three could come out either way"


def test_three_runs_an_arm_are_permuted():
    shares = {"s1": 0.3, "s2": 0.25, "s3": 0.35, "r1": 0.1, "r2": 0.12, "r3": 0.05}
    t = table(shares)
    out = contrast(t, sft=["s1", "s2", "s3"], rl=["r1", "r2", "r3"], taus=(0.7,))
    mass = np.array([tail(t, name) for name in shares])
    observed = mass[:3].mean() - mass[3:].mean()
    slow = [
        abs(mass[list(c)].mean() - np.delete(mass, list(c)).mean()) >= observed - 1e-9
        for c in combinations(range(6), 3)
    ]
    assert final(out).effect.item() == pytest.approx(observed)
    assert final(out).p_value.item() == pytest.approx(np.mean(slow)) == pytest.approx(0.1)
    assert out.attrs["unit"] == "run"


def test_two_runs_an_arm_are_not_enough_to_permute():
    t = table({"s1": 0.3, "s2": 0.25, "s3": 0.35, "r1": 0.1, "r2": 0.12})
    out = contrast(t, sft=["s1", "s2", "s3"], rl=["r1", "r2"], taus=(0.7,))
    assert out.attrs["scope"] == "these two models differ (3 SFT and 2 RL run(s))"
    assert out.attrs["unit"].startswith("cluster of features")


def test_a_feature_is_specific_above_seven_and_nine_tenths():
    """Twenty features each just below and just above either threshold, of 400."""
    t = table({"sft": 0.0, "rl": 0.0})
    for i, nrn in enumerate((0.695, 0.705, 0.895, 0.905)):
        t["nrn_l1"][0, 20 * i : 20 * (i + 1)] = nrn
    one = final(contrast(t))
    assert one.tail_sft.values == pytest.approx([60 / 400, 20 / 400])
    assert one.tau.values.tolist() == [0.7, 0.9]


# -- at equal distance from base ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shifts", "comparison", "message"),
    [
        ({"sft@10": 1.0, "rl@10": 0.8}, "final", "COMPARABLE: activation shift from base 1 (SFT) and 0.8 (RL), within"),
        ({"sft@10": 1.0, "rl@10": 0.79}, "final", "NOT_COMPARABLE: .*differ by more than a factor 1.25"),
        (
            {"sft@10": 1.0, "rl@10": 0.8},
            "matched_shift",
            "COMPARABLE: at activation shift 0.8 from base, sft as sft@10",
        ),
        ({"sft@5": 0.2, "sft@10": 1.0, "rl@10": 0.6}, "matched_shift", "NOT_COMPARABLE: .*views \\[base@0, sft@5\\]"),
        ({"sft@2": 0.1, "sft@5": 0.7, "sft@10": 1.0, "rl@10": 0.6}, "matched_shift", "NOT_COMPARABLE: .*base@0, sft@5"),
        ({"sft@5": 0.8, "sft@10": 1.0, "rl@10": 0.3}, "matched_shift", "NOT_COMPARABLE: .*schedule: geometric"),
        ({"sft@10": 1.0}, "final", "NOT_COMPARABLE: no activation shift is recorded for rl@10"),
        ({"sft@10": 1.0}, "matched_shift", "NOT_COMPARABLE: the activation shift of a run is not known or zero"),
        (
            {"sft@10": 1.0, "rl@10": 0.0},
            "matched_shift",
            "NOT_COMPARABLE: the activation shift of a run is not known or",
        ),
    ],
)
def test_which_distances_can_be_compared(shifts, comparison, message):
    t = table({"sft": 0.3, "rl": 0.1})
    out = contrast(t, movement=movement(shifts), health=health(t))
    text = str(out.comparable.sel(comparison=comparison).item())
    expected = message.replace("(SFT)", r"\(SFT\)").replace("(RL)", r"\(RL\)")
    assert re.match(expected, text), text


SHIFTS = {"sft@3": 0.1, "sft@10": 0.4, "rl@5": 0.1, "rl@10": 0.2}
TARGETS = {"early": "sft@3", "late": "sft@10", "rl": "rl@10"}


def drifting(seed=0):
    """Specific features are a matter of distance alone: 5% at a shift of .1, 15% at .2, 25% at .4."""
    return table({"early": 0.05, "late": 0.25, "rl": 0.15}, n=2000, seed=seed, targets=TARGETS)


def test_a_run_is_interpolated_to_the_others_distance_on_the_log_scale():
    t = drifting()
    out = validate(contrast(t, movement=movement(SHIFTS), health=health(t)), "attribution_contrast")
    assert out.attrs["decided_by"] == "matched_shift"
    one = out.sel(comparison="matched_shift", tau=0.7)
    # .2 lies half way from .1 to .4 in logarithms
    assert one.tail_sft.item() == pytest.approx((tail(t, "early") + tail(t, "late")) / 2)
    assert one.tail_rl.item() == pytest.approx(tail(t, "rl"))
    assert one.distance_sft.item() == one.distance_rl.item() == 0.2
    assert "sft as 50% sft@3 and 50% sft@10 and rl as rl@10" in str(one.comparable.item())
    assert one.effect_low.item() < 0 < one.effect_high.item()
    assert out.sel(comparison="final", tau=0.7).effect_low.item() > 0.05, "what the final models alone would say"


def test_the_verdict_of_a_drift_without_a_cause_is_not_that_of_the_final_models():
    t = drifting()
    out = contrast(t, movement=movement(SHIFTS), health=health(t))
    verdicts = {}
    for comparison in ("final", "matched_shift"):
        one = out.sel(comparison=comparison, tau=0.7)
        interval = tuple(float(one[f"effect{end}"]) for end in ("", "_low", "_high"))
        shares = (float(one.tail_sft), float(one.tail_rl), 0.0)
        verdicts[comparison], _ = specificity_verdict(interval, float(one.p_value), shares, alpha=0.05, comparable=True)
    assert verdicts["final"] is Verdict.SUPPORTED
    assert verdicts["matched_shift"] is not Verdict.SUPPORTED


def test_distances_are_matched_by_divergence_too():
    t = drifting()
    kl = {"sft@3": 0.01, "sft@10": 0.81, "rl@5": 0.001, "rl@10": 0.27}  # .27 is 3/4 of the way from .01 to .81
    out = contrast(t, movement=movement(SHIFTS, kl), health=health(t))
    one = out.sel(comparison="matched_kl", tau=0.7)
    assert one.tail_sft.item() == pytest.approx(0.25 * tail(t, "early") + 0.75 * tail(t, "late"))
    assert one.distance_rl.item() == 0.27
    assert "at KL 0.27 from base, sft as 25% sft@3 and 75% sft@10" in str(one.comparable.item())


def test_noise_larger_than_the_distance_compared_at_is_no_floor_there():
    """At a shift of .2, noise of .4 says nothing; noise of .2, and within a factor 1.25 of it, does."""
    shares = {"early": 0.05, "late": 0.25, "rl": 0.15, "by sft": 0.3, "by rl": 0.1, "halves": 0.02}
    targets = TARGETS | {"by sft": "sft.noise@10", "by rl": "rl.noise@10", "halves": "base.halves@0"}
    t = table(shares, n=2000, targets=targets)
    floors = {name: [name] for name in ("by sft", "by rl", "halves")}
    out = validate(contrast(t, floors=floors, movement=movement(SHIFTS), health=health(t)), "attribution_contrast")
    assert out.tail_null.sel(tau=0.7, comparison="final").item() == pytest.approx(tail(t, "by sft"))
    assert out.tail_null.sel(tau=0.7, comparison="matched_shift").item() == pytest.approx(tail(t, "by rl"))
    for shift, name in ((0.249, "by sft"), (0.251, "by rl")):
        near = contrast(t, floors=floors, movement=movement(SHIFTS | {"sft@10": shift}), health=health(t))
        assert near.tail_null.sel(tau=0.7, comparison="matched_shift").item() == pytest.approx(tail(t, name))
    only = contrast(t, floors={"by sft": ["by sft"]}, movement=movement(SHIFTS), health=health(t))
    assert np.isnan(only.tail_null.sel(comparison="matched_shift")).all()


def test_a_comparison_that_is_not_made_has_no_floor_and_noise_of_unknown_size_is_none():
    targets = TARGETS | {"by sft": "sft.noise@10", "by rl": "rl.noise@10", "halves": "base.halves@0"}
    t = table({"early": 0.05, "late": 0.25, "rl": 0.15, "by sft": 0.3, "by rl": 0.1, "halves": 0.02}, targets=targets)
    floors = {name: [name] for name in ("by sft", "by rl", "halves")}
    alone = contrast(t, floors=floors, movement=movement({"rl@10": 0.2, "sft@10": 0.4}), health=health(t))
    made = np.isfinite(alone.tail_sft.sel(tau=0.7))
    assert 0 < made.sum() < made.size
    assert (np.isfinite(alone.tail_null.sel(tau=0.7)) == made).all()
    kl = {"sft@3": 0.01, "sft@10": 0.81, "rl@5": 0.001, "rl@10": 0.27}
    for noise, floor in ((0.33, "by sft"), (0.34, "halves"), (np.nan, "halves")):
        known = contrast(
            t.assign_coords(target=t.target.where(t.crosscoder != "by sft", "other.noise@10")),
            floors={name: [name] for name in ("by sft", "halves")},
            movement=movement(SHIFTS | {"other@10": 0.5}, kl | {"other@10": noise}),
            health=health(t),
        )
        assert known.tail_null.sel(tau=0.7, comparison="matched_kl").item() == pytest.approx(tail(t, floor))


@pytest.mark.parametrize(("shift", "holds"), [(0.249, True), (0.251, False), (np.nan, False)])
def test_a_floor_run_counts_where_it_is_no_farther_from_base_than_the_arms(shift, holds):
    """The arms are compared at a shift of .2; the final models, one of which is at .4, are farther than the floor."""
    t = table({"early": 0.05, "late": 0.25, "rl": 0.15, "aside": 0.3}, n=2000, targets=TARGETS | {"aside": "aside@40"})
    moved = movement(SHIFTS | {"aside@40": shift})
    out = contrast(t, floors={"the floor run aside@40": ["aside"]}, movement=moved, health=health(t))
    at_shift = out.tail_null.sel(tau=0.7, comparison="matched_shift").item()
    np.testing.assert_allclose(at_shift, tail(t, "aside") if holds else np.nan)
    final_too = np.isfinite(shift)
    np.testing.assert_allclose(final(out).tail_null.sel(tau=0.7), tail(t, "aside") if final_too else np.nan)


def test_only_the_first_of_two_crosscoders_of_one_checkpoint_is_used():
    t = table({"sft": 0.3, "rl": 0.1, "sft-l1": 0.9}, targets={"sft-l1": "sft@10"})
    assert final(contrast(t)).tail_sft.values == pytest.approx(tail(t, "sft"))
    assert final(contrast(t)).effect_each.sizes["dictionary"] == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rl": (0.851, 10, 0.1)}, ""),
        ({"rl": (0.849, 10, 0.1)}, "FVE differs"),
        ({"rl": (0.9, 12.5, 0.1)}, ""),
        ({"rl": (0.9, 12.6, 0.1)}, "L0"),
        ({"rl": (0.9, 10, 0.199)}, ""),
        ({"rl": (0.9, 10, 0.201)}, "dead"),
    ],
)
def test_parity_of_fit(other, message):
    t = table({"sft": 0.3, "rl": 0.1})
    out = contrast(t, movement=movement(EQUAL), health=health(t, **other))
    text = str(out.comparable.sel(comparison="final").item())
    assert text.startswith("NOT_COMPARABLE" if message else "COMPARABLE"), text
    assert message in text


def test_without_movement_or_health_nothing_is_called_comparable():
    out = contrast(table({"sft": 0.3, "rl": 0.1}))
    assert all(str(text).startswith("NOT_COMPARABLE") for text in out.comparable.values)
    assert np.isfinite(final(out).effect).all()
    assert np.isnan(out.effect.sel(comparison="matched_shift")).all()


def test_decoders_are_clustered_here():
    rng = np.random.default_rng(0)
    t = table({"sft": 0.3, "rl": 0.1}, n=20)
    decoder = rng.normal(0, 1, (2, 20, 30))
    decoder[:, 10:] = decoder[:, :1]
    d = xr.Dataset({"decoder": (("view", "feature", "channel"), decoder)}, coords={"view": ["base@0", "x@1"]})
    out = contrast(t, {"sft": d, "rl": d}, n_bootstrap=99)
    assert final(out).n_clusters_sft.item() == pytest.approx(10)


def test_errors():
    t = table({"sft": 0.3, "rl": 0.1})
    with pytest.raises(InputError, match="run 'dpo' has no crosscoder with base in the attribution table"):
        contrast(t, rl="dpo")
    with pytest.raises(InputError, match="crosscoder 'rl' has no clusters"):
        contrast(t, {"sft": np.arange(400)})
    turned = t.assign_coords(original=("crosscoder", np.array(["base@0", "sft@10"])))
    with pytest.raises(InputError, match="run 'rl' has no crosscoder with base"):
        contrast(turned)
