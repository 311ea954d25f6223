"""Running arms on a live model: completions, grades, divergences; one parquet an arm, so that trials resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlgen_stats.schemas.dims import PROMPT, PROMPT_LABELS, SAMPLE
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import replacing
from rlgen_stats.stores.trial_completions import CONDITION, SHARED_KINDS
from rlgen_stats.toolkit.edits.edit import EditSite
from rlgen_stats.toolkit.edits.hooks import ActiveEdit, Donor, editing
from rlgen_stats.toolkit.extraction.generation import generate
from rlgen_stats.toolkit.extraction.grading import make_grader
from rlgen_stats.toolkit.extraction.prompts import ANSWER, TEXT
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.causal.outcome_table import Direction
from rlgen_stats.toolkit.trial.arms import Arm
from rlgen_stats.toolkit.trial.divergence import Probes, divergences, finite_mean, log_probabilities

DIVERGENCES: Final = ("kl_to_base", "kl_to_rl", "forced_kl_to_base", "forced_kl_to_rl", "neutral_kl")
"""Per prompt: first completion position and forced completions; neutral text, one number for all; NaN where not
computed."""
FILE_VERSION: Final = 2
"""Raised when an arm's file gets other columns."""
_HASH: Final = b"rlgen_stats_arm"


@dataclass(frozen=True)
class Subject:
    """The model that one direction edits."""

    direction: Direction
    model: Any
    site: EditSite
    donor: Donor | None
    """The RL model, for ``lift``."""


@dataclass(frozen=True)
class Bench:
    """What all arms share."""

    spec: StudySpec
    prompts: pd.DataFrame
    tokenizer: Any
    folder: Path
    """intervention/ in the study folder."""
    trial: str = ""
    """Name of a trial beside the study's own; arms that do not depend on the set are shared with it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else decides an arm's outcome (hashes of weights and spec); a stored arm with other facts is redone."""

    def place(self, direction: Direction, arm: Arm) -> Path:
        """File of an arm."""
        own = self.folder if arm.condition.kind in SHARED_KINDS or not self.trial else self.folder / self.trial
        return own / direction / f"{arm.name}.parquet"

    def is_stored(self, direction: Direction, site: EditSite, arm: Arm) -> bool:
        """Whether an arm has been run and would not be run again."""
        return _stored(self.place(direction, arm), _arm_hash(self, direction, site, arm)) is not None

    @property
    def ids(self) -> list[str]:
        """Prompt ids."""
        return list(self.prompts[PROMPT])

    def seeds(self, *, fresh: bool) -> list[int]:
        """One seed a (sample, prompt), shared by all arms but the fresh one."""
        purpose = ("intervention", "fresh") if fresh else ("intervention",)
        return [
            derive_seed(self.spec.seed, *purpose, prompt, sample)
            for sample in range(self.spec.intervention.n_samples)
            for prompt in self.ids
        ]


@contextmanager
def arm_in_force(subject: Subject, arm: Arm) -> Iterator[ActiveEdit | None]:
    """The subject's model with the arm's edit."""
    with ExitStack() as stack:
        active = None
        if arm.edit is not None:
            donor = subject.donor if arm.edit.kind == "lift" else None
            active = stack.enter_context(editing(subject.model, arm.edit, arm.site or subject.site, donor=donor))
        yield active


@contextmanager
def finite_logits(model: Any) -> Iterator[list[bool]]:
    """Replace non-finite logits by zeros so that sampling goes on; the list says whether there were any."""
    broken: list[bool] = []

    def guard(module: Any, args: Any, output: Any) -> None:
        if not bool(torch.isfinite(output.logits).all()):
            broken.append(True)
            output.logits = torch.nan_to_num(output.logits, nan=0.0, posinf=0.0, neginf=0.0)

    handle = model.register_forward_hook(guard)
    try:
        yield broken
    finally:
        handle.remove()


# -- one arm


