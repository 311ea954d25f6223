"""Every public statistic runs on arrays of one's own, without a study folder, and gives what is declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit import statistics as st
from rlgen_stats.toolkit.statistics.claim_verdicts import EQUAL_KL, NO_NULL, NOT_COMPARABLE, SelectionReason, Verdict
from rlgen_stats.toolkit.statistics.selection.discordance import CONTRAST
from rlgen_stats.toolkit.statistics.selection.token_detectors import TokenActivations

N, F = 240, 40
MODELS: Final = ("base@0", "sft@50", "sft@100", "rl@50", "rl@100")
WITHOUT_DATA: Final = {
    *("Design", "detectable_effect", "power_at", "required_prompts", "required_runs", "run_power"),
    *("Simulation", "simulate_features", "write_simulation", "SelectionRule", "SelectionTests", "StabilityOptions"),
}
"""Sample sizes, simulated studies and settings."""
COUNTED: Final = {
    *("effect", "effect_low", "effect_high", "p_value", "effect_each", "tail_null"),
    *(f"tail_{arm}{end}" for arm in ("sft", "rl") for end in ("", "_low", "_high")),
}
"""Variables of a contrast that are there by latent scaling too."""


@dataclass(frozen=True)
class Own:
    """What someone has: numbers of five models on the same prompts, and decoders of two dictionaries a run."""

    features: xr.Dataset
    outcomes: xr.Dataset
    selection: xr.Dataset
    tokens: xr.Dataset
    decoders: dict[str, xr.Dataset]
    sums: xr.Dataset
    timing: xr.Dataset

    @property
    def raw(self) -> xr.Dataset:
        """Raw activations of the same prompts."""
        values = np.random.default_rng(9).normal(size=(len(MODELS), N, 8)) + np.arange(len(MODELS))[:, None, None]
        labels = {"model": self.features.model, "prompt": self.features.prompt}
        return xr.Dataset({"activation": (("model", "prompt", "channel"), values)}, coords=labels)

    def scaling(self) -> tuple[dict[str, xr.Dataset], dict[str, xr.Dataset]]:
        table, share = st.latent_scaling(self.sums), st.attribution(self.decoders["rl"]).mas_l1
        return {"rl": table}, {"rl": st.classify_features(share, table, tau=0.7)}


def decoders(seed: int, target: str, weight: float) -> xr.Dataset:
    rows = np.random.default_rng(seed).normal(size=(2, F, 6)) * np.array([1.0, weight])[:, None, None]
    return xr.Dataset(
        {"decoder": (("view", "feature", "channel"), rows), "firing": ("feature", np.full(F, 0.1))},
        coords={"view": ["base@0", target]},
    )


@pytest.fixture(scope="module")
def own() -> Own:
    rng = np.random.default_rng(1)
    base, rl = rng.random((2, N)) < [[0.4], [0.8]]
    gained = rl & ~base
    level = rng.gamma(4.0, size=(N, F))
    mean = {model: np.maximum(level + rng.normal(0, 0.3, (N, F)), 0) for model in MODELS}
    for model, share in (("rl@50", 0.5), ("rl@100", 1.0)):
        mean[model][gained, :3] += 3 * share
    prompts = pd.DataFrame({"prompt": [f"p{i:03d}" for i in range(N)], "task": ["a", "b"] * (N // 2)})
    features = st.features_dataset(mean, prompts=prompts, scale="contribution")
    right = {"base@0": base, "sft@50": base, "sft@100": base | (rng.random(N) < 0.2), "rl@50": base, "rl@100": rl}
    outcomes = st.outcomes_dataset(right, prompts=features)
    tests = st.SelectionTests(n_resamples=199, n_bootstrap=99)
    selection = st.select_features(features, outcomes, target="rl@final", tests=tests, stability=None)
    chains = st.stabilization_test(features, runs=["sft", "rl"], n_bootstrap=50)
    sets = st.set_stability(features, runs=["sft", "rl"], k=5, n_halvings=10)
    sums = xr.Dataset(
        {
            "squares": (("group", "feature"), rng.gamma(4.0, size=(20, F))),
            "error": (("group", "view", "feature"), rng.gamma(4.0, size=(20, 2, F))),
            "reconstruction": (("group", "view", "feature"), rng.gamma(4.0, size=(20, 2, F))),
            "strongest": ("feature", np.zeros(F, dtype=int)),
            "n_active": ("feature", np.full(F, 80)),
        },
        coords={"view": ["base@0", "rl@100"]},
    )
    tokens = xr.Dataset(
        {"activation": (("model", "token", "channel"), rng.normal(size=(2, 300, 6)))},
        coords={"model": ["base@0", "rl@100"], "prompt": ("token", np.repeat(np.arange(30), 10))},
    )
    timing = st.timing_contrast([chains], [sets], first="sft", second="rl")
    pairs = {"sft": decoders(1, "sft@100", 1.2), "rl": decoders(2, "rl@100", 1.0)}
    return Own(features, outcomes, selection, tokens, pairs, sums, timing)


def graded(own: Own, model: str) -> pd.DataFrame:
    return pd.DataFrame({"prompt": own.outcomes.prompt, "correct": own.outcomes.greedy_correct.sel(model=model)})


def arms(own: Own) -> Any:
    rl, base = (own.outcomes.greedy_correct.sel(model=model).values for model in ("rl@100", "base@0"))
    return st.arms_table({"unedited": rl, "set": base}, base, direction="disable", prompts=own.features)


def contrast(sft: int, rl: int, *, compared: bool = True, floor: bool = True) -> xr.Dataset:
    """Of two runs with so many features of their own, equally far from base, unless that is not said."""
    pairs = {run: own_features(f"{run}@100", n) for run, n in (("sft", sft), ("rl", rl))}
    pairs |= {"null": own_features("base.repeat@0", 0)} if floor else {}
    fits = {name: ("crosscoder", np.full(len(pairs), value)) for name, value in (("l0", 10.0), ("dead_fraction", 0.1))}
    labels = {"crosscoder": list(pairs), "view": ["sft@100", "rl@100"]}
    health = xr.Dataset({"fve": (("crosscoder", "view"), np.full((len(pairs), 2), 0.9))} | fits, coords=labels)
    runs = pd.DataFrame({"model": ["sft@100", "rl@100"], "run": ["sft", "rl"], "activation_shift": 0.3})
    movement = runs.assign(kl_from_base=0.2).set_index("model").to_xarray().set_coords("run")
    known = {"movement": movement, "health": health} if compared else {}
    table = st.attribution_table(pairs)
    floors = {"base read again": ["null"]} if floor else None
    return st.attribution_contrast(table, pairs, sft="sft", rl="rl", floors=floors, n_bootstrap=199, **known)


def own_features(target: str, n: int) -> xr.Dataset:
    """Decoders of base and a model that differ by noise, but for the first n features, which are the model's."""
    rng = np.random.default_rng(n)
    rows = np.repeat(rng.normal(size=(1, 600, 32)), 2, axis=0)
    rows[1] += rng.normal(0, 0.05, (600, 32))
    rows[0, :n] /= 4
    variables = {"decoder": (("view", "feature", "channel"), rows), "firing": ("feature", np.full(600, 0.1))}
    return xr.Dataset(variables, coords={"view": ["base@0", target]})


