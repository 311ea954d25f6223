from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import attribution_contrast


def table(shares, n=400, seed=0, steps=None):
    """Attribution table in which a share of each crosscoder's features has NRN .95, the rest .5."""
    rng = np.random.default_rng(seed)
    nrn = np.stack([np.where(rng.random(n) < share, 0.95, 0.5) for share in shares.values()])
    targets = [f"{name}@{(steps or {}).get(name, 10)}" for name in shares]
    dims = ("crosscoder", "feature")
    return xr.Dataset(
        dict.fromkeys(("nrn_l1", "nrn_l2"), (dims, nrn)) | {"alive": (dims, np.ones_like(nrn, dtype=bool))},
        coords={"crosscoder": np.array(list(shares)), "target": ("crosscoder", np.array(targets))},
    )


def singletons(t):
    return {str(name): np.arange(t.sizes["feature"]) for name in t.crosscoder.values}


def movement(shifts):
    models = list(shifts)
    return xr.Dataset(
        {"activation_shift": ("model", np.array(list(shifts.values())))},
        coords={
            "model": np.array(models),
            "run": ("model", np.array([m.split("@")[0] for m in models])),
            "step": ("model", np.array([int(m.split("@")[1]) for m in models])),
        },
    )


def health(names, fve=0.9, l0=10.0, dead=0.1, **other):
    rows = [other.get(name, (fve, l0, dead)) for name in names]
    views = np.array([f"{name}@10" for name in names])
    values = np.full((len(names), len(views)), np.nan)
    np.fill_diagonal(values, [r[0] for r in rows])
    return xr.Dataset(
        {
            "fve": (("crosscoder", "view"), values),
            "l0": ("crosscoder", [r[1] for r in rows]),
            "dead_fraction": ("crosscoder", [r[2] for r in rows]),
        },
        coords={"crosscoder": np.array(names), "view": views},
    )


def contrast(t, **options):
    return attribution_contrast(t, singletons(t), **({"sft": "sft", "rl": "rl", "n_bootstrap": 499} | options))


def test_masses_floor_and_layout():
    t = table({"sft": 0.3, "rl": 0.1, "null": 0.02})
    out = validate(contrast(t, movement=movement({"sft@10": 1.0, "rl@10": 1.0})), "attribution_contrast")
    masses = {name: float((t.nrn_l1.sel(crosscoder=name) > 0.7).mean()) for name in ("sft", "rl", "null")}
    assert out.tail_sft.values == pytest.approx(masses["sft"])
    assert out.effect.values == pytest.approx(masses["sft"] - masses["rl"])
    assert out.excess_rl.values == pytest.approx(masses["rl"] - masses["null"])
    assert np.all((out.effect_low < 0.2) & (out.effect_high > 0.2))
    assert np.all(out.p_value < 0.01)
    assert "these two models" in out.attrs["scope"]


def test_features_that_latent_scaling_refutes_are_counted_apart():
    """All of SFT's specific features are artefacts, none of RL's."""
    t = table({"sft": 0.3, "rl": 0.1, "null": 0.02})
    agrees = np.ones_like(t.alive.values)
    agrees[0] = False
    t["scaling_agrees"] = (("crosscoder", "feature"), agrees)
    plain, out = contrast(t.drop_vars("scaling_agrees")), validate(contrast(t), "attribution_contrast")
    for name in plain.data_vars:
        xr.testing.assert_identical(out[name], plain[name])
    assert (out.agreed_tail_sft == 0).all()
    np.testing.assert_array_equal(out.agreed_tail_rl, out.tail_rl)
    assert (out.agreed_effect_high < 0).all()
    assert (out.agreed_p_value < 0.01).all()
    assert (out.effect_low > 0).all()


def test_single_features_would_be_overconfident():
    """A hundred copies of one direction are one piece of evidence."""
    t = table({"sft": 0.0, "rl": 0.0, "null": 0.0})
    t.nrn_l1[0, :100] = 0.95
    alone = contrast(t)
    copies = np.concatenate([np.zeros(100, dtype=int), np.arange(1, 301)])
    clustered = attribution_contrast(
        t, singletons(t) | {"sft": copies}, sft="sft", rl="rl", n_bootstrap=499, taus=(0.7,)
    )
    assert alone.p_value.values[0] < 0.01
    assert clustered.p_value.values[0] > 0.3


