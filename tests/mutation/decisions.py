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


EXACT = "equal only where the statistic is exactly at the limit, which it is with probability 0"

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
        functions=("_comparable", "comparability"),
    ),
    Decision(
        "toolkit/crosscoder/uses/health.py",
        ("tests/crosscoder/uses/test_health_limits.py",),
        functions=("judge_health", "_at_least", "dense_fraction", "dead_fraction"),
        technical=("HEALTH_TOKENS",),
    ),
    Decision(
        "toolkit/crosscoder/uses/readout_health.py",
        ("tests/crosscoder/uses/test_health_limits.py",),
        functions=("judge_readout", "_of_change"),
        technical=("READOUT_TOKENS",),
    ),
    Decision(
        "toolkit/statistics/replicability.py",
        ("tests/statistics/test_replicability.py",),
        functions=("decoded_agreement", "matched_drift", "set_agreement", "_common_prompts", "_levels"),
        technical=("N_RANDOM_SETS",),
    ),
    Decision(
        "toolkit/statistics/kernels/pooling.py",
        ("tests/statistics/kernels/test_pooling.py",),
        functions=("dictionaries_needed", "agreed", "same_direction", "pooled_intervals", "_parts", "_pooled"),
        technical=("BISECTIONS", "SMALLEST_LOG_P"),
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
        ("tests/statistics/selection/test_probe.py",),
        functions=("matched_sets", "nested_folds"),
    ),
)
