"""The first step of a causal trial: everything it will do, fixed and costed before a model is loaded; no torch."""

from __future__ import annotations

import itertools
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, CLUSTER, PROMPT, TASK
from rlgen_stats.schemas.errors import InputError, NotEstimableError, RefusedError
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import GenerationSpec, InterventionSpec, StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, open_features
from rlgen_stats.stores.crosscoder_weights import Decoder, read_decoder
from rlgen_stats.stores.health_records import unusable_readout
from rlgen_stats.stores.hub import locate_table
from rlgen_stats.stores.prompts import load_prompts, load_texts
from rlgen_stats.stores.study_models import ModelRef, final_model, find_model
from rlgen_stats.stores.trial_completions import ArmFiles, has_arm, read_arm
from rlgen_stats.toolkit.edits.edit import Positions
from rlgen_stats.toolkit.statistics.causal.controls import MatchedControls, match_controls
from rlgen_stats.toolkit.statistics.causal.covariates import (
    drift_ranking,
    feature_covariates,
    mean_levels,
    near_duplicates,
)
from rlgen_stats.toolkit.statistics.causal.criteria import FutilityRule
from rlgen_stats.toolkit.statistics.causal.design import Shortfall, shortfalls
from rlgen_stats.toolkit.statistics.causal.edit_norms import EditNorm, TokenCodes, copied, scaled
from rlgen_stats.toolkit.statistics.causal.mediated_share import ALL, SET, Curve, CurvePoint, curve_of
from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS, Direction, DirectionOutcomes
from rlgen_stats.toolkit.statistics.causal.result_datasets import Declaration
from rlgen_stats.toolkit.trial.arms import (
    UNEDITED,
    Arm,
    CopiedSet,
    Site,
    choose_prompts,
    copying_arms,
    dose_grid,
    edited_positions,
    intermediate_doses,
    main_dose,
    part_arms,
    plan_arms,
    target_prompts,
)

FILE_VERSION: Final = 5
"""Raised when an arm's file gets other columns, or the same edit does something else."""
_TOKEN_CODES: Final = "rlgen_stats.toolkit.trial.token_codes:token_codes"
"""Encodes stored activations, which needs torch; loaded only where a plan is made without codes."""
SEARCH_BUDGET: Final = 2
"""Sets measured only to choose the next member of the smaller set, in multiples of the set's size."""


@dataclass(frozen=True, eq=False)
class TrialPrompts:
    """What a trial's models read."""

    table: pd.DataFrame
    """Trial prompts, in the order of the study's file."""
    target: NDArray[np.bool_]
    """[prompt] where the effect is measured."""
    unrelated: NDArray[np.bool_]
    """[prompt] where side effects are measured."""
    neutral_texts: tuple[str, ...] = ()
    """Texts of no task; without any, prompts of unrelated tasks stand in."""

    @property
    def ids(self) -> list[str]:
        """Prompt ids."""
        return list(self.table[PROMPT])

    @property
    def n_clusters(self) -> dict[str, int]:
        """Clusters of prompts where the effect (``n_target``) and side effects (``n_unrelated``) are measured."""
        clusters = self.table[CLUSTER]
        return {
            "n_target": clusters[self.target].nunique(),
            "n_unrelated": clusters[self.unrelated].nunique(),
        }

    def accuracy(self, arm: pd.DataFrame) -> float:
        """Share right where the effect is measured, of an arm's rows as they are stored: sample after sample."""
        return float(arm["correct"].to_numpy().reshape(-1, len(self.target))[:, self.target].mean())


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn and graded, the same in every arm."""

    spec: StudySpec
    """The study, of which generation, tasks and graders are used."""
    n_samples: int
    """Completions per prompt and arm."""

    @property
    def generation(self) -> GenerationSpec:
        """How completions are drawn."""
        return self.spec.generation

    @property
    def seed(self) -> int:
        """The study's seed, from which all others are derived."""
        return self.spec.seed

    def seeds(self, prompts: Sequence[str], *, fresh: bool) -> list[int]:
        """One seed a (sample, prompt), shared by all arms but the fresh one."""
        purpose = ("intervention", "fresh") if fresh else ("intervention",)
        return [
            derive_seed(self.seed, *purpose, prompt, sample) for sample in range(self.n_samples) for prompt in prompts
        ]


