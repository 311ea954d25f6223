"""Feature dashboards: the texts in which a feature fires and the tokens it promotes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow.parquet as pq

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.stores.atomic import explain_damage
from rlgen_stats.stores.folder import StudyFolder, study_folder

PEAK: Final = ("⟦", "⟧")
"""Marks around the peak token in a context's text."""


def read_contexts(
    study: StudyFolder | Path | str, crosscoder: str, features: Iterable[int] | None = None
) -> pd.DataFrame:
    """Contexts in which features fire, in base and the contrasted runs' last checkpoints.

    Parameters
    ----------
    study
        Study folder, or one of its stores.
    crosscoder
        Name of the study's primary crosscoder.
    features
        Feature ids; default all. Dead features have no rows.

    Returns
    -------
    DataFrame
        One row per feature, model, kind and rank: ``feature, model, kind, rank, quantile, prompt, task, source,
        segment, position, token, activation, text`` and ``activation:MODEL`` at the same token in every contrasted
        model, all activations in contribution scale f ||d||. Kind ``top``: the prompts with the largest activation
        of that model, each at its peak over all texts that answer it, rank 1 first. Kind ``quantile``: of a random
        sample of the tokens on which the feature fires in that model, those nearest to the ``quantile`` named.
        ``text`` is the window around the token, which stands between ⟦ and ⟧.

    Raises
    ------
    StoreError
        If no contexts were written.
    """
    return _read(study_folder(study).contexts(crosscoder), features, by=["feature", "model", "kind", "rank"])


def read_logits(
    study: StudyFolder | Path | str, crosscoder: str, features: Iterable[int] | None = None
) -> pd.DataFrame:
    """Tokens that features promote and suppress through the unembedding (logit lens of the decoder direction).

    Parameters
    ----------
    study, crosscoder, features
        As in :func:`read_contexts`.

    Returns
    -------
    DataFrame
        One row per feature, model (view), sign (+1 promoted, -1 suppressed) and rank: ``feature, model, sign, rank,
        token, effect``. The effect is the change of the token's logit, relative to the mean over the vocabulary, per
        unit of contribution; the direct path only.

    Raises
    ------
    StoreError
        If no logits were written.
    """
    return _read(study_folder(study).logits(crosscoder), features, by=["feature", "model", "sign", "rank"])


def _read(path: Path, features: Iterable[int] | None, *, by: list[str]) -> pd.DataFrame:
    if not path.exists():
        raise StoreError(
            f"expected {path}, which is not there; the encode stage writes it: set summaries.contexts above 0 and run "
            "rlgen-stats encode."
        )
    filters = None if features is None else [("feature", "in", [int(k) for k in features])]
    with explain_damage(path):
        table: pd.DataFrame = pq.read_table(path, filters=filters).to_pandas()
    return table.sort_values(by, kind="stable", ignore_index=True)
