"""The second step of a causal trial: a plan in, outcome tables out. The only step that loads models.

Several arms are completed in common batches, each row under its arm's edit. Every arm is kept in one parquet file with
a hash of all that decides its outcome, so that a trial that was stopped goes on where it was, and trials of other sets
share the arms that do not depend on the set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CLUSTER, PROMPT, PROMPT_LABELS, SAMPLE, TASK
from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.stores.prompts import TEXT, plain_text
from rlgen_stats.stores.trial_completions import DIVERGENCES, read_arm, write_arm
from rlgen_stats.toolkit.crosscoder import Crosscoder, load_crosscoder
from rlgen_stats.toolkit.edits.hooks import ActiveEdit, SourceModel, editing_rows
from rlgen_stats.toolkit.edits.site import EditSite
from rlgen_stats.toolkit.extraction.answering import answer_in_arms
from rlgen_stats.toolkit.extraction.batching import encode_prompts, pad_id
from rlgen_stats.toolkit.extraction.checkpoints import load_model, resolve_device
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.grading import grade_all, graders_of
from rlgen_stats.toolkit.extraction.rendering import PromptReader, load_reader, shared_tokens
from rlgen_stats.toolkit.progress import SILENT, Progress, Task, Within
from rlgen_stats.toolkit.statistics.causal.criteria import FutilityRule
from rlgen_stats.toolkit.statistics.causal.outcome_table import (
    CURVE_KINDS,
    Direction,
    DirectionOutcomes,
    Floats,
    OutcomeTable,
    Texts,
    ending_of,
    finite_mean,
)
from rlgen_stats.toolkit.trial.arms import EDITED, RANDOM_KINDS, UNEDITED, Arm
from rlgen_stats.toolkit.trial.divergence import (
    EncodedTexts,
    Probes,
    divergences,
    make_probes,
    mean_residual,
)
from rlgen_stats.toolkit.trial.parts import measure_parts
from rlgen_stats.toolkit.trial.plan import DirectionPlan, TrialPlan, refuse_undecidable
from rlgen_stats.toolkit.workers import keeping, kept, run_tasks

BATCHES_TOGETHER: Final = 8
"""Times the batch size that arms which are run together complete: the first and the last batch are not full, and what
a kill loses is no more than this."""
ARMS_TOGETHER: Final = 8
"""Arms that are run together at least where edits begin at the completion: prompts are read once for all of them."""


def run_trial(
    plan: TrialPlan, *, live: LiveTrial | None = None, progress: Progress = SILENT
) -> tuple[DirectionOutcomes, ...]:
    """Run what a plan says and has not been run yet.

    Parameters
    ----------
    plan
        The trial.
    live
        Its models, if something else runs them too; loaded here if None.
    progress
        Receiver of progress, in completions.

    Returns
    -------
    tuple of DirectionOutcomes
        One a direction; none where no trial can be held.

    Raises
    ------
    InputError
        If some prompts have no token at the edited positions.
    ModelError
        If a model cannot be loaded.
    StoreError
        If a crosscoder is not the one that was planned with.
    RefusedError
        If no edit can be called a cause whatever the outcomes, and that was not accepted.

    Notes
    -----
    Sample s of prompt i has the same seed in every arm but ``fresh``. ``patch``, ``lift`` and ``lower`` copy from the
    other model, which reads the same tokens in parallel. The steering vector is the mean residual of RL minus base
    where the same forced texts' completion tokens are predicted: both models' unedited completions of the target
    prompts, which favours that baseline, since the set was chosen on other prompts.
    """
    if not plan.directions:
        return ()
    refuse_undecidable(plan.shortfalls, accepted=plan.accepted)
    live = LiveTrial(plan) if live is None else live
    with keeping():
        first = [(live, direction, [UNEDITED], False) for direction in EDITED]
        with run_tasks(_run_arms, first, progress=progress) as frames:
            unedited = {name: frame for name, (frame,) in zip(EDITED.values(), frames, strict=True)}
        with run_tasks(_vectors, [(live,)], progress=progress) as found:
            (vectors,) = found
        return tuple(
            _run_direction(live, one, _with_vectors(one.arms, vectors), unedited, progress) for one in plan.directions
        )


def run_parts(live: LiveTrial, *, progress: Progress = SILENT) -> xr.Dataset:
    """Effects of the single features of a set whose plan has such arms.

    Parameters
    ----------
    live
        The trial, planned ``by_feature``.
    progress
        Receiver of progress.

    Returns
    -------
    Dataset
        As :func:`measure_parts` gives it.

    Raises
    ------
    NotEstimableError
        If the trial cannot be held.
    """
    tasks = [
        (live, one.direction, together, False)
        for one in live.plan.directions
        for together in _grouped(live.plan, (UNEDITED, one.set_arm, *one.parts))
    ]
    with keeping():
        with run_tasks(_run_arms, tasks, progress=progress) as results:
            deque(results, maxlen=0)
        return measure_parts(live.plan, live.share_correct, progress=progress)  # whose search runs one after the other


@torch.no_grad()
def _run_arms(
    live: LiveTrial, direction: Direction, arms: Sequence[Arm], probed: bool, progress: Progress = SILENT
) -> list[pd.DataFrame]:
    live = kept("trial", live.key, lambda: live)
    return live.run_arms(direction, arms, live.probes if probed else None, progress)


@torch.no_grad()
def _vectors(live: LiveTrial, progress: Progress = SILENT) -> dict[str, NDArray[np.float64]]:
    """Difference-of-means vector and a random direction of the same norm, raw units."""
    live = kept("trial", live.key, lambda: live)
    layer = live.plan.sites["disable"].layer
    means = {name: mean_residual(live.model(name), layer, live.probes.forced) for name in ("base", "rl")}
    steering = (means["rl"] - means["base"]).cpu().numpy().astype(np.float64)
    draw = np.random.default_rng(derive_seed(live.plan.sampling.seed, "intervention", "random direction"))
    random = draw.standard_normal(len(steering))
    return {
        "steering": steering,
        "random_direction": random * float(np.linalg.norm(steering)) / float(np.linalg.norm(random)),
    }


def _with_vectors(arms: Sequence[Arm], vectors: Mapping[str, NDArray[np.float64]]) -> list[Arm]:
    """The arms with their vectors; without those that would add nothing, the models being equal there."""
    differ = bool(np.linalg.norm(vectors["steering"]) > 0)
    return [
        arm.with_vector(vectors[arm.condition.kind]) if arm.needs_vector else arm
        for arm in arms
        if differ or not arm.needs_vector
    ]


def _run_direction(
    live: LiveTrial,
    plan: DirectionPlan,
    arms: Sequence[Arm],
    unedited: Mapping[str, pd.DataFrame],
    progress: Progress,
) -> DirectionOutcomes:
    """Arm after arm; the random sets, which come last, until they have settled the rank of the set."""
    direction, trial = plan.direction, live.plan
    n_completions = trial.n_prompts * trial.n_samples
    rule = FutilityRule(direction, n_planned=plan.n_random, alpha=trial.declared.alpha)
    frames: list[pd.DataFrame] = []
    stored = {arm.name for arm in arms if trial.is_stored(direction, arm)}
    title = f"{direction}: {len(arms)} arms"
    with (
        progress.task(title, total=len(arms) * n_completions, unit="completions") as task,
        closing(_frames(live, direction, arms, task)) as results,
    ):
        for arm in arms:
            if trial.early_stop and rule.stop:
                progress.log(f"{direction}: stopped after {rule.n_run} of {plan.n_random} random sets; {rule.reason}")
                break
            frame = next(results)
            frames.append(frame)
            rule.add(arm.condition.kind, trial.prompts.accuracy(frame))
            task.advance(0, arm=arm.name, accuracy=round(float(frame["correct"].mean()), 3))
    for arm in arms[len(frames) :]:  # that were run together with the last one, or by other workers meanwhile
        if arm.name not in stored:
            trial.arm_path(direction, arm).unlink(missing_ok=True)
    other = unedited["base" if EDITED[direction] == "rl" else "rl"]
    judged = [(arm, frame) for arm, frame in zip(arms, frames, strict=False) if arm.condition.kind not in CURVE_KINDS]
    curve = {
        arm.name: _cube([frame], "correct", trial.n_prompts)[0].mean(axis=1)
        for arm, frame in zip(arms, frames, strict=False)
        if arm.condition.kind in CURVE_KINDS
    }
    outcomes = _outcomes(trial, direction, [arm for arm, _ in judged], [frame for _, frame in judged], other)
    return replace(outcomes, curve_correct=curve)


def _frames(live: LiveTrial, direction: Direction, arms: Sequence[Arm], task: Task) -> Generator[pd.DataFrame]:
    """Rows of arm after arm, some of which are run together when the first of them is asked for."""
    trial = live.plan
    n_completions, groups = trial.n_prompts * trial.n_samples, _grouped(trial, arms)
    n_missing = [sum(not trial.is_stored(direction, arm) for arm in together) for together in groups]
    within, expected = Within(task), 0
    tasks = [(live, direction, together, True) for together in groups]
    with run_tasks(_run_arms, tasks, progress=within) as results:
        for together, missing in zip(groups, n_missing, strict=True):
            frames = next(results)
            expected += missing * n_completions
            task.skip((len(together) - missing) * n_completions)
            within.reach(expected)
            yield from frames


def _grouped(plan: TrialPlan, arms: Sequence[Arm]) -> list[Sequence[Arm]]:
    n = arms_together(plan)
    return [arms[start : start + n] for start in range(0, len(arms), n)]


def arms_together(plan: TrialPlan) -> int:
    """How many arms share batches: enough to keep these full, or to read prompts for several arms at once."""
    filled = ceil(BATCHES_TOGETHER * plan.sampling.generation.batch_size / (plan.n_prompts * plan.n_samples))
    return max(filled, ARMS_TOGETHER if plan.positions == "completion" else 1)


# -- arms on live models


class LiveTrial:
    """A plan with its models, tokenizer and crosscoders: each is loaded when first asked for, and once.

    Parameters
    ----------
    plan
        The trial.
    like
        Another trial of the same study, whose models are used.
    """

    def __init__(self, plan: TrialPlan, like: LiveTrial | None = None) -> None:
        self.plan, self.key = plan, uuid4().hex
        self._models: dict[str, Any] = {} if like is None else like._models
        self._crosscoders: dict[Path, Crosscoder] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A worker loads for itself."""
        return {"plan": self.plan, "key": self.key, "_models": {}, "_crosscoders": {}}

    @cached_property
    def readers(self) -> dict[str, PromptReader]:
        """How ``base`` and ``rl`` read prompts."""
        return {name: load_reader(ref) for name, ref in self.plan.models.items()}

    @cached_property
    def texts(self) -> EncodedTexts:
        """Prompts and neutral texts as token ids.

        Raises
        ------
        InputError
            If prompts are edited and some are too short for that to change anything.
        """
        plan, tokenizer = self.plan, self.readers["base"].tokenizer
        prompts = {name: reader.encode(list(plan.prompts.table[TEXT])) for name, reader in self.readers.items()}
        if plan.positions == "prompt":
            ids = plan.prompts.ids
            read = zip(ids, *prompts.values(), strict=True)
            short = [prompt for prompt, *by_model in read if min(map(len, by_model)) <= plan.skip_first]
            if short:
                raise InputError(
                    f"{len(short)} of {len(ids)} prompts, e.g. {short[0]!r}, have no token after the first "
                    f"{plan.skip_first}, so that an edit of prompt tokens changes nothing there; lower "
                    "extraction.skip_first or leave these prompts out."
                )
        neutral = encode_prompts(tokenizer, plan.prompts.neutral_texts)
        return EncodedTexts(prompts, neutral, pad_id(tokenizer), shared_tokens(list(plan.models.values())))

    @cached_property
    def probes(self) -> Probes:
        """Texts on which arms are compared with the unedited models."""
        models = {name: self.model(name) for name in ("base", "rl")}
        unedited = {name: self.run_arm(direction, UNEDITED) for direction, name in EDITED.items()}
        return make_probes(self.plan, self.texts, models, unedited)

    def model(self, name: str) -> Any:
        """The model ``base`` or ``rl``."""
        if name not in self._models:
            self._models[name] = load_model(self.plan.models[name], device=resolve_device(self.plan.device))
        return self._models[name]

    def edit_site(self, direction: Direction) -> EditSite:
        """Where a direction's edits read and write."""
        site = self.plan.sites[direction]
        if site.crosscoder not in self._crosscoders:
            crosscoder = load_crosscoder(site.crosscoder)
            if crosscoder.weights_sha256 != site.weights_sha256:
                raise StoreError(f"{site.crosscoder} has other weights than when the trial was planned; plan it again.")
            self._crosscoders[site.crosscoder] = crosscoder
        return EditSite(self._crosscoders[site.crosscoder], site.view, site.layer, site.readout)

    @contextmanager
    def editing(self, direction: Direction, arms: Sequence[Arm]) -> Iterator[ActiveEdit]:
        """The direction's model with the arms' edits in force, the first one's at the beginning."""
        edits = [arm.edit for arm in arms]
        with ExitStack() as stack:
            active = ActiveEdit(edits)
            if any(edit is not None for edit in edits):
                source = self._other(direction) if any(arm.copies for arm in arms) else None
                model, site = self.model(EDITED[direction]), self.edit_site(direction)
                active = stack.enter_context(editing_rows(model, edits, site, source=source))
            yield active

    def _other(self, direction: Direction) -> SourceModel:
        """The model that the direction does not edit."""
        other: Direction = "amplify" if direction == "disable" else "disable"
        return SourceModel(self.model(EDITED[other]), self.plan.sites[other].view)

    def run_arm(
        self, direction: Direction, arm: Arm, probes: Probes | None = None, progress: Progress = SILENT
    ) -> pd.DataFrame:
        """Completions, grades and divergences of one arm, from its file if that holds the same arm.

        Parameters
        ----------
        direction, arm
            What to run on what.
        probes
            Texts for divergences; None to leave them out.
        progress
            Receiver of progress, in completions sampled.

        Returns
        -------
        DataFrame
            Sample after sample, prompts in order: prompt, sample, its labels, text, token_ids, n_tokens, correct,
            format_class, finite, and the columns of ``DIVERGENCES``.
        """
        (frame,) = self.run_arms(direction, [arm], probes, progress)
        return frame

    def run_arms(
        self, direction: Direction, arms: Sequence[Arm], probes: Probes | None = None, progress: Progress = SILENT
    ) -> list[pd.DataFrame]:
        """Rows of several arms as :meth:`run_arm` gives them; what no file holds is completed in common batches."""
        plan = self.plan
        places = [(plan.arm_path(direction, arm), plan.arm_hash(direction, arm)) for arm in arms]
        frames = [read_arm(*place) for place in places]
        n = arms_together(plan)
        for copying in (False, True):  # a source model that reads along would cost the other arms as much again
            missing = [i for i, arm in enumerate(arms) if frames[i] is None and arm.copies == copying]
            for together in (missing[start : start + n] for start in range(0, len(missing), n)):
                completed = self._complete(direction, [arms[i] for i in together], progress)
                for i, frame in zip(together, completed, strict=True):
                    frames[i] = frame
                    write_arm(frame, *places[i], asdict(arms[i].condition))
        return [
            self._with_divergences(direction, arm, frame, place, probes)
            for arm, frame, place in zip(arms, frames, places, strict=True)
            if frame is not None
        ]

    def _with_divergences(
        self, direction: Direction, arm: Arm, frame: pd.DataFrame, place: tuple[Path, str], probes: Probes | None
    ) -> pd.DataFrame:
        if probes is None or "kl_to_base" in frame or arm.condition.kind in CURVE_KINDS:
            return frame
        measured = self._diverge(direction, arm, probes)
        frame = frame.assign(**{name: np.tile(values, self.plan.n_samples) for name, values in measured.items()})
        write_arm(frame, *place, asdict(arm.condition))
        return frame

    def share_correct(self, direction: Direction, arm: Arm) -> Floats:
        """[prompt] share of right completions of an arm, which a worker runs where there are any."""
        with run_tasks(_run_arms, [(self, direction, [arm], False)]) as results:
            ((frame,),) = results
        correct = frame["correct"].to_numpy(np.float64)
        return np.asarray(correct.reshape(-1, self.plan.n_prompts).mean(axis=0))

    @torch.no_grad()
    def _complete(self, direction: Direction, arms: Sequence[Arm], progress: Progress) -> list[pd.DataFrame]:
        sampling, prompts = self.plan.sampling, self.plan.prompts
        model = self.model(EDITED[direction])
        with self.editing(direction, arms) as active, finite_logits(model, active) as broken:
            completions = answer_in_arms(
                model,
                self.readers[EDITED[direction]],
                prompts.table,
                sampling.spec,
                n_samples=sampling.n_samples,
                seeds=[sampling.seeds(prompts.ids, fresh=arm.fresh) for arm in arms],
                active=active,
                progress=progress,
                description=arms[0].name if len(arms) == 1 else f"{arms[0].name} to {arms[-1].name}",
            )
        return [self._frame(draws, finite=number not in broken) for number, draws in enumerate(completions)]

    def _frame(self, draws: Sequence[Sequence[Completion]], *, finite: bool) -> pd.DataFrame:
        """An arm's completions [draw][prompt] with their grades."""
        prompts, n_samples = self.plan.prompts, len(draws)
        completions = list(chain.from_iterable(draws))
        graders = graders_of(self.plan.sampling.spec, prompts.table[TASK])
        grades = list(chain.from_iterable(grade_all(graders, draw, prompts.table) for draw in draws))
        return pd.DataFrame(
            {
                PROMPT: prompts.ids * n_samples,
                SAMPLE: np.repeat(np.arange(n_samples), len(prompts.table)),
                **{name: list(prompts.table[name]) * n_samples for name in PROMPT_LABELS},
                "text": [c.text for c in completions],
                "token_ids": [list(c.token_ids) for c in completions],
                "n_tokens": [len(c.token_ids) for c in completions],
                "correct": [grade.correct for grade in grades],
                "format_class": [grade.format_class for grade in grades],
                "finite": finite,
            }
        )

    @torch.no_grad()
    def _diverge(self, direction: Direction, arm: Arm, probes: Probes) -> dict[str, NDArray[np.float64]]:
        """Per-prompt divergences of the arm: to both models on the first position, and where affordable on more."""
        n, edited = self.plan.n_prompts, EDITED[direction]
        model, references = self.model(edited), probes.references
        measured = {name: np.full(n, np.nan) for name in DIVERGENCES}
        with self.editing(direction, [arm]) as active:
            first = references["first"][edited].under_edit(model, active)
            for name in ("base", "rl"):
                measured[f"kl_to_{name}"] = divergences(first, references["first"][name].log_p, probes.first, n)
            if arm.condition.kind not in RANDOM_KINDS:  # a hundred sets on whole texts would cost more than the rest
                forced = references["forced"][edited].under_edit(model, active)
                for name in ("base", "rl"):
                    reference = references["forced"][name].log_p
                    measured[f"forced_kl_to_{name}"] = divergences(forced, reference, probes.forced, n)
            neutral = references["neutral"][edited].under_edit(model, active)
            moved = divergences(references["neutral"][edited].log_p, neutral, probes.neutral, len(probes.neutral.owner))
        measured["neutral_kl"] = np.full(n, finite_mean(moved))
        return measured