@dataclass(frozen=True)
class DirectionPlan:
    """What one direction runs."""

    direction: Direction
    arms: tuple[Arm, ...]
    """In the order in which they are run: the unedited one first, the random sets last."""
    curve: tuple[CurvePoint, ...] = ()
    """Sets of features copied from the other model, and the names of their arms."""
    parts: tuple[Arm, ...] = ()
    """Single features and sets without one feature, if asked for."""
    n_search_sets: int = 0
    """Sets that the search for a smaller set measures at most, beside ``parts``."""
    stored: frozenset[str] = frozenset()
    """Names of arms that had been run when the trial was planned."""
    n_spared: int = 0
    """Random sets that need not be run: those that had been settled the rank of the set."""

    @property
    def set_arm(self) -> Arm:
        """The arm that edits the whole set."""
        return next(arm for arm in self.arms if arm.condition.kind == "set")

    @property
    def n_random(self) -> int:
        """Matched random sets."""
        return sum(arm.condition.kind == "random" for arm in self.arms)

    @property
    def n_intermediate_doses(self) -> int:
        """Doses strictly between no edit and the set's own."""
        doses = [arm.condition.dose for arm in self.arms if arm.condition.kind == "dose"]
        return len(intermediate_doses(doses, self.set_arm.condition.dose))

    @property
    def n_copying(self) -> int:
        """Arms in which the other model reads along."""
        return sum(arm.edit is not None and arm.edit.needs_source for arm in self.arms)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrialPlan:
    """A causal trial that has not been run.

    Everything random is drawn, every edit but the steering vectors is known, and where each arm is kept is fixed; early
    stopping may spare random sets. Where no trial can be held ``directions`` is empty and ``why_not`` says why.
    """

    features: tuple[int, ...]
    """The set, ids in the primary crosscoder."""
    prompts: TrialPrompts
    directions: tuple[DirectionPlan, ...]
    sites: Mapping[Direction, Site]
    """Where each direction edits, also one that is not asked for: its unedited model is needed."""
    models: Mapping[str, ModelRef]
    """``base`` and ``rl``."""
    device: str
    sampling: Sampling
    positions: Positions
    """Positions edited."""
    skip_first: int
    """Leading tokens never edited."""
    early_stop: bool
    """Whether random sets stop once the set can no longer be special."""
    declared: Declaration
    """What the judge needs beside the outcomes."""
    files: ArmFiles
    facts: Mapping[str, str]
    """Hash of the study's spec: arms stored under another are run again."""
    n_asked: int
    """Random sets asked for; a dictionary may hold fewer that match, which the verdict then says."""
    accepted: bool = False
    """Whether it is run even if no edit can be called a cause."""

    def direction(self, direction: Direction) -> DirectionPlan:
        """What one of the directions asked for runs."""
        return next(plan for plan in self.directions if plan.direction == direction)

    # -- what it cannot show --------------------------------------------------------------------------------------

    @property
    def shortfalls(self) -> tuple[Shortfall, ...]:
        """Criteria that cannot pass by design, whatever the set and the outcomes, each once."""
        alpha, margin = self.declared.alpha, self.declared.margin
        found = [
            shortfalls(
                **self.prompts.n_clusters,
                n_random=self.n_asked,
                n_doses=plan.n_intermediate_doses,
                alpha=alpha,
                margin=margin,
            )
            for plan in self.directions
        ]
        return tuple(dict.fromkeys(itertools.chain.from_iterable(found)))

    # -- arms on disk ---------------------------------------------------------------------------------------------

    def arm_path(self, direction: Direction, arm: Arm) -> Path:
        """File of an arm."""
        return self.files.path(direction, arm.name, arm.condition.kind)

    def arm_hash(self, direction: Direction, arm: Arm) -> str:
        """Hash of everything that decides what an arm's completions are."""
        site = self.sites[direction]
        edit = None if arm.edit is None else asdict(arm.edit)
        dictionary = [site.weights_sha256] if arm.reads_features else []
        spec = self.sampling.spec
        generation = spec.generation.model_dump(exclude={"batch_size", "n_samples"})
        return content_hash(
            {
                "version": FILE_VERSION,
                "facts": dict(self.facts),
                "site": [direction, site.view, site.layer, site.readout],
                "arm": [edit, arm.fresh, *dictionary],
                "sampling": [generation, self.sampling.n_samples, self.sampling.seed],
                "grader": spec.grader.model_dump(),
                "prompts": self.prompts.ids,
            }
            | ({"tasks": spec.task_settings()} if spec.task_settings() else {})
        )

    def is_stored(self, direction: Direction, arm: Arm) -> bool:
        """Whether an arm has been run by now; of one whose vector is not known, whether its file is there."""
        path = self.arm_path(direction, arm)
        return path.exists() if arm.needs_vector else has_arm(path, self.arm_hash(direction, arm))

    # -- cost -----------------------------------------------------------------------------------------------------

    @property
    def n_prompts(self) -> int:
        """Prompts that every arm completes."""
        return len(self.prompts.table) if self.directions else 0

    @property
    def n_samples(self) -> int:
        """Completions per prompt and arm."""
        return self.sampling.n_samples

    @property
    def n_controls(self) -> int:
        """Matched random sets."""
        return min((len(controls.sets) for controls in self.declared.controls.values()), default=0)

    @property
    def max_new_tokens(self) -> int:
        """Length limit of a completion."""
        return max(map(self.sampling.spec.max_new_tokens_of, self.prompts.table[TASK].unique()))

    @property
    def arms(self) -> dict[str, int]:
        """Number of arms of each direction, at most."""
        return {
            plan.direction: len(plan.arms) - plan.n_spared + len(plan.parts) + plan.n_search_sets
            for plan in self.directions
        }

    @property
    def stored(self) -> dict[str, int]:
        """Of these, arms that had been run already when the trial was planned."""
        return {plan.direction: len(plan.stored) for plan in self.directions}

    @property
    def completions(self) -> int:
        """Completions still to be sampled, at most."""
        return (sum(self.arms.values()) - sum(self.stored.values())) * self.n_prompts * self.n_samples

    @property
    def why_not(self) -> str:
        """Why the trial cannot be held, or else why it has no random sets; empty if neither."""
        return self.declared.not_held or self.declared.no_controls

    def __str__(self) -> str:
        """The plan in a few lines."""
        lines = [f"features {', '.join(map(str, self.features)) or 'none'}"]
        if self.directions:
            target, unrelated = int(self.prompts.target.sum()), int(self.prompts.unrelated.sum())
            lines.append(
                f"{self.n_prompts} prompts ({target} target, {unrelated} unrelated), {self.n_samples} sample(s) each; "
                f"edited: {self.positions} tokens but the first {self.skip_first}"
            )
        for plan in self.directions:
            site = self.sites[plan.direction]
            lines.append(
                f"{plan.direction} in {site.view}, block {site.layer}: {self.arms[plan.direction]} arms, "
                f"{len(plan.stored)} stored, {plan.n_random} random sets; {plan.n_copying} copy from the other model, "
                f"which reads along ({', '.join(point.label for point in plan.curve)})"
            )
        if self.directions:
            lines.append(f"at most {self.completions:,} completions of up to {self.max_new_tokens} tokens to sample")
        lines += [f"cannot show {shortfall}" for shortfall in self.shortfalls]
        return "\n".join([*lines, *([self.why_not] if self.why_not else [])])


