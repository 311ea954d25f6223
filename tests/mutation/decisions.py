"""Which modules decide, and which tests must notice when a decision changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decision:
    """One module and its tests."""

    source: str
    tests: tuple[str, ...]
    functions: tuple[str, ...] | None = None
    """Functions whose comparisons and arithmetic are changed too; None: all of them."""
    technical: tuple[str, ...] = ()
    """Constants that bound memory, rounding or time, or are a grid between whose points is interpolated; they decide
    nothing."""
    unnoticed: Mapping[str, str] = field(default_factory=dict)
    """Mutants that change nothing that can be observed -> why."""


EXACT = "differs only exactly at the limit, which a measured number does not meet"
SIGN = "the claimed sign is +1 or -1, and no other number"
NOT_ZERO = "a difference whose direction is shown is not zero"
SLACK = "a slack for rounding, far above a double's error and far below a whole number"

DECISIONS = (
    Decision(
        "toolkit/statistics/claim_verdicts.py",
        ("tests/statistics/test_claim_verdicts.py",),
        unnoticed={
            "interval_verdict: claimed < 0  ->  claimed <= 0": SIGN,
            "interval_verdict: claimed < 0  ->  claimed < 1": SIGN,
            "specificity_verdict: effect > 0  ->  effect >= 0": NOT_ZERO,
            "difference_verdict: low > 0  ->  low >= 0": NOT_ZERO,
        },
    ),
    Decision(
        "toolkit/statistics/causal/criteria.py",
        (
            "tests/statistics/causal/test_criteria.py",
            "tests/statistics/causal/test_failure_modes.py",
            "tests/statistics/causal/test_verdict.py",
            "tests/statistics/causal/test_dictionaries.py::test_v6_must_hold_in_every_dictionary",
        ),
        functions=(
            "machinery",
            "effect_shown",
            "no_effect",
            "is_futile",
            "add",
            "stop",
            "specificity",
            "_rank",
            "random_sets_do_as_much",
            "_as_much",
            "combined_rank_p",
            "side_effects",
            "_neutral_text",
            "_kept",
            "failure_mode_match",
            "_meets",
            "_short_of_its_bound",
            "_new_failures",
        ),
        unnoticed={
            "effect_shown: table.sign > 0  ->  table.sign >= 0": SIGN,
            "effect_shown: bound > MIN_EFFECT  ->  bound >= MIN_EFFECT": EXACT,
            "effect_shown: table.sign > 0  ->  table.sign > -1": SIGN,
            "effect_shown: effects.p_value[i] <= settings.alpha  ->  effects.p_value[i] < settings.alpha": EXACT,
            "effect_shown: opposite < 0  ->  opposite <= 0": EXACT,
            "no_effect: -settings.margin < effect.low[0]  ->  -settings.margin <= effect.low[0]": EXACT,
            "no_effect: effect.high[0] < settings.margin  ->  effect.high[0] <= settings.margin": EXACT,
            "_rank: signed[random] >= signed[table.chosen] - TIE_SLACK  ->  "
            "signed[random] > signed[table.chosen] - TIE_SLACK": EXACT,
            "random_sets_do_as_much: k > MANY_RANDOM * n  ->  k >= MANY_RANDOM * n": EXACT,
            "random_sets_do_as_much: low > MANY_RANDOM  ->  low >= MANY_RANDOM": EXACT,
            "_as_much: random >= AS_MUCH * effects[table.chosen] - TIE_SLACK  ->  "
            "random > AS_MUCH * effects[table.chosen] - TIE_SLACK": EXACT,
            "_kept: effect.low[0] > -settings.margin  ->  effect.low[0] >= -settings.margin": EXACT,
            "_meets: row.statistic > row.bound  ->  row.statistic >= row.bound": EXACT,
            "_short_of_its_bound: row.p_value <= settings.alpha  ->  row.p_value < settings.alpha": EXACT,
            "_short_of_its_bound: row.statistic < row.bound  ->  row.statistic <= row.bound": EXACT,
            "_new_failures: UNLIKE + 1  ->  UNLIKE + 2": "one more class, of which no ending is",
            "_new_failures: shares[0][ending] >= shares[2][ending]  ->  shares[0][ending] > shares[2][ending]": EXACT,
            "_new_failures: mean <= TIE_SLACK  ->  mean < TIE_SLACK": EXACT,
            "_new_failures: low > 0  ->  low >= 0": EXACT,
            "add: self._sign * accuracy >= self._set_accuracy - TIE_SLACK  ->  "
            "self._sign * accuracy > self._set_accuracy - TIE_SLACK": EXACT,
        },
    ),
    Decision(
        "toolkit/statistics/causal/verdict.py",
        (
            "tests/statistics/causal/test_verdict.py",
            "tests/statistics/causal/test_dictionaries.py::test_no_verdict_is_specific_while_a_dictionary_lacks_a_set",
        ),
    ),
    Decision(
        "toolkit/statistics/causal/design.py",
        (
            "tests/statistics/causal/test_criteria.py::test_a_design_names_what_it_lacks",
            "tests/statistics/causal/test_criteria.py::test_five_clusters_cannot_show_any_effect",
        ),
        unnoticed={
            "shortfalls: 1 / alpha - 1e-09  ->  1 / alpha - 1.1000000000000001e-09": SLACK,
            "shortfalls: 1 / alpha - 1e-09  ->  1 / alpha - 9e-10": SLACK,
        },
    ),
    Decision(
        "toolkit/statistics/causal/failure_modes.py",
        ("tests/statistics/causal/test_failure_modes.py",),
        technical=("N_HASHES",),
        unnoticed={
            "kinds_of_endings: known.sum() < 2  ->  known.sum() < 1": "what is known of one completion alone is -1, "
            "below every similarity",
            "kinds_of_endings: nearest < threshold - 1e-09  ->  nearest <= threshold - 1e-09": EXACT,
            "kinds_of_endings: threshold - 1e-09  ->  threshold - 1.1000000000000001e-09": SLACK,
            "kinds_of_endings: threshold - 1e-09  ->  threshold - 9e-10": SLACK,
            "agreement_of: len(pool) < 2  ->  len(pool) < 1": "the mean over no other prompt is not a number, and left "
            "out as well",
        },
    ),
    Decision(
        "toolkit/statistics/causal/controls.py",
        ("tests/statistics/causal/test_controls.py",),
        functions=("comparable", "unbalanced", "_refuse_impossible"),
        technical=("TINY", "NOISE", "OVERDRAW", "MIN_POOL"),
        unnoticed={"_refuse_impossible: gap > spread  ->  gap >= spread": EXACT},
    ),
    Decision(
        "toolkit/statistics/causal/mediated_share.py",
        ("tests/statistics/causal/test_mediated_share.py",),
        functions=("_reach", "of_patch", "compact_share"),
        technical=("SETTLED", "MOST_STEPS"),
        unnoticed={
            "of_patch: larger <= CALIPER  ->  larger < CALIPER": EXACT,
            "_reach: np.abs(reach - before).max(initial=0.0) < SETTLED  ->  "
            "np.abs(reach - before).max(initial=0.0) <= SETTLED": EXACT,
            "_reach: reach - before  ->  reach + before": "only more steps towards the same ends",
        },
    ),
    Decision(
        "toolkit/statistics/causal/edit_norms.py",
        ("tests/statistics/causal/test_edit_norms.py",),
        unnoticed={
            "of_each: len(one) <= widest  ->  len(one) < widest": "a set of that size has the same norm by either way",
            "of_small: places + n * len(known)  ->  places - n * len(known)": "the same rows, counted from the end",
        },
    ),
    Decision(
        "toolkit/statistics/specificity/compared_arms.py",
        ("tests/statistics/specificity/test_compared_arms.py",),
        unnoticed={
            "_parity: abs(fve[0] - fve[1]) > FVE_TOLERANCE  ->  abs(fve[0] - fve[1]) >= FVE_TOLERANCE": EXACT,
            "_parity: abs(dead[0] - dead[1]) > DEAD_TOLERANCE  ->  abs(dead[0] - dead[1]) >= DEAD_TOLERANCE": EXACT,
        },
    ),
    Decision(
        "toolkit/statistics/specificity/matched_movement.py",
        ("tests/statistics/specificity/test_compared_arms.py",),
        unnoticed={
            "at_distance: level > 0  ->  level >= 0": "no distance is within a factor of zero or less",
            "at_distance: level > 0  ->  level > -1": "no distance is within a factor of zero or less",
            "at_distance: d >= level  ->  d > level": "at a checkpoint's own distance the other one has no weight",
        },
    ),
    Decision(
        "toolkit/statistics/specificity/superiority.py",
        ("tests/statistics/specificity/test_compared_arms.py",),
        technical=("BLOCK_ENTRIES",),
    ),
    Decision(
        "toolkit/statistics/specificity/arm_contrast.py",
        ("tests/statistics/specificity/test_arm_contrast.py",),
        functions=(),
    ),
    Decision(
        "toolkit/statistics/kernels/intervals/bounded.py",
        ("tests/statistics/kernels/test_bounded.py",),
        functions=("bounded_interval", "_with_one_more"),
        unnoticed={
            "bounded_interval: np.abs(x).max(initial=0.0) > limit + TIE_SLACK  ->  "
            "np.abs(x).max(initial=0.0) >= limit + TIE_SLACK": EXACT,
            "bounded_interval: sign * (each - mean) > TIE_SLACK  ->  sign * (each - mean) >= TIE_SLACK": EXACT,
            "bounded_interval: np.ptp(each, axis=0) <= TIE_SLACK  ->  np.ptp(each, axis=0) < TIE_SLACK": EXACT,
        },
        technical=("N_DRAWS", "BLOCK"),
    ),
    Decision(
        "toolkit/statistics/timing/run_contrast.py",
        ("tests/statistics/timing/test_run_contrast.py",),
        functions=("paired_checkpoints", "_determined"),
        unnoticed={
            "paired_checkpoints: apart[i, j] <= SAME_SHARE + 1e-09  ->  apart[i, j] < SAME_SHARE + 1e-09": EXACT,
            "paired_checkpoints: SAME_SHARE + 1e-09  ->  SAME_SHARE + 1.1000000000000001e-09": SLACK,
            "paired_checkpoints: SAME_SHARE + 1e-09  ->  SAME_SHARE + 9e-10": SLACK,
        },
    ),
    Decision(
        "toolkit/statistics/timing/set_stability.py",
        tuple(
            f"tests/statistics/timing/test_set_stability.py::{name}"
            for name in (
                "test_verdicts_of_one_run",
                "test_chance_reaches_chance_high_one_time_in_twenty",
                "test_rank_biased_overlap_has_persistence_nine_tenths",
                "test_eight_units_and_two_a_group_are_the_fewest_and_twenty_groups_the_most",
            )
        ),
        functions=(),
        technical=("SCORE_DIGITS", "SCORED_AT_ONCE", "ADDED_NOISE"),
    ),
    Decision(
        "toolkit/statistics/selection/compactness.py",
        (
            "tests/statistics/selection/test_compactness.py::test_the_interval_is_the_jackknifes_over_twenty_groups",
            "tests/statistics/selection/test_compactness.py::test_the_margin_of_one_feature_is_welchs_test",
            "tests/statistics/selection/test_select_features.py"
            "::test_a_compact_set_is_at_most_a_tenth_of_the_testable_features",
            "tests/statistics/test_claim_verdicts.py",
        ),
        functions=(),
    ),
    Decision(
        "toolkit/crosscoder/uses/health.py",
        ("tests/crosscoder/uses/test_health_limits.py",),
        functions=("judge_health", "_at_least", "dense_fraction", "dead_fraction"),
        technical=("HEALTH_TOKENS",),
        unnoticed={"judge_health: abs(bias - 1.0) <= BIAS_TOLERANCE  ->  abs(bias - 1.0) < BIAS_TOLERANCE": EXACT},
    ),
    Decision(
        "toolkit/crosscoder/uses/readout_health.py",
        ("tests/crosscoder/uses/test_health_limits.py",),
        functions=("judge_readout", "_of_change"),
        technical=("READOUT_TOKENS",),
        unnoticed={
            "_of_change: float(explained.constant_share()) > CONSTANT  ->  "
            "float(explained.constant_share()) >= CONSTANT": EXACT,
            "judge_readout: one.fve >= least  ->  one.fve > least": EXACT,
            "judge_readout: one.change > UNCHANGED  ->  one.change >= UNCHANGED": EXACT,
        },
    ),
    Decision(
        "toolkit/statistics/replicability.py",
        ("tests/statistics/test_replicability.py",),
        functions=("decoded_agreement", "matched_drift", "set_agreement", "_common_prompts", "_levels"),
        technical=("N_RANDOM_SETS",),
        unnoticed={"decoded_agreement: n_parts - 1  ->  n_parts - 0": "the number of parts is odd, and halved down"},
    ),
    Decision(
        "toolkit/statistics/kernels/pooling.py",
        ("tests/statistics/kernels/test_pooling.py",),
        functions=("dictionaries_needed", "agreed", "same_direction", "pooled_intervals", "_parts", "_pooled"),
        technical=("BISECTIONS", "SMALLEST_LOG_P"),
        unnoticed={
            "FEW_DICTIONARIES: 5  ->  4": "four fifths of four, rounded up, are all four",
            "dictionaries_needed: MAJORITY * n - 1e-09  ->  MAJORITY * n - 1.1000000000000001e-09": SLACK,
            "dictionaries_needed: MAJORITY * n - 1e-09  ->  MAJORITY * n - 9e-10": SLACK,
        },
    ),
    Decision("toolkit/statistics/kernels/intervals/clustered.py", ("tests/statistics/kernels/intervals",)),
    Decision("toolkit/statistics/kernels/proportions.py", ("tests/statistics/kernels/test_proportions.py",)),
    Decision(
        "toolkit/statistics/kernels/unit_tables.py",
        ("tests/statistics/kernels/flips/test_signflip.py",),
        functions=(),
        technical=("BLOCK_UNITS",),
    ),
    Decision("toolkit/statistics/core/paired_accuracy.py", ("tests/statistics/test_comparison.py",)),
    Decision(
        "toolkit/statistics/selection/linear_probe.py",
        tuple(
            f"tests/statistics/selection/test_probe.py::{name}"
            for name in (
                "test_candidates_fire_on_ten_prompts_and_are_twice_as_many_as_the_selected",
                "test_folds_need_two_units_of_either_answer_each",
                "test_random_sets_fire_as_often_and_leave_out_the_selected",
                "test_the_inner_folds_choose_one_of_three_penalties",
            )
        ),
        functions=("matched_sets", "nested_folds"),
    ),
)