@pytest.mark.parametrize(
    ("sft", "rl", "compared", "expected"),
    [
        (60, 4, True, (Verdict.SUPPORTED, ())),
        (4, 60, True, (Verdict.CONTRADICTED, ())),
        (0, 0, True, (Verdict.NOT_SUPPORTED, ())),
        (60, 4, False, (Verdict.UNDETERMINED, (NOT_COMPARABLE,))),
    ],
)
def test_the_run_with_more_features_of_its_own_is_named(sft: int, rl: int, compared: bool, expected: Any) -> None:
    assert st.specificity_claim(contrast(sft, rl, compared=compared), alpha=0.05) == expected


def test_a_larger_share_needs_one_of_base_against_itself_to_exceed() -> None:
    assert st.specificity_claim(contrast(60, 4, floor=False), alpha=0.05) == (Verdict.UNDETERMINED, (NO_NULL,))
    assert st.specificity_claim(contrast(0, 0, floor=False), alpha=0.05) == (Verdict.NOT_SUPPORTED, ())


def test_at_equal_kl_the_opposite_leaves_it_open() -> None:
    both = contrast(60, 4)
    opposite = both.copy(deep=True)
    for name in ("effect", "effect_low", "effect_high"):
        opposite[name].loc[{"comparison": "matched_kl"}] = -0.2
    assert st.specificity_claim(opposite, alpha=0.05) == (Verdict.UNDETERMINED, (EQUAL_KL,))
    opposite["comparable"].loc[{"comparison": "matched_kl"}] = "NOT_COMPARABLE: not measured"
    assert st.specificity_claim(opposite, alpha=0.05) == (Verdict.SUPPORTED, ())
    by_scaling = both.assign({f"agreed_{name}": both[name] * 0 for name in both.data_vars if name in COUNTED})
    assert st.specificity_claim(by_scaling, alpha=0.05)[0] is Verdict.NOT_SUPPORTED, "none by latent scaling too"


