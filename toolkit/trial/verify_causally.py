"""Does this feature set cause what it is said to cause? Arms, controls and verdicts for one study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, CLUSTER, TASK
from rlgen_stats.schemas.errors import InputError, NotEstimableError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, open_features
from rlgen_stats.toolkit.crosscoder import Crosscoder, load_crosscoder
from rlgen_stats.toolkit.edits.edit import EditSite
from rlgen_stats.toolkit.edits.hooks import Donor
from rlgen_stats.toolkit.extraction.batching import encode_prompts
from rlgen_stats.toolkit.extraction.checkpoints import (
    final_model,
    find_model,
    load_model,
    load_tokenizer,
    resolve_device,
)
from rlgen_stats.toolkit.extraction.prompts import TEXT, load_prompts, load_texts
from rlgen_stats.toolkit.progress import SILENT, Progress, Within
from rlgen_stats.toolkit.statistics.causal.controls import MatchedControls, match_controls
from rlgen_stats.toolkit.statistics.causal.criteria import TIE, Settings, hopeless
from rlgen_stats.toolkit.statistics.causal.outcome_table import Direction, OutcomeTable, ending_of
from rlgen_stats.toolkit.statistics.causal.verdict import judge
from rlgen_stats.toolkit.trial.arms import (
    DIRECTIONS,
    UNEDITED,
    Arm,
    choose_prompts,
    edited_positions,
    plan_arms,
    target_prompts,
)
from rlgen_stats.toolkit.trial.covariates import feature_covariates, mean_levels, near_duplicates
from rlgen_stats.toolkit.trial.divergence import Probes, finite_mean, mean_residual
from rlgen_stats.toolkit.trial.probes import make_probes
from rlgen_stats.toolkit.trial.replicates import Replicate, find_replicates, matched_words, replicate_arms
from rlgen_stats.toolkit.trial.run_arm import DIVERGENCES, Bench, Subject, run_arm
from rlgen_stats.toolkit.trial.trial_datasets import Result, as_dataset, balance_table, nothing_to_show

N_RESAMPLES: Final = 9999
"""Sign flips where enumeration is too long: the Monte-Carlo error of p = .05 is then .002."""


@dataclass(frozen=True)
class Trial:
    """What is verified, on which prompts, against which controls."""

    spec: StudySpec
    prompts: pd.DataFrame
    chosen: tuple[int, ...]
    crosscoder: Crosscoder
    rl_view: str
    controls: MatchedControls | None
    why: str
    """Why there are no controls, if so."""
    levels: NDArray[np.float64] | None = None
    """[feature] what amplifying adds, where that is not the features' own activation."""
    replicates: tuple[Replicate, ...] = ()
    """The set in dictionaries of other seeds."""

    def levels_of(self, direction: Direction) -> NDArray[np.float64] | None:
        """Levels that a direction's edits add."""
        return self.levels if direction == "amplify" else None


def verify_causally(
    spec: StudySpec,
    folder: StudyFolder,
    features: Sequence[int],
    covariates: xr.Dataset | None = None,
    *,
    provenance: Provenance,
    directions: Sequence[Direction] = DIRECTIONS,
    name: str = "",
    progress: Progress = SILENT,
) -> tuple[xr.Dataset, xr.Dataset]:
    """Disable the set in the RL model and amplify it in base, against matched controls, on prompts kept for this.

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
    name
        Folder below intervention/ for arms of a set that is not the study's own; arms without the set are shared.
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
    Arms and criteria are METHOD.md 4d's; see :func:`judge`. Sample s of prompt i has the same seed in every arm but
    ``fresh``. ``lift`` copies levels from the RL model reading the same tokens in parallel. The steering vector is the
    mean residual of RL minus base where the same forced texts' completion tokens are predicted: both models' unedited
    completions of the target prompts, which favours that baseline, since the set was chosen on other prompts.
    Counterparts of the set in dictionaries of other seeds are those of the results ``matching``, where there are any.
    Finished arms are kept as intervention/<direction>/<arm>.parquet and not run again. What cannot be estimated makes
    the verdict INCONCLUSIVE with a reason; it does not raise.
    """
    prepared = prepare(spec, folder, features, covariates)
    if isinstance(prepared, str):
        prompts = choose_prompts(load_prompts(spec, folder), spec)
        return nothing_to_show(spec, prompts, tuple(dict.fromkeys(map(int, features))), prepared)
    results = _run(prepared, folder, provenance, progress, directions, name)
    told = as_dataset(spec, prepared.prompts, prepared.chosen, results, prepared.controls)
    return told, balance_table(prepared.controls, prepared.why)


