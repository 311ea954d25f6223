"""Whether features respond to tokens rather than to what a text is about: identity, classes, and injected tokens.

Of published reasoning features most fire once a few of their tokens stand in unrelated text (arXiv:2601.05679).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.units import jackknife_groups, unit_means
from rlgen_stats.toolkit.statistics.kernels import adjust, delete_group_jackknife, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

EXPLAINED_BY: Final = {"token": (0,), "position": (1,), "both": (0, 1)}
"""What predicts an activation: columns of (token id, position)."""
N_FOLDS: Final = 5
"""Folds of whole units: an activation is predicted by a fit to other units."""
N_GROUPS: Final = 20
"""Groups of units that the jackknife leaves out in turn."""
PENALTY: Final = 1.0
"""Ridge penalty in tokens: a token seen once counts half, one seen a hundred times fully."""
CONTINUITY: Final = 0.5
"""Added to each cell of a two by two table, so that an empty one has an odds ratio (Haldane and Anscombe)."""
MIN_COUNT: Final = 5
"""Fewest occurrences of a token for its mean activation to count."""
DETECTS: Final = 0.5
"""A detector's share: of its activation that token and position explain, or of unrelated texts in which it fires on its
tokens and not on others."""


@dataclass(frozen=True, kw_only=True)
class TokenActivations:
    """Features on the stored tokens of one model."""

    activation: FloatArray
    """[token, feature]."""
    token_id: IntArray
    """[token]."""
    position: IntArray
    """[token], from the first token of the completion; negative in the prompt."""
    unit: IntArray
    """[token]: code of the prompt's cluster."""
    classes: Mapping[str, NDArray[np.bool_]]
    """Name of a token class -> [token], which tokens are in it."""


@dataclass(frozen=True, kw_only=True)
class Injections:
    """Largest activation over tokens put into unrelated texts."""

    own: FloatArray
    """[text, feature], of the feature's own leading tokens."""
    matched: FloatArray
    """[text, feature], of as many other tokens of like frequency at the same place."""
    unit: IntArray
    """[text]: code of the text's cluster."""
    tokens: Sequence[Sequence[str]]
    """Leading tokens of each feature, as text."""


def token_detectors(
    tokens: TokenActivations,
    injections: Injections | None,
    features: Sequence[int],
    *,
    alpha: float = 0.05,
    n_min: int = 10,
    seed: int = 0,
) -> xr.Dataset:
    """Say of every feature how far tokens alone explain it, in which classes it fires, and what injected tokens do.

    Parameters
    ----------
    tokens
        Activations of the features.
    injections
        What was measured with the model; None leaves it NaN.
    features
        Ids of the features, in the order of ``tokens`` and ``injections``.
    alpha, n_min
        Level; tokens a class or a feature must have for an odds ratio.
    seed
        Of folds, groups and flips.

    Returns
    -------
    xr.Dataset
        Layout ``tokens``: ``explained`` [explained_by, feature], ``odds_ratio`` [token_class, feature], both with
        intervals; ``injected``, ``injected_matched``, ``injection_p``, ``injection_q``, ``fires_alone`` (by
        injection), ``detector`` (by either), ``leading`` (its tokens) [feature].

    Notes
    -----
    *Explained* is out of fold: 1 - squared error over squared distance from the mean, of a ridge regression on
    indicators of tokens and positions fitted to other units; it is about 0, or a little below, where they say nothing.
    In the sample the same fit explains noise wherever tokens are rare. *Odds ratio*: of firing on a token of the class,
    over all tokens; its p-value is two-sided, its family all classes and features (BH). Intervals and p-values leave
    out groups of whole units in turn, since tokens of a text depend on each other. *Injected*: share of texts in which
    the feature fires on its own leading tokens, and on others of like frequency (``injected_matched``); p is one-sided,
    by sign flips over units (BH). A feature is a *detector* if either share reaches ``DETECTS``: the lower bound of
    what token and position explain, or the difference of both shares of texts at q <= alpha.

    References
    ----------
    Do sparse autoencoders identify reasoning features, arXiv:2601.05679.

    Examples
    --------
    >>> token_detectors(tokens, None, [3, 17])  # doctest: +SKIP
    """
    n = len(features)
    explained = explained_share(tokens, alpha=alpha, seed=seed)
    odds = class_odds(tokens, alpha=alpha, n_min=n_min, seed=seed)
    of_injection = _injection(injections, n, seed)
    by_tokens = explained["explained_low"][list(EXPLAINED_BY).index("both")] >= DETECTS
    excess = of_injection["injected"] - of_injection["injected_matched"]
    by_injection = (excess >= DETECTS) & (of_injection["injection_q"] <= alpha)
    leading = ["" if injections is None else " ".join(injections.tokens[k]) for k in range(n)]
    return xr.Dataset(
        {name: (("explained_by", FEATURE), values) for name, values in explained.items()}
        | {name: (("token_class", FEATURE), values) for name, values in odds.items()}
        | {"n_class_tokens": ("token_class", np.array([int(inside.sum()) for inside in tokens.classes.values()]))}
        | {name: (FEATURE, values) for name, values in of_injection.items()}
        | {"fires_alone": (FEATURE, by_injection), "detector": (FEATURE, by_tokens | by_injection)}
        | {"leading": (FEATURE, np.array(leading, dtype=np.str_))},
        coords={
            "explained_by": list(EXPLAINED_BY),
            "token_class": np.array(list(tokens.classes), dtype=np.str_),
            FEATURE: np.array(list(features), dtype=np.int64),
        },
        attrs={
            "test": "sign flips over texts (injection); delete-group jackknife of log odds ratios (classes)",
            "null": "own tokens fire no more often than matched ones; firing does not depend on the class",
            "unit": "prompt cluster",
            "family": "features (injection); token classes x features (odds ratios); BH each",
            "family_size": int(np.isfinite(odds["odds_p"]).sum()),
            "seed": seed,
            "alpha": alpha,
            "n_tokens": len(tokens.token_id),
            "n_texts": 0 if injections is None else len(injections.unit),
        },
    )