def curves_of(plan: TrialPlan, outcomes: Sequence[DirectionOutcomes]) -> list[Curve]:
    """What a trial says about the share of the full patch's effect that features carry: one curve a direction."""
    return [curve_of(plan.direction(one.table.direction).curve, one) for one in outcomes]


# -- from a study to a plan


def check_size(spec: StudySpec, folder: StudyFolder) -> None:
    """Refuse a study whose trials cannot call any edit a cause, before anything is trained or sampled for them.

    Raises
    ------
    RefusedError
        As :func:`refuse_undecidable`.
    """
    table, settings = choose_prompts(load_prompts(spec, folder), spec), spec.intervention
    if not len(table):
        return  # no trial is held, and its result says why
    n_doses = [
        len(intermediate_doses(dose_grid(direction, settings), main_dose(direction, settings)))
        for direction in DIRECTIONS
    ]
    found = shortfalls(
        **TrialPrompts(table, *target_prompts(table, spec)).n_clusters,
        n_random=settings.n_controls,
        n_doses=min(n_doses),
        alpha=spec.statistics.alpha,
        margin=settings.non_inferiority,
    )
    refuse_undecidable(found, accepted=settings.accept_undecidable)


def refuse_undecidable(found: Sequence[Shortfall], *, accepted: bool) -> None:
    """Refuse a trial in which no edit can be called a cause, unless that is accepted.

    Raises
    ------
    RefusedError
        Naming the criteria, what they need and what the trial has.
    """
    hopeless = [str(shortfall) for shortfall in found if shortfall.rules_out_a_cause]
    if hopeless and not accepted:
        raise RefusedError(
            f"this trial cannot call any edit a cause: {'; '.join(hopeless)}. Add prompts in clusters of their own "
            "(selection.control_tasks names unrelated tasks, intervention.max_prompts limits both), or run it as it is "
            "with intervention.accept_undecidable: true in study.yaml."
        )