def prepare(
    spec: StudySpec, folder: StudyFolder, features: Sequence[int], covariates: xr.Dataset | None = None
) -> Trial | str:
    """What will be verified, on which prompts, against which controls; or why nothing can be.

    Parameters
    ----------
    spec, folder, features, covariates
        As in :func:`verify_causally`.

    Raises
    ------
    InputError
        If a feature does not exist or never fires.
    """
    prompts = choose_prompts(load_prompts(spec, folder), spec)
    chosen = tuple(dict.fromkeys(int(k) for k in features))
    if not chosen:
        return "no_features: no feature selected"
    if prompts.empty:
        return "no_prompts: no verification prompts"
    crosscoder = load_crosscoder(folder.crosscoder(spec.primary_crosscoder.name))
    beyond = [k for k in chosen if not 0 <= k < crosscoder.n_features]
    if beyond:
        raise InputError(f"feature ids run from 0 to {crosscoder.n_features - 1}, got {beyond[0]}.")
    rl_view = final_model(spec, folder, spec.contrasted[1].name).model
    target, _ = target_prompts(prompts, spec)
    if not target.any():
        return "no_target_prompts: all verification prompts are of control tasks"
    summaries = open_features(folder.features)
    if covariates is None:
        covariates = feature_covariates(crosscoder, summaries, models=[BASE_MODEL, rl_view], view=rl_view)
    dead = [k for k in chosen if not np.isfinite(covariates["log_firing"].values[k])]
    if dead:
        raise InputError(
            f"features {dead[:5]} are dead: they fire on no token of {BASE_MODEL} or {rl_view}, so that editing them "
            "changes nothing; leave them out (rlgen-stats features lists those that fire)."
        )
    try:
        levels = mean_levels(crosscoder, summaries, model=rl_view) if spec.intervention.level == "rl" else None
    except NotEstimableError as error:
        return f"no_levels: {error}"
    controls = _controls(spec, chosen, crosscoder, covariates)
    replicates = find_replicates(spec, folder, chosen)
    return Trial(spec, prompts, chosen, crosscoder, rl_view, *controls, levels, replicates)


def _controls(
    spec: StudySpec, chosen: tuple[int, ...], crosscoder: Crosscoder, covariates: xr.Dataset
) -> tuple[MatchedControls | None, str]:
    try:
        return match_controls(
            covariates,
            chosen,
            n_sets=spec.intervention.n_controls,
            seed=derive_seed(spec.seed, "intervention", "controls"),
            near_duplicates=near_duplicates(crosscoder, chosen),
        ), ""
    except NotEstimableError as error:
        return None, str(error)


# -- running


def _run(
    trial: Trial,
    folder: StudyFolder,
    provenance: Provenance,
    progress: Progress,
    directions: Sequence[Direction],
    name: str,
) -> list[Result]:
    spec, prompts = trial.spec, trial.prompts
    refs = {"base": find_model(BASE_MODEL, spec, folder), "rl": find_model(trial.rl_view, spec, folder)}
    device = resolve_device(spec.device)
    models = {name: load_model(ref, device=device) for name, ref in refs.items()}
    bench = make_bench(trial, folder, provenance, load_tokenizer(refs["base"]), name)
    _check_positions(bench)
    sites = {direction: edit_site(trial, direction) for direction in DIRECTIONS}
    subjects = {
        "disable": Subject("disable", models["rl"], sites["disable"], None),
        "amplify": Subject("amplify", models["base"], sites["amplify"], Donor(models["rl"], trial.rl_view)),
    }
    with torch.no_grad():
        unedited = {
            name: run_arm(bench, subjects[direction], UNEDITED, None)
            for name, direction in (("rl", "disable"), ("base", "amplify"))
        }
        told = spec.intervention.neutral_text
        neutral = () if told is None else load_texts(folder.resolve(told))
        probes = make_probes(bench, models, unedited, *target_prompts(prompts, spec), neutral)
        vectors = _vectors(spec, models, probes)
        return [
            _run_direction(trial, bench, subjects[direction], vectors, unedited, probes, progress)
            for direction in DIRECTIONS
            if direction in directions
        ]


