"""The selected features: their numbers, and the texts on which they fire most in each model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import pandas as pd

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, read_contexts, read_logits
from rlgen_stats.stores.dashboards import PEAK
from rlgen_stats.toolkit.reporting.csv_tables import flat
from rlgen_stats.toolkit.reporting.facts import StudyData
from rlgen_stats.toolkit.reporting.formatting import compact, p_text, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, attr_number, final_models, labels_of, number, text
from rlgen_stats.toolkit.reporting.trial_rows import of_first_dictionary, part_blocks, single_trials
from rlgen_stats.toolkit.statistics.timing.run_contrast import checkpoints_of

_T = TypeVar("_T")

_OTHER_MODEL: Final = "activation:"
"""Prefix of the columns with other models' activation at the same token."""
MAX_TOKENS: Final = 8
"""Promoted and suppressed tokens shown per feature and model."""
MAX_CONTEXTS: Final = 8
"""Contexts read per feature, model and kind."""
_NEAR: Final = 3
"""Words on either side of the peak that near-identical contexts share."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One place where a feature fires."""

    before: str
    peak: str
    after: str
    activation: float
    prompt: str
    source: str
    position: int
    elsewhere: dict[str, float]
    """Activation at the same token, by model, where known."""


@dataclass(frozen=True, kw_only=True)
class SharedContext:
    """A context with every model's activation, and the top contexts that are like it."""

    context: Context
    models: tuple[str, ...]
    """Models in whose top contexts it is."""
    n_alike: int
    """Prompts whose contexts are the same but for numbers and for words that are not near the peak; 1: this one."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A feature at one checkpoint, against base."""

    model: str
    effect_sd: float
    """Mean change over prompts in standard deviations of base."""
    call: str
    """DRIFT, NO_DRIFT or UNDETERMINED; empty where it was not tested."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The feature of another dictionary that a feature was assigned to."""

    dictionary: str
    feature: int
    similarity: float
    """Cosine of the decoders."""
    correlation: float
    """Correlation of activations over prompts."""
    matched: bool
    """Whether it is more similar than chance allows."""


@dataclass(frozen=True, kw_only=True)
class FeatureCard:
    """Everything shown about one feature."""

    feature: int
    row: dict[str, Any]
    """Its row of the selection table."""
    means: dict[str, float]
    """Mean activation over prompts, by model."""
    scores: dict[str, float]
    """Paper's score by task."""
    contexts: dict[str, list[Context]]
    """Top contexts by model."""
    samples: dict[str, list[Context]]
    """Quantiles of a random sample of the tokens on which it fires, by model, strongest first."""
    tokens: dict[str, list[str]]
    """Promoted tokens (largest logits of its decoder direction through the unembedding), by model."""
    suppressed: dict[str, list[str]] = field(default_factory=dict)
    """Suppressed tokens (smallest logits), by model."""
    drift: dict[str, list[Checkpoint]] = field(default_factory=dict)
    """Change from base along the checkpoints, by run."""
    matches: list[Match] = field(default_factory=list)
    """Its counterpart in every other dictionary of the same design."""
    alone: list[dict[str, Any]] = field(default_factory=list)
    """What editing it alone does, in each trial of single features; see ``trial_rows.part_blocks``."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Trials of this feature alone; see ``trial_rows.single_trials``."""
    origin: tuple[str, ...] = ()
    """Model specificity, reappearance with other seeds, what tokens explain, in sentences; empty if not computed."""
    explained: float = math.nan
    """Share of its activation that token and position explain."""
    injected: float = math.nan
    """Share of unrelated texts in which it fires on its leading tokens."""
    matched: float = math.nan
    """The same of other tokens of like frequency."""

    @property
    def anchor(self) -> str:
        """Id of its section."""
        return f"feature-{self.feature}"

    @property
    def side_by_side(self) -> list[SharedContext]:
        """Top contexts of all models together, strongest first; near-identical ones once."""
        alike: dict[tuple[str, ...], list[tuple[str, Context]]] = {}
        for model, contexts in self.contexts.items():
            for context in contexts:
                alike.setdefault(near_identical(context), []).append((model, context))
        shared = [
            SharedContext(
                context=max((context for _, context in group), key=lambda context: context.activation),
                models=tuple(dict.fromkeys(model for model, _ in group)),
                n_alike=len({context.prompt for _, context in group}),
            )
            for group in alike.values()
        ]
        return sorted(shared, key=lambda one: -one.context.activation)


