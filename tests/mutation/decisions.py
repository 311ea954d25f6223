"""Which modules decide, and which tests must notice when a decision changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """One module and its tests."""

    source: str
    tests: tuple[str, ...]
    functions: tuple[str, ...] | None = None
    """Functions whose comparisons and arithmetic are changed too; None: all of them."""
    technical: tuple[str, ...] = ()
    """Constants that bound memory, rounding or time and decide nothing."""


DECISIONS = (
    Decision(
        "toolkit/statistics/causal/criteria.py", ("tests/statistics/causal/test_verdict.py", "tests/statistics/causal")
    ),
    Decision(
        "toolkit/statistics/causal/verdict.py", ("tests/statistics/causal/test_verdict.py", "tests/statistics/causal")
    ),
    Decision(
        "toolkit/statistics/causal/controls.py",
        ("tests/statistics/causal/test_controls.py",),
        functions=("comparable", "unbalanced", "_refuse_impossible", "_spread", "_result"),
        technical=("TINY", "NOISE", "OVERDRAW", "MIN_POOL"),
    ),
    Decision("toolkit/statistics/claim_verdicts.py", ("tests/statistics/test_claim_verdicts.py",)),
    Decision(
        "toolkit/statistics/specificity/arm_contrast.py",
        ("tests/statistics/specificity/test_arm_contrast.py",),
        functions=("_comparable", "comparability"),
    ),
    Decision(
        "toolkit/statistics/timing/set_stability.py",
        ("tests/statistics/timing/test_set_stability.py",),
        functions=("_verdict", "_status", "verdict_of"),
        technical=("SCORED_AT_ONCE", "SCORE_DIGITS", "DEFAULT_GROUPS"),
    ),
    Decision(
        "toolkit/statistics/timing/stabilization.py",
        ("tests/statistics/timing/test_stabilization.py", "tests/statistics/timing/test_stabilization_arms.py"),
        functions=(),
        technical=("PERMUTATIONS",),
    ),
    Decision("toolkit/statistics/timing/run_contrast.py", ("tests/statistics/timing/test_run_contrast.py",)),
    Decision(
        "toolkit/crosscoder/uses/health.py",
        ("tests/crosscoder/uses/test_health_limits.py",),
        functions=("_judge", "_at_least", "dense_fraction", "dead_fraction", "healthy"),
        technical=("HEALTH_TOKENS",),
    ),
    Decision(
        "toolkit/crosscoder/uses/readout_health.py",
        ("tests/crosscoder/uses/test_health_limits.py", "tests/crosscoder/uses/test_readout_health.py"),
        functions=("judge_readout", "_of_change", "_share", "own_fve"),
        technical=("READOUT_TOKENS",),
    ),
    Decision(
        "toolkit/statistics/replicability.py",
        ("tests/statistics/test_replicability.py",),
        technical=("N_RANDOM_SETS",),
    ),
    Decision(
        "toolkit/statistics/kernels/pooling.py",
        ("tests/statistics/kernels/test_pooling.py",),
        technical=("BISECTIONS", "SMALLEST_LOG_P"),
    ),
    Decision("toolkit/statistics/kernels/proportions.py", ("tests/statistics/kernels/test_proportions.py",)),
    Decision(
        "toolkit/statistics/kernels/intervals/clustered.py",
        ("tests/statistics/kernels/test_oracles.py", "tests/statistics/kernels/intervals"),
    ),
    Decision(
        "toolkit/statistics/kernels/unit_tables.py",
        ("tests/statistics/kernels/flips/test_signflip.py",),
        functions=(),
        technical=("BLOCK_UNITS",),
    ),
    Decision(
        "toolkit/statistics/core/paired_accuracy.py",
        ("tests/statistics/test_comparison.py", "tests/statistics/test_behaviour.py"),
    ),
    Decision("toolkit/statistics/comparison.py", ("tests/statistics/test_comparison.py",)),
    Decision(
        "toolkit/statistics/selection/separation.py",
        ("tests/statistics/selection/test_separation.py",),
        functions=(),
        technical=("N_GROUPS",),
    ),
    Decision("toolkit/statistics/selection/linear_probe.py", ("tests/statistics/selection",), functions=()),
)