def run_arm(
    bench: Bench, subject: Subject, arm: Arm, probes: Probes | None, progress: Progress = SILENT
) -> pd.DataFrame:
    """Completions, grades and divergences of one arm, from its file if that is there and the same.

    Parameters
    ----------
    bench, subject, arm
        What to run on what.
    probes
        Texts for divergences; None to leave them out.
    progress
        Receiver of progress, in completions sampled.

    Returns
    -------
    DataFrame
        Sample after sample, prompts in order: prompt, sample, text, token_ids, n_tokens, correct, format_class, finite,
        and the columns of ``DIVERGENCES``.
    """
    path = bench.place(subject.direction, arm)
    wanted = _arm_hash(bench, subject.direction, subject.site, arm)
    found = _stored(path, wanted)
    if found is None:
        found = _complete(bench, subject, arm, progress)
    elif probes is None or "kl_to_base" in found:
        return found
    if probes is not None:
        with arm_in_force(subject, arm) as active:
            measured = _diverge(bench, subject, arm, probes, active)
        found = found.assign(
            **{name: np.tile(values, bench.spec.intervention.n_samples) for name, values in measured.items()}
        )
    _store(found, path, wanted, arm)
    return found


def _arm_hash(bench: Bench, direction: Direction, site: EditSite, arm: Arm) -> str:
    edit = None if arm.edit is None else asdict(arm.edit)
    other = [] if arm.site is None else [arm.site.crosscoder.weights_sha256]
    how = bench.spec.generation.model_dump(exclude={"batch_size", "n_samples"})
    samples = bench.spec.intervention.n_samples
    return content_hash(
        {
            "version": FILE_VERSION,
            "facts": bench.facts,
            "site": [direction, site.view, site.layer, site.readout],
            "arm": [edit, arm.fresh, *other],
            "sampling": [how, samples, bench.spec.seed],
            "grader": bench.spec.grader.model_dump(),
            "prompts": bench.ids,
        }
    )


def _stored(path: Path, wanted: str) -> pd.DataFrame | None:
    if not path.exists():
        return None
    table = pq.read_table(path)
    if (table.schema.metadata or {}).get(_HASH) != wanted.encode():
        return None
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _store(frame: pd.DataFrame, path: Path, name: str, arm: Arm) -> None:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    told = {_HASH: name.encode(), CONDITION: json.dumps(asdict(arm.condition)).encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **told})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _complete(bench: Bench, subject: Subject, arm: Arm, progress: Progress) -> pd.DataFrame:
    how, n_samples = bench.spec.generation, bench.spec.intervention.n_samples
    with arm_in_force(subject, arm), finite_logits(subject.model) as broken:
        completions = generate(
            subject.model,
            bench.tokenizer,
            list(bench.prompts[TEXT]) * n_samples,
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seeds=bench.seeds(fresh=arm.fresh),
            batch_size=how.batch_size,
            progress=progress,
            description=arm.name,
        )
    grader = make_grader(bench.spec.grader)
    answers = list(bench.prompts[ANSWER]) * n_samples
    grades = [grader.grade(c, answer) for c, answer in zip(completions, answers, strict=True)]
    return pd.DataFrame(
        {
            PROMPT: bench.ids * n_samples,
            SAMPLE: np.repeat(np.arange(n_samples), len(bench.ids)),
            **{name: list(bench.prompts[name]) * n_samples for name in PROMPT_LABELS},
            "text": [c.text for c in completions],
            "token_ids": [list(c.token_ids) for c in completions],
            "n_tokens": [len(c.token_ids) for c in completions],
            "correct": [grade.correct for grade in grades],
            "format_class": [grade.format_class for grade in grades],
            "finite": not broken,
        }
    )


def _diverge(
    bench: Bench, subject: Subject, arm: Arm, probes: Probes, active: ActiveEdit | None
) -> dict[str, np.ndarray]:
    """Per-prompt divergences of the arm: to both models on the first position, and where affordable on more."""
    n = len(bench.ids)
    found = {name: np.full(n, np.nan) for name in DIVERGENCES}
    first = log_probabilities(subject.model, probes.first, active)
    for name in ("base", "rl"):
        found[f"kl_to_{name}"] = divergences(first, probes.references["first"][name], probes.first, n)
    if arm.condition.kind != "random":
        forced = log_probabilities(subject.model, probes.forced, active)
        for name in ("base", "rl"):
            found[f"forced_kl_to_{name}"] = divergences(forced, probes.references["forced"][name], probes.forced, n)
    own = "rl" if subject.direction == "disable" else "base"
    neutral = log_probabilities(subject.model, probes.neutral, active)
    moved = divergences(probes.references["neutral"][own], neutral, probes.neutral, len(probes.neutral.owner))
    found["neutral_kl"] = np.full(n, finite_mean(moved))
    return found