def by_token_only(detectors: xr.Dataset) -> NDArray[np.bool_]:
    """[feature] detectors that need no position: they fire on injected tokens, or the token alone explains enough.

    The others of layout ``tokens`` that are detectors are token-and-position detectors.
    """
    of_token = detectors["explained_low"].sel(explained_by="token").values >= DETECTS
    return np.asarray(detectors["detector"].values & (detectors["fires_alone"].values | of_token), dtype=np.bool_)


def explained_share(tokens: TokenActivations, *, alpha: float, seed: int) -> dict[str, FloatArray]:
    """``explained``, ``explained_low``, ``explained_high`` [explained_by, feature]; see :func:`token_detectors`.

    NaN for a feature that never varies, and with fewer than two units.
    """
    x = np.asarray(tokens.activation, dtype=np.float64)
    columns = np.stack([tokens.token_id, tokens.position], axis=1)
    folds = jackknife_groups(tokens.unit, N_FOLDS, derive_seed(seed, "tokens", "folds"))
    groups = jackknife_groups(tokens.unit, N_GROUPS, derive_seed(seed, "tokens", "groups"))
    shares = np.full((3, len(EXPLAINED_BY), x.shape[1]), np.nan)
    if len(np.unique(folds)) > 1 and x.shape[1]:
        for row, used in enumerate(EXPLAINED_BY.values()):
            error, spread = np.empty_like(x), np.empty_like(x)
            for fold in np.unique(folds):
                inside = folds == fold
                model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), Ridge(alpha=PENALTY, solver="sparse_cg"))
                model.fit(columns[~inside][:, used], x[~inside])
                predicted = model.predict(columns[inside][:, used]).reshape(x[inside].shape)
                error[inside] = np.square(x[inside] - predicted)
                spread[inside] = np.square(x[inside] - x[~inside].mean(axis=0))
            errors, spreads = (
                _without_each([part[groups == g].sum(axis=0) for g in np.unique(groups)]) for part in (error, spread)
            )
            share = np.where(spreads > 0, 1 - errors / np.where(spreads > 0, spreads, 1), np.nan)
            interval = delete_group_jackknife(share[1:], share[0], alpha=alpha)
            shares[:, row] = interval.estimate, interval.low, interval.high
    return dict(zip(("explained", "explained_low", "explained_high"), shares, strict=True))