def test_a_compact_set_is_told_from_none(own: Own) -> None:
    chosen = own.selection
    compact = (Verdict.SUPPORTED, SelectionReason.COMPACT)
    assert st.selection_claim([chosen], alpha=0.05) == (Verdict.SUPPORTED, (compact,))
    still = own.features.copy(deep=True)
    still["mean"].loc[{"model": "rl@100"}] = still["mean"].sel(model="sft@100").values  # which nothing was planted in
    tests = st.SelectionTests(n_resamples=199, n_bootstrap=99)
    nothing = st.select_features(still, own.outcomes, target="rl@final", tests=tests, stability=None)
    verdict, (of_one,) = st.selection_claim([nothing], alpha=0.05)
    assert (verdict, of_one[1]) == (Verdict.NOT_SUPPORTED, SelectionReason.NO_RISE)
    verdict, each = st.selection_claim([chosen, nothing], alpha=0.05)
    assert (verdict, each) == (Verdict.UNDETERMINED, (compact, of_one)), "dictionaries that disagree"
    held_out = chosen.assign(role=("task", ["in_domain", "held_out"]))
    assert st.selection_claim([held_out], alpha=0.05)[1][0][1] is SelectionReason.FEW_TASKS
    seldom = chosen.assign(verification_excess_estimable=("task", ["yes", "no: 0 prompts"]))
    assert st.selection_claim([seldom], alpha=0.05)[1][0][1] is SelectionReason.FEW_CONFIRMING
    untested = chosen.assign_attrs(accompanying_p=np.nan)
    assert st.selection_claim([untested], alpha=0.05)[1][0][1] is SelectionReason.ACCOMPANYING
    by_contrast = untested.assign(guard=("task", [CONTRAST] * 2))
    assert st.selection_claim([by_contrast], alpha=0.05)[1][0] == compact, "each feature was tested by itself"


SEEDS = decoders(3, "rl@100", 1.0), decoders(4, "rl@100", 1.0)
TOKENS = TokenActivations(
    activation=np.random.default_rng(3).gamma(1.0, size=(400, 2)),
    token_id=np.arange(400) % 7,
    position=np.arange(400) % 20,
    unit=np.arange(400) // 20,
    classes={"first": np.arange(400) % 20 == 0},
)
USES: Final[dict[str, tuple[Callable[[Own], Any], str | None]]] = {
    "features_dataset": (lambda own: own.features, "features"),
    "outcomes_dataset": (lambda own: own.outcomes, "outcomes"),
    "drift_test": (lambda own: st.drift_test(own.features, models=["rl@final"], n_bootstrap=50), "drift"),
    "stabilization_test": (
        lambda own: st.stabilization_test(own.features, runs=["rl"], n_bootstrap=50),
        "stabilization",
    ),
    "set_stability": (lambda own: st.set_stability(own.features, runs=["rl"], k=5, n_halvings=10), "set_stability"),
    "timing_contrast": (lambda own: own.timing, "timing_contrast"),
    "specificity_claim": (lambda own: st.specificity_claim(contrast(20, 0), alpha=0.05), None),
    "selection_claim": (lambda own: st.selection_claim([own.selection], alpha=0.05), None),
    "timing_claim": (lambda own: st.timing_claim(own.timing, alpha=0.05), None),
    "select_features": (lambda own: own.selection, "selection"),
    "selected_effects": (lambda own: st.selected_effects(own.features, own.selection, models=["rl@final"]), None),
    "correctness_probe": (
        lambda own: st.correctness_probe(own.features, own.outcomes, own.selection, model="sft@final", n_random=2),
        None,
    ),
    "model_separation": (
        lambda own: st.model_separation(own.raw, own.features, own.outcomes, own.selection, n_random=2),
        None,
    ),
    "behaviour": (lambda own: st.behaviour(own.outcomes, family=["rl@final"]), "behaviour"),
    "compare_outcomes": (
        lambda own: st.compare_outcomes(graded(own, "sft@100"), graded(own, "rl@100")),
        "outcome_comparison",
    ),
    "adjust_pvalues": (lambda own: st.adjust_pvalues(own.selection.p_value, dims=("feature",)), None),
    "mean_shift": (lambda own: st.mean_shift(own.raw, models=["rl@final"]), None),
    "representation_drift": (lambda own: st.representation_drift(own.tokens, models=["rl@final"]), None),
    "attribution": (lambda own: st.attribution(own.decoders["rl"]), None),
    "attribution_table": (lambda own: st.attribution_table(own.decoders, multiview=own.decoders), "attribution"),
    "decoder_clusters": (lambda own: st.decoder_clusters(own.decoders["rl"]), None),
    "attribution_contrast": (
        lambda own: st.attribution_contrast(
            st.attribution_table(own.decoders), own.decoders, sft="sft", rl="rl", n_bootstrap=50
        ),
        "attribution_contrast",
    ),
    "latent_scaling": (lambda own: own.scaling()[0]["rl"], None),
    "classify_features": (lambda own: own.scaling()[1]["rl"], None),
    "scaling_table": (lambda own: st.scaling_table(*own.scaling()), "latent_scaling"),
    "match_features": (lambda own: st.match_features(*SEEDS), None),
    "reappearance": (lambda own: st.reappearance({"other": st.match_features(*SEEDS)}), None),
    "subspace_overlap": (lambda own: st.subspace_overlap(*SEEDS), None),
    "token_detectors": (lambda own: st.token_detectors(TOKENS, None, [3, 17]), "tokens"),
    "arms_table": (arms, None),
    "judge": (lambda own: st.judge(arms(own)), None),
}
"""Public name -> how it is used, and the layout of what it returns."""


