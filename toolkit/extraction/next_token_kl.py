"""The Kullback-Leibler divergence of next-token distributions."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis, in nats and in the type of the log-probabilities.

    Parameters
    ----------
    log_p, log_q
        [..., vocabulary] log-probabilities.

    Returns
    -------
    Tensor [...]
        Exact over the vocabulary. Rounding may leave a value slightly below 0 where the distributions are nearly equal.
    """
    p = log_p.exp()
    # 0 log 0 = 0: without the case, a token that p rules out (log p = -inf) would make the sum NaN
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1)
