"""Completions of a study's prompts: written by the model, or the choice that it finds most likely."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from string import ascii_uppercase
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import TASK
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores.prompts import CHOICES, TEXT, choices_of
from rlgen_stats.toolkit.extraction.choice_scoring import PromptLengths, score_choices
from rlgen_stats.toolkit.extraction.generation import Completion, asked_of, generate
from rlgen_stats.toolkit.extraction.grading import graders_of
from rlgen_stats.toolkit.extraction.refilled_batch import RowEdits
from rlgen_stats.toolkit.extraction.rendering import PromptReader
from rlgen_stats.toolkit.progress import SILENT, Progress


class EditsInForce(RowEdits, PromptLengths, Protocol):
    """Handle of several edits, one of which an arm runs under."""


def answer_prompts(
    model: Any,
    reader: PromptReader,
    prompts: pd.DataFrame,
    spec: StudySpec,
    *,
    n_samples: int,
    seeds: Sequence[int],
    greedy: bool = False,
    progress: Progress = SILENT,
    description: str = "answer",
) -> list[list[Completion]]:
    """Completions of every prompt as its task asks for them: written, or chosen where the grader scores choices.

    Parameters
    ----------
    model, reader
        Causal language model, which may carry hooks, and how it reads prompts.
    prompts
        As ``load_prompts`` returns them.
    spec
        The study, of which generation, tasks and graders are used.
    n_samples
        Completions sampled per prompt.
    seeds
        One per sample and prompt, sample after sample.
    greedy
        Whether a greedy completion comes before the samples.
    progress, description
        Receiver and title of progress.

    Returns
    -------
    list of list of Completion
        [draw][prompt]. A choice is not drawn: all draws of such a prompt are equal.

    Raises
    ------
    InputError, ModelError
        As ``generate`` and ``score_choices``.
    """
    (draws,) = answer_in_arms(
        model,
        reader,
        prompts,
        spec,
        n_samples=n_samples,
        seeds=[seeds],
        greedy=greedy,
        progress=progress,
        description=description,
    )
    return draws


def answer_in_arms(
    model: Any,
    reader: PromptReader,
    prompts: pd.DataFrame,
    spec: StudySpec,
    *,
    n_samples: int,
    seeds: Sequence[Sequence[int]],
    greedy: bool = False,
    active: EditsInForce | None = None,
    progress: Progress = SILENT,
    description: str = "answer",
) -> list[list[list[Completion]]]:
    """Completions of every prompt in several arms, which share batches.

    Parameters
    ----------
    model, reader, prompts, spec, n_samples, greedy, progress, description
        As in :func:`answer_prompts`.
    seeds
        [arm] as in :func:`answer_prompts`.
    active
        Handle of the edits in force, one an arm; None if there are none.

    Returns
    -------
    list of list of list of Completion
        [arm][draw][prompt].
    """
    graders = graders_of(spec, prompts[TASK])
    chosen = np.array([not graders[task].needs_generation for task in prompts[TASK]], dtype=bool)
    best = []
    for arm in range(len(seeds)):
        if active is not None:
            active.rows = arm
        best.append(_most_likely(model, reader, prompts[chosen], spec, active, progress, f"{description} choices"))
    written = _written(
        model,
        reader,
        prompts[~chosen],
        spec,
        n_samples=n_samples,
        seeds=np.array(seeds, dtype=np.uint64).reshape(len(seeds), n_samples, len(prompts))[:, :, ~chosen],
        greedy=greedy,
        active=active,
        progress=progress,
        description=description,
    )
    return [
        [_in_their_places(chosen, choices, completions) for completions in draws]
        for choices, draws in zip(best, written, strict=True)
    ]


def _in_their_places(
    chosen: NDArray[np.bool_], choices: Sequence[Completion], written: Sequence[Completion]
) -> list[Completion]:
    choice, other = iter(choices), iter(written)
    return [next(choice if is_choice else other) for is_choice in chosen]


def _most_likely(
    model: Any,
    reader: PromptReader,
    prompts: pd.DataFrame,
    spec: StudySpec,
    active: PromptLengths | None,
    progress: Progress,
    description: str,
) -> list[Completion]:
    """The best choice of every prompt, in the form of a completion."""
    if prompts.empty:
        return []
    graders = [spec.grader_of(task) for task in prompts[TASK]]
    texts = [choices_of(cell) for cell in prompts[CHOICES]]
    options = [
        tuple(ascii_uppercase[: len(choices)]) if grader.options == "letters" else choices
        for grader, choices in zip(graders, texts, strict=True)
    ]
    scores = score_choices(
        model,
        reader.tokenizer,
        [reader.render(text) for text in prompts[TEXT]],
        options,
        special=reader.template is None,
        batch_size=spec.generation.batch_size,
        active=active,
        progress=progress,
        description=description,
    )
    completions = []
    for of_prompt, grader in zip(scores, graders, strict=True):
        best = of_prompt.best(grader.normalize or "none")
        log_likelihoods = tuple(float(value) for value in of_prompt.log_likelihood)
        completions.append(Completion(of_prompt.token_ids[best], of_prompt.choices[best], True, best, log_likelihoods))
    return completions


def _written(
    model: Any,
    reader: PromptReader,
    prompts: pd.DataFrame,
    spec: StudySpec,
    *,
    n_samples: int,
    seeds: NDArray[np.uint64],
    greedy: bool,
    active: EditsInForce | None,
    progress: Progress,
    description: str,
) -> list[list[list[Completion]]]:
    """[arm][draw][prompt] completions that the model writes; seeds are [arm, sample, prompt]."""
    n_arms, n_draws, n = len(seeds), n_samples + greedy, len(prompts)
    if prompts.empty:
        return [[[] for _ in range(n_draws)] for _ in range(n_arms)]
    of_draws = np.concatenate([np.zeros((n_arms, int(greedy), n), dtype=np.uint64), seeds], axis=1)
    is_greedy = np.broadcast_to((np.arange(n_draws) < greedy)[:, None], of_draws.shape)
    drawn = generate(
        model,
        reader.tokenizer,
        reader.encode(list(prompts[TEXT])) * (n_draws * n_arms),
        greedy=is_greedy.ravel().tolist(),
        seeds=of_draws.ravel().tolist(),
        temperature=spec.generation.temperature,
        top_p=spec.generation.top_p,
        batch_size=spec.generation.batch_size,
        end_of_turn=reader.end_of_turn,
        edits=None if active is None else np.repeat(np.arange(n_arms), n_draws * n).tolist(),
        active=active,
        progress=progress,
        description=description,
        **asked_of(spec, list(prompts[TASK]) * (n_draws * n_arms)),
    )
    rows = iter(drawn)
    return [[list(islice(rows, n)) for _ in range(n_draws)] for _ in range(n_arms)]