def _check_positions(bench: Bench) -> None:
    """Refuse prompts in which an edit of prompt tokens would change nothing."""
    extraction = bench.spec.extraction
    if edited_positions(extraction) != "prompt":
        return
    lengths = [len(ids) for ids in encode_prompts(bench.tokenizer, list(bench.prompts[TEXT]))]
    short = [prompt for prompt, length in zip(bench.ids, lengths, strict=True) if length <= extraction.skip_first]
    if short:
        raise InputError(
            f"{len(short)} of {len(lengths)} prompts, e.g. {short[0]!r}, have no token after the first "
            f"{extraction.skip_first}, so that an edit of prompt tokens changes nothing there; lower "
            "extraction.skip_first or leave these prompts out."
        )


def make_bench(trial: Trial, folder: StudyFolder, provenance: Provenance, tokenizer: Any, name: str) -> Bench:
    """Prompts, place and identity of a trial's arms."""
    facts = {"spec_hash": provenance.spec_hash, "crosscoder": trial.crosscoder.weights_sha256}
    return Bench(trial.spec, trial.prompts, tokenizer, folder.root / "intervention", name, facts)


def edit_site(trial: Trial, direction: Direction) -> EditSite:
    """Where a direction edits: disabling the RL model, amplifying base."""
    view = trial.rl_view if direction == "disable" else BASE_MODEL
    return EditSite(trial.crosscoder, view, trial.spec.extraction.layer, trial.spec.primary_crosscoder.readout)


def _run_direction(
    trial: Trial,
    bench: Bench,
    subject: Subject,
    vectors: dict[str, NDArray[np.float64]],
    unedited: dict[str, pd.DataFrame],
    probes: Probes,
    progress: Progress,
) -> Result:
    sets = np.empty((0, len(trial.chosen)), dtype=np.int64) if trial.controls is None else trial.controls.sets
    levels = trial.levels_of(subject.direction)
    others = replicate_arms(trial.replicates, subject.site, subject.direction, trial.spec)
    how: dict[str, Any] = {"levels": levels, "replicates": others, **vectors}
    arms = (UNEDITED, *plan_arms(subject.direction, trial.chosen, sets, trial.spec, **how))
    n = len(trial.prompts) * trial.spec.intervention.n_samples
    frames: list[pd.DataFrame] = []
    rank = _Rank(trial, subject.direction, n_planned=len(sets))
    with progress.task(f"{subject.direction}: {len(arms)} arms", total=len(arms) * n, unit="completions") as task:
        for arm in arms:
            if trial.spec.intervention.early_stop and rank.hopeless:
                progress.log(f"{subject.direction}: stopped after {rank.n_run} of {len(sets)} random sets; {rank.why}")
                break
            within = Within(task)
            frames.append(run_arm(bench, subject, arm, probes, within))
            rank.add(arm, frames[-1])
            count = task.advance if within.done else task.skip  # an arm that counted nothing was stored
            count(n - within.done, arm=arm.name, accuracy=round(float(frames[-1]["correct"].mean()), 3))
    other = unedited["base" if subject.direction == "disable" else "rl"]
    return _judged(trial, subject.direction, arms[: len(frames)], frames, other, n_planned=len(sets))


class _Rank:
    """How many random sets did as much as the set so far; they come last, in random order."""

    def __init__(self, trial: Trial, direction: Direction, *, n_planned: int) -> None:
        self._target, _ = target_prompts(trial.prompts, trial.spec)
        self._sign = 1.0 if direction == "amplify" else -1.0
        self._alpha, self._n_planned = trial.spec.statistics.alpha, n_planned
        self._set = np.inf
        self.n_run = self.n_as_large = 0

    def add(self, arm: Arm, frame: pd.DataFrame) -> None:
        correct = _cube([frame], "correct", len(self._target))[0][self._target]
        accuracy = self._sign * float(correct.mean())
        if arm.condition.kind == "set":
            self._set = accuracy
        elif arm.condition.kind == "random":
            self.n_run += 1
            self.n_as_large += int(accuracy >= self._set - TIE)

    @property
    def hopeless(self) -> bool:
        return hopeless(self.n_as_large, self._n_planned, self._alpha) and self.n_run > 0

    @property
    def why(self) -> str:
        return f"{self.n_as_large} did as much as the set, so that its rank p-value must exceed {self._alpha}"


