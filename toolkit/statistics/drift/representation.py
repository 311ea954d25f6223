"""Representation drift: how far all activations moved between two models (CKA, Procrustes, subspaces, shift)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, CHANNEL, MODEL, PROMPT, TOKEN
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.core.coordinates import find_models, model_coords
from rlgen_stats.toolkit.statistics.kernels import delete_group_jackknife
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray

TOKEN_BLOCK: Final = 65536
"""Tokens per block when the activations have no chunks of their own."""

DEFAULT_GROUPS: Final = 20
"""Prompt groups of the delete-group jackknife: enough for a t interval, few enough to keep their d x d sums."""

DEFAULT_RANK: Final = 10
"""Principal directions compared by the subspace overlap."""

MEASURES: Final = ("cka", "procrustes", "subspace_overlap", "activation_shift")


@dataclass(kw_only=True)
class _Sums:
    """Additive sums over tokens from which every measure follows: d x d matrices, d vectors and numbers.

    x is the reference, y the model (less a common origin); x2 = |x|^2 and y2 = |y|^2 of each token.
    """

    n: float
    x: FloatArray
    y: FloatArray
    xx: FloatArray
    yy: FloatArray
    xy: FloatArray
    x2: float
    y2: float
    x2x2: float
    y2y2: float
    x2y2: float
    x2x: FloatArray
    x2y: FloatArray
    y2x: FloatArray
    y2y: FloatArray
    moved: float
    """Of |y - x|^2."""

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


def _sums(x: FloatArray, y: FloatArray) -> _Sums:
    x2, y2 = np.einsum("ij,ij->i", x, x), np.einsum("ij,ij->i", y, y)
    return _Sums(
        n=float(len(x)),
        x=x.sum(0),
        y=y.sum(0),
        xx=x.T @ x,
        yy=y.T @ y,
        xy=x.T @ y,
        x2=x2.sum(),
        y2=y2.sum(),
        x2x2=x2 @ x2,
        y2y2=y2 @ y2,
        x2y2=x2 @ y2,
        x2x=x2 @ x,
        x2y=x2 @ y,
        y2x=y2 @ x,
        y2y=y2 @ y,
        moved=np.square(y - x).sum(),
    )


def representation_drift(
    activations: xr.Dataset,
    *,
    models: Sequence[str],
    reference: str = BASE_MODEL,
    mask: xr.DataArray | NDArray[np.bool_] | None = None,
    rank: int = DEFAULT_RANK,
    n_groups: int = DEFAULT_GROUPS,
    clusters: str | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    progress: Progress = SILENT,
) -> xr.Dataset:
    """How far the activations of each model are from the reference's on the same tokens.

    Parameters
    ----------
    activations
        ``activation[model, token, channel]`` with coordinate ``prompt`` on ``token``, lazy; streamed over token blocks.
    models, reference
        Model ids. A model equal to the reference is allowed (shift 0).
    mask
        Tokens to use (boolean, length token); default all. Pads and attention sinks are the caller's to exclude.
    rank
        Principal directions compared by the subspace overlap (at most the number of channels).
    n_groups
        Groups of prompts for the delete-group jackknife; 0 gives no intervals.
    clusters
        Coordinate on ``token`` whose values stay together in one group, default ``prompt``.
    alpha, seed
        1 - coverage of the intervals, and seed of the groups, which depend on the labels alone.
    progress
        Receiver of progress, in models.

    Returns
    -------
    xr.Dataset
        Over ``model``: ``cka``, ``procrustes``, ``subspace_overlap``, ``activation_shift``, each with ``_low`` and
        ``_high``, and ``n_tokens``. Small; computed at once.

    Raises
    ------
    InputError
        If a model is unknown, the mask has another length or leaves fewer than four tokens, or ``rank`` is below 1.

    Notes
    -----
    With X, Y [token, channel] of reference and model on the same tokens, Xc, Yc centred over tokens:

    - ``activation_shift`` = ||Y - X||_F / ||Xc||_F, the RMS displacement of a token in units of the reference's
      RMS spread about its mean; 0 is no change. Invariant to neither rotation nor translation, on purpose.
    - ``cka``: linear CKA with the unbiased HSIC of Song et al. 2012 (eq. 5), from d x d sums; 1 is equal up to
      rotation, translation and scale; does not rise with the number of channels under independence.
    - ``procrustes`` = sqrt(2 - 2 ||Xc'Yc||_* / (||Xc||_F ||Yc||_F)), in [0, sqrt 2].
    - ``subspace_overlap`` = ||U_x'U_y||_F^2 / r with U the top r principal directions; r/d is chance.

    Intervals: delete-group jackknife over groups of whole prompts with Student t (G-1); descriptive for measures at
    the boundary of their range. Memory: (1 + n_groups) x 3 d^2 numbers for one model at a time.

    References
    ----------
    Song et al. 2012, arXiv:1205.1404; Kornblith et al. 2019, arXiv:1905.00414; Ding et al. 2021, arXiv:2108.01661.

    Examples
    --------
    >>> representation_drift(open_activations(path), models=["sft@60", "rl@80"])  # doctest: +SKIP
    """
    (reference,), models = find_models(activations, [reference]), find_models(activations, models)
    if rank < 1 or n_groups < 0 or n_groups == 1:
        raise InputError(f"rank must be at least 1 and n_groups 0 or at least 2, got {rank} and {n_groups}.")
    keep = _mask(activations, mask)
    groups = _groups(activations, clusters or PROMPT, n_groups, derive_seed(seed, "representation_drift"))
    rank = min(rank, activations.sizes[CHANNEL])
    table = {name: np.full((3, len(models)), np.nan) for name in MEASURES}
    with progress.task("representation drift", total=len(models), unit="model") as task:
        for j, model in enumerate(models):
            per_group = _stream(activations, reference, model, keep, groups, max(n_groups, 1))
            for name, values in _measure_with_intervals(per_group, rank, alpha).items():
                table[name][:, j] = values
            task.advance(1)
    variables = {
        name + suffix: (MODEL, table[name][row])
        for name in MEASURES
        for row, suffix in enumerate(("", "_low", "_high"))
    }
    return xr.Dataset(
        variables | {"n_tokens": (MODEL, np.full(len(models), int(keep.sum()), dtype=np.int64))},
        coords=model_coords(activations, models),
        attrs={
            "reference": reference,
            "unit": f"group of {clusters or PROMPT}s",
            "interval": f"delete-group jackknife, {n_groups} groups, t" if n_groups else "none",
            "alpha": alpha,
            "seed": seed,
            "rank": rank,
            "activation_shift": "||A_model - A_reference||_F / ||A_reference - mean||_F over the masked tokens",
        },
    )


def _mask(activations: xr.Dataset, mask: xr.DataArray | NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    n = activations.sizes[TOKEN]
    keep = np.ones(n, dtype=bool) if mask is None else np.asarray(getattr(mask, "values", mask), dtype=bool)
    if keep.shape != (n,):
        raise InputError(f"mask must have one value per token ({n}), got shape {keep.shape}.")
    if keep.sum() < 4:
        raise InputError(f"the mask leaves {int(keep.sum())} tokens; the unbiased CKA needs at least 4.")
    return keep


def _groups(activations: xr.Dataset, label: str, n_groups: int, seed: int) -> NDArray[np.int64]:
    """Group of every token: whole prompts (or clusters) assigned at random, whatever their order in the store.

    Assigned in order, prompts of tasks that alternate would end up in groups of one task each.
    """
    n = activations.sizes[TOKEN]
    if n_groups == 0:
        return np.zeros(n, dtype=np.int64)
    if label not in activations.coords:
        raise InputError(f"the activations have no label {label!r} on tokens; give it, or n_groups=0.")
    names, codes = np.unique(np.asarray(activations[label].values), return_inverse=True)
    groups: NDArray[np.int64] = stream(seed, 0).permutation(len(names))[codes.reshape(-1)] % n_groups
    return groups


def _stream(
    activations: xr.Dataset,
    reference: str,
    model: str,
    keep: NDArray[np.bool_],
    groups: NDArray[np.int64],
    n_groups: int,
) -> list[_Sums | None]:
    """Sums of each group, reading one token block of the two models at a time."""
    pair = activations["activation"].sel({MODEL: [reference, model]}).transpose(MODEL, TOKEN, CHANNEL)
    sums: list[_Sums | None] = [None] * n_groups
    origin: FloatArray | None = None
    for start, stop in _token_blocks(pair):
        rows = np.flatnonzero(keep[start:stop])
        if not len(rows):
            continue
        block = np.asarray(pair.isel({TOKEN: slice(start, stop)}).values, dtype=np.float64)[:, rows]
        if origin is None:
            # A shift common to all tokens changes no measure, but keeps sums of squares from cancelling.
            origin = block.mean(axis=1)[0]
        block = block - origin
        group_of = groups[start:stop][rows]
        for g in np.unique(group_of):
            block_sums, so_far = _sums(block[0, group_of == g], block[1, group_of == g]), sums[g]
            sums[g] = block_sums if so_far is None else so_far + block_sums
    return sums


def _token_blocks(pair: xr.DataArray) -> Iterator[tuple[int, int]]:
    sizes = pair.chunksizes.get(TOKEN) if pair.chunks is not None else None
    n = pair.sizes[TOKEN]
    edges = np.cumsum([0, *sizes]) if sizes else np.array([*range(0, n, TOKEN_BLOCK), n])
    yield from ((int(a), int(b)) for a, b in pairwise(edges))


def _measure_with_intervals(per_group: list[_Sums | None], rank: int, alpha: float) -> dict[str, FloatArray]:
    """Measure -> (value, low, high)."""
    present = [sums for sums in per_group if sums is not None]
    total = present[0]
    for sums in present[1:]:
        total = total + sums
    value = _measures(total, rank)
    out = {name: np.array([v, np.nan, np.nan]) for name, v in value.items()}
    if len(present) < 2:
        return out
    left_out = [_measures(total - sums, rank) for sums in present]
    for name, v in value.items():
        interval = delete_group_jackknife(np.array([m[name] for m in left_out]), v, alpha=alpha)
        out[name] = np.array([v, interval.low, interval.high])
    return out


def _measures(s: _Sums, rank: int) -> dict[str, float]:
    n = s.n
    cxx = s.xx - np.outer(s.x, s.x) / n
    cyy = s.yy - np.outer(s.y, s.y) / n
    cxy = s.xy - np.outer(s.x, s.y) / n
    spread_x, spread_y = float(np.trace(cxx)), float(np.trace(cyy))
    scale = np.sqrt(spread_x * spread_y)
    nuclear = float(np.linalg.svd(cxy, compute_uv=False).sum())
    top_x = np.linalg.eigh(cxx)[1][:, -rank:]
    top_y = np.linalg.eigh(cyy)[1][:, -rank:]
    return {
        "cka": _cka(s),
        "procrustes": float(np.sqrt(max(0.0, 2 - 2 * nuclear / scale))) if scale > 0 else float("nan"),
        "subspace_overlap": float(np.square(top_x.T @ top_y).sum() / rank),
        "activation_shift": float(np.sqrt(s.moved / spread_x)) if spread_x > 0 else float("nan"),
    }


def _cka(s: _Sums) -> float:
    xy = _hsic(s.n, s.xy, s.x, s.y, s.x2, s.y2, s.x2y2, s.x2y, s.y2x)
    xx = _hsic(s.n, s.xx, s.x, s.x, s.x2, s.x2, s.x2x2, s.x2x, s.x2x)
    yy = _hsic(s.n, s.yy, s.y, s.y, s.y2, s.y2, s.y2y2, s.y2y, s.y2y)
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")


def _hsic(
    n: float,
    xy: FloatArray,
    x: FloatArray,
    y: FloatArray,
    x2: float,
    y2: float,
    x2y2: float,
    x2y: FloatArray,
    y2x: FloatArray,
) -> float:
    """Unbiased HSIC of linear kernels (Song et al. 2012 eq. 5) from sums over tokens.

    With zero-diagonal kernels K, L: tr(KL) = ||X'Y||^2 - sum |x|^2|y|^2; 1'K1 = |sum x|^2 - sum |x|^2;
    1'KL1 = sum_i (x_i'x. - |x_i|^2)(y_i'y. - |y_i|^2).
    """
    trace = np.square(xy).sum() - x2y2
    ones = (x @ x - x2) * (y @ y - y2)
    cross = x @ xy @ y - x2y @ y - y2x @ x + x2y2
    return float((trace + ones / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3)))
