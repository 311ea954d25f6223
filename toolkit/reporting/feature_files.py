"""A study's features for other tools: one table of all of them, and the JSON of SAEDashboard that Neuronpedia takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, FEATURE, MODEL, PROMPT
from rlgen_stats.schemas.errors import InputError, StageError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_features, read_contexts, read_logits, replacing
from rlgen_stats.toolkit.reporting.csv_tables import flat
from rlgen_stats.toolkit.reporting.feature_cards import split_peak
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of

FORMATS: Final = ("parquet", "neuronpedia")
TABLE: Final = "features.parquet"
PER_BATCH: Final = 128
"""Features a JSON file, as SAEDashboard writes them."""
_TOP: Final = {"bin_min": -1.0, "bin_contains": -1.0}
"""Bin of the strongest activations in SAEDashboard."""
_DRIFT: Final = ("effect_sd", "effect", "effect_low", "effect_high", "d_z", "p_value", "q_value", "call")
_EMPTY: Final = (
    *(f"neuron_alignment_{part}" for part in ("indices", "values", "l1")),
    *(f"correlated_{kind}_{part}" for kind in ("neurons", "features") for part in ("indices", "l1", "pearson")),
    *(f"{kind}_hist_data_bar_{part}" for kind in ("freq", "logits") for part in ("values", "heights")),
    *("decoder_weights_dist", "vector"),
)
"""Fields of SAEDashboard that are not known here."""


def export_features(
    folder: StudyFolder, spec: StudySpec, results: Results, out: Path | str, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write the features of the encoded crosscoder's first dictionary.

    Parameters
    ----------
    folder, spec, results
        The study, encoded, and its results.
    out
        New or empty folder; it appears whole or not at all.
    formats
        ``"parquet"``: :func:`all_features` as features.parquet. ``"neuronpedia"``: a folder a model with
        batch-0.json and so on, see :func:`dashboard_batches`.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    InputError
        If a format is unknown or the folder is not empty.
    StageError
        If the study was not encoded.
    """
    out = Path(out)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"features are written as {', '.join(FORMATS)}, got {unknown[0]!r}; name one of them.")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new folder.")
    if not folder.features.exists():
        raise StageError(f"{folder.features} is missing; run rlgen-stats encode first.")
    summaries = open_features(folder.features)
    with replacing(out) as temporary:
        temporary.mkdir()
        if "parquet" in formats:
            all_features(folder, spec, results, summaries).to_parquet(temporary / TABLE)
        if "neuronpedia" in formats:
            for model in _models(spec, summaries):
                (temporary / model).mkdir()
                for number, batch in enumerate(dashboard_batches(folder, spec, summaries, model)):
                    text = json.dumps(batch, ensure_ascii=False, allow_nan=False)
                    (temporary / model / f"batch-{number}.json").write_text(text, encoding="utf-8")
    return sorted(file for file in out.rglob("*") if file.is_file())


def all_features(folder: StudyFolder, spec: StudySpec, results: Results, summaries: xr.Dataset) -> pd.DataFrame:
    """One row a feature: what selection, attribution and matching say, and of each model what drift and summaries say.

    Returns
    -------
    DataFrame
        ``feature``, the variables of results/selection with one value a feature, ``feature_class``, ``specific_to``,
        ``reappearance``; ``mean:MODEL`` (contribution scale, over prompts) and ``firing:MODEL`` (share of tokens) of
        base and the last checkpoints; of these ``effect_sd:MODEL`` and so on of results/drift; ``promoted:MODEL`` and
        ``suppressed:MODEL``, tokens strongest first. What was not computed has no column.
    """
    name = spec.primary_crosscoder.name
    table = pd.DataFrame({FEATURE: summaries[FEATURE].values})
    if "selection" in results:
        table = table.merge(flat(results["selection"], (FEATURE,)), on=FEATURE, how="left")
    columns: dict[str, Any] = {}
    for group, variables in (("latent_scaling", ("feature_class", "specific_to")), ("matching", ("reappearance",))):
        if name in labels_of(results.get(group), "crosscoder"):
            one = results[group].sel(crosscoder=name).reindex({FEATURE: table[FEATURE].values})
            columns |= {variable: one[variable].values for variable in variables}
    for model in _models(spec, summaries):
        one = summaries.sel({MODEL: model})
        columns[f"mean:{model}"] = one["mean"].mean(PROMPT).values
        columns[f"firing:{model}"] = _firing(one)
    for model in final_models(spec, results.get("drift")).values():
        one = results["drift"].sel({MODEL: model}).reindex({FEATURE: table[FEATURE].values})
        columns |= {f"{variable}:{model}": one[variable].values for variable in _DRIFT}
    if folder.logits(name).exists():
        logits = read_logits(folder, name)
        for model, sign in [(model, sign) for model in _models(spec, summaries) for sign in (1, -1)]:
            rows = logits[(logits["model"] == model) & (logits["sign"] == sign)]
            tokens = rows.groupby(FEATURE)["token"].agg(list)
            columns[f"{'promoted' if sign > 0 else 'suppressed'}:{model}"] = tokens.reindex(table[FEATURE]).values
    return table.assign(**columns)


