"""Readout ``fit``: from one model's activations to what the joint code of all views makes of them, by least squares."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder.data.paired import PairedActivations, batches_of, views_of
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder

FIT_TOKENS: Final = 1 << 20
"""Tokens behind the fit: some hundred for each channel of a large model."""
SINGULAR: Final = 1e-12
"""Share of the largest eigenvalue below which a direction of the activations counts as absent: far below what float32
activations resolve, well above the rounding of float64."""


@torch.no_grad()
def fit_readout(crosscoder: Crosscoder, reader: PairedActivations, *, max_tokens: int = FIT_TOKENS) -> Crosscoder:
    """Fit the readout ``fit`` of a crosscoder: the linear map that best gives the joint pre-activation from one model.

    Minimises sum_m sum_t |a_mt W + b - pre_t|^2 over W and b, with m the views, t the tokens and pre_t the joint
    pre-activation of all views. One map for all models, so that equal activations give equal features.

    Parameters
    ----------
    crosscoder
        Trained or imported, its views of one width.
    reader
        Raw activations of its views.
    max_tokens
        All tokens are read, or a shuffled sample of about this many.

    Returns
    -------
    Crosscoder
        The same object, with ``fit_weight`` and ``fit_bias``; ``save`` keeps them.

    Raises
    ------
    InputError
        If the views differ in width, or an activation is not finite.

    Notes
    -----
    pre_t is linear in the views' activations, so first and second moments suffice: one pass, sums in float64 about the
    first batch's means, memory of d (V + 1) d numbers for V views of d channels. Where some direction never varies, a
    ridge of ``SINGULAR`` times the largest eigenvalue is added.
    """
    if len(set(crosscoder.widths)) > 1:
        raise InputError(
            f"readout 'fit' maps every model alike, but the views of crosscoder {crosscoder.name!r} have the widths "
            f"{list(crosscoder.widths)}; use readout 'own'."
        )
    n_views, width = len(crosscoder.views), crosscoder.width
    encoder = (crosscoder.encoder_matrix * crosscoder.channel_scale()[:, None]).double()
    shift: torch.Tensor | None = None
    n_tokens, total = 0, encoder.new_zeros(n_views, width)
    own, joint = encoder.new_zeros(width, width), encoder.new_zeros(width, n_views * width)
    for batch in batches_of(reader, max_tokens=max_tokens):
        raw = torch.from_numpy(np.stack(views_of(batch), axis=1)).to(encoder.device).double()
        shift = raw.mean(dim=0) if shift is None else shift
        x = raw - shift
        n_tokens, total = n_tokens + len(x), total + x.sum(dim=0)
        own += x.flatten(0, 1).T @ x.flatten(0, 1)
        joint += x.sum(dim=1).T @ x.flatten(1)
    if shift is None or not bool(torch.isfinite(own).all()):
        raise InputError(
            f"readout 'fit' needs finite activations of {', '.join(crosscoder.views)}; the {n_tokens} tokens "
            "given hold others, or there are none."
        )
    about = total / n_tokens  # of the views' means about the first batch's
    mean = shift + about
    pooled = mean.mean(dim=0)
    spread = mean - pooled
    own += n_tokens * (spread.T @ spread - about.T @ about)
    joint -= n_tokens * torch.outer(about.sum(dim=0), about.flatten())
    eigenvalues = torch.linalg.eigvalsh(own)
    ridge = SINGULAR * float(eigenvalues[-1])
    if float(eigenvalues[0]) < ridge:
        own.diagonal().add_(ridge)
    weight = torch.linalg.solve(own, joint @ encoder)
    pre = crosscoder.encoder_bias.double() + mean.flatten() @ encoder
    crosscoder.fit_weight, crosscoder.fit_bias = weight.float(), (pre - pooled @ weight).float()
    return crosscoder
