"""What a study of this size can answer: power of each claim's verdict, simulated before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import dask
import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, CLUSTER, TASK
from rlgen_stats.schemas.null_views import BASE_VIEWS, REPEAT_MODEL
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import RunSpec, StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, open_results, result_groups, write_results
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.toolkit.intervention import Settings, judge
from rlgen_stats.toolkit.posttrain.schedule import checkpoint_steps
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.reporting.claims.c1_specificity import assess_specificity
from rlgen_stats.toolkit.statistics import attribution_contrast, set_stability, stabilization_test
from rlgen_stats.toolkit.statistics.claim_verdicts import Difference, Verdict, selection_claim, timing_verdict
from rlgen_stats.toolkit.statistics.planning.simulated_claims import (
    MODELS,
    SpecificShares,
    attribution_of,
    equal_health,
    features_of_runs,
    movement_of,
    rises_where_gained,
    selection_study,
    two_runs,
)
from rlgen_stats.toolkit.statistics.planning.simulated_trials import EMPTY, world
from rlgen_stats.toolkit.statistics.selection.options import SelectionTests
from rlgen_stats.toolkit.statistics.selection.select_features import select_features
from rlgen_stats.toolkit.statistics.timing.run_contrast import MEASURES, timing_contrast
from rlgen_stats.toolkit.study.stage_graph import Study
from rlgen_stats.toolkit.trial.arms import choose_prompts, target_prompts

POWER: Final = "claim_power"
"""Group of results.zarr."""
N_WORLDS: Final = 20
"""Simulated studies of each truth: a power of .8 is then right to .18 (two standard errors)."""
FEATURES: Final = 100
"""Features of a simulated study of timing or selection; more of them cost time and change little."""
RESAMPLES: Final = 199
ACCURACY: Final = (0.5, 0.8)
"""Of base and the RL model in the simulated studies."""
LOST: Final = 0.3
"""Share of base's right answers that RL loses in the simulated studies of selection."""


@dataclass(frozen=True)
class StudySize:
    """The numbers that decide what a study can show."""

    n_clusters: int
    """Clusters of prompts of tasks that are no controls."""
    n_selection_tasks: int
    """Tasks that choose features."""
    prompts_per_task: int
    """Clusters of prompts of such a task, in all three parts."""
    steps: tuple[int, ...]
    """Checkpoints of an arm."""
    n_target: int
    """Trial prompts on which an effect is measured."""
    n_target_clusters: int
    n_unrelated: int
    """Clusters of trial prompts on which side effects are measured."""
    n_random: int
    n_features: int
    """Of a dictionary of base and one model."""
    n_dictionaries: int
    """Dictionaries of base and one model."""
    min_discordant: int
    alpha: float
    margin: float


def study_size(spec: StudySpec, folder: StudyFolder, steps: tuple[int, ...]) -> StudySize:
    """Read off a study's file and prompts what decides its power.

    Parameters
    ----------
    spec, folder
        The study; its prompts must be there, nothing else.
    steps
        Checkpoints of an arm.
    """
    prompts = load_prompts(spec, folder)
    control, held_out = spec.selection.control_tasks, spec.selection.held_out_tasks
    asked = prompts[~prompts[TASK].isin(control)]
    selecting = asked[~asked[TASK].isin(held_out)]
    trial = choose_prompts(prompts, spec)
    target, unrelated = target_prompts(trial, spec)
    pairs = [one for one in spec.crosscoders if len(one.views) == 2]
    return StudySize(
        n_clusters=asked[CLUSTER].nunique(),
        n_selection_tasks=selecting[TASK].nunique(),
        prompts_per_task=int(selecting.groupby(TASK)[CLUSTER].nunique().min()),
        steps=steps,
        n_target=int(target.sum()),
        n_target_clusters=trial.loc[target, CLUSTER].nunique(),
        n_unrelated=trial.loc[unrelated, CLUSTER].nunique(),
        n_random=spec.intervention.n_controls,
        n_features=min((one.n_features for one in pairs), default=0),
        n_dictionaries=min((len(one.names) for one in pairs), default=0),
        min_discordant=spec.selection.min_discordant,
        alpha=spec.statistics.alpha,
        margin=spec.intervention.non_inferiority,
    )


