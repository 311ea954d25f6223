"""The same features in two dictionaries: one-to-one matches with error rates, and reappearance over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from rlgen_stats.schemas.dims import CHANNEL, FEATURE, MODEL, PROMPT, VIEW
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

CANDIDATES: Final = 10
"""Most similar features of the other dictionary that are candidates for a match (docs/method.md section 2)."""

MATCH_BLOCK: Final = 2048
"""Features per block of the similarity matrix; memory holds two blocks and their product."""

REPLICATE: Final = "replicate"

RANK_VARIANCE: Final = 0.9
"""Share of a dictionary's squared decoder norm that its compared subspace holds."""

Similarity = Literal["decoder", "activation"]


def match_features(
    a: xr.Dataset,
    b: xr.Dataset,
    *,
    by: Similarity = "decoder",
    activations_a: xr.DataArray | None = None,
    activations_b: xr.DataArray | None = None,
    alpha: float = 0.05,
    seed: int = 0,
) -> xr.Dataset:
    """Match the features of dictionary ``a`` one to one with those of ``b``.

    Parameters
    ----------
    a, b
        Decoders ``decoder[view, feature, channel]`` and ``firing[feature]`` of two crosscoders over the same views
        (``toolkit/crosscoder/interop/decoder_dataset.py``): other seeds, other runs, other data. Features that never
        fire or have no decoder are left out.
    by
        ``"decoder"``: cosine of the decoder rows of all views together; needs a common space, so not for layers.
        ``"activation"``: correlation of ``activations_a`` and ``activations_b``; for any two dictionaries.
    activations_a, activations_b
        [prompt, feature] (or [model, prompt, feature], whose models and prompts are then flattened), mean
        activations of the same prompts, preferably prompts that neither dictionary was trained on. With
        ``by="decoder"`` they give independent evidence, ``correlation``.
    alpha
        Level at which ``matched`` is declared.
    seed
        Seed of the decoys.

    Returns
    -------
    xr.Dataset
        Over the features of ``a``: ``match`` (feature of ``b``, -1 for none), ``similarity`` (NaN without a match),
        ``best_similarity`` (of any feature of ``b``, also of one assigned to another feature of ``a``), ``q_value``,
        ``matched`` (q <= alpha), ``correlation`` (NaN where not given or constant), ``flag`` ("" or ``DEAD``).
        Attributes: ``n_compared`` features of a and b, ``expected_false`` among the matched, ``subspace_overlap`` and
        its chance level.

    Raises
    ------
    InputError
        If views, widths, models or prompts differ, or the activations that ``by`` needs are not given.

    Notes
    -----
    Candidates are each feature's ten most similar; among them the one-to-one assignment of largest total similarity.
    q-values compare with decoys that pass through the same search: a dictionary of as many vectors drawn from
    N(0, Sigma), Sigma the second moment of b's unit decoder rows, or (``by="activation"``) b's own activations with
    their prompts permuted. q(s) = (1 + decoys with similarity >= s) / (matches with similarity >= s), made monotone.
    A match says that the other dictionary has this direction or this activity, not that both mean the same concept.

    References
    ----------
    Elias & Gygi (2007), doi:10.1038/nmeth1019 (target-decoy competition); Paulo & Belrose (2025), arXiv:2501.16615
    (dictionaries of several seeds share only some features).

    Examples
    --------
    >>> rows = np.random.default_rng(0).normal(size=(1, 30, 16))
    >>> one = xr.Dataset(
    ...     {"decoder": (("view", "feature", "channel"), rows), "firing": ("feature", np.full(30, 0.1))},
    ...     coords={"view": ["base@0"]},
    ... )
    >>> turned = one.isel(feature=slice(None, None, -1))
    >>> match_features(one, turned)["match"].values[:3].tolist()
    [29, 28, 27]
    """
    _check_pair(a, b, by)
    first, second = _alive(a), _alive(b)
    activity = _activities(a, b, activations_a, activations_b)
    if by == "activation" and activity is None:
        raise InputError("matching by activation needs activations_a= and activations_b= of the same prompts.")
    rng = np.random.default_rng(derive_seed(seed, "match_features"))
    if by == "activation" and activity is not None:
        rows_a, rows_b = activity[0][first], activity[1][second]
        decoys = rows_b[:, rng.permutation(rows_b.shape[1])]
    else:
        rows_a, rows_b = _unit(_decoder_rows(a)[first]), _unit(_decoder_rows(b)[second])
        decoys = _gaussian_decoys(rows_b, rng)
    assigned, similarity, best = _assign(rows_a, rows_b)
    assignment = _Assignment(
        first=first,
        second=second,
        match=assigned,
        similarity=similarity,
        best=best,
        q_value=decoy_q_values(similarity, _assign(rows_a, decoys)[1]),
        activity=None if activity is None else (activity[0][first], activity[1][second]),
    )
    return _match_table(a, b, assignment, by=by, alpha=alpha, seed=seed)


