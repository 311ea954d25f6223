"""Activations of a base model and two checkpoints of a run, synthesised from features whose drift is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from rlgen_stats.schemas.study import CrosscoderSpec, Readout
from rlgen_stats.toolkit.crosscoder import ArrayReader, Crosscoder, train_crosscoder
from rlgen_stats.toolkit.crosscoder.uses.encode import contribution_scale
from rlgen_stats.toolkit.statistics.core.feature_blocks import DEFAULT_MIN_FIRING

MODELS: Final = ("base@0", "rl@1", "rl@2")
"""Checkpoint 1 is half way; it is encoded, and never trained on."""
VIEWS: Final = ("base@0", "rl@2")
N_TOKENS: Final = 24
"""Tokens of a prompt."""
SHARES: Final = {"stronger": 0.08, "weaker": 0.08, "new": 0.08, "rotated": 0.08}
"""Share of the planted features of each kind; the others are unchanged."""
FACTOR: Final = {"stronger": 1.6, "weaker": 0.4}
"""Final strength over that in base."""
ANGLE: Final = 0.8
"""Radians by which the direction of a rotated feature turns."""
NOISE: Final = 0.05
"""Standard deviation of each model's own noise in a channel, beside features of strength 1 to 2."""
JITTER: Final = 0.05
"""Length of the random step by which every direction differs between base and the final checkpoint."""
LEAST_COSINE: Final = 0.8
"""Cosine of decoder and planted direction from which a planted feature counts as found."""