def test_a_share_is_resampled_as_a_share():
    """Clusters of unequal size that all hit have mass 1 in every draw."""
    t = table({"sft": 1.0, "rl": 0.5}, n=60)
    sizes = np.repeat(np.arange(6), [1, 2, 4, 8, 15, 30])
    out = attribution_contrast(t, {"sft": sizes, "rl": sizes}, sft="sft", rl="rl", null=None, n_bootstrap=2999)
    assert out.tail_sft_low.values == pytest.approx(1)
    assert out.tail_sft_high.values == pytest.approx(1)
    # and otherwise as numerator and denominator together
    nrn = t.nrn_l1.values[1] > 0.7
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(3000):
        members = np.concatenate([np.flatnonzero(sizes == c) for c in rng.integers(0, 6, 6)])
        draws.append(nrn[members].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    assert out.tail_rl_low.values[0] == pytest.approx(low, abs=0.06)
    assert out.tail_rl_high.values[0] == pytest.approx(high, abs=0.06)


def test_coverage_of_the_cluster_bootstrap():
    hits, sims = 0, 120
    for s in range(sims):
        out = contrast(table({"sft": 0.3, "rl": 0.2}, n=150, seed=s), null=None, taus=(0.7,), n_bootstrap=199, seed=s)
        hits += float(out.effect_low[0]) <= 0.1 <= float(out.effect_high[0])
    assert abs(hits / sims - 0.95) < 3 * np.sqrt(0.95 * 0.05 / sims) + 0.01


def test_no_specific_feature_anywhere_is_not_certainty():
    out = contrast(table({"sft": 0.0, "rl": 0.0, "null": 0.0}, n=50))
    assert np.all(out.p_value == 1.0)
    assert np.all((out.effect_low < -0.02) & (out.effect_high > 0.02))


def test_three_runs_an_arm_are_permuted():
    shares = {"s1": 0.3, "s2": 0.25, "s3": 0.35, "r1": 0.1, "r2": 0.12, "r3": 0.05}
    t = table(shares)
    out = contrast(t, sft=["s1", "s2", "s3"], rl=["r1", "r2", "r3"], null=None, taus=(0.7,))
    mass = np.array([float((t.nrn_l1.sel(crosscoder=name) > 0.7).mean()) for name in shares])
    observed = mass[:3].mean() - mass[3:].mean()
    slow = [
        abs(mass[list(c)].mean() - np.delete(mass, list(c)).mean()) >= observed - 1e-9
        for c in combinations(range(6), 3)
    ]
    assert float(out.p_value[0]) == pytest.approx(np.mean(slow)) == pytest.approx(0.1)
    assert out.attrs["unit"] == "run"


@pytest.mark.parametrize(
    ("shifts", "message"),
    [
        ({"sft@10": 1.0, "rl@10": 0.9}, "COMPARABLE: "),
        ({"sft@5": 0.2, "sft@10": 1.0, "rl@10": 0.6}, "NOT_COMPARABLE: .*passes 0.6 near step 8"),
        ({"sft@5": 0.8, "sft@10": 1.0, "rl@10": 0.3}, "NOT_COMPARABLE: .*ranges do not overlap"),
        ({"sft@10": 1.0}, "NOT_COMPARABLE: .*no activation shift is recorded for rl@10"),
    ],
)
def test_matched_drift(shifts, message):
    t = table({"sft": 0.3, "rl": 0.1, "null": 0.0})
    out = contrast(t, movement=movement(shifts), health=health(["sft", "rl", "null"]))
    assert re.match(message, str(out.comparable.values[0])), out.comparable.values[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [({"rl": (0.8, 10, 0.1)}, "FVE differs"), ({"rl": (0.9, 20, 0.1)}, "L0"), ({"rl": (0.9, 10, 0.4)}, "dead")],
)
def test_parity_of_fit(other, message):
    t = table({"sft": 0.3, "rl": 0.1, "null": 0.0})
    out = contrast(t, movement=movement({"sft@10": 1.0, "rl@10": 1.0}), health=health(["sft", "rl"], **other))
    assert str(out.comparable.values[0]).startswith("NOT_COMPARABLE")
    assert message in str(out.comparable.values[0])


def test_without_movement_or_health_nothing_is_called_comparable():
    out = contrast(table({"sft": 0.3, "rl": 0.1, "null": 0.0}))
    assert str(out.comparable.values[0]).startswith("NOT_COMPARABLE")


def test_decoders_are_clustered_here():
    rng = np.random.default_rng(0)
    t = table({"sft": 0.3, "rl": 0.1}, n=20)
    decoder = rng.normal(0, 1, (2, 20, 30))
    decoder[:, 10:] = decoder[:, :1]
    d = xr.Dataset({"decoder": (("view", "feature", "channel"), decoder)}, coords={"view": ["base@0", "x@1"]})
    out = attribution_contrast(t, {"sft": d, "rl": d}, sft="sft", rl="rl", null=None, n_bootstrap=99)
    assert out.n_clusters_sft.values.tolist() == [10, 10]


def test_errors():
    t = table({"sft": 0.3, "rl": 0.1})
    with pytest.raises(InputError, match="crosscoder 'null' is not in the attribution table"):
        contrast(t)
    with pytest.raises(InputError, match="crosscoder 'rl' has no clusters"):
        attribution_contrast(t, {"sft": np.arange(400)}, sft="sft", rl="rl", null=None)