def dashboard_batches(
    folder: StudyFolder, spec: StudySpec, summaries: xr.Dataset, model: str
) -> Iterator[dict[str, Any]]:
    """Features of one model as SAEDashboard writes them for Neuronpedia, ``PER_BATCH`` at a time.

    Yields
    ------
    dict
        ``model_id``, ``layer``, ``sae_set``, ``sae_id_suffix`` and ``features``. Of a feature: the share of tokens on
        which it fires, promoted and suppressed tokens with the change of their logits, and its strongest contexts.
        The activation is known at a context's peak alone, so ``tokens`` are the text before it, the peak and the text
        after, with values 0, the activation, 0. Fields that are not known are empty lists.
    """
    name = spec.primary_crosscoder.name
    contexts, logits = (
        read(folder, name) if path.exists() else None
        for read, path in ((read_contexts, folder.contexts(name)), (read_logits, folder.logits(name)))
    )
    top = _by_feature(contexts, model, "kind", "top")
    promoted, suppressed = (_by_feature(logits, model, "sign", sign) for sign in (1, -1))
    one = summaries.sel({MODEL: model})
    firing, n_tokens = _firing(one), one["n_tokens"].values
    block = re.search(r"\d+$", str(summaries.attrs.get("site", "")))
    features = [
        dict.fromkeys(_EMPTY, ())
        | {
            "feature_index": int(feature),
            "frac_nonzero": float(firing[i]),
            **_tokens("pos", promoted.get(int(feature))),
            **_tokens("neg", suppressed.get(int(feature))),
            "n_prompts_total": len(n_tokens),
            "n_tokens_in_prompt": int(n_tokens.max(initial=0)),
            "dataset": spec.name,
            "activations": _activations(top.get(int(feature))),
        }
        for i, feature in enumerate(summaries[FEATURE].values)
    ]
    for start in range(0, len(features), PER_BATCH):
        yield {
            "model_id": model,
            "layer": int(block[0]) if block else 0,
            "sae_set": f"{spec.name}-{name}",
            "sae_id_suffix": None,
            "features": features[start : start + PER_BATCH],
        }


def _models(spec: StudySpec, summaries: xr.Dataset) -> list[str]:
    """Base and the last checkpoint of every run."""
    return [BASE_MODEL, *(model for model in final_models(spec, summaries).values() if model != BASE_MODEL)]


def _firing(one: xr.Dataset) -> np.ndarray:
    """Share of a model's tokens on which each feature fires."""
    share: np.ndarray = one["firing"].weighted(one["n_tokens"]).mean(PROMPT).values
    return np.asarray(np.nan_to_num(share))


def _by_feature(table: pd.DataFrame | None, model: str, column: str, value: Any) -> dict[int, pd.DataFrame]:
    if table is None:
        return {}
    rows = table[(table[MODEL] == model) & (table[column] == value)]
    return {int(str(feature)): part for feature, part in rows.groupby(FEATURE)}


def _tokens(sign: str, rows: pd.DataFrame | None) -> dict[str, list[Any]]:
    tokens: Iterable[Any] = () if rows is None else rows["token"]
    effects: Iterable[Any] = () if rows is None else rows["effect"]
    return {f"{sign}_str": [str(token) for token in tokens], f"{sign}_values": [float(effect) for effect in effects]}


def _activations(rows: pd.DataFrame | None) -> list[dict[str, Any]]:
    if rows is None:
        return []
    strongest = float(rows["activation"].max())
    found = []
    for text, activation in zip(rows["text"], rows["activation"], strict=True):
        parts = split_peak(str(text))
        at = 1 if parts[0] else 0
        values = [0.0, float(activation), 0.0]
        kept = [(part, value) for part, value in zip(parts, values, strict=True) if part]
        tokens = [part for part, _ in kept]
        found.append(
            _TOP
            | {"bin_max": strongest, "tokens": tokens, "values": [v for _, v in kept], "qualifying_token_index": at}
        )
    return found