def class_odds(tokens: TokenActivations, *, alpha: float, n_min: int, seed: int) -> dict[str, FloatArray]:
    """``odds_ratio``, ``odds_low``, ``odds_high``, ``odds_p``, ``odds_q`` [token_class, feature] of firing in a class.

    NaN where the feature fires, or the class or its complement has tokens, fewer than ``n_min`` times.
    """
    fires = (tokens.activation > 0).astype(np.float64)
    members = np.stack([np.asarray(inside, dtype=np.float64) for inside in tokens.classes.values()])
    groups = jackknife_groups(tokens.unit, N_GROUPS, derive_seed(seed, "tokens", "groups"))
    names = ("odds_ratio", "odds_low", "odds_high", "odds_p", "odds_q")
    nan = np.full((len(members), fires.shape[1]), np.nan)
    if len(np.unique(groups)) < 2 or not fires.shape[1]:
        return dict.fromkeys(names, nan)
    by_group = [groups == g for g in np.unique(groups)]
    both = _without_each([members[:, inside] @ fires[inside] for inside in by_group])
    of_class = _without_each([members[:, inside].sum(axis=1, keepdims=True) for inside in by_group])
    firing = _without_each([fires[inside].sum(axis=0, keepdims=True) for inside in by_group])
    n = _without_each([np.full((1, 1), inside.sum()) for inside in by_group])
    cells = (both, of_class - both, firing - both, n - of_class - firing + both)
    logs = [np.log(cell + CONTINUITY) for cell in cells]
    log_ratio = logs[0] - logs[1] - logs[2] + logs[3]
    interval = delete_group_jackknife(log_ratio[1:], log_ratio[0], alpha=alpha)
    t = np.abs(interval.estimate) / np.where(interval.standard_error > 0, interval.standard_error, np.inf)
    enough = (np.minimum(of_class, n - of_class)[0] >= n_min) & (firing[0] >= n_min)
    p = np.where(enough, 2 * stats.t.sf(t, len(by_group) - 1), np.nan)
    ratios = [np.where(enough, np.exp(part), np.nan) for part in (interval.estimate, interval.low, interval.high)]
    return dict(zip(names, (*ratios, p, np.asarray(adjust(p, method="bh"))), strict=True))


def leading_tokens(tokens: TokenActivations, n: int, excluded: Sequence[int] = ()) -> list[list[int]]:
    """Ids of the at most ``n`` tokens with the largest mean activation of each feature, of those seen often enough.

    Parameters
    ----------
    tokens
        Activations.
    n
        Tokens a feature.
    excluded
        Ids that do not count, such as special tokens.
    """
    ids, codes, counts = np.unique(tokens.token_id, return_inverse=True, return_counts=True)
    total = np.zeros((len(ids), tokens.activation.shape[1]))
    np.add.at(total, codes.reshape(-1), tokens.activation)
    mean = total / counts[:, None]
    mean[(counts < MIN_COUNT) | np.isin(ids, excluded)] = 0.0
    order = np.argsort(-mean, axis=0, kind="stable")[:n]
    return [[int(ids[i]) for i in order[:, k] if mean[i, k] > 0] for k in range(mean.shape[1])]


def like_tokens(tokens: TokenActivations, own: Sequence[int], n: int, excluded: Sequence[int] = ()) -> list[list[int]]:
    """For each token of ``own`` the ``n`` nearest to it in log frequency, without ``own`` and excluded ones."""
    ids, counts = np.unique(tokens.token_id, return_counts=True)
    usable = ~np.isin(ids, [*own, *excluded])
    ids, frequency = ids[usable], np.log(counts[usable])
    at = {int(token): np.log(max(int((tokens.token_id == token).sum()), 1)) for token in own}
    return [ids[np.argsort(np.abs(frequency - at[token]), kind="stable")[:n]].tolist() for token in own]


def _injection(injections: Injections | None, n_features: int, seed: int) -> dict[str, FloatArray]:
    """Shares of texts in which features fire on injected tokens, and one-sided p-values of their difference."""
    names = ("injected", "injected_matched", "injection_p", "injection_q")
    if injections is None or not n_features:
        return {name: np.full(n_features, np.nan) for name in names}
    fires = [(part > 0).astype(np.float64) for part in (injections.own, injections.matched)]
    difference = unit_means(fires[0] - fires[1], injections.unit)
    test = sign_flip_test(difference, alternative="greater", seed=derive_seed(seed, "tokens", "injection"))
    p = np.where((difference == 0).all(axis=0), 1.0, np.asarray(test.p_value))
    shares = [part.mean(axis=0) for part in fires]
    return dict(zip(names, (*shares, p, np.asarray(adjust(p, method="bh"))), strict=True))


def _without_each(by_group: Sequence[NDArray[Any]]) -> FloatArray:
    """[1 + group, ...]: the sum over groups, and the same without each of them."""
    parts = np.stack(by_group).astype(np.float64)
    total = parts.sum(axis=0)
    return np.concatenate([total[None], total - parts])
