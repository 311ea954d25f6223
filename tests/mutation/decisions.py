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
    """Constants that bound memory, rounding or time and decide nothing."""
    unnoticed: Mapping[str, str] = field(default_factory=dict)
    """Mutants that change nothing that can be observed -> why."""


EXACT = "differs only exactly at the limit, which a measured number does not meet"
SLACK = "a slack for rounding, far above a double's error and far below a whole number"

DECISIONS = (
    Decision("toolkit/statistics/causal/criteria.py", ("tests/statistics/causal/test_verdict.py",)),
    Decision("toolkit/statistics/causal/verdict.py", ("tests/statistics/causal/test_verdict.py",)),
    Decision(
        "toolkit/statistics/causal/controls.py",
        ("tests/statistics/causal/test_controls.py",),
        functions=("comparable", "unbalanced", "_refuse_impossible"),
        technical=("TINY", "NOISE", "OVERDRAW", "MIN_POOL"),
    ),
    Decision("toolkit/statistics/claim_verdicts.py", ("tests/statistics/test_claim_verdicts.py",)),
    Decision(
        "toolkit/statistics/specificity/arm_contrast.py",
        ("tests/statistics/specificity/test_arm_contrast.py",),
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