@contextmanager
def finite_logits(model: Any, active: ActiveEdit) -> Iterator[set[int]]:
    """Replace non-finite logits by zeros so that sampling goes on; numbers of the edits under which there were any."""
    broken: set[int] = set()

    def guard(module: Any, args: Any, output: Any) -> None:
        finite = torch.isfinite(output.logits).flatten(1).all(dim=1)
        if not bool(finite.all()):
            of_row = np.broadcast_to(active.rows, finite.shape)
            broken.update(of_row[~finite.cpu().numpy()].tolist())
            output.logits = torch.nan_to_num(output.logits, nan=0.0, posinf=0.0, neginf=0.0)

    handle = model.register_forward_hook(guard)
    try:
        yield broken
    finally:
        handle.remove()


# -- from arms to an outcome table


def _outcomes(
    plan: TrialPlan, direction: Direction, arms: Sequence[Arm], frames: Sequence[pd.DataFrame], other: pd.DataFrame
) -> DirectionOutcomes:
    prompts, n = plan.prompts, plan.n_prompts
    plain = prompts.table[TEXT].map(plain_text)
    kl = {name: _cube(frames, name, n)[:, :, 0].astype(np.float64) for name in DIVERGENCES}
    # Where the unedited models wrote nothing there are no forced completions; the first position stands in.
    forced = np.isfinite(kl["forced_kl_to_base"][0]).any()
    by_name = {arm.name: frame for arm, frame in zip(arms, frames, strict=True)}
    changed = by_name["passthrough"]["text"] != by_name["unedited"]["text"]
    table = OutcomeTable(
        direction=direction,
        conditions=tuple(arm.condition for arm in arms),
        correct=_cube(frames, "correct", n).astype(np.float64),
        ending=_endings(frames, n),
        other_ending=_endings([other], n)[0],
        kl_to_base=kl["forced_kl_to_base" if forced else "kl_to_base"],
        kl_to_rl=kl["forced_kl_to_rl" if forced else "kl_to_rl"],
        neutral_kl=np.array([finite_mean(row) for row in kl["neutral_kl"]]),
        n_tokens=_cube(frames, "n_tokens", n).astype(np.float64),
        task=prompts.table[TASK].to_numpy(dtype=np.str_),
        cluster=prompts.table[CLUSTER].to_numpy(dtype=np.str_),
        target=prompts.target,
        unrelated=prompts.unrelated,
        texts=Texts(
            unedited=_cube([by_name["unedited"]], "text", n)[0],
            edited=_cube([by_name["set"]], "text", n)[0],
            other=_cube([other], "text", n)[0],
            prompts=plain.to_numpy(dtype=np.object_),
            neutral=prompts.neutral_texts or tuple(plain[prompts.unrelated | ~prompts.unrelated.any()]),
        ),
    )
    return DirectionOutcomes(
        table=table,
        divergences=kl,
        passthrough_changed=float(changed.mean()),
        non_finite=tuple(name for name, frame in by_name.items() if not frame["finite"].all()),
    )


def _cube(frames: Sequence[pd.DataFrame], column: str, n_prompts: int) -> NDArray[Any]:
    """[condition, prompt, sample] of a column stored sample after sample."""
    stacked = np.stack([frame[column].to_numpy() for frame in frames])
    return stacked.reshape(len(frames), -1, n_prompts).transpose(0, 2, 1)


def _endings(frames: Sequence[pd.DataFrame], n_prompts: int) -> NDArray[Any]:
    correct = _cube(frames, "correct", n_prompts).astype(bool)
    return ending_of(correct, _cube(frames, "format_class", n_prompts).astype(np.str_))
