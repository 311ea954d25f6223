"""What the crosscoder benchmarks share: sizes, activations made from sparse codes, waiting for a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Size:
    """Shapes of a benchmark."""

    views: int
    width: int
    n_features: int
    batch: int
    k: int
    low: bool
    """Whether products run in bfloat16."""
    full: bool

    @property
    def flat(self) -> int:
        return self.views * self.width

    def settings(self, device: torch.device) -> dict[str, Any]:
        """For the report's head line."""
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        return {
            "views": f"{self.views} x {self.width}", "features": self.n_features, "batch": self.batch, "k": self.k,
            "products in": "bfloat16" if self.low else "float32", "on": name,
        }  # fmt: skip


def size_of(options: argparse.Namespace, device: torch.device) -> Size:
    """The size the issue asks for on this kind of device."""
    low = device.type == "cuda"
    views = getattr(options, "views", None) or 3
    if options.quick:
        return Size(views, 16, 512, 64, 8, low, full=False)
    if low:
        return Size(views, 2560, 32_768, 4096, 64, low, full=True)
    return Size(views, 512, 8192, 1024, 32, low, full=True)


def planted(size: Size, *, n_batches: int = 8) -> NDArray[np.float32]:
    """Activations [token, view, channel]: about k directions a token, of as many as there are features, and noise."""
    generator = torch.Generator().manual_seed(0)
    n_tokens, n_directions = n_batches * size.batch, size.n_features
    directions = torch.randn(n_directions, size.flat, generator=generator)
    which = torch.randint(n_directions, (n_tokens, size.k), generator=generator)
    strength = torch.rand(n_tokens, size.k, generator=generator) + 0.5
    offsets = torch.arange(0, which.numel(), size.k)
    mixed = torch.nn.functional.embedding_bag(
        which.ravel(), directions, offsets, mode="sum", per_sample_weights=strength.ravel()
    )
    mixed += 0.1 * torch.randn(mixed.shape, generator=generator)
    return mixed.view(n_tokens, size.views, size.width).numpy()


def synchronised(run: Callable[[], None], device: torch.device) -> Callable[[Any], None]:
    """``run`` until the device is done."""

    def waited(_: Any) -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return waited