def plan_trial(
    spec: StudySpec,
    folder: StudyFolder,
    features: Sequence[int],
    covariates: xr.Dataset | None = None,
    *,
    provenance: Provenance,
    directions: Sequence[Direction] = DIRECTIONS,
    dictionary: int = 1,
    name: str = "",
    by_feature: bool = False,
    codes: TokenCodes | None = None,
) -> TrialPlan:
    """Fix everything about a trial; reads prompts, decoder, stored summaries and activations, loads no model.

    Parameters
    ----------
    spec, folder
        The study: models, crosscoder, prompts, ``intervention`` settings.
    features
        The set; may be empty.
    covariates
        What controls are matched on, as :func:`feature_covariates` gives it; computed from ``features.zarr`` if None.
    provenance
        Origin; its spec hash decides whether arms found on disk are still this trial's.
    directions
        ``disable`` and/or ``amplify``.
    dictionary
        Number of the primary crosscoder's dictionary whose features these are.
    name
        Folder below intervention/ for arms of a set that is not the study's own; arms without the set are shared.
    by_feature
        Whether to edit every feature alone and leave each out too, and look for a smaller set that suffices.
    codes
        Both models' features on tokens that are edited, from which the norms of edits are computed; encoded here, with
        torch, if None.

    Raises
    ------
    InputError
        If a feature does not exist or never fires, or a file of the study cannot be read.
    """
    chosen = tuple(dict.fromkeys(int(k) for k in features))
    table = choose_prompts(load_prompts(spec, folder), spec)
    prompts = TrialPrompts(table, *target_prompts(table, spec))
    files = ArmFiles(folder.root / "intervention", name, dictionary)
    plan = _plan_without_arms(spec, chosen, prompts, provenance, files)
    try:
        matched = _match(spec, folder, chosen, prompts, covariates, codes, dictionary)
    except NotEstimableError as error:
        return replace(plan, declared=replace(plan.declared, not_held=str(error)))
    neutral = spec.intervention.neutral_text
    texts = () if neutral is None else tuple(load_texts(locate_table(neutral, folder)))
    sites = _sites(spec, matched)
    plan = replace(
        plan,
        prompts=replace(prompts, neutral_texts=texts),
        directions=tuple(
            _plan_direction(spec, sites[direction], direction, chosen, matched, by_feature=by_feature)
            for direction in DIRECTIONS
            if direction in directions
        ),
        sites=sites,
        models={"base": find_model(BASE_MODEL, spec, folder), "rl": matched.rl},
        declared=replace(
            plan.declared,
            controls=matched.controls,
            no_controls=matched.no_controls,
        ),
    )
    return replace(plan, directions=tuple(_with_stored(plan, one) for one in plan.directions))