def write_claim_power(study: Study, *, n_worlds: int = N_WORLDS, progress: Progress = SILENT) -> xr.Dataset:
    """Simulate the power of a study's claims and store it as ``results.zarr/claim_power``, where the report finds it.

    What is stored already for a study of this size is kept. Nothing has to be trained, only the prompts must be there.
    """
    spec, results = study.spec, study.folder.results
    size = study_size(spec, study.folder, steps_of(spec.contrasted[1]))
    said = {"n_worlds": n_worlds, "size": json.dumps(asdict(size))}
    if POWER in result_groups(results):
        stored = open_results(results, POWER).load()
        if {name: stored.attrs.get(name) for name in said} == said:
            return stored
    found = claim_power(size, spec, n_worlds=n_worlds, progress=progress)
    details = {"stage": POWER, "study": spec.name, "seed": spec.seed, "parents": {}}
    write_results(results, POWER, found, provenance=Provenance(study.study_id, content_hash(said), details))
    return found


def steps_of(run: RunSpec) -> tuple[int, ...]:
    """Checkpoints of a run, also of one whose training has not begun; where its steps are not known, of a thousand."""
    if run.checkpoints:
        return tuple(sorted(run.checkpoints))
    total = run.trainer.get("max_steps", 1000)
    return checkpoint_steps(int(total), run.n_checkpoints, run.schedule)


def claim_power(
    size: StudySize, spec: StudySpec, *, n_worlds: int = N_WORLDS, progress: Progress = SILENT
) -> xr.Dataset:
    """How often a study of this size says what is true, for each claim and some truths.

    Parameters
    ----------
    size
        From :func:`study_size`.
    spec
        Names the runs, and seeds the simulation.
    n_worlds
        Simulated studies of each truth.
    progress
        Receiver of progress.

    Returns
    -------
    Dataset
        claim, truth, verdict (the right one), power (share of simulated studies that give it) on ``row``.

    Notes
    -----
    Every study is simulated as the tables that the claim's verdict is made from, and judged by the same code. Verdicts
    over several dictionaries of the encoded crosscoder are simulated with one; C3 without the trial's curve. What a
    simulation takes for granted (size of effects, noise) is in the words of its truth and in the named worlds of
    :mod:`rlgen_stats.toolkit.statistics.planning`.
    """
    rows = list(_truths(size, spec))
    power = []
    one_thread = dask.config.set(scheduler="synchronous")
    with one_thread, progress.task("power of the claims", total=len(rows), unit="truth") as task:
        for claim, truth, verdict, study in rows:
            found = [study(derive_seed(spec.seed, "claim power", claim, truth, world)) for world in range(n_worlds)]
            power.append(float(np.mean([str(one) == verdict for one in found])))
            task.advance(1, claim=claim, power=power[-1])
    columns = dict(zip(("claim", "truth", "verdict"), zip(*(row[:3] for row in rows), strict=True), strict=True))
    return xr.Dataset(
        {name: ("row", list(values)) for name, values in columns.items()} | {"power": ("row", power)},
        attrs={"n_worlds": n_worlds, "size": json.dumps(asdict(size))},
    )


_Study = Callable[[int], str]


