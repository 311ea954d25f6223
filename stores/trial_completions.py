"""Completions and grades of a causal trial's arms: one file an arm, so that a trial that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

from rlgen_stats.schemas.dims import PROMPT, PROMPT_LABELS, SAMPLE
from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.stores.atomic import explain_damage, replacing
from rlgen_stats.stores.folder import StudyFolder, study_folder

CONDITION: Final = b"rlgen_stats_condition"
"""Key of an arm's name, kind and dose (JSON) in its file."""
FEATURELESS_KINDS: Final = ("unedited", "fresh", "steering", "random_direction", "patch")
"""Arms that read no feature: the same whatever the dictionary, and so shared by all trials."""
DICTIONARY_KINDS: Final = ("passthrough", "curve", "curve_random")
"""Arms that are the same whatever the set: shared by all trials with one dictionary."""
_VARIABLES: Final = {"correct": bool, "n_tokens": np.int64, "format_class": np.str_, "text": np.str_}
PROMPT_DIVERGENCES: Final = ("kl_to_base", "kl_to_rl", "forced_kl_to_base", "forced_kl_to_rl")
"""Columns that hold one number a prompt: KL at the first completion position, and over whole forced completions."""
DIVERGENCES: Final = (*PROMPT_DIVERGENCES, "neutral_kl")
"""All divergence columns, NaN where not computed; the one on neutral text is the same in every row of an arm."""
_HASH: Final = b"rlgen_stats_arm"
"""Key of the hash of everything that decides an arm's outcome."""


@dataclass(frozen=True)
class ArmFiles:
    """Where a trial keeps its arms."""

    root: Path
    """intervention/ in the study folder."""
    trial: str = ""
    """Name of a trial beside the study's own; arms that do not depend on the set are shared with it."""
    dictionary: int = 1
    """Number of the dictionary whose features are edited; arms that edit none are shared with the first."""

    def path(self, direction: str, name: str, kind: str) -> Path:
        """File of an arm."""
        return self.folder(kind) / direction / f"{name}.parquet"

    def folder(self, kind: str) -> Path:
        """Folder of the arms of a kind, by direction."""
        if kind in FEATURELESS_KINDS:
            return self.root
        of_dictionary = self.root if self.dictionary == 1 else self.root / f"dictionary-{self.dictionary}"
        return of_dictionary if kind in DICTIONARY_KINDS or not self.trial else of_dictionary / self.trial


def has_arm(path: Path, arm_hash: str) -> bool:
    """Whether a file holds the arm of this hash; another hash means that something about the arm has changed."""
    return path.exists() and _metadata(path).get(_HASH) == arm_hash.encode()


def read_arm(path: Path, arm_hash: str) -> pd.DataFrame | None:
    """Rows of a stored arm, sample after sample; None if the file is missing or holds another arm."""
    return _read(path) if has_arm(path, arm_hash) else None


def write_arm(frame: pd.DataFrame, path: Path, arm_hash: str, condition: Mapping[str, Any]) -> None:
    """Write an arm's rows with its hash and its condition (name, kind, dose), atomically."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    labels = {_HASH: arm_hash.encode(), CONDITION: json.dumps(dict(condition)).encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **labels})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def open_arms(study: StudyFolder | Path | str, direction: str, *, trial: str = "", dictionary: int = 1) -> xr.Dataset:
    """Every completion of a causal trial with its grade, as the outcomes of models are: labelled by arm and prompt.

    Parameters
    ----------
    study
        Study folder, or one of its stores.
    direction
        ``disable`` (the RL model is edited) or ``amplify`` (base is).
    trial
        Name of a trial beside the study's own, e.g. ``features-12-407``; its arms, and those without a set that all
        trials share.
    dictionary
        Number of the dictionary whose features were edited.

    Returns
    -------
    Dataset
        ``correct``, ``completion_tokens``, ``format_class``, ``text`` [condition, prompt, sample]; ``kl_to_base``,
        ``kl_to_rl`` [condition, prompt], the divergence of the next-token distribution from the unedited models' where
        the completion begins, in nats, and ``forced_kl_to_base``, ``forced_kl_to_rl`` over whole completions of theirs
        (NaN for arms where they were not measured: the random sets' on completions, parts of sets, the curve's);
        coordinates ``condition`` with ``kind`` (unedited, fresh, passthrough, set, random, rescaled, dose, steering,
        random_direction, patch, lift, lower, part, curve, lift_random, curve_random) and ``dose``; ``prompt`` with
        ``task``, ``domain``, ``split``, ``cluster``; ``sample``.

    Raises
    ------
    StoreError
        If no arm has been run.

    Examples
    --------
    >>> arms = open_arms("runs/demo", "disable")  # doctest: +SKIP
    >>> arms.correct.sel(condition=["unedited", "set"]).groupby("task").mean(["prompt", "sample"])  # doctest: +SKIP
    """
    where = ArmFiles(study_folder(study).root / "intervention", trial, dictionary)
    files: dict[str, Path] = {}
    for kinds in (FEATURELESS_KINDS, DICTIONARY_KINDS, ("set",)):  # from what is shared most to the trial's own
        found = {file.stem: file for file in sorted((where.folder(kinds[0]) / direction).glob("*.parquet"))}
        own = kinds == ("set",)
        files |= {name: file for name, file in found.items() if own or _condition(file)["kind"] in kinds}
    if not files or not own or not found:
        raise StoreError(f"{where.folder('set') / direction} has no arms; run rlgen-stats intervene.")
    conditions = {name: _condition(file) for name, file in files.items()}
    tables = {name: _read(file) for name, file in files.items()}
    first = next(iter(tables.values()))
    samples = first[SAMPLE].unique()
    prompts = first[PROMPT].to_numpy()[: len(first) // len(samples)]
    # Files hold sample after sample, so that a column is [sample, prompt] row by row.
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
    arms = xr.Dataset({name: (dims, values) for name, values in data.items()}, coords=coords)
    unmeasured = np.full(len(prompts), np.nan)
    for name in PROMPT_DIVERGENCES:  # of a prompt: the same beside each of its samples
        rows = [table[name].to_numpy()[: len(prompts)] if name in table else unmeasured for table in tables.values()]
        arms[name] = (("condition", PROMPT), np.stack(rows))
    return arms


def _condition(file: Path) -> dict[str, Any]:
    stored = _metadata(file).get(CONDITION)
    with explain_damage(file):
        return {"kind": "", "dose": float("nan")} if stored is None else dict(json.loads(stored))


def _metadata(file: Path) -> dict[bytes, bytes]:
    with explain_damage(file):
        return dict(pq.read_schema(file).metadata or {})


def _read(file: Path) -> pd.DataFrame:
    with explain_damage(file):
        table: pd.DataFrame = pq.read_table(file).to_pandas()
    return table
