"""Completions and grades of a causal trial's arms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import xarray as xr

from rlgen_stats.schemas.dims import PROMPT, PROMPT_LABELS, SAMPLE
from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.stores.folder import StudyFolder

CONDITION: Final = b"rlgen_stats_condition"
"""Key of an arm's name, kind and dose (JSON) in its file."""
SHARED_KINDS: Final = ("unedited", "fresh", "passthrough", "steering", "random_direction")
"""Arms that are the same whatever the set, and so shared by all trials."""
_VARIABLES: Final = {"correct": bool, "n_tokens": np.int64, "format_class": np.str_, "text": np.str_}
_DIVERGENCES: Final = ("kl_to_base", "kl_to_rl", "forced_kl_to_base", "forced_kl_to_rl")


def open_arms(study: StudyFolder | Path | str, direction: str, *, trial: str = "") -> xr.Dataset:
    """Every completion of a causal trial with its grade, as the outcomes of models are: labelled by arm and prompt.

    Parameters
    ----------
    study
        Study folder.
    direction
        ``disable`` (the RL model is edited) or ``amplify`` (base is).
    trial
        Name of a trial beside the study's own, e.g. ``features-12-407``; its arms, and those without a set that all
        trials share.

    Returns
    -------
    Dataset
        ``correct``, ``completion_tokens``, ``format_class``, ``text`` [condition, prompt, sample]; ``kl_to_base``,
        ``kl_to_rl`` [condition, prompt], the divergence of the next-token distribution from the unedited models' where
        the completion begins, in nats, and ``forced_kl_to_base``, ``forced_kl_to_rl`` over whole completions of theirs
        (NaN for arms where they were not measured: the random sets' on completions, parts of sets); coordinates
        ``condition`` with ``kind`` (unedited, fresh, passthrough, set, random, dose, replicate, steering,
        random_direction, lift, part) and ``dose``; ``prompt`` with ``task``, ``domain``, ``split``, ``cluster``;
        ``sample``.

    Raises
    ------
    StoreError
        If no arm has been run.

    Examples
    --------
    >>> arms = open_arms("runs/demo", "disable")  # doctest: +SKIP
    >>> arms.correct.sel(condition=["unedited", "set"]).groupby("task").mean(["prompt", "sample"])  # doctest: +SKIP
    """
    folder = study if isinstance(study, StudyFolder) else StudyFolder(Path(study))
    root = folder.root / "intervention"
    files = {file.stem: file for file in sorted((root / direction).glob("*.parquet"))}
    conditions = {name: _condition(file) for name, file in files.items()}
    if trial:
        files = {name: file for name, file in files.items() if conditions[name]["kind"] in SHARED_KINDS}
        own = {file.stem: file for file in sorted((root / trial / direction).glob("*.parquet"))}
        files |= own
        conditions |= {name: _condition(file) for name, file in own.items()}
    if not files or (trial and not own):
        raise StoreError(f"{root / trial / direction} has no arms; run rlgen-stats intervene.")
    tables = {name: pq.read_table(file).to_pandas() for name, file in files.items()}
    first = next(iter(tables.values()))
    samples = first[SAMPLE].unique()
    prompts = first[PROMPT].to_numpy()[: len(first) // len(samples)]
    shape = (len(samples), len(prompts))
    data = {
        name: np.stack([table[name].to_numpy().astype(kind).reshape(shape).T for table in tables.values()])
        for name, kind in _VARIABLES.items()
    }
    data["completion_tokens"] = data.pop("n_tokens")
    coords: dict[str, Any] = {
        "condition": list(tables),
        "kind": ("condition", [str(conditions[name]["kind"]) for name in tables]),
        "dose": ("condition", [float(conditions[name]["dose"]) for name in tables]),
        PROMPT: prompts.astype(np.str_),
        SAMPLE: samples,
    }
    coords |= {name: (PROMPT, first[name].to_numpy(np.str_)[: len(prompts)]) for name in PROMPT_LABELS}
    dims = ("condition", PROMPT, SAMPLE)
    found = xr.Dataset({name: (dims, values) for name, values in data.items()}, coords=coords)
    unmeasured = np.full(len(prompts), np.nan)
    for name in _DIVERGENCES:  # of a prompt: the same beside each of its samples
        rows = [table[name].to_numpy()[: len(prompts)] if name in table else unmeasured for table in tables.values()]
        found[name] = (("condition", PROMPT), np.stack(rows))
    return found


def _condition(file: Path) -> dict[str, Any]:
    stored = (pq.read_schema(file).metadata or {}).get(CONDITION)
    return {"kind": "", "dose": float("nan")} if stored is None else dict(json.loads(stored))