def near_identical(context: Context) -> tuple[str, ...]:
    """What contexts share that count as one: the peak and the words beside it, numbers taken as equal."""
    before, after = context.before.split()[-_NEAR:], context.after.split()[:_NEAR]
    return tuple(re.sub(r"\d+", "0", word) for word in (*before, context.peak.strip(), *after))


def feature_cards(
    folder: StudyFolder,
    spec: StudySpec,
    results: Results,
    data: StudyData,
    features: Sequence[int] | None = None,
) -> list[FeatureCard]:
    """Cards of some features of the primary crosscoder; default the selected ones, by rank.

    Raises
    ------
    InputError
        If a feature does not exist.
    """
    selection = results.get("selection")
    table = pd.DataFrame({"feature": []}) if selection is None else flat(selection, ("feature",))
    if features is None and selection is not None:
        table = table[table["selected"].to_numpy(bool)].sort_values(["rank", "feature"])
    chosen = [int(feature) for feature in (table["feature"] if features is None else features)]
    rows = table.set_index("feature", drop=False).reindex(chosen)
    unknown = [k for k in chosen if not 0 <= k < spec.primary_crosscoder.n_features]
    if unknown:
        name, last = spec.primary_crosscoder.name, spec.primary_crosscoder.n_features - 1
        raise InputError(f"features of {name!r} run from 0 to {last}, got {unknown[:5]}.")
    contexts = _contexts(folder, spec, chosen)
    tokens, suppressed = tokens_of(folder, spec, chosen, sign=1), tokens_of(folder, spec, chosen, sign=-1)
    drift, matches, alone = _drift(results, spec, chosen), _matches(results, spec, chosen), _alone(results, chosen)
    means, trials = _means(data, spec, chosen), single_trials(results, spec.contrasted[1].name)
    tasks = labels_of(selection, "task")
    scores = np.empty((0, len(chosen)))
    if selection is not None:
        scores = selection["score"].reindex(feature=chosen).transpose("task", "feature").values
    return [
        FeatureCard(
            feature=feature,
            row={str(key): value for key, value in row.items()},
            means={model: float(values[i]) for model, values in means.items()},
            scores={task: float(scores[t, i]) for t, task in enumerate(tasks) if np.isfinite(scores[t, i])},
            contexts=_in_order(contexts.get((feature, "top"), {}), list(means)),
            samples=_in_order(contexts.get((feature, "quantile"), {}), list(means)),
            tokens=_in_order(tokens.get(feature, {}), list(means)),
            suppressed=_in_order(suppressed.get(feature, {}), list(means)),
            drift=drift.get(feature, {}),
            matches=matches.get(feature, []),
            alone=alone.get(feature, []),
            trials=trials.get(feature, []),
            origin=(*_origin(results, spec.primary_crosscoder.name, feature), *_token_sentences(results, feature)),
            explained=number(results.get("tokens"), "explained", explained_by="both", feature=feature),
            injected=number(results.get("tokens"), "injected", feature=feature),
            matched=number(results.get("tokens"), "injected_matched", feature=feature),
        )
        for i, (feature, row) in enumerate(zip(chosen, rows.to_dict("records"), strict=True))
    ]


