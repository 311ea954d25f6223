"""A causal trial in one call (plan, run, judge), and the effects of the single features of a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.causal.dictionaries import judge_together
from rlgen_stats.toolkit.statistics.causal.mediated_share import Curve, mediated_share
from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS, Direction, DirectionOutcomes
from rlgen_stats.toolkit.statistics.causal.result_datasets import Declaration, judge_trial
from rlgen_stats.toolkit.trial.plan import curves_of, plan_trial
from rlgen_stats.toolkit.trial.run_trial import LiveTrial, run_parts, run_trial


def verify_causally(
    spec: StudySpec,
    folder: StudyFolder,
    features: Sequence[int],
    covariates: xr.Dataset | None = None,
    *,
    provenance: Provenance,
    directions: Sequence[Direction] = DIRECTIONS,
    dictionary: int = 1,
    name: str = "",
    progress: Progress = SILENT,
) -> tuple[xr.Dataset, xr.Dataset]:
    """Disable the set in the RL model and amplify it in base, against matched controls, on prompts kept for this.

    Parameters
    ----------
    spec, folder, features, covariates, provenance, directions, dictionary, name
        As in :func:`plan_trial`.
    progress
        Receiver of progress.

    Returns
    -------
    intervention : Dataset
        Layout ``intervention``; also ``forced_kl_to_base``, ``forced_kl_to_rl`` and ``neutral_kl`` [direction,
        condition].
    balance : Dataset
        Layout ``control_balance``.

    Notes
    -----
    Arms and criteria are docs/method.md 4d's; see :func:`run_trial` and :func:`judge_trial`. Finished arms are kept as
    intervention/<direction>/<arm>.parquet and not run again. What cannot be estimated makes the verdict INCONCLUSIVE
    with a reason; it does not raise.
    """
    plan = plan_trial(
        spec,
        folder,
        features,
        covariates,
        provenance=provenance,
        directions=directions,
        dictionary=dictionary,
        name=name,
    )
    outcomes = run_trial(plan, progress=progress)
    return judge_trial(outcomes, plan.declared)


@dataclass(frozen=True)
class DictionaryTrials:
    """The causal trials of a study's dictionaries."""

    trials: Mapping[int, tuple[xr.Dataset, xr.Dataset]]
    """Number of the dictionary -> results and balance of its controls, as :func:`verify_causally` gives them."""
    intervention: xr.Dataset
    """One verdict on all, as :func:`judge_together` gives it."""
    balance: xr.Dataset
    """Balance of the controls: means over dictionaries."""
    mediated: xr.Dataset | None
    """Layout ``mediated_share``, of all dictionaries in which a trial was held."""


def verify_in_dictionaries(
    spec: StudySpec,
    folder: StudyFolder,
    sets: Mapping[int, Sequence[int]],
    *,
    provenance: Provenance,
    progress: Progress = SILENT,
) -> DictionaryTrials:
    """One trial for each dictionary's own set, on the same models, prompts and seeds, and a verdict on all together.

    Parameters
    ----------
    spec, folder, provenance
        As in :func:`plan_trial`.
    sets
        Number of the dictionary -> its set; may be empty.
    progress
        Receiver of progress.

    Returns
    -------
    DictionaryTrials
    """
    trials: dict[int, tuple[xr.Dataset, xr.Dataset]] = {}
    judged: dict[int, tuple[Sequence[DirectionOutcomes], Declaration]] = {}
    curves: dict[int, list[Curve]] = {}
    live: LiveTrial | None = None
    for number, features in sets.items():
        plan = plan_trial(spec, folder, features, provenance=provenance, dictionary=number)
        live = LiveTrial(plan, like=live)
        outcomes = run_trial(plan, live=live, progress=progress)
        trials[number] = judge_trial(outcomes, plan.declared)
        judged[number] = (outcomes, plan.declared)
        if outcomes:
            curves[number] = curves_of(plan, outcomes)
    shares = mediated_share(curves, alpha=spec.statistics.alpha)
    return DictionaryTrials(trials, *judge_together(judged), shares)


def feature_effects(
    spec: StudySpec,
    folder: StudyFolder,
    features: Sequence[int],
    *,
    provenance: Provenance,
    directions: Sequence[Direction] = DIRECTIONS,
    name: str = "",
    progress: Progress = SILENT,
) -> xr.Dataset:
    """Edit every feature of a set alone, leave each out of the set, and look for a smaller set that suffices.

    Parameters
    ----------
    spec, folder, features, provenance, directions, name
        As in :func:`verify_causally`, with whose arms these are kept and whose prompts and seeds they share.
    progress
        Receiver of progress, in completions.

    Returns
    -------
    Dataset
        As :func:`~rlgen_stats.toolkit.trial.parts.measure_parts` gives it.

    Raises
    ------
    NotEstimableError
        If the trial cannot be held.
    InputError
        If a feature does not exist.
    """
    plan = plan_trial(spec, folder, features, provenance=provenance, directions=directions, name=name, by_feature=True)
    return run_parts(LiveTrial(plan), progress=progress)