@dataclass(frozen=True, kw_only=True)
class _Assignment:
    """Matches of the compared features of a."""

    first: IntArray
    """Positions of the compared features in a."""
    second: IntArray
    """Positions of the compared features in b."""
    match: IntArray
    """[compared feature of a]: index into ``second``, -1 for none."""
    similarity: FloatArray
    best: FloatArray
    q_value: FloatArray
    activity: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    """Standardised activations of the compared features of a and of b, [feature, unit], if given."""


def _match_table(
    a: xr.Dataset, b: xr.Dataset, assignment: _Assignment, *, by: str, alpha: float, seed: int
) -> xr.Dataset:
    n, first, second = a.sizes[FEATURE], assignment.first, assignment.second
    assigned = assignment.match >= 0
    partner = assignment.match[assigned]
    match = np.full(n, -1, dtype=np.int64)
    match[first[assigned]] = _labels(b)[second[partner]]
    similarity, best, q_value, correlation = np.full((4, n), np.nan)
    similarity[first], best[first], q_value[first] = assignment.similarity, assignment.best, assignment.q_value
    if assignment.activity is not None:
        activity_a, activity_b = assignment.activity
        correlation[first[assigned]] = np.einsum(
            "kp,kp->k", activity_a[assigned], activity_b[partner], dtype=np.float64
        )
        correlation[first[~activity_a.any(axis=1)]] = np.nan
    matched = q_value <= alpha
    overlap, chance = subspace_overlap(a, b) if by == "decoder" else (float("nan"), float("nan"))
    flag = np.full(n, "DEAD", dtype="<U4")
    flag[first] = ""
    return xr.Dataset(
        {
            "match": (FEATURE, match),
            "similarity": (FEATURE, similarity),
            "best_similarity": (FEATURE, best),
            "q_value": (FEATURE, q_value),
            "matched": (FEATURE, matched),
            "correlation": (FEATURE, correlation),
            "flag": (FEATURE, flag),
        },
        coords={FEATURE: _labels(a)},
        attrs={
            "test": "target-decoy competition of one-to-one assigned similarities",
            "null": "decoys with b's covariance" if by == "decoder" else "b's activations on permuted prompts",
            "unit": "feature",
            "by": by,
            "family": "features of the first dictionary that fire",
            "family_size": len(first),
            "seed": seed,
            "alpha": alpha,
            "n_compared": [len(first), len(second)],
            "expected_false": float(np.nanmax(q_value[matched]) * matched.sum()) if matched.any() else 0.0,
            "subspace_overlap": overlap,
            "subspace_overlap_chance": chance,
        },
    )


def _check_pair(a: xr.Dataset, b: xr.Dataset, by: str) -> None:
    if by not in ("decoder", "activation"):
        raise InputError(f"features are matched by 'decoder' or 'activation', got {by!r}.")
    for dictionary in (a, b):
        if "decoder" not in dictionary or "firing" not in dictionary:
            raise InputError("match_features needs decoder[view, feature, channel] and firing[feature] of both.")
    if by == "activation":
        return
    views = [[str(view) for view in dictionary[VIEW].values] for dictionary in (a, b)]
    if views[0] != views[1] or a.sizes[CHANNEL] != b.sizes[CHANNEL]:
        raise InputError(
            f"decoders are compared in one space, but the dictionaries have views {views[0]} of width "
            f"{a.sizes[CHANNEL]} and {views[1]} of width {b.sizes[CHANNEL]}; match them by='activation'."
        )


def _labels(dictionary: xr.Dataset) -> IntArray:
    if FEATURE in dictionary.coords:
        return np.asarray(dictionary[FEATURE].values, dtype=np.int64)
    return np.arange(dictionary.sizes[FEATURE])


