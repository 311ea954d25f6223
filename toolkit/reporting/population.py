"""What each analysis is computed on: prompts and part of the split, decoding, unit, models; said wherever a number is.

One sentence an analysis, so that the same number cannot be given two populations in two places.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.formatting import count, listed
from rlgen_stats.toolkit.reporting.result_lookup import (
    Results,
    attr_number,
    chooses_features,
    final_models,
    labels_of,
    number,
    text,
)

CLAIM_POPULATION: Final = {"C1": "whose", "C2": "when", "C3": "which", "C4": "editing", "C5": "editing"}
"""Analysis that a claim rests on."""


def populations(results: Results, spec: StudySpec, prompts: pd.DataFrame | None = None) -> dict[str, str]:
    """Analysis -> one sentence on its population; only of analyses that were computed.

    Parameters
    ----------
    results
        Results groups by name.
    spec
        The study: its runs, dictionaries and sampling.
    prompts
        One row a prompt with its ``split``; without it the sizes of the parts are left out.
    """
    builders: dict[str, tuple[str, Callable[[Results, StudySpec, dict[str, int]], str]]] = {
        "behaviour": ("behaviour", _behaviour),
        "tasks": ("behaviour", _tasks),
        "completions": ("behaviour", _completions),
        "movement": ("movement", _movement),
        "whose": ("attribution_contrast", _whose),
        "finals": ("attribution_contrast", partial(_whose, of_finals=True)),
        "attribution": ("attribution", _attribution),
        "when": ("timing_contrast", _when),
        "stabilization": ("stabilization", partial(_all_prompts, group="stabilization")),
        "set_stability": ("set_stability", partial(_all_prompts, group="set_stability")),
        "drift": ("drift", partial(_all_prompts, group="drift")),
        "which": ("selection", _which),
        "scores": ("selection", _scores),
        "editing": ("intervention", _editing),
        "side_effects": ("intervention", _side_effects),
        "balance": ("control_balance", _balance),
        "copying": ("mediated_share", _copying),
        "tokens": ("tokens", _tokens),
        "health": ("health", _health),
        "dictionaries": ("replicability", _dictionaries),
    }
    sizes = _sizes(prompts, results.get("selection"))
    return {name: build(results, spec, sizes) for name, (group, build) in builders.items() if group in results}


def _sizes(prompts: pd.DataFrame | None, selection: xr.Dataset | None) -> dict[str, int]:
    """Prompts of each part of the split, of those in tasks that choose features, and of all; empty if not known."""
    if prompts is None:
        return {}
    sizes = {str(part): int(n) for part, n in prompts["split"].value_counts().items()} | {"all": len(prompts)}
    if selection is not None:
        tasks = selection["task"].values[chooses_features(selection)].astype(str)
        of_tasks = prompts.loc[prompts["task"].isin(tasks), "split"].value_counts()
        sizes |= {f"{part} of tasks": int(n) for part, n in of_tasks.items()}
    return sizes


def _part(sizes: dict[str, int], part: str) -> str:
    """``344 verification prompts``, or without the number."""
    words = "prompts of all parts" if part == "all" else f"{part.removesuffix(' of tasks')} prompts"
    return f"{sizes[part]:,} {words}" if part in sizes else f"all {words}" if part != "all" else words


def _unit(data: xr.Dataset) -> str:
    return f"unit: {data.attrs.get('unit', 'prompt')}"


def _counted(data: xr.Dataset, name: str, noun: str) -> str:
    """``27,499 tokens``, or without the number where it is not known."""
    n = attr_number(data, name)
    return f"{n:,.0f} {noun}" if np.isfinite(n) else noun


def _models(results: Results, spec: StudySpec, group: str) -> str:
    finals = final_models(spec, results.get(group))
    return listed([BASE_MODEL, *(finals[run.name] for run in spec.contrasted if run.name in finals)])


def _joined(*parts: str) -> str:
    text = "; ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}."


def _behaviour(results: Results, spec: StudySpec, _: dict[str, int]) -> str:
    data = results["behaviour"]
    counted = data.isel(task=np.isin(data["role"].values, ("pooled", "control"), invert=True), model=0)
    domains = [(words, int(counted["n_prompts"].values[counted["domain"].values == domain].sum()))
               for domain, words in (("in", "in-domain"), ("out", "out-of-domain"))]  # fmt: skip
    sizes = listed(f"{n:,} {words}" for words, n in domains if n)
    return _joined(
        f"{sizes} prompts of all parts", "greedy completions", _unit(data), _models(results, spec, "behaviour")
    )


def _tasks(results: Results, spec: StudySpec, _: dict[str, int]) -> str:
    """The same with negative controls, where tasks stand one by one."""
    data = results["behaviour"].isel(model=0)
    n = int(data["n_prompts"].values[data["role"].values == "control"].sum())
    return _behaviour(results, spec, {}).replace(
        " prompts of all parts", f"{f' and {n:,} control' if n else ''} prompts of all parts", 1
    )


def _completions(results: Results, spec: StudySpec, _: dict[str, int]) -> str:
    data = results["behaviour"]
    n = int(data["n_prompts"].isel(model=0, task=data["role"].values != "pooled").sum())
    generation = spec.generation
    return _joined(
        f"{n:,} prompts of all parts, controls among them",
        f"{count(generation.n_samples.final, 'completion')} a prompt sampled at temperature {generation.temperature:g}",
        _models(results, spec, "behaviour"),
    )


def _movement(results: Results, spec: StudySpec, sizes: dict[str, int]) -> str:
    data = results["movement"]
    n = int(np.max(data["n_tokens"].values)) if "n_tokens" in data else 0
    tokens = f"{n:,} tokens of " if n else ""
    return _joined(
        f"{tokens}{_part(sizes, 'all')}, read by every model", _unit(data), _checkpoints(results, spec, "movement")
    )


def _checkpoints(results: Results, spec: StudySpec, group: str) -> str:
    models = labels_of(results.get(group), "model")
    counts = [(run.name, sum(model.rpartition("@")[0] == run.name for model in models)) for run in spec.contrasted]
    return listed(f"{count(n, 'checkpoint')} of {run}" for run, n in counts if n)


def _whose(results: Results, spec: StudySpec, _: dict[str, int], *, of_finals: bool = False) -> str:
    data = results["attribution_contrast"]
    models = listed(str(model) for model in np.atleast_1d(data.attrs.get("models", [])))
    decides = str(data.attrs["decided_by"])
    if decides != "final" and not of_finals:
        # such as "at activation shift 0.25 from base, sft as 96% sft@16 and 4% sft@100 and rl as rl@100"
        models = text(data, "comparable", comparison=decides).partition(": ")[2].partition(";")[0] or models
    return _joined(
        "decoder norms of alive features of the two-model dictionaries; no prompts and no decoding",
        _unit(data),
        models or listed(run.name for run in spec.contrasted),
    )


def _attribution(results: Results, _spec: StudySpec, _: dict[str, int]) -> str:
    names = labels_of(results["attribution"], "crosscoder")
    return _joined(f"decoder norms of alive features of {listed(names)}; no prompts and no decoding")


def _dictionary_words(spec: StudySpec) -> str:
    names = spec.primary_crosscoder.names
    return f"dictionary {names[0]}" if len(names) == 1 else f"{len(names)} dictionaries ({names[0]} and its replicates)"


def _when(results: Results, spec: StudySpec, sizes: dict[str, int]) -> str:
    data = results["timing_contrast"]
    return _joined(
        f"features of {_dictionary_words(spec)} that changed equally far",
        f"{_part(sizes, 'all')}, the same text for every model"
        if data.attrs.get("text_mode") == "forced"
        else _part(sizes, "all"),
        _unit(data),
        _checkpoints(results, spec, "stabilization"),
    )


def _all_prompts(results: Results, spec: StudySpec, sizes: dict[str, int], *, group: str) -> str:
    forced = results[group].attrs.get("text_mode") == "forced"
    return _joined(
        f"testable features of dictionary {spec.primary_crosscoder.names[0]}",
        f"{_part(sizes, 'all')}{', the same text for every model' if forced else ''}",
        _unit(results[group]),
        _checkpoints(results, spec, group),
    )


def _which(results: Results, spec: StudySpec, sizes: dict[str, int]) -> str:
    data = results["selection"]
    return _joined(
        f"chosen on {_part(sizes, 'selection of tasks')}, confirmed on {_part(sizes, 'verification of tasks')} of "
        f"{count(int(chooses_features(data).sum()), 'task')}",
        "greedy completions decide who is right",
        _dictionary_words(spec),
        _unit(data),
        f"{data.attrs.get('base', BASE_MODEL)} and {data.attrs.get('target', spec.contrasted[1].name)}",
    )


def _scores(results: Results, spec: StudySpec, sizes: dict[str, int]) -> str:
    data = results["selection"]
    return _joined(
        f"of {_part(sizes, 'selection of tasks')} those that base got wrong and {spec.contrasted[1].name} right",
        "greedy completions",
        f"dictionary {spec.primary_crosscoder.names[0]}",
        f"{data.attrs.get('base', BASE_MODEL)} and {data.attrs.get('target', spec.contrasted[1].name)}",
    )


def _sampled(spec: StudySpec) -> str:
    n, temperature = spec.intervention.n_samples, spec.generation.temperature
    return f"{count(n, 'completion')} a prompt sampled at temperature {temperature:g}"


def _trial_prompts(results: Results) -> str:
    data = results.get("intervention")
    n = {int(number(data, "n_prompts", direction=d)) for d in labels_of(data, "direction")
         if np.isfinite(number(data, "n_prompts", direction=d))}  # fmt: skip
    tasks = [str(task) for task in np.atleast_1d([] if data is None else data.attrs.get("target_tasks", []))]
    of_tasks = f" of {listed(tasks)}" if tasks else ""
    return f"{' and '.join(f'{one:,}' for one in sorted(n)) + ' ' if n else ''}trial prompts{of_tasks}"


def _rl(results: Results, spec: StudySpec) -> str:
    """The final RL model."""
    return final_models(spec, results.get("behaviour")).get(spec.contrasted[1].name, spec.contrasted[1].name)


def _edited(results: Results, spec: StudySpec) -> str:
    return f"{_rl(results, spec)} (disable, lower) and {BASE_MODEL} (amplify, lift)"


def _editing(results: Results, spec: StudySpec, _: dict[str, int]) -> str:
    return _joined(_trial_prompts(results), _sampled(spec), _unit(results["intervention"]), _edited(results, spec))


def _side_effects(results: Results, spec: StudySpec, _: dict[str, int]) -> str:
    data = results["intervention"]
    tasks = [str(task) for task in np.atleast_1d(data.attrs.get("unrelated_tasks", []))]
    neutral = Path(str(data.attrs.get("neutral_text", ""))).name
    return _joined(
        f"trial prompts of {listed(tasks)}" if tasks else "no unrelated task",
        _sampled(spec),
        f"neutral text: {neutral}" if neutral else "",
        _edited(results, spec),
    )


def _balance(results: Results, spec: StudySpec, sizes: dict[str, int]) -> str:
    return _joined(
        _counted(results["control_balance"], "n_sets", "matched random sets, of which a trial may need fewer"),
        f"edit norms over tokens of {_trial_prompts(results)}",
        f"firing and energy over those of {_part(sizes, 'all')} in {BASE_MODEL} and {_rl(results, spec)}",
        f"dictionary {spec.primary_crosscoder.names[0]}",
    )


def _tokens(results: Results, spec: StudySpec, _: dict[str, int]) -> str:
    data = results["tokens"]
    return _joined(
        f"{_counted(data, 'n_tokens', 'tokens')} of selection and verification prompts in {_rl(results, spec)}",
        f"injected into {_counted(data, 'n_texts', 'unrelated texts')}",
        _unit(data),
    )


def _health(results: Results, spec: StudySpec, sizes: dict[str, int]) -> str:
    corpora = {one.name: one.corpus for one in spec.crosscoders if one.corpus is not None}
    trained = f"; {listed(corpora)} trained on another corpus" if corpora else ""
    measured = results["health"].get("n_tokens_model")
    of_models = "" if measured is None else f"; readouts of single models: {int(measured.max()):,} tokens"
    return _joined(f"tokens of {_part(sizes, 'all')} and of completions, as stored{trained}{of_models}")


def _copying(results: Results, spec: StudySpec, _: dict[str, int]) -> str:
    return _joined(_trial_prompts(results), _sampled(spec), _unit(results["mediated_share"]), _edited(results, spec))


def _dictionaries(results: Results, spec: StudySpec, sizes: dict[str, int]) -> str:
    data = results["replicability"]
    split = str(data.attrs.get("split", "verification"))
    prompts = _counted(data, "n_prompts", f"{split} prompts") if "n_prompts" in data.attrs else _part(sizes, split)
    return _joined(f"features and {prompts}", _dictionary_words(spec), _models(results, spec, "replicability"))
