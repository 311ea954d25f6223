"""Whether findings replicate over dictionaries of other seeds: rows, and sentences computed from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.dims import MODEL
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.formatting import DASH, compact, fixed, interval, listed, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, attr_number, final_models, labels_of, number

GROUP: Final = "replicability"
_BY_PAIR: Final = (
    *(f"{part}_{kind}" for part in ("decoded", "error") for kind in ("correlation", "cosine")),
    *(f"set_{kind}{level}" for kind in ("correlation", "within") for level in ("", "_random", "_random_high")),
)
_MATCHED: Final = (
    "n_matched",
    "matched_share",
    *(f"matched_energy{level}" for level in ("", "_random", "_random_high")),
    "top_shared",
    "top_expected",
)
"""Of pairs with the first dictionary; those of close matches are called ``close_...``."""


def pair_rows(results: Results, spec: StudySpec) -> pd.DataFrame:
    """One row a run and pair of dictionaries; matched features in pairs with the first dictionary only."""
    data = results.get(GROUP)
    return pd.DataFrame() if data is None else pairs_of(data, final_models(spec, data))


def pairs_of(data: xr.Dataset, models: Mapping[str, str]) -> pd.DataFrame:
    """The rows of some models, ``run -> model id``."""
    rows: list[dict[str, Any]] = []
    numbers, replicates = [int(n) for n in data["dictionary"].values], labels_of(data, "replicate")
    for run, model in models.items():
        for first, second in itertools.combinations(numbers, 2):
            pair = {"dictionary": first, "other": second, MODEL: model}
            row: dict[str, Any] = {"run": run, **pair}
            row |= {name: number(data, name, **pair) for name in _BY_PAIR}
            replicate = replicates[second - 2] if first == 1 else ""
            for criterion in labels_of(data, "criterion"):
                at = {"criterion": criterion, "replicate": replicate}
                prefix = "" if criterion == "matched" else f"{criterion}_"
                for name in _MATCHED:
                    labels = at | ({MODEL: model} if MODEL in data[name].dims else {})
                    row[f"{prefix}{name.removeprefix('matched_') if prefix else name}"] = number(data, name, **labels)
            for name in ("dfve", "true_correlation", "n_drift"):
                row[name], row[f"other_{name}"] = (
                    number(data, name, dictionary=n, model=model) for n in (first, second)
                )
            rows.append(row)
    return pd.DataFrame(rows)


def why_absent(results: Results, spec: StudySpec) -> str:
    """Why there is nothing to show; empty if there is."""
    if GROUP in results:
        return ""
    if len(spec.primary_crosscoder.names) > 1:
        return f"The analysis ‘{GROUP}’ has not been computed."
    return (
        "This study has one dictionary (replicates: 1), so nothing in it says whether its findings would reappear in a "
        "dictionary trained from another seed."
    )


def sentences(results: Results, spec: StudySpec) -> tuple[str, ...]:
    """What replicates over dictionaries in the RL run, in words and numbers; empty if that was not computed."""
    data, run = results.get(GROUP), spec.contrasted[1].name
    table = pair_rows(results, spec)
    if data is None or table.empty or run not in set(table["run"]):
        return ()
    rows = table[table["run"] == run]
    told = (_matched(data, rows, run), _sets_and_changes(rows), _meaning(rows))
    return tuple(sentence for sentence in told if sentence)


def _matched(data: xr.Dataset, rows: pd.DataFrame, run: str) -> str:
    first = rows[rows["dictionary"] == 1]
    n_features = f"{attr_number(data, 'n_features'):,.0f} features that fire"
    if not first["n_matched"].any():
        return f"None of the first dictionary’s {n_features} has a match in another dictionary."
    others = f"{'dictionaries' if len(first) > 1 else 'dictionary'} {listed(str(n) for n in first['other'])}"
    k, cosine = attr_number(data, "top_k"), attr_number(data, "close_cosine")
    return (
        f"Of the first dictionary’s {n_features}, {_each(first['matched_share'], percent)} have a match in {others} "
        f"that is better than chance, {_each(first['close_share'], percent)} a close one (cosine {cosine:g} or more). "
        f"The close ones carry {_each(first['close_energy'], percent)} of the drift of {run} "
        f"({_each(first['close_energy_random'], percent)} if as many were matched at random{_chance(first)}), and "
        f"{_each(first['top_shared'], fixed)} of its {k:.0f} most changed features have their match among the other’s "
        f"{k:.0f} ({_each(first['top_expected'], fixed, 1)} expected at random)."
    )


def _chance(first: pd.DataFrame) -> str:
    """Whether the drift of close matches exceeds the 95% quantile of its random level."""
    above = first["close_energy"] > first["close_energy_random_high"]
    return ", so more than chance" if above.all() else "" if above.any() else ", within what chance gives"


def _sets_and_changes(rows: pd.DataFrame) -> str:
    sets = "The selected sets cannot be compared, since fewer than two dictionaries have one that drifts"
    if np.isfinite(rows["set_correlation"]).any():
        sets = (
            f"The selected sets’ drift per prompt correlates {span(rows['set_correlation'])} between dictionaries "
            f"(random sets {span(rows['set_correlation_random'])})"
        )
    return (
        f"{sets}; the whole changes that they decode correlate {span(rows['decoded_correlation'])}, the errors that "
        f"these leave {span(rows['error_correlation'])}."
    )


def _meaning(rows: pd.DataFrame) -> str:
    shares = rows["close_share"][rows["dictionary"] == 1]
    if (shares < 0.5).any():
        return "A feature number therefore means something in its own dictionary only."
    return "Most features of the first dictionary have a close counterpart in each of the others."


def counts_note(results: Results, spec: StudySpec) -> str:
    """Features called DRIFT in every dictionary, run by run, and their mean; empty if not computed."""
    data = results.get(GROUP)
    finals = final_models(spec, data)
    if data is None or not finals:
        return ""
    parts = []
    for run, model in finals.items():
        counts = [number(data, "n_drift", dictionary=n, model=model) for n in data["dictionary"].values]
        mean, low, high = (number(data, f"n_drift_{name}", model=model) for name in ("mean", "low", "high"))
        parts.append(f"{run} {_each(counts, fixed)} (mean {compact(mean)}, interval {interval(low, high, 0)})")
    numbers = listed(labels_of(data, "dictionary"))
    return (
        f"Features called DRIFT in dictionaries {numbers}: {'; '.join(parts)}; intervals are over dictionaries. "
        f"Selected: {_each(data['n_set'].values, fixed)}."
    )


def _each(values: Iterable[float], form: Any, digits: int = 0) -> str:
    return listed(form(value, digits) for value in values)


def span(values: Iterable[float]) -> str:
    """Smallest to largest, two decimals; one number where they are the same."""
    known = sorted(value for value in values if np.isfinite(value))
    ends = dict.fromkeys((fixed(known[0], 2), fixed(known[-1], 2))) if known else [DASH]
    return " to ".join(ends)