def _with_stored(plan: TrialPlan, one: DirectionPlan) -> DirectionPlan:
    stored = frozenset(arm.name for arm in (*one.arms, *one.parts) if plan.is_stored(one.direction, arm))
    missing = [arm for arm in one.arms if arm.condition.kind == "random" and arm.name not in stored]
    return replace(one, stored=stored, n_spared=len(missing) if plan.early_stop and _stopped(plan, one) else 0)


def _stopped(plan: TrialPlan, one: DirectionPlan) -> bool:
    """Whether the random sets that have been run stop the others, as :class:`FutilityRule` says."""
    rule = FutilityRule(one.direction, n_planned=one.n_random, alpha=plan.declared.alpha)
    for arm in (arm for arm in one.arms if arm.condition.kind in ("set", "random")):
        rows = read_arm(plan.arm_path(one.direction, arm), plan.arm_hash(one.direction, arm))
        if rows is None:
            return False
        rule.add(arm.condition.kind, plan.prompts.accuracy(rows))
        if rule.stop:
            return True
    return False


def _plan_without_arms(
    spec: StudySpec, features: tuple[int, ...], prompts: TrialPrompts, provenance: Provenance, files: ArmFiles
) -> TrialPlan:
    """What holds whether or not the set can be tried: prompts, settings, where arms are kept."""
    return TrialPlan(
        features=features,
        prompts=prompts,
        directions=(),
        sites={},
        models={},
        device=spec.device,
        sampling=Sampling(spec, spec.intervention.n_samples),
        positions=edited_positions(spec.extraction),
        skip_first=spec.extraction.skip_first,
        early_stop=spec.intervention.early_stop,
        declared=Declaration(
            alpha=spec.statistics.alpha,
            margin=spec.intervention.non_inferiority,
            seeds={direction: derive_seed(spec.seed, "intervention", "verdict", direction) for direction in DIRECTIONS},
            controls={},
            not_held="",
            no_controls="",
            tasks=tuple(sorted(set(prompts.table[TASK]))),
            attributes=_attributes(spec, features, prompts),
        ),
        files=files,
        n_asked=spec.intervention.n_controls,
        accepted=spec.intervention.accept_undecidable,
        facts={"spec_hash": provenance.spec_hash},
    )


def _attributes(spec: StudySpec, features: tuple[int, ...], prompts: TrialPrompts) -> dict[str, Any]:
    tasks = prompts.table[TASK]
    return {
        "test": "sign-flip over prompt clusters (exact McNemar for one sample a prompt); interval over clusters (CR2, "
        "and one unseen cluster where few changed); "
        "rank of the set among matched random sets",
        "null": "the edit changes no completion's chance of being right",
        "unit": "prompt cluster",
        "seed": spec.seed,
        "alpha": spec.statistics.alpha,
        "features": list(features),
        "readout": spec.primary_crosscoder.readout,
        "layer": spec.extraction.layer,
        "positions": edited_positions(spec.extraction),
        "phases": "prefill and decode",
        "skip_first": spec.extraction.skip_first,
        "target_tasks": sorted(set(tasks[prompts.target])),
        "unrelated_tasks": sorted(set(tasks[prompts.unrelated])),
        "lift_reference": "the RL model's features on the same tokens",
        "level": spec.intervention.level,
        "neutral_text": spec.intervention.neutral_text or "prompts of unrelated tasks",
        "n_samples": spec.intervention.n_samples,
    }


