"""Claims from whole results: planted numbers, guards, and every way a number can be missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting import CLAIM_COLUMNS, Claim, Verdict, assess_claims, claims_table
from rlgen_stats.toolkit.reporting.claims.c1_specificity import assess_specificity
from rlgen_stats.toolkit.reporting.claims.c2_timing import assess_timing
from rlgen_stats.toolkit.reporting.claims.c3_selection import assess_selection
from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import assess_amplification, assess_disabling
from rlgen_stats.toolkit.reporting.claims.claim import VERDICT_MEANINGS, VERDICT_SYMBOLS, verdict_label
from rlgen_stats.toolkit.reporting.csv_tables import flat
from rlgen_stats.toolkit.reporting.formatting import jsonable
from rlgen_stats.toolkit.reporting.report_agreement import in_text
from rlgen_stats.toolkit.reporting.result_lookup import tidy
from rlgen_stats.toolkit.statistics.causal.findings import Check, State
from rlgen_stats.toolkit.statistics.causal.verdict import decided_again

Results = dict[str, xr.Dataset]


ASSESS = {
    "C1": assess_specificity,
    "C2": assess_timing,
    "C3": assess_selection,
    "C4": assess_disabling,
    "C5": assess_amplification,
}


def claim(results: Results, spec: StudySpec, name: str) -> Claim:
    """One claim, whose text names its numbers: else no report is written."""
    assessed = ASSESS[name](tidy(results), spec)
    assert list(in_text([assessed.as_dict()])) == []
    return assessed


def test_planted_numbers_come_through(results: Results, spec: StudySpec) -> None:
    c1, c2, c3, c4, c5 = assess_claims(results, spec)
    assert (c1.estimate, c1.low, c1.high, c1.p_value) == pytest.approx((9.7, 5.2, 14.1, 0.002))
    assert (c2.estimate, c2.low, c2.high, c2.p_value) == pytest.approx((28, 20, 36, 0.0004))
    assert (c3.estimate, c3.low, c3.p_value) == pytest.approx((5, 5, 0.008))
    assert (c4.estimate, c4.low, c4.high, c4.p_value) == pytest.approx((-35, -41, -29, 0.0004))
    assert (c5.estimate, c5.low, c5.high, c5.p_value) == pytest.approx((21, 15, 27, 0.0004))
    assert [c.verdict for c in (c1, c2, c3, c4, c5)] == [Verdict.SUPPORTED] * 5


def test_nothing_computed_is_five_times_not_estimable(spec: StudySpec) -> None:
    claims = assess_claims({}, spec)
    assert [c.id for c in claims] == ["C1", "C2", "C3", "C4", "C5"]
    assert {c.verdict for c in claims} == {Verdict.NOT_ESTIMABLE}
    assert all(math.isnan(c.estimate) and c.answer.startswith("Not estimable: ") for c in claims)


@pytest.mark.parametrize(
    ("group", "affected"),
    [
        ("attribution_contrast", {"C1"}),
        ("timing_contrast", {"C2"}),
        ("selection", {"C3"}),
        ("intervention", {"C4", "C5"}),
        *(
            (g, set())
            for g in (
                *(
                    "behaviour",
                    "movement",
                    "health",
                    "attribution",
                    "drift",
                    "stabilization",
                    "set_stability",
                    "separation",
                ),
                *("tokens", "control_balance", "mediated_share"),
            )
        ),
    ],
)
def test_a_missing_group_costs_only_its_own_claims(
    group: str, affected: set[str], results: Results, spec: StudySpec
) -> None:
    del results[group]
    lost = {c.id for c in assess_claims(results, spec) if c.verdict is Verdict.NOT_ESTIMABLE}
    assert lost == affected


def test_claims_are_json(results: Results, spec: StudySpec) -> None:
    for mapping in (results, {}):
        text = json.dumps(jsonable([c.as_dict() for c in assess_claims(mapping, spec)]), allow_nan=False)
        assert len(json.loads(text)) == 5


# -- C1 ------------------------------------------------------------------------------------------------------------
def test_c1_one_run_per_arm_speaks_of_two_models(results: Results, spec: StudySpec) -> None:
    assessed = claim(results, spec, "C1")
    assert "these two models" in assessed.answer.lower()
    assert any("One run per arm" in caveat for caveat in assessed.caveats)


def test_c1_three_runs_per_arm_speak_of_runs(results: Results, spec_with: Callable[..., StudySpec]) -> None:
    runs = [
        {"name": f"{arm}{i or ''}", "arm": arm, "checkpoints": {10: "x"}} for arm in ("sft", "rl") for i in range(3)
    ]
    of_three, data = spec_with(runs=runs), results["attribution_contrast"]
    results["attribution_contrast"] = data.assign_attrs(runs_per_arm=[2, 3])
    assessed = claim(results, of_three, "C1")
    assert "two runs compared" in assessed.answer
    assert assessed.caveats[0].startswith("The contrast is between two runs (sft, rl) of 3 and 3 trained")
    results["attribution_contrast"] = data.assign_attrs(runs_per_arm=[3, 3])
    assessed = claim(results, of_three, "C1")
    assert assessed.answer.startswith("The runs of sft and of rl differ as claimed: ")
    assert "Exact permutation of 3 and 3 runs reaches p = 0.1 at best; train more runs an arm." in assessed.caveats
    results["attribution_contrast"] = data.assign_attrs(runs_per_arm=[4, 4])
    said = " ".join(claim(results, of_three, "C1").caveats)
    assert not any(words in said for words in ("two runs", "two models", "at best"))


def test_c1_says_latent_scaling_is_missing(results: Results, spec: StudySpec) -> None:
    assert any("Latent scaling has not been done" in caveat for caveat in claim(results, spec, "C1").caveats)


def with_final(data: xr.Dataset, name: str, *values: float) -> xr.DataArray:
    """A variable over [comparison, tau] with other values of the final models."""
    changed = xr.full_like(data["effect"], np.nan)
    changed.loc[{"comparison": "final"}] = list(values)
    return changed.rename(name)


def test_c1_counts_only_what_latent_scaling_confirms_where_it_was_done(results: Results, spec: StudySpec) -> None:
    data = results["attribution_contrast"]
    agreed = {
        "tail_sft": 0.2,
        "tail_rl": 0.02,
        "effect": 0.18,
        "effect_low": 0.1,
        "effect_high": 0.25,
        "p_value": 0.001,
    }
    confirmed = {f"agreed_{k}": with_final(data, k, v, v / 2) for k, v in agreed.items()}
    confirmed |= {"agreed_tail_null": 0 * data.tail_null, "agreed_tail_floor": 0 * data.tail_floor}
    results["attribution_contrast"] = data.assign(confirmed | {"agreed_effect_each": data.effect_each})
    assessed = claim(results, spec, "C1")
    assert assessed.estimate == pytest.approx(18)
    assert assessed.details["tails_percent_norms_alone"]["sft"] == pytest.approx(13.1)
    assert "20.0% of sft's and 2.0% of rl's alive features have NRN > 0.7 and are specific by latent" in assessed.answer
    assert "by norms alone 13.1% and 3.4%" in assessed.answer
    assert not any("Latent scaling" in caveat for caveat in assessed.caveats)
    assert assessed.details["other_tau"]["0.9"]["estimate"] == pytest.approx(9)


def test_c1_contradicted(results: Results, spec: StudySpec) -> None:
    data = results["attribution_contrast"]
    swapped = {
        "tail_sft": data.tail_rl,
        "tail_rl": data.tail_sft,
        "effect": -data.effect,
        "effect_low": -data.effect_high,
        "effect_high": -data.effect_low,
        "effect_each": -data.effect_each,
        "superiority": 1 - data.superiority,
        "superiority_low": 1 - data.superiority_high,
        "superiority_high": 1 - data.superiority_low,
    }
    results["attribution_contrast"] = data.assign(swapped)
    assert claim(results, spec, "C1").verdict is Verdict.CONTRADICTED


def test_c1_not_comparable_is_undetermined_and_says_why(results: Results, spec: StudySpec) -> None:
    comparable = results["attribution_contrast"].comparable.copy(deep=True)
    comparable.loc["final"] = "NOT_COMPARABLE: L0 differs"
    results["attribution_contrast"] = results["attribution_contrast"].assign(comparable=comparable)
    assessed = claim(results, spec, "C1")
    assert assessed.verdict is Verdict.UNDETERMINED
    assert "L0 differs; no checkpoint of sft is so near to base" in assessed.answer


def test_c1_is_answered_where_the_runs_are_equally_far_from_base(results: Results, spec: StudySpec) -> None:
    """The final models say one thing, the models at equal distance another, and only these are comparable."""
    data = results["attribution_contrast"].copy(deep=True)
    final, matched = {"comparison": "final"}, {"comparison": "matched_shift"}
    for name in data.data_vars:
        if "comparison" in data[name].dims and name != "comparable":
            data[name].loc[matched] = -data[name].loc[final] if name.startswith("effect") else data[name].loc[final]
    data["effect_low"].loc[matched], data["effect_high"].loc[matched] = [-0.141, -0.069], [-0.052, -0.012]
    data["tail_sft"].loc[matched], data["tail_rl"].loc[matched] = [0.034, 0.011], [0.131, 0.052]
    data["superiority_low"].loc[matched], data["superiority_high"].loc[matched] = 0.33, 0.45
    data["comparable"] = data["comparable"].astype("<U80")
    data["comparable"].loc[final] = "NOT_COMPARABLE: activation shifts differ"
    data["comparable"].loc[matched] = "COMPARABLE: at activation shift 0.21 from base, sft as sft@3; parity"
    results["attribution_contrast"] = data.assign_attrs(decided_by="matched_shift")
    assessed = claim(results, spec, "C1")
    assert assessed.verdict is Verdict.CONTRADICTED
    assert "at activation shift 0.21 from base, sft as sft@3, 3.4% of sft's" in assessed.answer


def test_c1_below_the_floor_is_undetermined(results: Results, spec: StudySpec) -> None:
    results["attribution_contrast"] = results["attribution_contrast"].assign(
        tail_null=with_final(results["attribution_contrast"], "tail_null", 0.2, 0.2)
    )
    assessed = claim(results, spec, "C1")
    assert assessed.verdict is Verdict.UNDETERMINED
    assert "the largest of base against itself" in assessed.answer


def test_c1_ranks_that_say_the_opposite_leave_it_open(results: Results, spec: StudySpec) -> None:
    one = results["attribution_contrast"].superiority
    opposite = {"superiority_low": 0 * one + 0.4, "superiority_high": 0 * one + 0.49}
    results["attribution_contrast"] = results["attribution_contrast"].assign(opposite)
    assessed = claim(results, spec, "C1")
    assert assessed.verdict is Verdict.UNDETERMINED
    assert "the ranks of all features say the opposite" in assessed.answer


def test_c1_equal_divergence_that_says_the_opposite_leaves_it_open(results: Results, spec: StudySpec) -> None:
    data = results["attribution_contrast"].copy(deep=True)
    data["effect_low"].loc[{"comparison": "matched_kl"}] = -0.2
    data["effect_high"].loc[{"comparison": "matched_kl"}] = -0.01
    results["attribution_contrast"] = data
    assert claim(results, spec, "C1").verdict is Verdict.SUPPORTED, "that comparison cannot be made"
    data["comparable"].loc["matched_kl"] = "COMPARABLE: at KL"
    assessed = claim(results, spec, "C1")
    assert assessed.verdict is Verdict.UNDETERMINED
    assert "at equal KL from base the opposite holds" in assessed.answer


def test_c1_needs_the_direction_in_every_dictionary(results: Results, spec: StudySpec) -> None:
    data = results["attribution_contrast"].drop_vars(["effect_each", "superiority_each", "dictionary"])
    each = np.full((3, 2, 3), np.nan)
    for last, verdict in ((0.001, Verdict.SUPPORTED), (-0.001, Verdict.UNDETERMINED)):
        each[0] = [0.2, 0.09, last]
        results["attribution_contrast"] = data.assign(effect_each=((*data.effect.dims, "dictionary"), each))
        assert claim(results, spec, "C1").verdict is verdict


def test_c1_a_floor_that_is_zero_by_construction_is_said_to_be(results: Results, spec: StudySpec) -> None:
    words = "zero by construction"
    assert not any(words in caveat for caveat in claim(results, spec, "C1").caveats)
    results["attribution_contrast"] = results["attribution_contrast"].isel(floor=[0])
    assert any(words in caveat for caveat in claim(results, spec, "C1").caveats)


def test_c1_uses_the_tau_of_the_study(results: Results, spec_with: Callable[..., StudySpec]) -> None:
    assessed = claim(results, spec_with(statistics={"tau": 0.9}), "C1")
    assert assessed.estimate == pytest.approx(4.1)
    assert assessed.details["other_tau"]["0.7"]["estimate"] == pytest.approx(9.7)


def test_c1_empty_contrast_is_not_estimable(results: Results, spec: StudySpec) -> None:
    results["attribution_contrast"] = (
        results["attribution_contrast"].where(False).assign(comparable=results["attribution_contrast"].comparable)
    )
    assert claim(results, spec, "C1").verdict is Verdict.NOT_ESTIMABLE


def test_c1_sick_crosscoders_are_caveats(results: Results, spec: StudySpec) -> None:
    caveats = [c for c in claim(results, spec, "C1").caveats if "health check" in c]
    assert caveats == ["Crosscoder null failed its health check: explained variance of base.repeat@0 below 0.9."]
    results["health"] = results["health"].assign(healthy=("crosscoder", [False, False, True, True]))
    caveats = [c for c in claim(results, spec, "C1").caveats if "health check" in c]
    assert [c.split()[1] for c in caveats] == ["pair-sft"], "the primary crosscoder is not what C1 rests on"


# -- C2 ------------------------------------------------------------------------------------------------------------
def timing(results: Results, **changes: tuple[float, ...]) -> None:
    """The stored contrast with other values [time, turnover]."""
    data = results["timing_contrast"]
    results["timing_contrast"] = data.assign({name: ("measure", list(values)) for name, values in changes.items()})


def test_c2_says_both_differences_and_where_they_come_from(results: Results, spec: StudySpec) -> None:
    c2 = claim(results, spec, "C2")
    assert c2.answer == (
        "These two models differ as claimed: rl's features become stable 28.0 points of training later than sft's that "
        "changed as far [20.0, 36.0] and of its top set 12.0 points more were still to change than of sft's "
        "[6.0, 18.0]."
    )
    assert c2.details["measures"]["turnover"]["by_run"]["rl"] == pytest.approx([17, 14, 20])
    assert list(c2.details["time_in_stratum"]) == ["moderate", "large"]
    assert c2.details["time_in_stratum"]["large"]["difference"] == pytest.approx(34)
    assert c2.details["time_in_stratum"]["large"]["n_features"] == {"sft": 30, "rl": 20}


def test_c2_the_papers_rule_stands_beside_and_decides_nothing(results: Results, spec: StudySpec) -> None:
    before = claim(results, spec, "C2")
    assert (
        "The paper's own rule, reported only: at 20%, 40%, 60% and 80% of training, 71%, 82%, 90% and 95% of sft's and "
        "42%, 53%, 64% and 75% of rl's final top 50 by model-specificity were in the set already; noise is not taken "
        "off."
    ) in before.caveats
    assert before.details["paper_rule_overlap"]["rl"]["rl@16"] == pytest.approx(42)
    data = results["timing_contrast"]
    results["timing_contrast"] = data.assign(paper_overlap=1 - data["paper_overlap"])
    after = claim(results, spec, "C2")
    assert (after.verdict, after.estimate, after.answer) == (before.verdict, before.estimate, before.answer)


def test_c2_that_contradicts_its_own_strata_is_not_said(results: Results, spec: StudySpec) -> None:
    """Both top sets are stable by half of training, so that the old rule said the runs do not differ in timing.

    Within strata SFT settles earlier all the same: +.67 [.64, .70] and +.12 [.08, .15].
    """
    sets = results["set_stability"]
    both_early = {"verdict": ["SET_STABLE", "SET_STABLE"], "stable_from": [30.0, 32.0]}
    results["set_stability"] = sets.assign({name: ("trained_run", values) for name, values in both_early.items()})
    shares = [step / last for step, last in zip((30, 32), (150, 80), strict=True)]
    assert all(share <= 0.5 for share in shares), "the old rule: NOT_SUPPORTED"
    timing(results, difference=(0.4, 0.001), low=(0.36, -0.01), high=(0.44, 0.012), p_value=(1e-6, 0.8))
    assert claim(results, spec, "C2").verdict is Verdict.UNDETERMINED
    assert "[−1.0, 1.2, too little to matter]" in claim(results, spec, "C2").answer
    timing(results, difference=(0.4, 0.05), low=(0.36, 0.03), high=(0.44, 0.07), p_value=(1e-6, 0.002))
    assert claim(results, spec, "C2").verdict is Verdict.SUPPORTED


def test_c2_contradicted_when_rl_settles_first(results: Results, spec: StudySpec) -> None:
    timing(results, difference=(-0.28, -0.12), low=(-0.36, -0.18), high=(-0.2, -0.06))
    data = results["timing_contrast"]
    low, high = -data["stratum_difference_high"], -data["stratum_difference_low"]
    results["timing_contrast"] = data.assign(
        dictionary_difference=-data["dictionary_difference"],
        stratum_difference=-data["stratum_difference"],
        stratum_difference_low=low,
        stratum_difference_high=high,
    )
    c2 = claim(results, spec, "C2")
    assert (c2.verdict, c2.estimate) == (Verdict.CONTRADICTED, pytest.approx(-28))
    assert "28.0 points of training earlier than sft's that changed as far [20.0, 36.0]" in c2.answer
    assert "12.0 points fewer were still to change than of sft's [6.0, 18.0]" in c2.answer


def test_c2_not_supported_only_where_both_differences_are_shown_to_be_small(results: Results, spec: StudySpec) -> None:
    small = {"difference": (0.01, 0.0), "low": (-0.02, -0.01), "high": (0.04, 0.01), "p_value": (0.5, 0.9)}
    timing(results, **small)
    assert claim(results, spec, "C2").verdict is Verdict.UNDETERMINED, "strata show a difference that matters"
    silent = results["timing_contrast"]["stratum_difference"] * np.nan
    unknown = {f"stratum_difference{end}": silent for end in ("", "_low", "_high", "_p")}
    results["timing_contrast"] = results["timing_contrast"].assign(unknown)
    assert claim(results, spec, "C2").verdict is Verdict.NOT_SUPPORTED
    timing(results, **small | {"high": (0.06, 0.01)})
    assert claim(results, spec, "C2").verdict is Verdict.UNDETERMINED


def test_c2_verdict_follows_from_the_stored_table(results: Results, spec: StudySpec) -> None:
    """Redone with nothing but the table and the rule in the glossary."""
    generator = np.random.default_rng(0)
    seen = set()
    silent = results["timing_contrast"]["stratum_difference"] * np.nan  # strata that say nothing of their own
    unknown = {f"stratum_difference{end}": silent for end in ("", "_low", "_high", "_p")}
    results["timing_contrast"] = results["timing_contrast"].assign(unknown)
    for _ in range(60):
        centre, half = generator.normal(0, [0.1, 0.05]), generator.exponential([0.03, 0.012])
        p = 2 * stats.norm.sf(np.abs(centre) / half * 1.96)
        each = centre[:, None] + 0 * half[:, None]
        timing(results, difference=tuple(centre), low=tuple(centre - half), high=tuple(centre + half), p_value=tuple(p))
        data = results["timing_contrast"].assign(dictionary_difference=(("measure", "dictionary"), each))
        results["timing_contrast"] = data
        table = flat(data, ("measure",)).set_index("measure")
        small = (table["low"] > [-0.05, -0.02]) & (table["high"] < [0.05, 0.02])
        if small.all():
            expected = Verdict.NOT_SUPPORTED
        elif (table["low"] > [0.05, 0.02]).all():
            expected = Verdict.SUPPORTED
        elif (table["high"] < [-0.05, -0.02]).all():
            expected = Verdict.CONTRADICTED
        else:
            expected = Verdict.UNDETERMINED
        assert claim(results, spec, "C2").verdict is expected
        seen.add(expected)
    assert len(seen) == 4


def test_c2_is_open_where_strata_show_opposite_differences(results: Results, spec: StudySpec) -> None:
    data = results["timing_contrast"]
    before = claim(results, spec, "C2")
    assert before.verdict is Verdict.SUPPORTED
    assert "do not show the same" not in before.answer
    shift = xr.DataArray([0.0, 0.0, -0.6], dims="stratum")
    moved = {f"stratum_difference{end}": data[f"stratum_difference{end}"] + shift for end in ("", "_low", "_high")}
    results["timing_contrast"] = data.assign(moved)
    c2 = claim(results, spec, "C2")
    assert c2.verdict is Verdict.UNDETERMINED
    assert "36.0], alone open" in c2.answer or "36.0, alone open]" in c2.answer
    assert c2.answer.endswith("Features that changed little and features that changed much do not show the same.")
    assert any("large −26.0 points" in text for text in c2.caveats)


def test_c2_says_what_each_stratum_shows_and_on_how_many_features(results: Results, spec: StudySpec) -> None:
    data = results["timing_contrast"]
    said = next(text for text in claim(results, spec, "C2").caveats if text.startswith("By how far features changed"))
    for stratum in data["stratum"].values[data["weight"].values > 0]:
        one = data.sel(stratum=stratum)
        assert f"{stratum} {100 * float(one.stratum_difference):+.1f}".replace("-", "−") in said
        assert f"{float(one.n_in_stratum.sel(trained_run='rl')):.0f} of rl's" in said


def test_c2_top_sets_that_prompts_do_not_determine_are_a_caveat(results: Results, spec: StudySpec) -> None:
    data = results["timing_contrast"]
    results["timing_contrast"] = data.assign(determined=("node", [False, True, True, True, True]))
    assert any("Top sets are not compared at 20% of training" in text for text in claim(results, spec, "C2").caveats)
    nan = float("nan")
    timing(results, difference=(0.28, nan), low=(0.2, nan), high=(0.36, nan), p_value=(0.0004, nan))
    c2 = claim(results, spec, "C2")
    assert c2.verdict is Verdict.UNDETERMINED
    assert "the prompts do not determine its top set" in c2.answer


def test_c2_without_a_time_is_not_estimable(results: Results, spec: StudySpec) -> None:
    nan = float("nan")
    timing(results, difference=(nan, 0.12), low=(nan, 0.06), high=(nan, 0.18), p_value=(nan, 0.002))
    assert claim(results, spec, "C2").answer == (
        "Not estimable: no stratum of total change holds features of both runs."
    )
    results["timing_contrast"] = results["timing_contrast"].isel(node=[4])
    assert "no checkpoint before the last at the same share" in claim(results, spec, "C2").answer


# -- C3 ------------------------------------------------------------------------------------------------------------
def tiers(results: Results, confirmed: int, name: str = "specific_tier") -> None:
    tier = np.where(np.arange(240) < confirmed, "CONFIRMED", "REJECTED")
    results["selection"] = results["selection"].assign({name: ("feature", tier)})


@pytest.mark.parametrize(
    ("confirmed", "changed", "expected", "said"),
    [
        (0, {}, Verdict.UNDETERMINED, "5 rise where RL gained, not shown to do so by more than elsewhere, which does"),
        (0, {"no_rise_p": 0.01}, Verdict.NOT_SUPPORTED, "No feature of 210 testable ones rises where RL gained by 0.2"),
        (1, {}, Verdict.SUPPORTED, "1 feature of 210 testable ones is confirmed to rise where RL gained by more than"),
        (
            40,
            {},
            Verdict.SUPPORTED,
            "the leading candidates, 21 at most, carry 71% [58%, 84%] of that difference (no trial has measured",
        ),
        (40, {"carried_low": 0.4}, Verdict.UNDETERMINED, "neither shows nor excludes that a compact set carries 50%"),
        (
            40,
            {"carried_low": 0.1, "carried_best_high": 0.4},
            Verdict.NOT_SUPPORTED,
            "no 21 features carry more than 40%",
        ),
        (40, {"accompanying_p": 0.3}, Verdict.UNDETERMINED, "features that merely accompany right answers"),
        (40, {"carried_share": np.nan, "carried_low": np.nan}, Verdict.UNDETERMINED, "cannot be estimated"),
    ],
)
def test_c3_needs_confirmed_features_that_carry_the_rise_where_no_trial_has_been_run(
    confirmed: int, changed: dict[str, float], expected: Verdict, said: str, results: Results, spec: StudySpec
) -> None:
    tiers(results, confirmed)
    del results["mediated_share"]
    results["selection"] = results["selection"].assign_attrs(changed)
    assessed = claim(results, spec, "C3")
    assert assessed.verdict is expected
    assert assessed.estimate == confirmed
    assert said in assessed.answer


OF_PATCH = "of what copying the whole residual does"


@pytest.mark.parametrize(
    ("low", "expected", "said"),
    [
        (0.5, Verdict.SUPPORTED, f"; lifted into base, the set (5 features) carries 70% [50%, 85%] {OF_PATCH}, +68% "),
        (0.4999, Verdict.UNDETERMINED, f"{OF_PATCH}, +68% of it [+50, +90] beyond random sets whose edits are as "),
    ],
)
def test_c3_reads_compactness_off_the_trial_where_there_is_one(
    low: float, expected: Verdict, said: str, results: Results, spec: StudySpec
) -> None:
    """Whatever the rise on verification prompts says, which stands beside it."""
    data = results["mediated_share"]
    results["mediated_share"] = data.assign(share_low=data["share_low"].where(data.point != "set", low))
    for best_high in (0.9, 0.3):
        results["selection"] = results["selection"].assign_attrs(carried_low=0.1, carried_best_high=best_high)
        c3 = claim(results, spec, "C3")
        assert (c3.verdict, c3.details["compactness_by"]) == (expected, "mediated share")
        assert said in c3.answer
        assert any("21 at most, carry 71% [10%, 84%]; the verdict rests on" in caveat for caveat in c3.caveats)
    results["mediated_share"] = data.assign(share=data["share"] * np.nan)
    c3 = claim(results, spec, "C3")
    assert (c3.verdict, c3.details["compactness_by"]) == (Verdict.NOT_SUPPORTED, "rise")
    assert "copying RL's whole residual into base has no shown effect to have a share in" in c3.answer


def test_c3_excludes_a_compact_set_by_all_points_up_to_the_first_that_is_not_smaller(
    results: Results, spec: StudySpec
) -> None:
    data = results["mediated_share"]
    low = data.assign(share_low=0 * data["share"], share_high=0 * data["share"] + 0.49)
    results["mediated_share"] = low
    c3 = claim(results, spec, "C3")
    assert c3.verdict is Verdict.NOT_SUPPORTED
    sets = "the selected set, the 1 of largest drift and the 50 of largest drift"
    assert f"lifted into base, {sets} carry no more than 49% {OF_PATCH}" in c3.answer
    for point, verdict in (("top-50", Verdict.UNDETERMINED), ("all", Verdict.NOT_SUPPORTED)):
        results["mediated_share"] = low.assign(share_high=low["share_high"].where(low.point != point, 0.9))
        assert claim(results, spec, "C3").verdict is verdict
    for most, verdict in ((1, Verdict.NOT_SUPPORTED), (50, Verdict.NOT_SUPPORTED), (51, Verdict.UNDETERMINED)):
        results["selection"] = results["selection"].assign_attrs(most_features=most)
        results["mediated_share"] = low.assign(share_high=low["share_high"].where(low.point != "all", 0.9))
        assert claim(results, spec, "C3").verdict is verdict


def test_c3_wants_more_than_comparable_random_sets_do(results: Results, spec: StudySpec) -> None:
    data = results["mediated_share"]
    assert claim(results, spec, "C3").verdict is Verdict.SUPPORTED
    results["mediated_share"] = data.assign(above_low=0 * data["above_low"])
    assert "not shown to be more than any features would do" in claim(results, spec, "C3").answer
    results["mediated_share"] = data.assign(random_sets=data["random_sets"].copy(data=np.full((2, 1, 4), "rescaled")))
    assert "beyond random sets rescaled to edits as large (none is by itself)." in claim(results, spec, "C3").answer
    results["mediated_share"] = data.assign(random_sets=data["random_sets"].copy(data=np.full((2, 1, 4), "")))
    c3 = claim(results, spec, "C3")
    assert c3.verdict is Verdict.UNDETERMINED
    assert "(there is no random set of comparable edits), so that it is not shown" in c3.answer
    assert "(there is no random set of comparable edits)" in claim(results, spec, "C4").answer


def test_c3_set_of_too_many_features_is_not_compact(results: Results, spec: StudySpec) -> None:
    for most, verdict in ((5, Verdict.SUPPORTED), (4, Verdict.UNDETERMINED)):
        results["selection"] = results["selection"].assign_attrs(most_features=most)
        assert claim(results, spec, "C3").verdict is verdict
    assert "but these are too many for a compact set." in claim(results, spec, "C3").answer


def test_c3_of_five_dictionaries_is_said_of_those_that_agree(results: Results, spec: StudySpec) -> None:
    (main,) = (one for one in spec.crosscoders if one.name == spec.primary_crosscoder.name)
    five = spec.model_copy(update={"crosscoders": (main.model_copy(update={"replicates": 5}),)})
    data = results["selection"]
    results |= {f"selection.{n}": data for n in range(2, 6)}
    nothing = data.copy(deep=True)
    nothing["specific_tier"][:] = "REJECTED"
    results["selection.3"] = nothing
    c3 = claim(results, five, "C3")
    assert c3.verdict is Verdict.SUPPORTED
    assert c3.answer.startswith("In 4 of 5 dictionaries 5 features of 210 testable ones are confirmed")
    of_sets, of_paper = (
        next(x for x in c3.caveats if words in x) for words in ("shown to rise where RL gained", "own rule")
    )
    n = int(data.selected.sum())
    rising = int((data.selected & (data.tier == "CONFIRMED")).sum())
    specific = int((data.selected & (data.specific_tier == "CONFIRMED")).sum())
    assert of_sets == (
        f"The edited sets (C4, C5) hold {n}, {n}, {n}, {n} and {n} features; {rising}, {rising}, {rising}, {rising} "
        f"and {rising} of them are shown to rise where RL gained, {specific}, {specific}, 0, {specific} and {specific} "
        "by more than where base was right too."
    )
    assert of_paper.startswith("The paper's own rule in the first dictionary keeps")
    del results["mediated_share"]
    excluded = {"carried_low": 0.1, "carried_best_high": 0.4}
    for n, changed in enumerate([excluded, excluded, {"no_rise_p": 0.01}, {}, {"no_rise_p": 0.02}], start=1):
        results[f"selection.{n}" if n > 1 else "selection"] = data.assign_attrs(changed)
    c3 = claim(results, five, "C3")
    assert c3.verdict is Verdict.NOT_SUPPORTED
    spread, none = c3.answer.split(" The set that is")[0].split("; in ")
    assert spread.startswith("In 2 of 5 dictionaries 5 features of 210 testable ones are confirmed")
    assert "no 21 features carry more than 40% of it" in spread
    assert none.startswith("2 of 5 dictionaries no feature of 210 testable ones rises where RL gained by 0.2 sd more")
    results["selection.5"] = nothing
    c3 = claim(results, five, "C3")
    assert c3.verdict is Verdict.UNDETERMINED
    words = "not supported, not supported, not supported, supported, undetermined"
    assert c3.answer.startswith(f"Undetermined, because the dictionaries disagree ({words}): in 2 of 5 dictionaries 5 ")
    assert "; in 1 of 5 dictionaries 0 features of 210 testable ones are confirmed" in c3.answer


def test_c3_no_gain_prompts_is_not_estimable_with_the_reasons(results: Results, spec: StudySpec) -> None:
    why = ["no: 0 base-wrong/target-right prompts"] * 3 + ["score only: 4 units"] + ["no: not selected on"] * 3
    results["selection"] = results["selection"].assign(excess_estimable=("task", why))
    assessed = claim(results, spec, "C3")
    assert assessed.verdict is Verdict.NOT_ESTIMABLE
    assert assessed.answer == (
        "Not estimable: 0 base-wrong/target-right prompts (tasks addition, parity and maximum); "
        "score only: 4 units (task counting)."
    )


def test_c3_held_out_and_control_tasks_do_not_count_as_tasks(results: Results, spec: StudySpec) -> None:
    why = ["yes", "no: x", "no: x", "no: x", "yes", "yes", "yes"]
    results["selection"] = results["selection"].assign(excess_estimable=("task", why))
    assert claim(results, spec, "C3").verdict is Verdict.UNDETERMINED


def test_c3_tasks_that_can_choose_and_not_confirm_are_told(results: Results, spec: StudySpec) -> None:
    why = ["yes", "no: 3 gains"] + ["no: 1 gain"] * 2 + ["no: not selected on"] * 3
    column = "verification_excess_estimable"
    results["selection"] = results["selection"].assign({column: ("task", why)})
    c3 = claim(results, spec, "C3")
    assert c3.verdict is Verdict.UNDETERMINED
    assert (
        "base was right too; on prompts not used to select them 1 task could be tested (at least 2 needed; on those "
        "that select, 4 tasks could be)"
    ) in c3.answer
    results["selection"] = results["selection"].assign({column: ("task", ["no: 1 gain"] * 4 + why[4:])})
    assert "; on prompts not used to select them no task could be tested (" in claim(results, spec, "C3").answer
    results["selection"] = results["selection"].assign({column: ("task", ["yes"] * 2 + why[2:])})
    assert "(4 tasks could be tested on those that select, 2 on these)" in claim(results, spec, "C3").answer
    results["selection"] = results["selection"].drop_vars(column)  # as stored by an earlier release
    assert "(4 tasks could be tested on those that select)" in claim(results, spec, "C3").answer


def test_c3_another_guard_is_a_caveat(results: Results, spec: StudySpec) -> None:
    assert not any("RL-specific contrast needs" in caveat for caveat in claim(results, spec, "C3").caveats)
    guard = results["selection"]["guard"].values.copy()
    guard[1] = "all prompts"
    results["selection"] = results["selection"].assign(guard=("task", guard))
    assert any("RL-specific contrast needs" in caveat for caveat in claim(results, spec, "C3").caveats)


def test_c3_one_mechanism_is_said(results: Results, spec: StudySpec) -> None:
    assert not any("one mechanism" in c for c in claim(results, spec, "C3").caveats)
    results["selection"] = results["selection"].assign_attrs(score_correlation=0.97, shift_rank=1.1)
    caveats = " ".join(claim(results, spec, "C3").caveats)
    assert "correlate 0.97 across tasks" in caveats
    assert "effective rank of 1.1" in caveats


def test_c3_raw_activations_are_shown_beside_the_features(results: Results, spec: StudySpec) -> None:
    expected = (
        "Raw activations alone tell rl from base on 40 verification prompts with AUC 0.980 (their mean shift, 80% of "
        "the squared difference, 0.930), the 12 selected features 0.910 and as many random ones 0.840: that features "
        "separate the models is no news here."
    )
    assert expected in claim(results, spec, "C3").caveats
    assert claim(results, spec, "C3").details["separation_auc"]["models on gains"]["random"] == 0.85
    data = results["separation"]
    results["separation"] = data.assign(beats_raw=("comparison", [True, False, False]))
    assert any("better than raw activations do." in caveat for caveat in claim(results, spec, "C3").caveats)
    nothing = data.auc.where(data.predictor.isin(["raw", "mean shift"]))
    results["separation"] = data.assign(auc=nothing)
    assert any(caveat.endswith("difference, 0.930).") for caveat in claim(results, spec, "C3").caveats)


def test_c3_says_that_the_set_is_mostly_token_detectors(results: Results, spec: StudySpec) -> None:
    said = "The set that is edited is mostly token and token-and-position detectors (3 of 5 features)"
    assert said in claim(results, spec, "C3").answer
    assert any(
        c.startswith("Of the 5 edited features 2 are token detectors (2 fire in") and " and 1 token-and-position" in c
        for c in claim(results, spec, "C3").caveats
    )
    data = results["tokens"]
    results["tokens"] = data.assign(detector=data.fires_alone)  # two of five are not most
    assert "token detectors" not in claim(results, spec, "C3").answer
    assert any(
        c.startswith("Of the 5 edited features 2 are") and " and 0 token-and-position" in c
        for c in claim(results, spec, "C3").caveats
    )
    del results["tokens"]
    assert not any("token detectors" in c for c in claim(results, spec, "C3").caveats)


def test_c3_is_about_tokens_only_where_the_dictionaries_agree(results: Results, spec: StudySpec) -> None:
    several, of_three = three_dictionaries(results, spec)
    data = results["tokens"]
    several |= {"tokens.2": data, "tokens.3": data}
    assert "(3 of 5, 3 of 5 and 3 of 5 features)" in claim(several, of_three, "C3").answer
    several["tokens.3"] = data.assign(detector=data.fires_alone)
    assert "token detectors" not in claim(several, of_three, "C3").answer


def test_c3_gains_told_from_losses_are_shown_where_there_are_enough(results: Results, spec: StudySpec) -> None:
    assert not any("gained from" in caveat for caveat in claim(results, spec, "C3").caveats)
    data = results["separation"]
    results["separation"] = data.assign(estimable=("comparison", ["yes"] * 3), auc=data.auc.fillna(0.6))
    assert any("raw 0.600, mean shift 0.600" in caveat for caveat in claim(results, spec, "C3").caveats)
    few = ["no: 8 units, 10 needed"] * 3
    results["separation"] = data.assign(estimable=("comparison", few))
    assert not any("Raw activations" in caveat for caveat in claim(results, spec, "C3").caveats)


# -- C4, C5 --------------------------------------------------------------------------------------------------------
def causal(results: Results, verdict: str, reasons: str = "") -> None:
    results["intervention"] = results["intervention"].assign(
        verdict=("direction", [verdict] * 2), reasons=("direction", [reasons] * 2)
    )


@pytest.mark.parametrize(
    ("verdict", "expected", "words"),
    [
        ("DESTRUCTIVE", Verdict.NOT_SUPPORTED, "breaks the model"),
        ("CAUSAL_NONSPECIFIC", Verdict.NOT_SUPPORTED, "many matched random sets have at least half of that effect"),
        ("NO_EFFECT", Verdict.NOT_SUPPORTED, "equivalent to no effect (within 5 points)"),
        ("INCONCLUSIVE", Verdict.UNDETERMINED, "do not allow a verdict"),
    ],
)
def test_c4_c5_follow_the_causal_verdict(
    verdict: str, expected: Verdict, words: str, results: Results, spec: StudySpec
) -> None:
    causal(results, verdict)
    for name in ("C4", "C5"):
        assessed = claim(results, spec, name)
        assert assessed.verdict is expected
        assert words in assessed.answer


@pytest.mark.parametrize(
    ("checks", "words"),
    [({"v1": False}, "neither shown to be an effect nor shown to be none"), ({"v3": False}, "(V3 dose response)")],
)
def test_c4_inconclusive_says_what_failed(
    checks: dict[str, bool], words: str, results: Results, spec: StudySpec
) -> None:
    causal(results, "INCONCLUSIVE")
    results["intervention"] = results["intervention"].assign({k: ("direction", [v] * 2) for k, v in checks.items()})
    assert words in claim(results, spec, "C4").answer


def test_c5_significant_but_too_close_to_zero_says_so(results: Results, spec: StudySpec) -> None:
    causal(results, "INCONCLUSIVE")
    data = results["intervention"]
    close = {"v1": ("direction", [False] * 2), "effect_low": data.effect_low * 0 + 0.014}
    results["intervention"] = data.assign(close)
    assert "may be smaller than the 2 points that V1 requires" in claim(results, spec, "C5").answer


def test_c4_contradicted_when_disabling_helps(results: Results, spec: StudySpec) -> None:
    data = results["intervention"]
    flipped = {"effect": -data.effect, "effect_low": -data.effect_high, "effect_high": -data.effect_low}
    results["intervention"] = data.assign(flipped)
    assert claim(results, spec, "C4").verdict is Verdict.CONTRADICTED
    assert claim(results, spec, "C5").verdict is Verdict.CONTRADICTED


def test_c4_without_features_says_so(results: Results, spec: StudySpec) -> None:
    data = results["intervention"]
    absent = xr.full_like(data.kind, "absent")
    results["intervention"] = data.assign(kind=absent)
    causal(results, "INCONCLUSIVE", "no_features: no feature selected")
    assessed = claim(results, spec, "C4")
    assert assessed.verdict is Verdict.NOT_ESTIMABLE
    assert assessed.answer == "Not estimable: no feature selected."


def test_c4_limiting_reasons_become_caveats_and_semicolons_survive(results: Results, spec: StudySpec) -> None:
    causal(results, "CAUSAL_SPECIFIC", "v3_dose: p=0.01; dose: accuracy 0: 0.4; does_not_beat_steering: +0.01, p=0.7")
    assessed = claim(results, spec, "C4")
    assert assessed.details["reasons"] == [
        "v3_dose: p=0.01; dose: accuracy 0: 0.4",
        "does_not_beat_steering: +0.01, p=0.7",
    ]
    assert any(
        c.startswith("The set is not shown to have a larger effect than one mean-shift vector: +0.01")
        for c in assessed.caveats
    )


def test_c4_in_domain_targets_are_a_caveat(results: Results, spec: StudySpec) -> None:
    assert not any("not over out-of-domain" in c for c in claim(results, spec, "C4").caveats)
    results["intervention"].attrs["target_tasks"] = ["addition", "parity"]
    assert any("includes addition" in c for c in claim(results, spec, "C4").caveats)


def test_c4_unconfirmed_features_are_a_caveat(results: Results, spec: StudySpec) -> None:
    tiers(results, 8)  # of the edited features only number 7 is confirmed now
    caveat = "Of the 5 edited features 5 are shown to rise where rl gained, 1 by more than elsewhere (C3)."
    assert caveat in claim(results, spec, "C4").caveats


def test_c4_of_dictionaries_without_a_set_is_open(results: Results, spec: StudySpec) -> None:
    """Also where a release that decided otherwise has stored its verdict."""
    states = results["intervention"]["criterion_state"].copy()
    states.loc[{"criterion": str(Check.V5_SETS)}] = str(State.FAILED)
    trial = results["intervention"].assign(criterion_state=states)
    results["intervention"] = decided_again(trial)
    assert decided_again(results["intervention"]) is results["intervention"]
    each = xr.DataArray([[-35.0, np.nan, np.nan], [21.0, np.nan, np.nan]], dims=("direction", "dictionary")) / 100
    results["intervention"] = results["intervention"].assign(dictionary_effect=each).assign_attrs(n_controls=39)
    assessed = claim(results, spec, "C4")
    assert (assessed.verdict, assessed.in_short) == (Verdict.UNDETERMINED, "not every dictionary has a set")
    assert "the set that 1 of 3 dictionaries has" in assessed.answer
    assert "changes accuracy by −35.0 points, and what the other dictionaries would say is open." in assessed.answer
    assert any(c.startswith("Only 1 of 3 dictionaries selected any feature") for c in assessed.caveats)


def test_c4_too_few_controls_are_a_caveat(results: Results, spec: StudySpec) -> None:
    keep = [i for i, c in enumerate(results["intervention"].condition.values) if c < "random-010" or c > "random-9"]
    results["intervention"] = results["intervention"].isel(condition=keep)
    assessed = claim(results, spec, "C4")
    assert assessed.details["n_controls"] == 10
    assert any("cannot fall below 0.0909" in c for c in assessed.caveats)


def test_c3_c4_c5_say_what_share_of_the_patch_the_set_carries(results: Results, spec: StudySpec) -> None:
    of_patch = "70% [55%, 85%] of what copying the whole residual does"
    for name, start in (
        (
            "C4",
            f"Lowered to base's level in the RL model, the set changes accuracy by −21.0 points, {of_patch} (−30.0), ",
        ),
        (
            "C5",
            f"Lifted to the RL model's level in base, the set changes accuracy by +17.5 points, {of_patch} (+25.0), ",
        ),
    ):
        assessed = claim(results, spec, name)
        assert assessed.answer.startswith(start)
        beyond, low, high = (100 * value for value in assessed.details["share_above_random"])
        said = f"{beyond:+.0f}% of it [{low:+.0f}, {high:+.0f}] beyond random sets whose edits are as large"
        assert f"{said}. {'Disabling' if name == 'C4' else 'Amplifying'} the set in " in assessed.answer
        assert ", the paper's rule, changes accuracy by" in assessed.answer
        assert assessed.details["share_of_patch"] == pytest.approx([0.7, 0.55, 0.85])
        assert assessed.details["share_by_set"] == pytest.approx({"set": 0.7, "top-1": 0.1, "top-50": 0.9, "all": 1.0})
    both = f"{of_patch} into base and {of_patch} into the RL model"
    assert any(both in caveat for caveat in claim(results, spec, "C3").caveats)


def test_without_a_shown_patch_effect_no_share_is_named(results: Results, spec: StudySpec) -> None:
    known = results["mediated_share"]
    results["mediated_share"] = known.assign(share=xr.full_like(known["share"], np.nan))
    assert claim(results, spec, "C4").answer.startswith("Disabling the set in the RL model changes accuracy by")
    assert not any("Copied from the other model" in caveat for caveat in claim(results, spec, "C3").caveats)
    said = "Copying the whole residual changes accuracy by −30.0 points [−40.0, −20.0], which is no shown effect in"
    assert any(caveat.startswith(said) for caveat in claim(results, spec, "C4").caveats)
    del results["mediated_share"]
    assert not any("whole residual" in caveat for caveat in claim(results, spec, "C4").caveats)


def test_c4_unmatched_and_missing_controls_are_caveats(results: Results, spec: StudySpec) -> None:
    """Each claim speaks of the random sets of its own direction."""
    balance = results["control_balance"]
    row = balance["covariate"] == "decoder_norm_disable"
    results["control_balance"] = balance.assign(balanced=~row)
    assert any("match the set in decoder norm." in c for c in claim(results, spec, "C4").caveats)
    assert not any("match the set in" in c for c in claim(results, spec, "C5").caveats)
    none = xr.full_like(balance.standardized_difference, np.nan)
    flags = ["disable: too few features.", "amplify: none alike"]
    results["control_balance"] = balance.assign(standardized_difference=none).assign_attrs(flags=flags)
    assert "There are no matched random sets: too few features." in claim(results, spec, "C4").caveats
    assert "There are no matched random sets: none alike." in claim(results, spec, "C5").caveats


# -- table ---------------------------------------------------------------------------------------------------------
def test_claims_table_rows(results: Results, spec: StudySpec) -> None:
    rows = claims_table(assess_claims(results, spec))
    assert {len(row) for row in rows} == {len(CLAIM_COLUMNS)}
    assert rows[0] == (
        "C1",
        "SFT introduces more model-specific features than RL",
        "SUPPORTED",
        "+9.7 points",
        "[+5.2, +14.1]",
        "0.002",
    )
    assert rows[2][3:] == ("5 features", "at least 5", "0.008")
    assert rows[3][3:] == ("−35.0 points", "[−41.0, −29.0]", "0.0004")
    assert claims_table(assess_claims({}, spec))[0][2:] == ("NOT_ESTIMABLE", "—", "—", "—")


def test_c3_says_how_many_confirmed_features_other_seeds_bring_back(results: Results, spec: StudySpec) -> None:
    data = results["selection"]
    confirmed = data["feature"].values[data["tier"].values == "CONFIRMED"]
    back = int((confirmed % 2 == 0).sum())  # every second feature is matched
    caveats = claim(results, spec, "C3").caveats
    assert (
        f"{back} of {len(confirmed)} confirmed features have a match in the other dictionary trained from"
        in caveats[-2]
    )
    assert caveats[-1].startswith("One dictionary: another one, trained from other initial weights, may answer")


@pytest.mark.parametrize("name", ["C2", "C3"])
def test_features_that_explain_little_of_a_model_read_alone_are_a_caveat(
    results: Results, spec: StudySpec, name: str
) -> None:
    assert not any("Read one model at a time" in c for c in claim(results, spec, name).caveats)
    alone = results["health"]["fve_readout"]
    alone.loc[{"crosscoder": "main", "view": "sft@150"}] = 0.24
    caveats = [c for c in claim(results, spec, name).caveats if "Read one model at a time" in c]
    assert caveats == [
        "Read one model at a time (swap), the features explain 88% of base@0, 24% of sft@150 and 88% of rl@80; "
        "together they explain 93% or more. They describe each model only in part."
    ]
    results["health"] = results["health"].drop_vars("fve_readout")
    assert not any("Read one model at a time" in c for c in claim(results, spec, name).caveats)


def with_readout(results: Results, *, reasons: str = "", accepted: bool = False, **low: float) -> Results:
    """The readout of crosscoder main judged; dFVE .7 but where ``low`` says else (run_step -> value)."""
    models = [str(model) for model in results["set_stability"]["model"].values]
    n = results["health"].sizes["crosscoder"]
    dfve = np.tile([low.get(model.replace("@", "_"), 0.7) for model in models], (n, 1))
    health = results["health"].assign(
        readout_reasons=("crosscoder", [reasons] + [""] * (n - 1)),
        readout_accepted=("crosscoder", [accepted] + [False] * (n - 1)),
        healthy=("crosscoder", [not reasons] + [True] * (n - 1)),
        reasons=("crosscoder", [reasons or "ok"] + ["ok"] * (n - 1)),
    )
    health = health.drop_dims("model", errors="ignore").assign_coords(model=models)
    return results | {"health": health.assign(dfve=(("crosscoder", "model"), dfve)).assign_attrs(dfve_min=0.3)}


FAILED = "reconstructions explain -4.013 of what changed between base and sft@150, at least 0.3 needed"


@pytest.mark.parametrize("name", ["C2", "C3", "C4", "C5"])
def test_a_failed_readout_costs_every_claim_that_rests_on_it(results: Results, spec: StudySpec, name: str) -> None:
    passed = claim(with_readout(results), spec, name)
    assert (passed.answer, passed.caveats) == (claim(results, spec, name).answer, claim(results, spec, name).caveats)
    failed = claim(with_readout(results, reasons=FAILED), spec, name)
    assert (failed.verdict, math.isnan(failed.estimate)) == (Verdict.NOT_ESTIMABLE, True)
    assert failed.answer == f"Not estimable: the features of single models cannot be read: {FAILED}."
    assert claim(with_readout(results, reasons=FAILED), spec, "C1").verdict is Verdict.SUPPORTED


@pytest.mark.parametrize("by", ["study.yaml", "encode --force"])
@pytest.mark.parametrize("name", ["C2", "C3", "C4", "C5"])
def test_an_accepted_readout_is_a_caveat(results: Results, spec: StudySpec, name: str, by: str) -> None:
    if by == "study.yaml":
        main, *others = spec.crosscoders
        spec = spec.model_copy(update={"crosscoders": (main.model_copy(update={"accept_unhealthy": True}), *others)})
    read = with_readout(results, reasons=FAILED, accepted=by != "study.yaml", rl_48=-2.0)
    answered = claim(read, spec, name)
    assert answered.estimate == claim(results, spec, name).estimate
    assert answered.caveats[-1] == f"Crosscoder main failed its health check: {FAILED}."


def test_checkpoints_that_are_not_described_are_named(results: Results, spec: StudySpec) -> None:
    """They were left out of the stored contrast."""
    read = with_readout(results, sft_30=-0.5, rl_16=0.12)
    answered, before = claim(read, spec, "C2"), claim(results, spec, "C2")
    assert (answered.verdict, answered.estimate) == (before.verdict, before.estimate)
    named = "Nothing is said about sft@30 (−50%) and rl@16 (12%): so little of its change from base do the features"
    assert any(caveat.startswith(named) for caveat in answered.caveats)
    assert answered.details["dfve_below_limit"] == {"sft@30": -0.5, "rl@16": 0.12}
    del read["timing_contrast"]
    assert claim(read, spec, "C2").answer == (
        "Not estimable: of one of the runs the features describe fewer than two checkpoints."
    )


def test_every_verdict_has_a_label_a_symbol_and_a_meaning() -> None:
    assert set(VERDICT_SYMBOLS) == set(VERDICT_MEANINGS) == set(Verdict)
    assert len(set(VERDICT_SYMBOLS.values())) == len({verdict_label(v) for v in Verdict}) == len(Verdict) == 5
    assert all(meaning.endswith(".") for meaning in VERDICT_MEANINGS.values())


def three_dictionaries(results: Results, spec: StudySpec, **changes: xr.Dataset) -> tuple[Results, StudySpec]:
    """The study with three dictionaries that say the same; ``changes``: group -> what the third one has instead."""
    main, *others = spec.crosscoders
    spec = spec.model_copy(update={"crosscoders": (main.model_copy(update={"replicates": 3}), *others)})
    several = dict(results)
    for group in ("selection", "set_stability", "stabilization"):
        several |= {f"{group}.2": results[group], f"{group}.3": changes.get(group, results[group])}
    return several, spec


def test_claims_of_dictionaries_that_agree_are_those_of_one(results: Results, spec: StudySpec) -> None:
    several, of_three = three_dictionaries(results, spec)
    for name in ("C2", "C3"):
        one, together = claim(results, spec, name), claim(several, of_three, name)
        assert (together.verdict, together.estimate) == (one.verdict, pytest.approx(one.estimate))
        assert not any("One dictionary" in caveat for caveat in together.caveats)
        assert any("One dictionary" in caveat for caveat in one.caveats)
    assert claim(several, of_three, "C3").answer.startswith("In each of 3 dictionaries 5 features of ")


def test_c3_is_open_where_a_dictionary_confirms_nothing(results: Results, spec: StudySpec) -> None:
    nothing = results["selection"].copy(deep=True)
    nothing["specific_tier"][:] = "REJECTED"
    several, of_three = three_dictionaries(results, spec, selection=nothing)
    c3 = claim(several, of_three, "C3")
    assert c3.verdict is Verdict.UNDETERMINED
    assert "the dictionaries disagree (supported, supported, undetermined)" in c3.answer
    assert c3.details["n_confirmed_by_dictionary"] == [5, 5, 0]
    assert c3.estimate == pytest.approx(10 / 3)
    assert (c3.low, c3.high) == (0.0, pytest.approx(10 / 3 + 4.302652730 * 5 / 3))


def test_c2_is_open_where_a_dictionary_has_the_opposite_direction(results: Results, spec: StudySpec) -> None:
    several, of_three = three_dictionaries(results, spec)
    for third, verdict in ((0.3, Verdict.SUPPORTED), (-0.01, Verdict.UNDETERMINED)):
        each = np.array([[0.3, 0.2, third], [0.1, 0.1, 0.1]])
        data = results["timing_contrast"].drop_dims("dictionary")
        several["timing_contrast"] = data.assign(dictionary_difference=(("measure", "dictionary"), each))
        assert claim(several, of_three, "C2").verdict is verdict


def test_c4_names_the_effect_in_every_dictionary(results: Results, spec: StudySpec) -> None:
    several, of_three = three_dictionaries(results, spec)
    data = results["intervention"]
    effects = np.array([[-0.3, -0.35, -0.4], [0.1, 0.2, 0.3]])
    data = data.assign(dictionary_effect=(("direction", "dictionary"), effects))
    several["intervention"] = data.assign_attrs(features=[], n_features=[4, 5, 6], n_controls=99)
    del several["mediated_share"]
    c4 = claim(several, of_three, "C4")
    assert c4.answer.startswith(
        "Disabling the set of each dictionary in the RL model changes accuracy by −35.0 points on"
    )
    assert "(−30.0, −35.0, −40.0)" in c4.answer
    assert c4.details["effect_by_dictionary"] == pytest.approx([-30, -35, -40])
    assert (c4.details["n_features"], c4.details["n_controls"]) == ([4, 5, 6], 99)


def test_a_readout_that_fails_in_another_dictionary_costs_the_claims_too(results: Results, spec: StudySpec) -> None:
    several, of_three = three_dictionaries(with_readout(results), spec)
    health = several["health"]
    names = [str(name) for name in health["crosscoder"].values]
    renamed = ["main.3" if name == "null" else name for name in names]
    failing = [FAILED if name == "main.3" else "" for name in renamed]
    several["health"] = health.assign_coords(crosscoder=renamed).assign(readout_reasons=("crosscoder", failing))
    answer = claim(several, of_three, "C4").answer
    assert answer == f"Not estimable: the features of single models cannot be read in dictionary main.3: {FAILED}."
    sick = ("crosscoder", [name != "main.3" for name in renamed])
    reasons = ("crosscoder", ["dead fraction 0.900" if name == "main.3" else "" for name in renamed])
    several["health"] = several["health"].assign(
        readout_reasons=("crosscoder", [""] * len(renamed)), healthy=sick, reasons=reasons
    )
    for name in ("C3", "C4", "C5"):
        assert (
            "Crosscoder main.3 failed its health check: dead fraction 0.900." in claim(several, of_three, name).caveats
        )
