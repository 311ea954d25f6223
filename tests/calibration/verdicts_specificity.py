"""False verdicts on claim C1: studies simulated as tables of attribution, answered as the report answers them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr
from scipy import stats

from rlgen_stats.toolkit.reporting.claims.c1_specificity import assess_specificity
from rlgen_stats.toolkit.statistics import attribution_contrast
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict
from rlgen_stats.toolkit.statistics.planning.simulated_claims import (
    SpecificShares,
    attribution_of,
    equal_health,
    movement_of,
)
from tests.calibration.rows import Row, rate_row
from tests.reporting.synthetic_study import make_spec

ALPHA = 0.05
DRAWS = 99
DIRECTED = (Verdict.SUPPORTED, Verdict.CONTRADICTED)


EQUAL = SpecificShares({"sft@150": 0.15, "rl@80": 0.15}, {"sft@150": 0.4, "rl@80": 0.4}, spread=0.08)
"""No difference."""
TINY = replace(EQUAL, shares={"sft@150": 0.01, "rl@80": 0.002}, n_features=2000, spread=0.0, cluster=1)
"""Eight features in a thousand more: less than one in a hundred, which is called negligible."""
MORE = replace(EQUAL, shares={"sft@150": 0.35, "rl@80": 0.10}, spread=0.02)
OPPOSITE = replace(MORE, shares={"sft@150": 0.10, "rl@80": 0.35})
FARTHER = SpecificShares(
    {"sft@3": 0.10, "sft@150": 0.40, "rl@80": 0.25},
    {"sft@3": 0.1, "sft@30": 0.3, "sft@150": 0.4, "rl@80": 0.2},
    spread=0.02,
)
"""How many features are specific is a matter of distance alone, linear in its logarithm; SFT went farther."""


def _verdicts(world: SpecificShares, studies: int, seed: int) -> tuple[list[Verdict], list[Verdict | None]]:
    """Of each study, C1's verdict and the old rule's direction."""
    spec, movement, found, old = make_spec(), movement_of(world), [], []
    for study in range(studies):
        table = attribution_of(world, np.random.default_rng([seed, study]))
        clusters = {str(name): np.arange(world.n_features) // world.cluster for name in table["crosscoder"].values}
        contrast = attribution_contrast(
            table,
            clusters,
            sft="sft",
            rl="rl",
            taus=(0.7,),
            movement=movement,
            health=equal_health(table),
            seed=study,
            n_bootstrap=DRAWS,
        )
        found.append(assess_specificity({"attribution_contrast": contrast}, spec).verdict)
        old.append(_old_rule(table, world))
    return found, old


def _old_rule(table: xr.Dataset, world: SpecificShares) -> Verdict | None:
    """One dictionary of each final model, any interval off zero whatever the effect's size and the distances."""
    hits = [table["nrn_l1"].sel(crosscoder=f"{name}.0").values[:: world.cluster] > 0.7 for name in ("sft@150", "rl@80")]
    error = np.sqrt(sum(np.var(one) / len(one) for one in hits))
    z = (hits[0].mean() - hits[1].mean()) / error if error > 0 else 0.0
    if abs(z) <= stats.norm.isf(ALPHA / 2):
        return None
    return Verdict.SUPPORTED if z > 0 else Verdict.CONTRADICTED


def specificity_verdicts(scale: int, seed: int) -> list[Row]:
    """Verdicts on C1 where there is no difference, a negligible one, a true one, and one of distance alone."""
    n = 12 * scale
    cases = (
        ("no difference: SUPPORTED or CONTRADICTED", EQUAL, DIRECTED, ALPHA),
        ("effect of .8 points: SUPPORTED or CONTRADICTED", TINY, DIRECTED, ALPHA),
        ("difference of distance alone: SUPPORTED or CONTRADICTED", FARTHER, DIRECTED, ALPHA),
        ("25 points more: CONTRADICTED or NOT_SUPPORTED", MORE, (Verdict.CONTRADICTED, Verdict.NOT_SUPPORTED), ALPHA),
        ("25 points less: SUPPORTED", OPPOSITE, (Verdict.SUPPORTED,), ALPHA),
    )
    rows = []
    for number, (name, world, wrong, nominal) in enumerate(cases):
        found, old = _verdicts(world, n, 100 * seed + number)
        many = f"{world.n_dictionaries} dictionaries of {world.n_features:,} features in clusters of {world.cluster}"
        size = f"{n} studies, {many}"
        bites = any(verdict in wrong for verdict in old)
        rows.append(
            rate_row(
                name,
                nominal,
                sum(verdict in wrong for verdict in found),
                n,
                size,
                at_most=True,
                naive=sum(verdict in wrong for verdict in old) / n if bites else float("nan"),
                naive_name="one dictionary of each final model, any size" if bites else "",
            )
        )
        if world in (MORE, OPPOSITE):
            right = Verdict.SUPPORTED if world is MORE else Verdict.CONTRADICTED
            missed = sum(verdict is not right for verdict in found)
            rows.append(rate_row(f"{name.partition(':')[0]}: not {right.name}", 0.2, missed, n, size, at_most=True))
    return rows
