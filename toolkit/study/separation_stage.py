"""The separation stage: raw activations beside the selected features, which are no news where raw ones do better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import ARM, CHANNEL, MODEL, PROMPT, PROMPT_LABELS, RUN, SPLIT, STEP, TASK
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.stores import open_activations, open_features, open_outcomes, open_results, write_results
from rlgen_stats.toolkit.crosscoder.uses.encode import BLOCK_TOKENS, Prompts
from rlgen_stats.toolkit.extraction import site_name, usable_tokens
from rlgen_stats.toolkit.progress import Progress
from rlgen_stats.toolkit.statistics import mean_shift, model_separation
from rlgen_stats.toolkit.study.stage_graph import Study
from rlgen_stats.toolkit.study.statistics_stages import clusters_of


def separation(study: Study, key: str, progress: Progress) -> dict[str, Any]:
    """Raw activations, their mean shift, selected and random features: how well each tells the target from base."""
    spec, folder, settings = study.spec, study.folder, study.spec.statistics
    features, selection = open_features(folder.features), open_results(folder.results, "selection").load()
    models = [str(model) for model in features[MODEL].values]
    prompts = Prompts(folder.activations, usable_tokens(spec, folder, "summary"))
    means = prompt_means(folder.activations, site_name(spec.extraction.layer), models, prompts)
    means = means.assign_coords({name: features[name] for name in (RUN, STEP, ARM)})
    seed, clusters = derive_seed(spec.seed, "separation"), clusters_of(features)
    probed = model_separation(
        means,
        features,
        open_outcomes(folder.outcomes),
        selection,
        min_discordant=spec.selection.min_discordant,
        alpha=settings.alpha,
        seed=seed,
        progress=progress,
    )
    used = selection[TASK].values.astype(np.str_)[np.asarray(selection["used"].values, dtype=bool)]
    inside = (means[SPLIT].values == "verification") & np.isin(means[TASK].values, used)
    shift = mean_shift(means.isel({PROMPT: np.flatnonzero(inside)}), clusters=clusters, alpha=settings.alpha, seed=seed)
    result = probed.merge(shift.rename(n="n_shift"), combine_attrs="override")
    write_results(folder.results, "separation", result, provenance=study.provenance("separation", key))
    return {"auc": dict(zip(probed["predictor"].values.tolist(), probed["auc"].values[0].tolist(), strict=True))}


def prompt_means(path: Path, site: str, models: Sequence[str], prompts: Prompts) -> xr.Dataset:
    """Mean raw activation of each prompt's summarised tokens, ``activation[model, prompt, channel]`` float64, lazily.

    Parameters
    ----------
    path, site
        Activation store and site.
    models
        Model ids of one width.
    prompts
        Which prompt each token belongs to; tokens that no summary averages over are left out.

    Notes
    -----
    One dask chunk a model, read in blocks of tokens: memory is that of a block and of one model's means. NaN for
    prompts without tokens.
    """
    parts = []
    for model in models:
        activation = open_activations(path, models=[model], site=site)["activation"][0]
        shape = (len(prompts.labels), activation.sizes[CHANNEL])
        parts.append(da.from_delayed(dask.delayed(_means)(activation, prompts), shape, dtype=np.float64))
    labels = {name: (PROMPT, prompts.labels[name].to_numpy(np.str_)) for name in (PROMPT, *PROMPT_LABELS)}
    return xr.Dataset(
        {"activation": ((MODEL, PROMPT, CHANNEL), da.stack(parts))},
        coords={MODEL: (MODEL, np.array(list(models), dtype=np.str_)), **labels},
    )


def _means(activation: xr.DataArray, prompts: Prompts) -> NDArray[np.float64]:
    total = np.zeros((len(prompts.labels), activation.sizes[CHANNEL]))
    n = np.zeros(len(total))
    for start in range(0, len(prompts), BLOCK_TOKENS):
        code = prompts.codes(start, start + BLOCK_TOKENS)
        kept = np.flatnonzero(code >= 0)
        if not len(kept):
            continue
        kept = kept[np.argsort(code[kept], kind="stable")]
        rows, first = np.unique(code[kept], return_index=True)
        block = np.asarray(activation[start : start + BLOCK_TOKENS].values)[kept].astype(np.float64)
        total[rows] += np.add.reduceat(block, first, axis=0)
        n += np.bincount(code[kept], minlength=len(n))
    return total / np.where(n == 0, np.nan, n)[:, None]