def _vectors(spec: StudySpec, models: dict[str, Any], probes: Probes) -> dict[str, NDArray[np.float64]]:
    """Difference-of-means vector and a random direction of the same norm, raw units."""
    means = {name: mean_residual(model, spec.extraction.layer, probes.forced) for name, model in models.items()}
    steering = (means["rl"] - means["base"]).cpu().numpy().astype(np.float64)
    draw = np.random.default_rng(derive_seed(spec.seed, "intervention", "random direction"))
    random = draw.standard_normal(len(steering))
    return {
        "steering": steering,
        "random_direction": random * float(np.linalg.norm(steering)) / float(np.linalg.norm(random)),
    }


# -- tables


def _cube(frames: Sequence[pd.DataFrame], column: str, n_prompts: int) -> NDArray[Any]:
    """[condition, prompt, sample] of a column stored sample after sample."""
    stacked = np.stack([frame[column].to_numpy() for frame in frames])
    return stacked.reshape(len(frames), -1, n_prompts).transpose(0, 2, 1)


def _endings(frames: Sequence[pd.DataFrame], n_prompts: int) -> NDArray[Any]:
    correct = _cube(frames, "correct", n_prompts).astype(bool)
    return ending_of(correct, _cube(frames, "format_class", n_prompts).astype(np.str_))


def _judged(
    trial: Trial,
    direction: Direction,
    arms: Sequence[Arm],
    frames: list[pd.DataFrame],
    other: pd.DataFrame,
    *,
    n_planned: int,
) -> Result:
    spec, prompts, controls = trial.spec, trial.prompts, trial.controls
    n = len(prompts)
    target, unrelated = target_prompts(prompts, spec)
    kl = {name: _cube(frames, name, n)[:, :, 0].astype(np.float64) for name in DIVERGENCES}
    neutral = np.array([finite_mean(row) for row in kl["neutral_kl"]])
    forced = np.isfinite(kl["forced_kl_to_base"][0]).any()
    table = OutcomeTable(
        direction=direction,
        conditions=tuple(arm.condition for arm in arms),
        correct=_cube(frames, "correct", n).astype(np.float64),
        ending=_endings(frames, n),
        other_ending=_endings([other], n)[0],
        kl_to_base=kl["forced_kl_to_base" if forced else "kl_to_base"],
        kl_to_rl=kl["forced_kl_to_rl" if forced else "kl_to_rl"],
        neutral_kl=neutral,
        n_tokens=_cube(frames, "n_tokens", n).astype(np.float64),
        task=prompts[TASK].to_numpy(dtype=np.str_),
        cluster=prompts[CLUSTER].to_numpy(dtype=np.str_),
        target=target,
        unrelated=unrelated,
    )
    passthrough = next(frame for arm, frame in zip(arms, frames, strict=True) if arm.name == "passthrough")
    verdict = judge(
        table,
        Settings(
            alpha=spec.statistics.alpha,
            margin=spec.intervention.non_inferiority,
            n_resamples=N_RESAMPLES,
            seed=derive_seed(spec.seed, "intervention", "verdict", direction),
            comparable=controls is not None and controls.comparable,
            control_flags=(trial.why,) if controls is None else controls.flags,
            noop_changed=float((passthrough["text"] != frames[0]["text"]).mean()),
            n_planned=n_planned,
            replicates=matched_words(trial.replicates, len(trial.chosen)),
        ),
    )
    broken = [arm.name for arm, frame in zip(arms, frames, strict=True) if not frame["finite"].all()]
    if broken:
        verdict = replace(verdict, reasons=(*verdict.reasons, f"non_finite_logits: {', '.join(broken)}"))
    return Result(direction, table, kl, verdict)