def _origin(results: Results, crosscoder: str, feature: int) -> tuple[str, ...]:
    sentences = []
    scaling, matching = results.get("latent_scaling"), results.get("matching")
    if crosscoder in labels_of(scaling, "crosscoder"):
        feature_class = text(scaling, "feature_class", crosscoder=crosscoder, feature=feature)
        view = text(scaling, "specific_to", crosscoder=crosscoder, feature=feature)
        sentences.append(f"By decoder norms and latent scaling it is {feature_class}{f' ({view})' if view else ''}.")
    if crosscoder in labels_of(matching, "crosscoder"):
        share = number(matching, "reappearance", crosscoder=crosscoder, feature=feature)
        n = len(labels_of(matching, "replicate"))
        if math.isfinite(share):
            sentences.append(
                f"It reappears in {round(share * n)} of {n} dictionaries trained from other initial weights."
            )
    return tuple(sentences)


def _token_sentences(results: Results, feature: int) -> tuple[str, ...]:
    """What tokens explain of a feature, what injected ones do, and the token classes in which it fires more or less."""
    data, here = results.get("tokens"), {"feature": feature}
    low, high = (number(data, f"explained_{end}", explained_by="both", **here) for end in ("low", "high"))
    if data is None or not math.isfinite(low):
        return ()
    parts = [percent(number(data, "explained", explained_by=part, **here), 0) for part in ("both", "token", "position")]
    sentences = [
        f"Token and position explain {parts[0]} [{percent(low, 0)}, {percent(high, 0)}] of its activation (token alone "
        f"{parts[1]}, position alone {parts[2]})."
    ]
    if math.isfinite(number(data, "injected", **here)):
        own, matched = (percent(number(data, name, **here), 0) for name in ("injected", "injected_matched"))
        sentences.append(
            f"In unrelated texts it fires on its leading tokens ({text(data, 'leading', **here)}) in {own}, on others "
            f"of like frequency in {matched} (q = {p_text(number(data, 'injection_q', **here))})."
        )
    alpha = attr_number(data, "alpha")
    odds = [
        f"{name} {compact(number(data, 'odds_ratio', token_class=name, **here))}"
        for name in labels_of(data, "token_class")
        if number(data, "odds_q", token_class=name, **here) <= alpha
    ]
    if odds:
        sentences.append(f"Odds ratios of firing by token class (q at most {alpha:g}): {', '.join(odds)}.")
    return tuple(sentences)


def _in_order(by_model: dict[str, _T], models: list[str]) -> dict[str, _T]:
    """Base first, then the models in the order of the other tables."""
    return {model: by_model[model] for model in [*models, *by_model] if model in by_model}


def _means(data: StudyData, spec: StudySpec, chosen: list[int]) -> dict[str, np.ndarray]:
    if data.features is None or not chosen:
        return {}
    finals = final_models(spec, data.features)
    models = [BASE_MODEL, *(finals[run.name] for run in spec.contrasted if run.name in finals)]
    models = [model for model in models if model in labels_of(data.features, "model")]
    mean = data.features["mean"].sel(model=models, feature=chosen).mean("prompt").compute().values
    return {model: mean[i] for i, model in enumerate(models)}


def _contexts(
    folder: StudyFolder, spec: StudySpec, features: list[int]
) -> dict[tuple[int, str], dict[str, list[Context]]]:
    """``(feature, kind) -> model -> contexts`` of the primary crosscoder, strongest first; empty if none were kept."""
    if not folder.contexts(spec.primary_crosscoder.name).exists() or not features:
        return {}
    table = read_contexts(folder, spec.primary_crosscoder.name, features)
    contexts: dict[tuple[int, str], dict[str, list[Context]]] = {}
    for row in table.to_dict("records"):
        of_model = contexts.setdefault((int(row["feature"]), str(row["kind"])), {}).setdefault(str(row["model"]), [])
        if len(of_model) < MAX_CONTEXTS:
            of_model.append(_context({str(key): value for key, value in row.items()}))
    return contexts


