"""Simulated studies: what is planted is there, nothing else is, and nothing depends on how it is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.stores import open_features, open_outcomes, open_results, verify
from rlgen_stats.toolkit.statistics import SelectionTests, drift_test, select_features, stabilization_test
from rlgen_stats.toolkit.statistics.planning import simulate as module
from rlgen_stats.toolkit.statistics.planning.planted_truth import KINDS, Simulation, d_z_of, plant_truth, shift_of
from rlgen_stats.toolkit.statistics.planning.simulate import simulate_features, write_simulation

SMALL = Simulation(n_prompts=120, n_features=640, runs=1, checkpoints=2, seed=3)


def difference(study, model="rl1@40"):
    mean = study.features["mean"]
    return (mean.sel(model=model) - mean.sel(model="base@0")).values.astype(np.float64)


def test_layouts_and_sizes():
    study = simulate_features(SMALL)
    validate(study.features, "features")
    validate(study.outcomes, "outcomes")
    assert study.features.model.values.tolist() == ["base@0", "sft1@20", "sft1@40", "rl1@20", "rl1@40"]
    assert study.features.arm.values.tolist() == ["base", "sft", "sft", "rl", "rl"]
    kinds = {name: int((study.truth.kind == name).sum()) for name in KINDS}
    assert kinds == {"null": 480, "dead": 64, "drifting": 64, "generalising": 13, "narrow": 6, "decoy": 13}
    labels = zip(*(study.features[name].values for name in ("cluster", "task", "split")), strict=True)
    clusters = set(labels)
    assert len(clusters) == len(set(study.features.cluster.values)) == 30, "a cluster has one task and one split"
    assert set(study.features.task.values) == {"in1", "out1", "out2", "out3"}


def test_shift_and_d_z_are_inverse_and_simulated():
    d_z = np.array([-0.4, 0.0, 0.1, 0.3])
    for density in (0.2, 1.0):
        shift = shift_of(d_z, density)
        assert d_z_of(shift, density) == pytest.approx(d_z)
        random = np.random.default_rng(0)
        d = np.where(random.random(10**6) < density, random.normal(shift[3], np.sqrt(0.6), 10**6), 0.0)
        assert d.mean() / d.std() == pytest.approx(0.3, abs=0.005)


def test_planted_effects_have_their_size():
    study = simulate_features(replace(SMALL, n_prompts=2000, n_features=1024, run_sd=0.1))
    d = difference(study)
    kind = study.truth.kind.values
    observed = np.divide(d.mean(axis=0), d.std(axis=0), out=np.zeros(len(kind)), where=d.std(axis=0) > 0)
    truth = study.truth.d_z.sel(model="rl1@40").values
    for name in ("drifting", "generalising"):
        of_kind = kind == name
        assert 0.2 < np.abs(truth[of_kind]).mean() < 0.4
        # ICC .1 in clusters of 4 that fire together: a standard error of about sqrt(1.3 / 2000)
        assert np.abs(observed - truth)[of_kind].max() < 5 * np.sqrt(1.3 / 2000)
        assert np.std(observed[of_kind] - truth[of_kind]) < 1.5 * np.sqrt(1.3 / 2000)
        change = study.truth.mean_change.sel(model="rl1@40").values[of_kind]
        assert d.mean(axis=0)[of_kind] == pytest.approx(change, abs=0.25)
    assert (truth[kind == "generalising"] > 0).all()
    assert (study.truth.d_z.sel(model="sft1@40").values[kind == "generalising"] == 0).all()
    narrow = np.flatnonzero(kind == "narrow")
    inside = study.features.domain.values == "in"
    assert np.abs(d[~inside][:, narrow].mean(axis=0)).max() < 0.3
    per_domain = d[inside][:, narrow]
    assert per_domain.mean(axis=0) / per_domain.std(axis=0) == pytest.approx(truth[narrow], abs=0.2)


def test_changes_settle_when_the_truth_says():
    world = replace(SMALL, n_prompts=400, checkpoints=5, run_sd=0.0)
    study = simulate_features(world)
    truth = study.truth.isel(feature=np.flatnonzero(study.truth.kind == "drifting"))
    for arm, latest in (("sft", 40), ("rl", 100)):
        settles = truth.settles_at.sel(arm=arm).values
        assert settles.max() == latest
        final = truth.mean_change.sel(model=f"{arm}1@100").values
        # What is found, averaged over features in the direction of their change, follows the planted course.
        d = np.stack([difference(study, f"{arm}1@{step}") for step in range(20, 101, 20)])[:, :, truth.feature.values]
        for c, step in enumerate(range(20, 101, 20)):
            planted = truth.mean_change.sel(model=f"{arm}1@{step}").values
            assert planted == pytest.approx(final * np.minimum(step / settles, 1.0), rel=1e-5)
            observed = (np.sign(final) * d[c].mean(axis=0) / truth.scale.values).mean()
            assert observed == pytest.approx((np.abs(planted) / truth.scale.values).mean(), abs=0.02)


def test_dependence_is_as_declared():
    study = simulate_features(
        Simulation(
            n_prompts=4000,
            n_features=64,
            drifting=0,
            generalising=0,
            narrow=0,
            decoys=0,
            dead=0.25,
            density=0.5,
            icc=0.4,
            correlation=0.5,
            group=8,
            runs=1,
            checkpoints=1,
            seed=1,
        )
    )
    d = difference(study, "rl1@20")
    alive = study.truth.kind.values != "dead"
    assert (d[:, ~alive] == 0).all()
    assert (study.features["mean"].values[..., ~alive] == 0).all()
    assert (study.features.firing.values[0][:, alive] > 0).mean() == pytest.approx(0.5, abs=0.02)
    z = d / study.truth.scale.values
    clusters = z[:, alive].reshape(-1, 4, alive.sum())
    firing = clusters[:, 0] != 0
    pairs = (clusters[:, 0] * clusters[:, 1])[firing].mean() / np.square(clusters)[:, 0][firing].mean()
    assert pairs == pytest.approx(0.4, abs=0.03)
    group = np.flatnonzero(alive[:8])[:2]
    both = (z[:, group] != 0).all(axis=1)
    assert np.corrcoef(z[both][:, group].T)[0, 1] == pytest.approx(0.5, abs=0.1)
    far = np.flatnonzero(alive)[[0, -1]]
    both = (z[:, far] != 0).all(axis=1)
    assert abs(np.corrcoef(z[both][:, far].T)[0, 1]) < 0.12


def test_the_null_is_symmetric_and_uniform():
    world = replace(
        SMALL,
        n_prompts=200,
        n_features=1024,
        drifting=0,
        generalising=0,
        narrow=0,
        decoys=0,
        correlation=0.0,
        icc=0.3,
        density=0.8,
    )
    features = simulate_features(world).features
    with dask.config.set(scheduler="synchronous"):
        p = drift_test(features, models=["rl1@40"], clusters="cluster", n_resamples=9, n_bootstrap=9).p_value.values[0]
    p = p[np.isfinite(p)]
    half = 3 * np.sqrt(0.05 * 0.95 / len(p))
    assert abs((p <= 0.05).mean() - 0.05) < half
    assert stats.kstest(p, "uniform").pvalue > 0.001


def test_decoys_correlate_with_correctness_and_do_not_change():
    trap = replace(
        SMALL,
        n_prompts=6000,
        n_features=16,
        drifting=0,
        generalising=0,
        narrow=0,
        decoys=1,
        dead=0,
        gain=0,
        density=1.0,
        outcome_correlation=0.2,
    )
    study = simulate_features(trap)
    right = study.outcomes.greedy_correct.values
    for m in (0, 4):
        x = study.features["mean"].values[m]
        correlations = [np.corrcoef(right[m], x[:, k])[0, 1] for k in range(16)]
        assert np.mean(correlations) == pytest.approx(0.2, abs=0.02)
    d = difference(study)
    assert np.abs(d.mean(axis=0) / d.std(axis=0)).max() < 0.06
    gain = (right[0] == 0) & (right[4] == 1)
    assert (d[gain].mean(axis=0) / d[gain].std(axis=0)).min() > 0.2


def test_accuracy_is_as_declared():
    study = simulate_features(replace(SMALL, n_prompts=8000, n_features=1, samples=2))
    by_domain = study.outcomes.greedy_correct.groupby("domain").mean("prompt")
    assert by_domain.sel(model="base@0").values == pytest.approx([0.4, 0.4], abs=0.03)
    assert by_domain.sel(model="sft1@40").sel(domain=["in", "out"]).values == pytest.approx([0.6, 0.4], abs=0.03)
    assert by_domain.sel(model="rl1@40").values == pytest.approx([0.6, 0.6], abs=0.03)
    assert study.outcomes.correct.mean(("prompt", "sample")).values[-1] == pytest.approx(0.6, abs=0.03)


def test_analyses_find_the_planted_truth():
    world = Simulation(
        n_prompts=1600,
        n_features=256,
        density=1.0,
        effect=0.6,
        icc=0.0,
        cluster_size=1,
        decoys=0.1,
        outcome_correlation=0.25,
        drifting=0.2,
        generalising=0.1,
        gain=0.2,
        runs=1,
        checkpoints=5,
        tasks_out=1,
        samples=1,
        run_sd=0.0,
        seed=5,
    )
    study = simulate_features(world)
    kind = study.truth.kind.values
    with dask.config.set(scheduler="synchronous"):
        drift = drift_test(study.features, models=["rl1@100"], n_resamples=49, n_bootstrap=9).compute()
        # Holm over some 50 candidates needs permutation p-values below .001.
        tests = SelectionTests(n_resamples=2999, n_bootstrap=9)
        chosen = select_features(study.features, study.outcomes, target="rl1@100", tests=tests)
        settled = stabilization_test(
            study.features, runs=["sft1"], relative=True, margin=0.4, persist=0.2, n_bootstrap=5
        ).compute()
    drifting = drift.call.values[0] == "DRIFT"
    assert drifting[np.isin(kind, ("drifting", "generalising"))].mean() > 0.99
    assert not drifting[kind == "dead"].any()
    assert (drifting & (kind == "null")).sum() < 0.12 * drifting.sum(), "BH at .05 in one world"
    confirmed = chosen.tier.values == "CONFIRMED"
    # Rising in every task is what the selection asks for; drifting features that rise do so in rl as in sft.
    rises = (kind == "generalising") | ((kind == "drifting") & (study.truth.d_z.sel(model="rl1@100").values > 0))
    assert confirmed[rises].mean() > 0.8
    assert confirmed[~rises].mean() < 0.02
    planted = kind == "drifting"
    early = study.truth.settles_at.sel(arm="sft").values[planted]
    assert set(early) == {20.0, 40.0}
    settled_at = settled.stabilized_at.values[0][planted]
    assert np.isfinite(settled_at).mean() > 0.7
    # Shown to be settled before it was: an equivalence error, at most alpha each.
    assert (settled_at < early - 20).mean() <= 0.05


def test_lazy_and_the_same_whatever_is_computed(no_compute, monkeypatch):
    with no_compute():
        study = simulate_features(SMALL)
    whole = study.features["mean"].values
    assert np.array_equal(study.features["mean"][3, :, 100:110].values, whole[3, :, 100:110])
    with dask.config.set(scheduler="threads", num_workers=4):
        assert np.array_equal(study.features["mean"].values, whole)
    wide = simulate_features(replace(SMALL, n_features=1024, dead=0.0)).features.firing[1].values
    assert (wide[:, :512] == wide[:, 512:]).mean() < 0.8, "every block has streams of its own"
    # A study with fewer runs or checkpoints is part of one with more.
    more = simulate_features(replace(SMALL, runs=2)).features
    assert np.array_equal(more["mean"].sel(model="base@0").values, whole[0])
    assert not np.array_equal(simulate_features(replace(SMALL, seed=4)).features["mean"].values, whole)
    calls = []
    original = module._block
    monkeypatch.setattr(module, "_block", lambda *args: calls.append(args) or original(*args))
    study = simulate_features(SMALL)
    with dask.config.set(scheduler="synchronous"):
        study.features["mean"][0, :, :512].load()
    assert len(calls) == 1


@pytest.mark.slow
def test_written_and_resumed(tmp_path: Path, monkeypatch):
    calls = 0
    append = module.append_model

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        append(*args, **kwargs)

    monkeypatch.setattr(module, "append_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_simulation(tmp_path / "cut", SMALL)
    monkeypatch.setattr(module, "append_model", append)
    done = write_simulation(tmp_path / "cut", SMALL)
    assert (done.n_models, done.n_resumed) == (5, 3)
    again = write_simulation(tmp_path / "cut", SMALL)
    assert again.n_resumed == 5
    write_simulation(tmp_path / "whole", SMALL)
    study = simulate_features(SMALL)
    for folder in ("cut", "whole"):
        features = open_features(tmp_path / folder / "features.zarr")
        for name in ("mean", "firing", "max"):
            assert np.array_equal(features[name].values, study.features[name].values)
        outcomes = open_outcomes(tmp_path / folder / "outcomes.zarr")
        assert np.array_equal(outcomes.correct.values, study.outcomes.correct.values)
        truth = open_results(tmp_path / folder / "results.zarr", "truth")
        assert truth.kind.values.tolist() == plant_truth(SMALL).kind.tolist()
        assert truth.attrs["effect"] == 0.3
        assert verify(tmp_path / folder / "features.zarr").ok
    with pytest.raises(StoreError, match="was written for another study"):
        write_simulation(tmp_path / "whole", replace(SMALL, seed=9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drifting": 0.9, "dead": 0.2}, "add up to at most 1"),
        ({"effect": 2.0}, r"effect d_z=2.0 cannot be planted at density 0.25: .* lower the effect"),
        ({"icc": 1.0}, r"icc must lie in \[0, 1\), got 1.0"),
        ({"density": 0.0}, "expected 0 < density <= 1"),
        ({"accuracy": 0.9}, r"accuracy \+ gain must lie in \(0, 1\)"),
        ({"runs": 0}, "runs is too small; expected at least 1"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(InputError, match=message):
        Simulation(**settings)