@dataclass(frozen=True)
class DriftWorld:
    """Planted features in three models."""

    direction: NDArray[np.float64]
    """[model, feature, channel], unit vectors."""
    strength: NDArray[np.float64]
    """[model, feature], relative to the strength drawn per token."""
    frequency: NDArray[np.float64]
    """[feature]: share of tokens, averaged over prompts."""
    offset: NDArray[np.float64]
    """[model, channel]."""
    kind: NDArray[np.str_]
    """[feature]: a key of ``SHARES``, or unchanged."""

    def draw(self, n_prompts: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Activations [prompt, token, model, channel] and mean planted feature [model, prompt, feature]."""
        random = np.random.default_rng(seed)
        n_features = len(self.kind)
        # Prompts differ in what they are about: a gamma factor of variance one half.
        rate = np.clip(self.frequency * random.gamma(2.0, 0.5, (n_prompts, n_features)), 0.0, 0.9)
        fires = random.random((n_prompts, N_TOKENS, n_features)) < rate[:, None]
        drawn = np.where(fires, random.uniform(1.0, 2.0, fires.shape), 0.0)
        parts = [np.einsum("ptk,kc->ptc", drawn * s, d) for s, d in zip(self.strength, self.direction, strict=True)]
        data = np.stack(parts, axis=2) + self.offset
        data += NOISE * random.normal(size=data.shape)
        means = self.strength[:, None] * drawn.mean(axis=1)
        return data.astype(np.float32), means


def drift_world(n_channels: int, n_features: int, seed: int) -> DriftWorld:
    """More features than channels, in superposition; a third of them change towards the final checkpoint."""
    random = np.random.default_rng([seed, n_channels])
    base = _unit(random.normal(size=(n_features, n_channels)))
    kind = np.full(n_features, "unchanged", dtype="U9")
    order, start = random.permutation(n_features), 0
    for name, share in SHARES.items():
        stop = start + round(share * n_features)
        kind[order[start:stop]], start = name, stop
    angle = np.where(kind == "rotated", ANGLE, 0.0)[:, None]
    aside = random.normal(size=base.shape)
    aside = _unit(aside - (aside * base).sum(axis=1, keepdims=True) * base)
    jitter = JITTER * _unit(random.normal(size=base.shape))
    shift = 0.1 * random.normal(size=n_channels)
    direction, strength, offset = [], [], []
    for part in (0.0, 0.5, 1.0):
        turned = np.cos(part * angle) * base + np.sin(part * angle) * aside + part * jitter
        direction.append(_unit(turned))
        change = [1.0 + part * (FACTOR.get(str(name), 1.0) - 1.0) if name != "new" else part for name in kind]
        strength.append(np.array(change))
        offset.append(part * shift)
    frequency = np.geomspace(0.02, 0.12, n_features)[random.permutation(n_features)]
    return DriftWorld(np.stack(direction), np.stack(strength), frequency, np.stack(offset), kind)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def trained(world: DriftWorld, *, seed: int, steps: int = 1500, n_prompts: int = 2000, **changes: object) -> Crosscoder:
    """A dictionary of base and the final checkpoint, twice as many features as planted."""
    data, _ = world.draw(n_prompts, seed + 1000)
    pair = data[:, :, [0, 2]].reshape(-1, 2, data.shape[-1])
    spec = CrosscoderSpec.model_validate(
        {
            "name": "pair",
            "views": VIEWS,
            "n_features": 2 * len(world.kind),
            "k": max(1, round(float(world.frequency.sum()))),
            "steps": steps,
            "batch_size": 512,
            "learning_rate": 3e-3,
        }
        | changes
    )
    return train_crosscoder(ArrayReader(pair, batch_size=512, seed=seed), spec, views=VIEWS, seed=seed)


def encoded(crosscoder: Crosscoder, data: NDArray[np.float32], readout: Readout = "swap") -> xr.Dataset:
    """Layout ``features`` of activations [prompt, token, model, channel], read one model at a time."""
    n_prompts, n_tokens = data.shape[:2]
    means, firing = [], []
    for m, model in enumerate(MODELS):
        view = VIEWS[0] if m == 0 else VIEWS[1]
        raw = torch.from_numpy(np.ascontiguousarray(data[:, :, m].reshape(-1, data.shape[-1])))
        f = crosscoder.readout(raw, view=view, kind=readout) * contribution_scale(crosscoder, view, readout)
        by_prompt = f.double().numpy().reshape(n_prompts, n_tokens, -1)
        means.append(by_prompt.mean(axis=1))
        firing.append((by_prompt > 0).mean(axis=1))
        assert model in MODELS
    dims = ("model", "prompt", "feature")
    return xr.Dataset(
        {
            "mean": (dims, np.stack(means)),
            "firing": (dims, np.stack(firing)),
            "n_tokens": (dims[:2], np.full((len(MODELS), n_prompts), n_tokens)),
        },
        coords={
            "model": list(MODELS),
            "run": ("model", ["base", "rl", "rl"]),
            "step": ("model", [0, 1, 2]),
            "arm": ("model", ["base", "rl", "rl"]),
            "prompt": [f"p{i:05d}" for i in range(n_prompts)],
        },
        attrs={"scale": "contribution", "readout": readout, "text_mode": "forced"},
    )


def difference_explained(crosscoder: Crosscoder, data: NDArray[np.float32], model: int, readout: Readout) -> float:
    """Share of the variance of a checkpoint's difference from base that the decoded features explain."""
    truth, decoded = [], []
    for m, view in ((0, VIEWS[0]), (model, VIEWS[1])):
        raw = torch.from_numpy(np.ascontiguousarray(data[:, :, m].reshape(-1, data.shape[-1])))
        truth.append(raw.double())
        decoded.append(crosscoder.reconstruct(crosscoder.readout(raw, view=view, kind=readout), view).double())
    true, found = truth[1] - truth[0], decoded[1] - decoded[0]
    return 1.0 - float((true - found).square().sum() / (true - true.mean(dim=0)).square().sum())


def matched(
    world: DriftWorld, crosscoder: Crosscoder, features: xr.Dataset
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Learnt feature of each planted one, one to one, and whether it is close enough; new ones by the final decoder.

    Only learnt features that fire in ``features`` are looked at: others cannot be tested.
    """
    cosines = []
    for view, planted in zip(VIEWS, world.direction[[0, 2]], strict=True):
        learnt = crosscoder.feature_direction(view).double().numpy()
        cosines.append(planted @ _unit(learnt + 1e-12).T)
    cosine = np.where((world.kind == "new")[:, None], cosines[1], cosines[0])
    prompts = (features["firing"].values[[0, 2]] > 0).sum(axis=(0, 1))
    cosine = np.where(prompts >= DEFAULT_MIN_FIRING, cosine, -1.0)
    rows, columns = linear_sum_assignment(-cosine)
    assert np.array_equal(rows, np.arange(len(world.kind)))
    return columns, cosine[rows, columns] >= LEAST_COSINE
