"""The replicability stage: what the dictionaries of other seeds agree on, from features up to whole changes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, FEATURE, MODEL, of_dictionary
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.stores import PairedReader, open_by_dictionary, open_results, write_results
from rlgen_stats.stores.study_models import final_model
from rlgen_stats.toolkit.crosscoder import agreement_sums, load_crosscoder
from rlgen_stats.toolkit.extraction import resolve_device, site_name, usable_tokens
from rlgen_stats.toolkit.progress import Progress
from rlgen_stats.toolkit.statistics.core.coordinates import model_coords
from rlgen_stats.toolkit.statistics.replicability import (
    REPLICATE,
    decoded_agreement,
    drift_counts,
    matched_drift,
    set_agreement,
)
from rlgen_stats.toolkit.study.stage_graph import Study
from rlgen_stats.toolkit.study.statistics_stages import features_by_dictionary

BATCH_TOKENS: Final = 4096
"""Tokens per shuffled batch where only a sample of the tokens is read."""
ONE_DICTIONARY: Final = "not estimable: one dictionary"


def replicability(study: Study, key: str, progress: Progress) -> dict[str, Any]:
    """Compare the dictionaries of the primary crosscoder on the final models of the two contrasted runs."""
    spec, folder = study.spec, study.folder
    names = spec.primary_crosscoder.names
    if len(names) < 2:
        progress.log("  one dictionary (replicates: 1): nothing says whether its findings replicate")
        return {"replicability": ONE_DICTIONARY}
    models = [final_model(spec, folder, run.name).model for run in spec.contrasted]
    tests = open_by_dictionary(folder.results, "drift")
    tests = {number: tests[number][["effect", "call"]].sel({MODEL: models}).load() for number in _numbers(names)}
    seed = derive_seed(spec.seed, "replicability")
    parts = [
        decoded_agreement(_sums(study, models, seed)),
        _matched(study, {number: one["effect"] for number, one in tests.items()}, seed),
        _sets(study, models, seed),
        drift_counts({number: one["call"] for number, one in tests.items()}, alpha=spec.statistics.alpha),
    ]
    table = xr.merge(parts, join="exact", compat="no_conflicts", combine_attrs="no_conflicts")
    table["dfve"] = (("dictionary", MODEL), _explained(study, models))
    table = table.assign_coords(model_coords(tests[1], models)).assign_attrs(
        test="agreement of dictionaries trained from other seeds; descriptive",
        null="as many matches, and sets of the same size and firing rates, at random",
        unit="dictionary",
        seed=seed,
        alpha=spec.statistics.alpha,
    )
    write_results(folder.results, "replicability", table, provenance=study.provenance("replicability", key))
    return {"dictionaries": len(names), "matched": table["n_matched"].values.tolist()}


def _numbers(names: tuple[str, ...]) -> range:
    return range(1, len(names) + 1)


def _sums(study: Study, models: list[str], seed: int) -> xr.Dataset:
    """Products of true and decoded changes over the tokens that crosscoders are trained on."""
    spec, folder = study.spec, study.folder
    mask = usable_tokens(spec, folder)
    reader = PairedReader(
        folder.activations,
        [BASE_MODEL, *models],
        site_name(spec.extraction.layer),
        batch_size=min(BATCH_TOKENS, int(mask.sum())),
        seed=seed,
        mask=mask,
    )
    device, primary = resolve_device(spec.device), spec.primary_crosscoder
    dictionaries = [load_crosscoder(folder.crosscoder(name), device=device) for name in primary.names]
    return agreement_sums(dictionaries, reader, reader.models, readout=primary.readout)


def _matched(study: Study, effects: dict[int, xr.DataArray], seed: int) -> xr.Dataset:
    """Drift that matched features of the first dictionary carry."""
    primary, settings = study.spec.primary_crosscoder, study.spec.statistics
    matching = open_results(study.folder.results, "matching")[["match", "matched", "similarity", "reappearance"]]
    matching = matching.sel({"crosscoder": primary.name, REPLICATE: list(primary.names[1:])}).load()
    return matched_drift(matching, effects, top_k=settings.top_k, n_permutations=settings.n_resamples, seed=seed)


def _sets(study: Study, models: list[str], seed: int) -> xr.Dataset:
    """Drift of the selected sets on prompts that did not choose them."""
    chosen = {
        number: open_results(study.folder.results, of_dictionary("selection", number))["selected"].load()
        for number in _numbers(study.spec.primary_crosscoder.names)
    }
    sets = {number: [int(k) for k in one[FEATURE].values[one.values.astype(bool)]] for number, one in chosen.items()}
    features = dict(features_by_dictionary(study))
    return set_agreement(features, sets, models=models, n_min=study.spec.statistics.n_min, seed=seed)


def _explained(study: Study, models: list[str]) -> np.ndarray:
    """Share of each model's change that each dictionary decodes, from its health: NaN where it was not judged."""
    names, health = study.spec.primary_crosscoder.names, open_results(study.folder.results, "health")
    if "dfve" not in health:
        return np.full((len(names), len(models)), np.nan)
    of_models = health["dfve"].sel(crosscoder=list(names)).reindex({MODEL: models})
    return np.asarray(of_models.transpose("crosscoder", MODEL).values, dtype=np.float64)