def _alive(dictionary: xr.Dataset) -> IntArray:
    """Positions of the features that fire and have a decoder."""
    decoder = dictionary["decoder"]
    has_decoder = np.nan_to_num(decoder.values).any(axis=decoder.get_axis_num((VIEW, CHANNEL)))
    return np.flatnonzero((np.asarray(dictionary["firing"].values) > 0) & has_decoder)


def _decoder_rows(dictionary: xr.Dataset) -> NDArray[np.float32]:
    """[feature, view * channel]."""
    values = np.asarray(dictionary["decoder"].transpose(FEATURE, VIEW, CHANNEL).values, dtype=np.float32)
    return np.nan_to_num(values.reshape(len(values), -1))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0), dtype=np.float32)


def _activities(
    a: xr.Dataset, b: xr.Dataset, activations_a: xr.DataArray | None, activations_b: xr.DataArray | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Centred unit vectors over prompts, so that products are correlations; zero where constant: [feature, unit]."""
    if activations_a is None or activations_b is None:
        return None
    for dim in (PROMPT, MODEL):
        sides = [list(map(str, x[dim].values)) if dim in x.dims else [] for x in (activations_a, activations_b)]
        if sides[0] != sides[1]:
            raise InputError(f"activations_a and activations_b must have the same {dim}s in the same order.")
    activities = []
    for dictionary, values in ((a, activations_a), (b, activations_b)):
        units = [dim for dim in (MODEL, PROMPT) if dim in values.dims]
        rows = np.asarray(values.transpose(FEATURE, *units).values, dtype=np.float64).reshape(values.sizes[FEATURE], -1)
        if len(rows) != dictionary.sizes[FEATURE]:
            raise InputError(
                f"activations of {len(rows)} features were given with {dictionary.sizes[FEATURE]} decoders."
            )
        rows = rows[:, np.isfinite(rows).all(axis=0)] if len(units) else rows
        activities.append(_unit((rows - rows.mean(axis=1, keepdims=True)).astype(np.float32)))
    if activities[0].shape[1] != activities[1].shape[1]:
        raise InputError("activations_a and activations_b are not finite on the same prompts; select those first.")
    return activities[0], activities[1]


def _gaussian_decoys(rows: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """As many unit vectors as ``rows``, Gaussian with their second moment."""
    moment = rows.T @ rows / max(1, len(rows))
    # With fewer features than channels the moment is singular, and has no Cholesky factor without this.
    jitter = 1e-6 * np.trace(moment) / len(moment)
    factor = np.linalg.cholesky(moment.astype(np.float64) + jitter * np.eye(len(moment))).astype(np.float32)
    return _unit(rng.standard_normal(rows.shape, dtype=np.float32) @ factor.T)


def _assign(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[IntArray, FloatArray, FloatArray]:
    """One-to-one assignment of largest total similarity.

    Returns, for each row of ``a``: its row of ``b`` (-1: none is left), their similarity (NaN), and the largest
    similarity with any row of ``b``.
    """
    row, column, value = _candidates(a, b)
    n, m = len(a), len(b)
    # The solver needs a full matching: column m + i stands for "feature i stays alone". Its weight is below that of any
    # candidate, whose similarity (at least -1) is shifted to be positive.
    weights = np.concatenate([value + 2.0, np.full(n, 1e-3)])
    rows, columns = np.concatenate([row, np.arange(n)]), np.concatenate([column, m + np.arange(n)])
    graph = csr_array(coo_array((weights, (rows, columns)), shape=(n, m + n)))
    match = np.full(n, -1, dtype=np.int64)
    similarity = np.full(n, np.nan)
    if n:
        chosen_rows, chosen = min_weight_full_bipartite_matching(graph, maximize=True)
        real = chosen < m
        match[chosen_rows[real]] = chosen[real]
        similarity[match >= 0] = np.einsum("kd,kd->k", a[match >= 0], b[match[match >= 0]], dtype=np.float64)
    best = np.maximum.reduceat(value, np.arange(n) * (len(value) // n)) if n else similarity
    return match, similarity, best


def _candidates(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[IntArray, IntArray, FloatArray]:
    """The ``CANDIDATES`` most similar of b for each of a, as coordinate lists."""
    top = min(CANDIDATES, len(b))
    best_value = np.full((len(a), top), -np.inf, dtype=np.float32)
    best_index = np.zeros((len(a), top), dtype=np.int64)
    for start in range(0, len(a), MATCH_BLOCK):
        rows = slice(start, start + MATCH_BLOCK)
        for first in range(0, len(b), MATCH_BLOCK):
            block = a[rows] @ b[first : first + MATCH_BLOCK].T
            columns = np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)
            value = np.concatenate([best_value[rows], block], axis=1)
            index = np.concatenate([best_index[rows], columns], axis=1)
            keep = np.argpartition(-value, top - 1, axis=1)[:, :top]
            best_value[rows] = np.take_along_axis(value, keep, axis=1)
            best_index[rows] = np.take_along_axis(index, keep, axis=1)
    row = np.repeat(np.arange(len(a)), top)
    return row, best_index.ravel(), best_value.ravel().astype(np.float64)


def decoy_q_values(similarity: FloatArray, decoy: FloatArray) -> FloatArray:
    """q(s) = (1 + decoys >= s) / (targets >= s), made monotone in s and at most 1; NaN where there is no match."""
    q = np.full(len(similarity), np.nan)
    assigned = np.flatnonzero(np.isfinite(similarity))
    order = assigned[np.argsort(-similarity[assigned], kind="stable")]
    values, decoys = similarity[order], np.sort(decoy[np.isfinite(decoy)])
    n_decoys = len(decoys) - np.searchsorted(decoys, values, side="left")
    n_targets = np.searchsorted(-values, -values, side="right")
    rate = np.minimum(1.0, (1 + n_decoys) / n_targets)
    q[order] = np.minimum.accumulate(rate[::-1])[::-1]
    return q


def reappearance(matches: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """How often each feature reappears in dictionaries trained from other seeds.

    Parameters
    ----------
    matches
        Name of the other dictionary -> result of :func:`match_features` of one and the same first dictionary.

    Returns
    -------
    xr.Dataset
        ``match``, ``similarity``, ``best_similarity``, ``q_value``, ``correlation``, ``matched`` [replicate, feature];
        ``reappearance[feature]``, the share of replicates in which the feature is matched, NaN for features that never
        fire; ``subspace_overlap`` and ``subspace_overlap_chance`` [replicate].

    Raises
    ------
    InputError
        If none is given, or they are not about the same features.
    """
    tables = list(matches.values())
    if not tables:
        raise InputError("reappearance needs at least one matched dictionary, got none.")
    if any(not np.array_equal(table[FEATURE].values, tables[0][FEATURE].values) for table in tables):
        raise InputError("the matches are of different first dictionaries; match one dictionary with every other.")
    names = ("match", "similarity", "best_similarity", "q_value", "correlation", "matched")
    out = xr.Dataset(
        {name: ((REPLICATE, FEATURE), np.stack([table[name].values for table in tables])) for name in names},
        coords={REPLICATE: np.array(list(matches), dtype=np.str_), FEATURE: tables[0][FEATURE].values},
        attrs={key: value for key, value in tables[0].attrs.items() if not key.startswith(("sub", "exp", "n_comp"))},
    )
    alive = tables[0]["flag"].values == ""
    share = out["matched"].mean(REPLICATE).values
    out["reappearance"] = (FEATURE, np.where(alive, share, np.nan))
    for name in ("subspace_overlap", "subspace_overlap_chance"):
        out[name] = (REPLICATE, np.array([float(table.attrs[name]) for table in tables]))
    return out


def subspace_overlap(a: xr.Dataset, b: xr.Dataset, *, rank: int | None = None) -> tuple[float, float]:
    """Overlap ||U_a' U_b||_F^2 / r of the leading r directions of two dictionaries, and its chance level.

    Parameters
    ----------
    a, b
        Decoders over the same views.
    rank
        r; default the smaller number of directions that hold ``RANK_VARIANCE`` of the squared decoder norm.

    Returns
    -------
    tuple of float
        Overlap in [0, 1], and r / D, its expectation for random subspaces of the D joint channels.
    """
    spectra = []
    for dictionary in (a, b):
        rows = _decoder_rows(dictionary)[_alive(dictionary)].astype(np.float64)
        values, vectors = np.linalg.eigh(rows.T @ rows)
        spectra.append((values[::-1].clip(min=0), vectors[:, ::-1]))
    if rank is None:
        counts = [int(np.searchsorted(np.cumsum(values) / values.sum(), RANK_VARIANCE)) + 1 for values, _ in spectra]
        rank = min(counts)
    top = [vectors[:, :rank] for _, vectors in spectra]
    return float(np.square(top[0].T @ top[1]).sum() / rank), rank / len(spectra[0][0])
