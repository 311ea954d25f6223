"""Tables of the report: written as CSV, shown in part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Final

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.arm_rows import arms_of
from rlgen_stats.toolkit.reporting.claims.claim import Claim
from rlgen_stats.toolkit.reporting.facts import Fact, families
from rlgen_stats.toolkit.reporting.over_dictionaries import GROUP, pair_rows
from rlgen_stats.toolkit.reporting.population import CLAIM_POPULATION
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of
from rlgen_stats.toolkit.statistics.task_accuracy import DomainAccuracy

TOP_DRIFT: Final = 200
"""Features per model in drift.csv, smallest p first; all of them are in results.zarr/drift."""
_SIMPLE: Final = {
    "behaviour": ("model", "task"),
    "movement": ("model",),
    "attribution_contrast": ("comparison", "tau"),
    "control_balance": ("covariate",),
    "mediated_share": ("direction", "point"),
    "set_stability": ("model",),
    "stabilization": ("model",),
    "timing_contrast": ("measure",),
}
"""Groups written as one table over these dimensions."""


def build_tables(
    results: Results,
    spec: StudySpec,
    *,
    claims: tuple[Claim, ...],
    domains: list[DomainAccuracy],
    facts: list[Fact],
    said_of: Mapping[str, str],
) -> dict[str, pd.DataFrame]:
    """Every table by file name without suffix; analyses that are missing have none.

    ``said_of`` are the populations by analysis: a table of their own, and a column of the claims.
    """
    tables = {
        "claims": claims_frame(claims).assign(
            population=[said_of.get(CLAIM_POPULATION[claim.id], "") for claim in claims]
        ),
        "populations": pd.DataFrame(said_of.items(), columns=["analysis", "population"]),
        "domains": pd.DataFrame([asdict(row) for row in domains]),
        "facts": pd.DataFrame([vars(fact) for fact in facts]),
        "families": pd.DataFrame(families(results)),
    }
    for name, dims in _SIMPLE.items():
        if name in results:
            tables[name] = flat(results[name], dims)
    if "health" in results:
        tables["health"] = flat(results["health"], ("crosscoder",))
        views = flat(results["health"], ("crosscoder", "view")).dropna(subset=["fve"])
        tables["health_views"] = views if "fve_readout" in views else views.assign(fve_readout=math.nan)
        if "dfve" in results["health"]:
            tables["health_models"] = flat(results["health"], ("crosscoder", "model")).dropna(subset=["fve_model"])
    if "attribution_contrast" in results:
        tables["attribution_comparisons"] = flat(results["attribution_contrast"], ("comparison",))
        if "tail_floor" in results["attribution_contrast"]:
            tables["attribution_floors"] = flat(results["attribution_contrast"], ("floor", "tau"))
    if "latent_scaling" in results:
        tables["feature_classes"] = class_counts(results["latent_scaling"])
    if "matching" in results:
        tables["matching"] = matching_summary(results["matching"])
    if GROUP in results:
        tables[GROUP] = pair_rows(results, spec)
    if "drift" in results:
        tables["drift_summary"] = drift_summary(results["drift"])
        tables["drift"] = top_drift(results["drift"], spec)
    if "selection" in results:
        tables["selection"] = selection_frame(results["selection"])
        tables["selection_tasks"] = flat(results["selection"], ("task",))
    if "tokens" in results:
        tables["tokens"] = flat(results["tokens"], ("feature",))
        tables["token_shares"] = flat(results["tokens"], ("explained_by", "feature"))
        tables["token_classes"] = flat(results["tokens"], ("token_class", "feature"))
    if "separation" in results:
        tables["separation"] = flat(results["separation"], ("comparison", "predictor"))
        tables["mean_shift"] = flat(results["separation"], ("model",))
    if "intervention" in results:
        tables["intervention"] = intervention_frame(results["intervention"])
        tables["intervention_tasks"] = flat(results["intervention"], ("direction", "condition", "task")).dropna(
            subset=["task_accuracy"]
        )
    return {name: table for name, table in tables.items() if len(table.columns)}


def claims_frame(claims: tuple[Claim, ...]) -> pd.DataFrame:
    """Claims without their details; caveats in one cell."""
    names = ("id", "statement", "estimate", "low", "high", "p_value", "unit")
    return pd.DataFrame(
        [
            {name: getattr(claim, name) for name in names}
            | {"verdict": claim.verdict.value, "answer": claim.answer, "caveats": " ".join(claim.caveats)}
            | {"paper_figure": claim.paper_figure}
            for claim in claims
        ]
    )


def flat(data: xr.Dataset, dims: tuple[str, ...]) -> pd.DataFrame:
    """Variables with exactly these dimensions, and their labels; one row per combination."""
    names = [str(name) for name, variable in data.data_vars.items() if set(variable.dims) == set(dims)]
    labels = [
        str(name)
        for name, coord in data.coords.items()
        if name not in dims and coord.ndim == 1 and coord.dims[0] in dims and name not in data.dims
    ]
    chosen = data[names].reset_coords(labels) if labels else data[names]
    return chosen.to_dataframe(dim_order=list(dims)).reset_index()[[*dims, *labels, *names]]


def class_counts(scaling: xr.Dataset) -> pd.DataFrame:
    """Features of every crosscoder by class and by the view they are specific to."""
    rows = []
    for i, crosscoder in enumerate(labels_of(scaling, "crosscoder")):
        classes = zip(scaling["feature_class"].values[i], scaling["specific_to"].values[i], strict=True)
        for (name, view), n in sorted(Counter((str(c), str(v)) for c, v in classes if c).items()):
            rows.append({"crosscoder": crosscoder, "class": name, "view": view, "n_features": n})
    return pd.DataFrame(rows)


def matching_summary(matching: xr.Dataset) -> pd.DataFrame:
    """Per other dictionary: matched features, median similarity and correlation, overlap of subspaces."""
    rows = []
    for crosscoder in labels_of(matching, "crosscoder"):
        for replicate in labels_of(matching, "replicate"):
            one = matching.sel(crosscoder=crosscoder, replicate=replicate)
            if not np.isfinite(one["similarity"].values).any():
                continue
            matched = one["matched"].values
            rows.append(
                {
                    "crosscoder": crosscoder,
                    "replicate": replicate,
                    "n_compared": int(np.isfinite(one["q_value"].values).sum()),
                    "n_matched": int(matched.sum()),
                    "median_similarity": float(np.nanmedian(one["similarity"].values)),
                    "median_correlation": float(one["correlation"].where(one["matched"]).median()),
                    "subspace_overlap": float(one["subspace_overlap"]),
                    "subspace_overlap_chance": float(one["subspace_overlap_chance"]),
                }
            )
    return pd.DataFrame(rows)


def drift_summary(drift: xr.Dataset) -> pd.DataFrame:
    """Calls per checkpoint, testable features, and those that differ by no more than the margin as far as is shown."""
    rows = []
    for i, model in enumerate(labels_of(drift, "model")):
        calls, p = drift["call"].values[i].astype(str), drift["p_value"].values[i]
        below = int((drift["flag"].values[i].astype(str) == "below_margin").sum())
        rows.append(
            {"model": model, "n_features": p.size, "n_testable": int(np.isfinite(p).sum())}
            | {call: int((calls == call).sum()) for call in ("DRIFT", "NO_DRIFT", "UNDETERMINED")}
            | {"below_margin": below, "typical_effect": float(drift["typical_effect"].values[i])}
        )
    return pd.DataFrame(rows)


def top_drift(drift: xr.Dataset, spec: StudySpec) -> pd.DataFrame:
    """The features of every final model with the smallest p-values."""
    sizes = ("effect", "effect_low", "effect_high", "effect_sd", "d_z", "firing_change")
    names = (*sizes, "p_value", "q_value", "q_minimum", "p_max_t", "call")
    parts = []
    for model in final_models(spec, drift).values():
        one = drift.sel(model=model)
        order = np.argsort(np.nan_to_num(one["p_value"].values, nan=2.0), kind="stable")[:TOP_DRIFT]
        order = order[np.isfinite(one["p_value"].values[order])]
        parts.append(
            pd.DataFrame(
                {"model": model, "feature": one["feature"].values[order]} | {n: one[n].values[order] for n in names}
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def selection_frame(selection: xr.Dataset) -> pd.DataFrame:
    """Features that are selected, confirmed, candidates or kept by the paper's rule, by rank."""
    table = flat(selection, ("feature",))
    kept = table["selected"] | table["paper_selected"] | table["tier"].isin(["CONFIRMED", "CANDIDATE"])
    return table[kept.to_numpy(bool)].sort_values(["rank", "feature"], ignore_index=True)


def intervention_frame(data: xr.Dataset) -> pd.DataFrame:
    """One row per arm, with the share of completions in every class."""
    classes, rows = labels_of(data, "class"), []
    for direction in labels_of(data, "direction"):
        for arm in arms_of(data, direction):
            values = {name: value for name, value in vars(arm).items() if name != "shares"}
            rows.append(values | {f"share_{c}": float(s) for c, s in zip(classes, arm.shares, strict=True)})
    return pd.DataFrame(rows)
