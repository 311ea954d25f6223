"""BatchTopK crosscoders of others: crosscoder_learning's own trainer, and one as one would write it.

The latter is modules, einsum, a dense top-k over the batch and autograd throughout: the same model, loss, clipping and
optimiser as the package's, written independently of it. Revival of dead features and the running inference threshold
are left out, which favours it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


def crosscoder_learning(
    checkout: Path, *, views: int, width: int, n_features: int, k: int, step: int, device: torch.device
) -> Callable[[Tensor], object]:
    """One step after the other of ``BatchTopKCrossCoderTrainer``, as it comes.

    Parameters
    ----------
    checkout
        Folder of github.com/science-of-finetuning/crosscoder_learning; needs einops and zstandard.
    step
        The first step, of twice as many: after its warm-ups.
    """
    package = ModuleType("dictionary_learning")  # without its __init__, which imports nnsight
    package.__path__ = [str(checkout / "dictionary_learning")]
    sys.modules["dictionary_learning"] = package
    module = importlib.import_module("dictionary_learning.trainers.crosscoder")
    trainer = module.BatchTopKCrossCoderTrainer(
        steps=2 * step, activation_dim=width, dict_size=n_features, k=k, layer=0, lm_name="", num_layers=views,
        seed=0, device=str(device),
    )  # fmt: skip
    return lambda x: trainer.update(step, x)
