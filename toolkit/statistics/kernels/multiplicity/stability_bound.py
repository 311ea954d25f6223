"""Error bounds of stability selection."""

from __future__ import annotations

from typing import Literal

from rlgen_stats.schemas.errors import InputError


def cpss_bound(
    q: float, n_features: int, n_pairs: int, threshold: float, assumption: Literal["none", "unimodal"] | str = "none"
) -> float:
    """Bound on the expected number of low-probability features selected by complementary-pairs stability selection.

    Parameters
    ----------
    q
        Mean number of features chosen per half-sample.
    n_features
        Candidates.
    n_pairs
        Complementary pairs B.
    threshold
        Selection share tau from which a feature is kept, in (1/2, 1].
    assumption
        ``none`` (also Meinshausen and Buhlmann's bound) or ``unimodal``.

    Raises
    ------
    InputError
        If the threshold is not in (1/2, 1], ``q`` not in (0, n_features], or either is out of the unimodal bound's
        range (threshold too close to 1/2, q above n_features / sqrt(3)).

    References
    ----------
    Shah and Samworth 2013, doi:10.1111/j.1467-9868.2011.01034.x, theorem 1 and equation 8.
    """
    if not 0.5 < threshold <= 1:
        raise InputError(f"the threshold must lie in (1/2, 1], got {threshold}.")
    if not 0 < q <= n_features or n_pairs < 1:
        raise InputError(f"expected 0 < q <= {n_features} features and at least one pair, got q={q}, B={n_pairs}.")
    theta = q / n_features
    if assumption == "none":
        return float(theta * q / (2 * threshold - 1))
    if assumption != "unimodal":
        raise InputError(f"assumption must be none or unimodal, got {assumption!r}.")
    if theta > 3**-0.5:
        raise InputError(f"the unimodal bound needs q <= {n_features} / sqrt(3), got {q}; use assumption='none'.")
    least = min(0.5 + theta**2, 0.5 + 1 / (2 * n_pairs) + 0.75 * theta**2)
    if threshold <= least or 2 * threshold - 1 - 1 / (2 * n_pairs) <= 0:
        raise InputError(f"the unimodal bound needs a threshold above {least:.4f}, got {threshold}.")
    if threshold <= 0.75:
        factor = 1 / (2 * (2 * threshold - 1 - 1 / (2 * n_pairs)))
    else:
        factor = 4 * (1 - threshold + 1 / (2 * n_pairs)) / (1 + 1 / n_pairs)
    return float(factor * theta * q)