# -- the set and its controls


@dataclass(frozen=True, eq=False)
class _Matched:
    """A set that can be tried, and what it is compared with."""

    crosscoder: Path
    """Folder of the dictionary."""
    decoder: Decoder
    rl: ModelRef
    """The last checkpoint of the second contrasted run: the set is disabled there."""
    levels: NDArray[np.float64] | None
    """[feature] what amplifying adds, where that is not the features' own activation."""
    controls: Mapping[Direction, MatchedControls]
    no_controls: str
    """Why there are no controls, if so."""
    codes: TokenCodes
    norms: Mapping[Direction, EditNorm]
    """Measures the edits of sets, those of each direction in the model that it edits."""
    copied: tuple[CopiedSet, ...]
    """Sets that are copied from the other model."""


def _match(
    spec: StudySpec,
    folder: StudyFolder,
    features: tuple[int, ...],
    prompts: TrialPrompts,
    covariates: xr.Dataset | None,
    codes: TokenCodes | None,
    dictionary: int,
) -> _Matched:
    """The set with its controls.

    Raises
    ------
    NotEstimableError
        If no trial can be held, as ``code: reason``.
    """
    place, decoder = _usable_dictionary(spec, folder, features, prompts, dictionary)
    rl = final_model(spec, folder, spec.contrasted[1].name)
    summaries = open_features(folder.features_of(dictionary))
    if covariates is None:
        covariates = feature_covariates(decoder, summaries, models=[BASE_MODEL, rl.model], view=rl.model)
    dead = [k for k in features if not np.isfinite(covariates["log_firing"].values[k])]
    if dead:
        raise InputError(
            f"features {dead[:5]} are dead: they fire on no token of {BASE_MODEL} or {rl.model}, so that editing them "
            "changes nothing; leave them out (rlgen-stats features lists those that fire)."
        )
    try:
        levels = mean_levels(decoder, summaries, model=rl.model) if spec.intervention.level == "rl" else None
    except NotEstimableError as error:
        raise NotEstimableError(f"no_levels: {error}") from error
    if codes is None:
        encode = pkgutil.resolve_name(_TOKEN_CODES)
        codes = encode(spec, folder, place, rl=rl.model, prompts=prompts.ids)
    raised = main_dose("amplify", spec.intervention) - 1.0
    norms: dict[Direction, EditNorm] = {
        "disable": scaled(codes.rl, -1.0),
        "amplify": scaled(codes.base, raised, levels),
    }
    seed = derive_seed(spec.seed, *("intervention", "controls"), *([dictionary] if dictionary > 1 else []))

    def match(members: Sequence[int], norm: EditNorm, n_sets: int) -> MatchedControls:
        return match_controls(
            covariates,
            members,
            norm.of_each,
            n_sets=n_sets,
            seed=seed,
            near_duplicates=near_duplicates(decoder, members),
        )

    try:
        controls = {direction: match(features, norm, spec.intervention.n_controls) for direction, norm in norms.items()}
        no_controls = ""
    except NotEstimableError as error:
        controls, no_controls = {}, str(error)

    sizes = copied(codes)
    ranking = drift_ranking(summaries, base=BASE_MODEL, target=rl.model)
    copies = _copied_sets(
        spec.intervention,
        features,
        ranking,
        decoder.n_features,
        lambda members: match(members, sizes, spec.intervention.curve_controls),
    )
    return _Matched(place, decoder, rl, levels, controls, no_controls, codes, norms, copies)


