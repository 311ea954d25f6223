"""What a study will take: completions and tokens to sample, and bytes on disk, from its settings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from rlgen_stats.schemas.dims import TASK
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS, Direction
from rlgen_stats.toolkit.trial.arms import choose_prompts

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TOKEN_BYTES = 8
"""Of a sampled token in completions: its id and its text."""
_LABEL_BYTES = 15
"""Of a token's labels in activations.zarr."""
_SUMMARIES = 3
"""Numbers a feature has for every prompt: mean, firing share, maximum."""
_BINS = 15
_RESULTS = 40
"""Numbers of 8 bytes that the analyses keep of a feature and model."""
_FURTHER_ARMS = 6
"""Of a trial's direction, beside random sets, doses and copied sets: unedited, fresh draws, steering vectors."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts that a study's costs follow from."""

    models: Mapping[str, int]
    """All models, also those imported -> completions of a prompt, the greedy one included."""
    to_sample: Sequence[str]
    """Those that the outcomes stage will sample."""
    trials_left: bool = True
    """Whether trials are still to be held."""
    width: int
    """Channels of the residual stream."""
    prompt_tokens: int
    """Tokens of all prompts together."""
    checkpoint_bytes: int
    """Of one checkpoint that is trained here."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a study will take at most: every completion as long as its limit."""

    completions: int
    tokens: int
    """Tokens of these completions."""
    prompt_tokens: int
    """Tokens of the prompts before these completions, at the mean length of a prompt."""
    trial_completions: int
    trial_tokens: int
    trial_prompt_tokens: int
    stores: Mapping[str, int]
    """What is written -> bytes, before compression."""

    def hours(self, tokens_per_second: float) -> tuple[float, float]:
        """Hours to sample outcomes, and trials, where a token is read as fast as one is written."""
        outcomes, trials = self.tokens + self.prompt_tokens, self.trial_tokens + self.trial_prompt_tokens
        return outcomes / tokens_per_second / 3600, trials / tokens_per_second / 3600


def token_limits(spec: StudySpec, prompts: pd.DataFrame) -> list[int]:
    """Length limit of each prompt's completions; 0 where nothing is generated."""
    limits = {
        task: 0 if spec.grader_of(task).name == "choice_loglik" else spec.max_new_tokens_of(task)
        for task in prompts[TASK].unique()
    }
    return [limits[task] for task in prompts[TASK]]


def estimate(spec: StudySpec, prompts: pd.DataFrame, sizes: Sizes) -> Costs:
    """Costs of a study.

    Parameters
    ----------
    spec
        The study.
    prompts
        Its prompts.
    sizes
        Counts that the spec alone does not give.

    Notes
    -----
    Trials are counted as if no futility stop ended them and a set was found in every dictionary. Random draws, health
    and figures take no space worth counting.
    """
    limits = token_limits(spec, prompts)
    n_drawn = sum(sizes.models[model] for model in sizes.to_sample)
    generated = sum(limit > 0 for limit in limits)
    trial_limits = token_limits(spec, choose_prompts(prompts, spec))
    trials = {(layer, pair and pair[1]) for layer, pair in spec.answers}  # contrasts with one second run share a trial
    n_trial = (
        len(trials)
        * sum(arms_at_most(spec).values())
        * len(spec.primary_crosscoder.names)
        * spec.intervention.n_samples
    )
    a_prompt = sizes.prompt_tokens / max(len(prompts), 1)
    n_completions = n_drawn * generated
    n_trial_completions = sizes.trials_left * n_trial * sum(limit > 0 for limit in trial_limits)
    return Costs(
        completions=n_completions,
        tokens=n_drawn * sum(limits),
        prompt_tokens=round(n_completions * a_prompt),
        trial_completions=n_trial_completions,
        trial_tokens=sizes.trials_left * n_trial * sum(trial_limits),
        trial_prompt_tokens=round(n_trial_completions * a_prompt),
        stores=_stores(spec, prompts, sizes, sum(limits), n_trial * sum(trial_limits)),
    )


def arms_at_most(spec: StudySpec, directions: Sequence[Direction] = DIRECTIONS) -> dict[Direction, int]:
    """Arms of a trial in one dictionary, by direction."""
    settings = spec.intervention
    copied = (len(settings.curve) + 2) * (1 + settings.curve_controls)  # the curve, the set, and all
    return dict.fromkeys(directions, settings.n_controls + len(settings.doses) + copied + _FURTHER_ARMS)


def _stores(spec: StudySpec, prompts: pd.DataFrame, sizes: Sizes, n_tokens: int, n_trial_tokens: int) -> dict[str, int]:
    n_models, n_prompts, n_layers = len(sizes.models), len(prompts), len(spec.extraction.layers) or 1
    primary, n_drawn = spec.primary_crosscoder, sum(sizes.models.values())
    # texts: what base and each contrasted run's last checkpoint wrote; base reads them twice
    texts = (1 + len(spec.all_contrasted)) * (sizes.prompt_tokens + n_tokens)
    per_token = (n_models + 1) * sizes.width * _ITEM_BYTES[spec.extraction.dtype] + _LABEL_BYTES
    weights = sum(
        len(one.names) * 2 * len(one.views) * sizes.width * one.n_features * 4
        for one in spec.crosscoders
        if one.weights is None
    )
    per_feature = _SUMMARIES * 4 + (_BINS * 4 if spec.summaries.histograms else 0)
    trained = sum(run.n_checkpoints for run in spec.runs if run.method != "checkpoints")
    stores = {
        "models": trained * sizes.checkpoint_bytes,
        "completions": n_drawn * n_tokens * _TOKEN_BYTES,
        "outcomes.zarr": n_drawn * n_prompts * 32,
        "activations.zarr": n_layers * texts * per_token,
        "crosscoder": n_layers * 3 * weights,  # and the optimiser's state while it trains
        "features.zarr": n_layers * len(primary.names) * n_models * n_prompts * primary.n_features * per_feature,
        "results.zarr": n_layers * len(primary.names) * n_models * primary.n_features * _RESULTS * 8,
        "intervention": n_trial_tokens * _TOKEN_BYTES,
    }
    return {name: size for name, size in stores.items() if size}