def _context(row: dict[str, Any]) -> Context:
    before, peak, after = split_peak(str(row["text"]))
    elsewhere = {
        key.removeprefix(_OTHER_MODEL): float(value) for key, value in row.items() if key.startswith(_OTHER_MODEL)
    }
    return Context(
        before=before,
        peak=peak,
        after=after,
        activation=float(row["activation"]),
        prompt=str(row["prompt"]),
        source=str(row["source"]),
        position=int(row["position"]),
        elsewhere=elsewhere,
    )


def tokens_of(
    folder: StudyFolder, spec: StudySpec, features: list[int], *, sign: int
) -> dict[int, dict[str, list[str]]]:
    """``feature -> model -> tokens`` that it promotes (1) or suppresses (-1), strongest first; may be empty."""
    if not folder.logits(spec.primary_crosscoder.name).exists() or not features:
        return {}
    table = read_logits(folder, spec.primary_crosscoder.name, features)
    table = table[(table["sign"] == sign) & (table["rank"] <= MAX_TOKENS)]
    tokens: dict[int, dict[str, list[str]]] = {}
    for row in table.to_dict("records"):
        tokens.setdefault(int(row["feature"]), {}).setdefault(str(row["model"]), []).append(str(row["token"]))
    return tokens


def _drift(results: Results, spec: StudySpec, features: list[int]) -> dict[int, dict[str, list[Checkpoint]]]:
    """``feature -> run -> checkpoints`` of the contrasted runs; empty if drift was not computed."""
    data = results.get("drift")
    if data is None:
        return {}
    known = [feature for feature in features if feature in data["feature"].values]
    tables: dict[int, dict[str, list[Checkpoint]]] = {feature: {} for feature in known}
    for run in spec.contrasted:
        one = checkpoints_of(data, run.name).sel(feature=known)
        effects, calls = one["effect_sd"].values, one["call"].values
        for i, feature in enumerate(known):
            tables[feature][run.name] = [
                Checkpoint(model=model, effect_sd=float(effects[m, i]), call=str(calls[m, i]))
                for m, model in enumerate(labels_of(one, "model"))
            ]
    return tables


def _matches(results: Results, spec: StudySpec, features: list[int]) -> dict[int, list[Match]]:
    data, name = results.get("matching"), spec.primary_crosscoder.name
    if data is None or name not in labels_of(data, "crosscoder"):
        return {}
    one = data.sel(crosscoder=name)
    where = {int(feature): i for i, feature in enumerate(one["feature"].values)}
    columns = {
        v: one[v].transpose("replicate", "feature").values for v in ("match", "similarity", "correlation", "matched")
    }
    return {
        feature: [
            Match(
                dictionary=replicate,
                feature=int(columns["match"][r, where[feature]]),
                similarity=float(columns["similarity"][r, where[feature]]),
                correlation=float(columns["correlation"][r, where[feature]]),
                matched=bool(columns["matched"][r, where[feature]]),
            )
            for r, replicate in enumerate(labels_of(one, "replicate"))
        ]
        for feature in features
        if feature in where
    }


def _alone(results: Results, features: list[int]) -> dict[int, list[dict[str, Any]]]:
    """``feature -> rows`` of the trials in which features were edited one by one."""
    alone: dict[int, list[dict[str, Any]]] = {}
    for block in part_blocks(results):
        for row in block["rows"]:
            if int(row["feature"]) in features and of_first_dictionary(block["name"]):
                of_trial = {"trial": block["name"], "direction": block["direction"]}
                alone.setdefault(int(row["feature"]), []).append(of_trial | row)
    return alone


def split_peak(text: str) -> tuple[str, str, str]:
    """Text before, within and after the peak marks; all of it "before" if there are none.

    Examples
    --------
    >>> split_peak("two ⟦plus⟧ three")
    ('two ', 'plus', ' three')
    """
    before, opened, rest = text.partition(PEAK[0])
    peak, closed, after = rest.partition(PEAK[1])
    return (before, peak, after) if opened and closed else (text, "", "")