def _copied_sets(
    spec: InterventionSpec,
    features: tuple[int, ...],
    ranking: NDArray[np.int64],
    n_features: int,
    match: Callable[[Sequence[int]], MatchedControls],
) -> tuple[CopiedSet, ...]:
    """The set, the leading features of a ranking and all, with comparable random sets; none where there are none."""

    def with_random(label: str, members: tuple[int, ...]) -> CopiedSet:
        alone = CopiedSet(label, members, _no_sets(members))
        if not spec.curve_controls or 2 * len(members) > n_features:  # fewer are left than are needed
            return alone
        try:
            matched = match(members)
        except NotEstimableError:
            return alone
        if not matched.comparable_rescaled:
            return alone
        return replace(alone, random=matched.sets, rescaled=not matched.comparable)

    leading = {f"top-{n}": tuple(map(int, ranking[:n])) for n in sorted(spec.curve) if n <= len(ranking)}
    copies = {SET: features, **leading, ALL: tuple(range(n_features))}
    return tuple(with_random(label, members) for label, members in copies.items())


def _no_sets(members: Sequence[int]) -> NDArray[np.int64]:
    """[0, member]."""
    return np.empty((0, len(members)), dtype=np.int64)


def _usable_dictionary(
    spec: StudySpec, folder: StudyFolder, features: tuple[int, ...], prompts: TrialPrompts, dictionary: int
) -> tuple[Path, Decoder]:
    """Folder and decoder of the dictionary, if a trial of these features can be held in it."""
    if not features:
        raise NotEstimableError("no_features: no feature selected")
    place = folder.crosscoder(spec.primary_crosscoder.names[dictionary - 1])
    unusable = unusable_readout(place, accepted=spec.primary_crosscoder.accept_unhealthy)
    if unusable:
        raise NotEstimableError(f"readout_failed: {unusable}")
    if prompts.table.empty:
        raise NotEstimableError("no_prompts: no trial prompts")
    decoder = read_decoder(place)
    unknown = [k for k in features if not 0 <= k < decoder.n_features]
    if unknown:
        raise InputError(f"feature ids run from 0 to {decoder.n_features - 1}, got {unknown[0]}.")
    if not prompts.target.any():
        raise NotEstimableError("no_target_prompts: all trial prompts are of control tasks")
    return place, decoder


def _sites(spec: StudySpec, matched: _Matched) -> dict[Direction, Site]:
    disabled = Site(
        crosscoder=matched.crosscoder,
        weights_sha256=matched.decoder.weights_sha256,
        view=matched.rl.model,
        layer=spec.extraction.layer,
        readout=spec.primary_crosscoder.readout,
    )
    return {"disable": disabled, "amplify": replace(disabled, view=BASE_MODEL)}


def _plan_direction(
    spec: StudySpec,
    site: Site,
    direction: Direction,
    features: tuple[int, ...],
    matched: _Matched,
    *,
    by_feature: bool,
) -> DirectionPlan:
    matches = matched.controls.get(direction)
    controls = _no_sets(features) if matches is None else matches.sets
    norm = matched.norms[direction]
    beside = norm.of_each(controls[: spec.intervention.curve_controls])
    arms = plan_arms(
        direction,
        features,
        controls,
        spec,
        levels=matched.levels if direction == "amplify" else None,
        gains=[norm.of(features) / one if one else 0.0 for one in beside],
    )
    copying, curve = copying_arms(direction, matched.copied, spec, copied(matched.codes), matched.codes.difference)
    last = next((i for i, arm in enumerate(arms) if arm.condition.kind == "random"), len(arms))
    plan = DirectionPlan(direction, (UNEDITED, *arms[:last], *copying, *arms[last:]), curve)
    if not by_feature:
        return plan
    # The budget, and one set of each size from 2 to n - 1, where a member is added unmeasured: sizes 1 and n are arms
    # already, and of two features or fewer so is every subset.
    n_search = max((SEARCH_BUDGET + 1) * len(features) - 2, 0) if len(features) > 2 else 0
    return replace(plan, parts=part_arms(plan.set_arm), n_search_sets=n_search)
