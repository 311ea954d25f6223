"""Sampling one token a row so that the last bits of the logits hardly ever decide which."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.toolkit.counter_random import GOLDEN_GAMMA, MIX_1, MIX_2

NUCLEUS_CANDIDATES: Final = 256
"""Most likely tokens among which a nucleus is looked for before the whole vocabulary is sorted."""
IN_CACHE: Final = 2**14
"""Hashes computed at once on a CPU: as many as its cache holds; fewer cost more in calls."""


def draw_tokens(logits: Tensor, keys: NDArray[np.uint64], *, temperature: float, top_p: float) -> Tensor:
    """Draws from softmax(logits / temperature), cut to its nucleus, by the Gumbel-max trick.

    Parameters
    ----------
    logits
        [row, vocabulary].
    keys
        [row] random bits; the noise of a token is a hash of its row's key and its id.
    temperature
        Positive; 1 leaves the model's distribution.
    top_p
        Keep the fewest most likely tokens whose mass reaches this, and all that are as likely as the last of them
        (arXiv 1904.09751, section 3.1); 1 keeps all.

    Returns
    -------
    Tensor [row] int64
        Token ids; a token of probability zero is never drawn.

    Notes
    -----
    argmax_i(l_i / T + g_i) with independent standard Gumbel numbers g_i is distributed as softmax(l / T). Which token
    that is changes only where two sums are as close as the logits' error, whereas an inverse-CDF draw adds up the
    probabilities of all tokens before, and with them their errors. Two models or arms with the same keys draw the same
    token unless their distributions differ where it matters.
    """
    scores = logits.float() / temperature
    hashed = torch.from_numpy(keys.view(np.int64)).to(logits.device)
    if top_p < 1.0:
        return _draw_from_nucleus(scores, hashed, top_p)
    tokens = torch.arange(scores.shape[1], device=scores.device)
    n = max(1, IN_CACHE // len(tokens)) if scores.device.type == "cpu" else max(len(scores), 1)
    parts = zip(torch.split(scores, n), torch.split(hashed, n), strict=True)
    return torch.cat([(some + gumbel_noise(keys_of_some, tokens)).argmax(dim=-1) for some, keys_of_some in parts])


def _draw_from_nucleus(scores: Tensor, keys: Tensor, top_p: float) -> Tensor:
    """Among the candidates, and among all tokens in rows whose nucleus may be larger."""
    total = scores.logsumexp(dim=-1, keepdim=True)
    values, tokens = scores.topk(min(NUCLEUS_CANDIDATES, scores.shape[1]), dim=-1)
    smallest = _smallest_kept(values, total, top_p)
    drawn = tokens.gather(1, _best(values, tokens, keys, smallest))
    # a token outside the candidates may be kept as well, unless the last candidate is not
    wide = (smallest <= values[:, -1:]).squeeze(1) & (values.shape[1] < scores.shape[1])
    if wide.any():
        ordered = scores[wide].sort(dim=-1, descending=True).values
        smallest = _smallest_kept(ordered, total[wide], top_p)
        all_tokens = torch.arange(scores.shape[1], device=scores.device)
        drawn[wide] = _best(scores[wide], all_tokens, keys[wide], smallest)
    return drawn.squeeze(1)


def _smallest_kept(ordered: Tensor, total: Tensor, top_p: float) -> Tensor:
    """[row, 1] the smallest score in the nucleus, of scores in descending order and the log of the sum of all."""
    mass = (ordered - total).exp()
    kept = (mass.cumsum(dim=-1) - mass < top_p).sum(dim=-1, keepdim=True)
    return ordered.gather(1, (kept - 1).clamp_min(0))


def _best(scores: Tensor, tokens: Tensor, keys: Tensor, smallest: Tensor) -> Tensor:
    """[row, 1] place of the highest noisy score among those that are not below ``smallest``."""
    noisy = scores + gumbel_noise(keys, tokens)
    return noisy.masked_fill(scores < smallest, -torch.inf).argmax(dim=-1, keepdim=True)


def gumbel_noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel numbers [row, token], float32: a hash of each row's key and each token's id.

    Parameters
    ----------
    keys
        [row] int64, random bits.
    tokens
        [token] or [row, token] int64.

    Notes
    -----
    Output ``token`` of the SplitMix64 stream that begins at the key (see :mod:`counter_random`), in the wrapping int64
    arithmetic that every device has. g = -log(E) with E = -log(1 - v): v comes from 63 bits, and is most precise near
    0, where large g come from.
    """
    z = tokens * _signed(GOLDEN_GAMMA) + (keys + _signed(GOLDEN_GAMMA))[:, None]
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, None)):
        z ^= (z >> shift) & (2 ** (64 - shift) - 1)  # the shift of an int64 copies the sign
        if factor is not None:
            z *= _signed(factor)
    v = ((z & (2**63 - 1)).float() + 0.5) * 2.0**-63
    return v.clamp_max_(1.0 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _signed(number: np.uint64) -> int:
    """The int64 of the same bits."""
    return int(number.astype(np.int64))
