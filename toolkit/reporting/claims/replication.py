"""What a number of runs per arm can and cannot show."""

from __future__ import annotations

import math
from collections import Counter

import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.formatting import fixed, listed
from rlgen_stats.toolkit.reporting.result_lookup import Results, attr_number, labels_of, number, text
from rlgen_stats.toolkit.statistics.claim_verdicts import smallest_permutation_p


def runs_per_arm(spec: StudySpec) -> dict[str, int]:
    """Number of runs of each arm, in the spec's order."""
    return dict(Counter(run.arm for run in spec.runs))


def fewest_runs(spec: StudySpec) -> int:
    """The smaller number of runs of the two contrasted arms."""
    counts = runs_per_arm(spec)
    return min(counts[run.arm] for run in spec.contrasted)


def these_models(spec: StudySpec, *, start: bool = True) -> str:
    """The subject of a verdict on two runs."""
    word = "these two models" if fewest_runs(spec) == 1 else "the two runs compared"
    return word[0].upper() + word[1:] if start else word


def run_caveat(spec: StudySpec) -> str:
    """One sentence on the replication behind a comparison of arms."""
    first, second = spec.contrasted
    counts = runs_per_arm(spec)
    n_first, n_second = counts[first.arm], counts[second.arm]
    if min(n_first, n_second) == 1:
        return (
            "One run per arm: the verdict says that these two models differ, not that SFT and RL do; another seed of "
            "either arm could differ as much."
        )
    return (
        f"The contrast is between two runs ({first.name}, {second.name}) of {n_first} and {n_second} trained; exact "
        f"permutation of run labels could reach p = {smallest_permutation_p(n_first, n_second):.3g} at best."
    )


def replication_text(spec: StudySpec) -> str:
    """A paragraph for the report's header: what this number of runs can and cannot show."""
    counts = runs_per_arm(spec)
    shown = listed(f"{n} {arm} run{'s' * (n > 1)}" for arm, n in counts.items())
    first, second = spec.contrasted
    n_first, n_second = counts[first.arm], counts[second.arm]
    if min(n_first, n_second) == 1:
        return (
            f"This study has {shown}. One run per arm can show that these two models differ on these prompts, how, "
            "when, and whether editing features changes what they say. It cannot show that SFT and RL differ: the unit "
            "of that claim is the training run, and one of each has no variation to compare with. Three runs per arm "
            "can reach p = 0.10 at best, four p = 0.029."
        )
    return (
        f"This study has {shown}. The claims compare the runs {first.name} and {second.name}; claims about the arms "
        f"have the training run as their unit, and with these numbers an exact permutation of run labels can reach "
        f"p = {smallest_permutation_p(n_first, n_second):.3g} at best."
    )


def unusable_readout(results: Results, spec: StudySpec) -> str:
    """Why the features of single models say nothing in this study; empty if they can be read, or were accepted."""
    health = results.get("health")
    for name in spec.primary_crosscoder.names:
        failed = text(health, "readout_reasons", crosscoder=name)
        if failed and not _accepted(health, name, spec):
            where = f" in dictionary {name}" if len(spec.primary_crosscoder.names) > 1 else ""
            return f"the features of single models cannot be read{where}: {failed}"
    return ""


def readout_accepted(results: Results, spec: StudySpec) -> bool:
    """Whether the study uses its readout whatever its checks say."""
    return all(_accepted(results.get("health"), name, spec) for name in spec.primary_crosscoder.names)


def _accepted(health: xr.Dataset | None, name: str, spec: StudySpec) -> bool:
    return spec.primary_crosscoder.accept_unhealthy or number(health, "readout_accepted", crosscoder=name) == 1.0


def dictionary_caveat(spec: StudySpec) -> tuple[str, ...]:
    """One sentence where a single dictionary speaks for all."""
    if len(spec.primary_crosscoder.names) > 1:
        return ()
    return (
        "One dictionary: another one, trained from other initial weights, may answer otherwise, and no interval here "
        "holds that (replicates: 3 in study.yaml).",
    )


def health_caveat(results: Results, spec: StudySpec) -> tuple[str, ...]:
    """Sentences where encoded crosscoders failed their checks; else one where features describe a view in part."""
    health = results.get("health")
    names = [name for name in spec.primary_crosscoder.names if name in labels_of(health, "crosscoder")]
    failed = [name for name in names if not number(health, "healthy", crosscoder=name)]
    if health is None or not names or failed:
        said = ((name, text(health, "reasons", crosscoder=name)) for name in failed)
        return tuple(f"Crosscoder {name} failed its health check: {reasons}." for name, reasons in said)
    if "fve_readout" not in health:
        return ()
    alone = health["fve_readout"].sel(crosscoder=names).min("crosscoder").dropna("view")
    required = attr_number(health, "fve_min")
    if not alone.size or not math.isfinite(required) or float(alone.min()) >= required:
        return ()
    explained = listed(f"{fixed(100 * fve, 0)}% of {view}" for view, fve in alone.to_series().items())
    joint = float(health["fve"].sel(crosscoder=names, view=alone["view"].values).min())
    which = "" if len(names) == 1 else " of the dictionary that explains least"
    return (
        f"Read one model at a time ({spec.primary_crosscoder.readout}), the features{which} explain {explained}; "
        f"together they explain {fixed(100 * joint, 0)}% or more. They describe each model only in part.",
    )