def _truths(size: StudySize, spec: StudySpec) -> Iterator[tuple[str, str, str, _Study]]:
    """Claim, what is true, the verdict that says so, and a function that simulates and judges such a study."""
    if size.n_features:
        for truth, sft, verdict in (
            ("25 points more features are specific to SFT", 0.35, Verdict.SUPPORTED),
            ("25 points more are specific to RL", 0.10, Verdict.CONTRADICTED),
        ):
            yield "C1", truth, verdict, partial(_specificity, size, spec, sft=sft, rl=0.45 - sft)
    early, late = (0.02, 0.15), (0.3, 1.0)
    for truth, windows, verdict in (
        ("SFT settles by 15% of training, RL from 30% on", (early, late), Verdict.SUPPORTED),
        ("RL settles by 15%, SFT from 30% on", (late, early), Verdict.CONTRADICTED),
    ):
        yield "C2", truth, verdict, partial(_timing, size, windows)
    for truth, n, verdict in (
        ("one feature in twenty rises by 2 sd where RL gained", FEATURES // 20, Verdict.SUPPORTED),
        ("every other feature does", FEATURES // 2, Verdict.NOT_SUPPORTED),
    ):
        yield "C3", truth, verdict, partial(_selection, size, n)
    base, rl = ACCURACY
    half = {"right": {"set": (base + rl) / 2}, "kl": {"set": 0.4}}
    for truth, called, how in (
        ("the set carries half of RL's 30 points", "CAUSAL_SPECIFIC", half),
        ("the edit changes nothing", "NO_EFFECT", {"fresh_noise": False}),
        ("the edit breaks the model", "DESTRUCTIVE", half | {"set_fails": EMPTY}),
    ):
        yield "C4, C5", truth, called, partial(_trial, size, how)


def _has_floor(spec: StudySpec) -> bool:
    """Whether base is compared with itself, with noise on it, or with a run that is not taught."""
    floors = {run.name for run in spec.runs if run.is_floor}
    pairs = [one.views for one in spec.crosscoders if len(one.views) == 2 and BASE_MODEL in one.views]
    others = {view for views in pairs for view in views if view != BASE_MODEL}
    return any(view in BASE_VIEWS or view.endswith("@noise") or view.partition("@")[0] in floors for view in others)


def _specificity(size: StudySize, spec: StudySpec, seed: int, *, sft: float, rl: float) -> str:
    names = [f"{run.name}@100" for run in spec.contrasted]
    floor = {REPEAT_MODEL: 0.0} if _has_floor(spec) else {}
    simulated = SpecificShares(
        dict(zip(names, (sft, rl), strict=True)) | floor,
        dict.fromkeys(names, 0.4),
        n_features=size.n_features,
        spread=0.02,
        n_dictionaries=size.n_dictionaries,
    )
    table = attribution_of(simulated, np.random.default_rng(seed))
    contrast = attribution_contrast(
        table,
        {str(name): np.arange(size.n_features) // simulated.cluster for name in table["crosscoder"].values},
        sft=spec.contrasted[0].name,
        rl=spec.contrasted[1].name,
        floors={name: [f"{name}.{number}" for number in range(size.n_dictionaries)] for name in floor},
        taus=(spec.statistics.tau,),
        movement=movement_of(simulated),
        health=equal_health(table),
        seed=seed,
        n_bootstrap=RESAMPLES,
    )
    return assess_specificity({"attribution_contrast": contrast}, spec).verdict


def _timing(size: StudySize, windows: tuple[tuple[float, float], tuple[float, float]], seed: int) -> str:
    random, shares = np.random.default_rng(seed), np.array(size.steps) / size.steps[-1]
    features = features_of_runs(two_runs(windows, shares, FEATURES, random), size.steps, size.n_clusters, random)
    common: dict[str, Any] = {"runs": ["sft", "rl"], "seed": seed, "alpha": size.alpha}
    chain = stabilization_test(features, n_bootstrap=RESAMPLES // 2, **common).compute()
    sets = set_stability(features, k=FEATURES // 8, n_halvings=10, n_groups=10, **common)
    contrast = timing_contrast([chain], [sets], first="sft", second="rl", alpha=size.alpha)
    return verdict_of_contrast(contrast, size.alpha)


def verdict_of_contrast(contrast: xr.Dataset, alpha: float) -> Verdict:
    """C2's verdict on the contrast of timing in one dictionary."""
    time, turnover = (
        Difference(
            low=float(one["low"]),
            high=float(one["high"]),
            p_value=float(one["p_value"]),
            each=one["dictionary_difference"].values.tolist(),
        )
        for one in (contrast.sel(measure=measure) for measure in MEASURES)
    )
    counted = contrast.isel(stratum=contrast["weight"].values > 0)
    ends = [counted[f"stratum_difference{end}"].values for end in ("_low", "_high", "_p", "")]
    strata = [Difference(low=low, high=high, p_value=p, each=[mean]) for low, high, p, mean in zip(*ends, strict=True)]
    return timing_verdict(time, turnover, alpha=alpha, strata=strata)[0]


def _selection(size: StudySize, n_rising: int, seed: int) -> str:
    tasks = [f"t{i}" for i in range(size.n_selection_tasks)]
    features, outcomes = selection_study(
        rises_where_gained(n_rising, by=2.0),
        size.prompts_per_task * len(tasks),
        seed,
        n_features=FEATURES,
        tasks=tasks,
        accuracy=ACCURACY,
        lost=LOST,
    )
    tests = SelectionTests(alpha=size.alpha, n_resamples=9, n_bootstrap=0, min_discordant=size.min_discordant)
    chosen = select_features(features, outcomes, target=MODELS[1], tests=tests, stability=None)
    return selection_claim([chosen], alpha=size.alpha)[0]


def _trial(size: StudySize, how: dict[str, Any], seed: int) -> str:
    base, rl = ACCURACY
    table = world(
        seed=seed,
        base=base,
        rl=rl,
        unrelated=0.65,
        n_random=size.n_random,
        n_target=size.n_target,
        n_clusters=size.n_target_clusters,
        n_unrelated=size.n_unrelated,
        **how,
    )
    return judge(table, Settings(alpha=size.alpha, margin=size.margin, n_resamples=RESAMPLES, seed=seed)).verdict
