"""A BatchTopK crosscoder as one would write it: modules, einsum, a dense top-k over the batch, autograd throughout.

The same model, loss, clipping and optimiser as the package's, written independently of it; what crosscoder_learning and
dictionary_learning do is of this kind. Revival of dead features and the running inference threshold are left out, which
favours this side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLIP = 1.0


class PlainCrosscoder(nn.Module):
    """Encoder and decoder [view, channel, feature] and [view, feature, channel]."""

    def __init__(self, views: int, width: int, n_features: int, k: int) -> None:
        super().__init__()
        decoder = torch.randn(views, n_features, width)
        decoder /= decoder.norm(dim=-1, keepdim=True) * 2.5
        self.decoder = nn.Parameter(decoder)
        self.encoder = nn.Parameter(decoder.transpose(1, 2).contiguous().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(n_features))
        self.decoder_bias = nn.Parameter(torch.zeros(views, width))
        self.k = k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, view, channel] -> code [batch, feature] and reconstruction [batch, view, channel]."""
        pre = torch.relu(torch.einsum("bmc,mcf->bf", x, self.encoder) + self.encoder_bias)
        contribution = (pre * self.decoder.norm(dim=-1).sum(dim=0)).flatten()
        top = torch.topk(contribution.detach(), self.k * len(x), sorted=False)
        kept = torch.zeros_like(contribution).scatter_(0, top.indices, 1.0).view_as(pre)
        f = pre * kept
        return f, torch.einsum("bf,mfc->bmc", f, self.decoder) + self.decoder_bias


class PlainTrainer:
    """One training step after the other.

    Parameters
    ----------
    crosscoder
        What is trained.
    learning_rate
        Of Adam.
    low
        Whether matrix products run in bfloat16 (autocast).
    """

    def __init__(self, crosscoder: PlainCrosscoder, learning_rate: float = 1e-4, *, low: bool = False) -> None:
        self.crosscoder, self._low = crosscoder, low
        self._optimiser = torch.optim.Adam(crosscoder.parameters(), lr=learning_rate)

    def step(self, x: Tensor) -> None:
        """[batch, view, channel], normalised."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._low):
            _, back = self.crosscoder(x)
        loss = (back.float() - x).square().sum(dim=(1, 2)).mean()
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.crosscoder.parameters(), CLIP)
        self._optimiser.step()