def test_every_public_statistic_is_used_here() -> None:
    assert set(USES) | WITHOUT_DATA == set(st.__all__)


@pytest.mark.parametrize("name", USES)
def test_it_runs_without_a_study(own: Own, name: str) -> None:
    use, layout = USES[name]
    result = use(own)
    assert result is not None
    if layout is not None:
        validate(result, layout)


def test_what_was_planted_is_found(own: Own) -> None:
    drift = st.drift_test(own.features, models=["sft@final", "rl@final"], n_bootstrap=50)
    assert drift.model.values.tolist() == ["sft@100", "rl@100"]
    assert np.flatnonzero((drift.call == "DRIFT").sel(model="rl@100")).tolist() == [0, 1, 2]
    assert not (drift.call == "DRIFT").sel(model="sft@100").any()
    assert np.flatnonzero(own.selection.tier == "CONFIRMED").tolist() == [0, 1, 2]
    assert own.selection.attrs["target"] == "rl@100"
    assert st.behaviour(own.outcomes).p_value.sel(model="rl@100", task="all:in") < 1e-6
    assert st.judge(arms(own)).requirements["v1"]
    assert set(st.timing_claim(own.timing, alpha=0.05)) <= set(Verdict)


def where_gained(n_tasks: int, risen: int, *, n_features: int = 20, per_task: int = 400) -> tuple[Any, Any]:
    """Three features that rise where RL gained, in the first ``risen`` of the tasks."""
    rng = np.random.default_rng(0)
    n = n_tasks * per_task
    task = np.repeat([f"t{i}" for i in range(n_tasks)], per_task)
    kind = rng.choice(["gain", "loss", "kept", "wrong"], size=n, p=[0.35, 0.1, 0.45, 0.1])
    base = 5 + rng.normal(0, 0.3, (n, n_features))
    rl = base + rng.normal(0, 0.1, base.shape)
    rl[np.ix_((kind == "gain") & np.isin(task, [f"t{i}" for i in range(risen)]), range(3))] += 0.5
    prompts = pd.DataFrame({"prompt": [f"p{i:04d}" for i in range(n)], "task": task})
    features = st.features_dataset({"base@0": base, "rl@1": rl}, prompts=prompts, scale="contribution")
    right = {"base@0": np.isin(kind, ["loss", "kept"]), "rl@1": np.isin(kind, ["gain", "kept"])}
    return features, st.outcomes_dataset(right, prompts=features)


@pytest.mark.parametrize(("risen", "shown"), [(0, True), (1, True), (2, False), (3, False)])
def test_what_rises_in_two_tasks_of_three_is_not_shown_to_rise_in_none(risen: int, shown: bool) -> None:
    tests = st.SelectionTests(n_resamples=99, n_bootstrap=0)
    chosen = st.select_features(*where_gained(3, risen), target="rl@1", tests=tests, stability=None)
    assert (chosen.attrs["no_rise_p"] <= 0.05) == shown
    assert (st.selection_claim([chosen], alpha=0.05)[1][0][1] is SelectionReason.NO_RISE) == shown


@pytest.mark.parametrize(("asked", "n_features", "most"), [(500, 620, 50), (30, 620, 30), (500, 320, 32)])
def test_no_set_of_more_than_fifty_is_compact(asked: int, n_features: int, most: int) -> None:
    chosen = st.select_features(
        *where_gained(2, 2, n_features=n_features, per_task=120),
        target="rl@1",
        rule=st.SelectionRule(max_features=asked),
        tests=st.SelectionTests(n_resamples=9, n_bootstrap=0),
        stability=None,
    )
    assert chosen.attrs["most_features"] == most
