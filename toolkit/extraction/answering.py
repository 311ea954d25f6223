"""Completions of a study's prompts: written by the model, or the choice that it finds most likely."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import TASK
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores.prompts import CHOICES, TEXT, choices_of
from rlgen_stats.toolkit.extraction.choice_scoring import PromptLengths, score_choices
from rlgen_stats.toolkit.extraction.generation import Completion, asked_of, generate
from rlgen_stats.toolkit.extraction.grading import graders_of
from rlgen_stats.toolkit.extraction.rendering import PromptReader
from rlgen_stats.toolkit.progress import SILENT, Progress


def answer_prompts(
    model: Any,
    reader: PromptReader,
    prompts: pd.DataFrame,
    spec: StudySpec,
    *,
    n_samples: int,
    seeds: Sequence[int],
    greedy: bool = False,
    active: PromptLengths | None = None,
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
    active
        Handle of the edit in force.
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
    graders = graders_of(spec, prompts[TASK])
    chosen = np.array([not graders[task].needs_generation for task in prompts[TASK]], dtype=bool)
    best = iter(_most_likely(model, reader, prompts[chosen], spec, active, progress, f"{description} choices"))
    choice_of = {int(row): next(best) for row in np.flatnonzero(chosen)}
    written = _written(
        model,
        reader,
        prompts[~chosen],
        spec,
        n_samples=n_samples,
        seeds=np.array(seeds, dtype=np.uint64).reshape(n_samples, len(prompts))[:, ~chosen],
        greedy=greedy,
        progress=progress,
        description=description,
    )
    draws = []
    for completions in written:
        remaining = iter(completions)
        draws.append([choice_of[row] if row in choice_of else next(remaining) for row in range(len(prompts))])
    return draws


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
    progress: Progress,
    description: str,
) -> list[list[Completion]]:
    """[draw][prompt] completions that the model writes."""
    if prompts.empty:
        return [[] for _ in range(n_samples + greedy)]
    tasks, n, n_draws = list(prompts[TASK]), len(prompts), n_samples + greedy
    drawn = generate(
        model,
        reader.tokenizer,
        reader.encode(list(prompts[TEXT])) * n_draws,
        greedy=np.repeat(np.arange(n_draws) < greedy, n).tolist(),
        seeds=[0] * (n * greedy) + [int(seed) for seed in seeds.ravel()],
        temperature=spec.generation.temperature,
        top_p=spec.generation.top_p,
        batch_size=spec.generation.batch_size,
        end_of_turn=reader.end_of_turn,
        progress=progress,
        description=description,
        **asked_of(spec, tasks * n_draws),
    )
    return [drawn[draw * n : (draw + 1) * n] for draw in range(n_draws)]
