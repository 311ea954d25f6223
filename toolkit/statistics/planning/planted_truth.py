"""The design of a simulated study and its planted truth: which features change, by how much, from which step on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import (
    ARM,
    BASE_MODEL,
    CLUSTER,
    DOMAIN,
    FEATURE,
    MODEL,
    PROMPT,
    SPLIT,
    SPLITS,
    TASK,
    model_id,
)
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray

ARMS: Final = ("sft", "rl")
KINDS: Final = ("null", "dead", "drifting", "generalising", "narrow", "decoy")
"""No change; never fires; changes in both arms; rises in rl in every task, or in domain; follows correctness."""

LEVEL: Final = 4.0
"""Mean of a firing feature in its standard deviations: less than 1 in 10,000 values is cut at zero."""

MODEL_SHARE: Final = 0.3
"""Share of a firing feature's variance that differs between models; the rest is the prompt's, the same in all."""

MAX_SHIFT: Final = 2.0
"""Largest planted change of a firing feature, in its standard deviations: beyond it values would be cut at zero."""

DIFFICULTY_SHARE: Final = 0.6
"""Share of the variance of (latent) correctness that is the prompt's difficulty, common to all models."""

STEPS: Final = 20
"""Training steps between checkpoints."""

SETTLED: Final = {"sft": 0.4, "rl": 1.0}
"""Share of training within which planted changes of an arm are complete: the paper's claim C2."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated study of two arms post-trained from one base; every number in it follows from the seed.

    Raises
    ------
    InputError
        If a setting is out of range, shares add up to more than 1, or the effect is too large for the density.
    """

    n_prompts: int = 400
    n_features: int = 2048
    drifting: float = 0.1
    """Share of features that change in both arms, by the same amount, in either direction."""
    generalising: float = 0.02
    """Share of features that rise in ``rl`` only, in every task (RL-specific and task-agnostic)."""
    narrow: float = 0.01
    """Share of features that rise in ``rl`` only, in domain only."""
    decoys: float = 0.02
    """Share of features that correlate with correctness, in every model alike: no model difference of their own."""
    dead: float = 0.1
    """Share of features that never fire."""
    effect: float = 0.3
    """d_z (mean / sd of the paired difference over prompts) of every planted change at the last checkpoint."""
    outcome_correlation: float = 0.2
    """Correlation of a firing decoy with correctness, within one model."""
    density: float = 0.25
    """Share of prompts (of clusters) on which a feature that is not dead fires."""
    icc: float = 0.1
    """Intraclass correlation of noise within a cluster of prompts; prompts of a cluster fire together."""
    cluster_size: int = 4
    correlation: float = 0.3
    """Correlation of noise between the firing features of a group."""
    group: int = 32
    """Neighbouring features that are correlated."""
    runs: int = 2
    """Runs per arm."""
    run_sd: float = 0.05
    """Standard deviation between runs of a planted d_z."""
    checkpoints: int = 5
    tasks_in: int = 1
    tasks_out: int = 3
    accuracy: float = 0.4
    """Accuracy of base."""
    gain: float = 0.2
    """Accuracy gained at the last checkpoint: ``sft`` in domain, ``rl`` everywhere."""
    samples: int = 4
    """Graded completions per model and prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.drifting, self.generalising, self.narrow, self.decoys, self.dead)
        sizes = ("n_prompts", "n_features", "cluster_size", "group", "runs", "checkpoints", "tasks_in", "samples")
        small = [name for name in sizes if getattr(self, name) < 1]
        if small or self.tasks_out < 0:
            raise InputError(f"{small[0] if small else 'tasks_out'} is too small; expected at least 1 (tasks_out: 0).")
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise InputError(
                f"shares of drifting, generalising, narrow, decoy and dead features must be 0 or more and add up to at "
                f"most 1, got {shares}; lower one."
            )
        for name in ("icc", "correlation", "outcome_correlation"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if not 0 < self.density <= 1 or self.effect < 0 or self.run_sd < 0:
            raise InputError(
                f"expected 0 < density <= 1, effect >= 0 and run_sd >= 0; got {self.density}, {self.effect}, "
                f"{self.run_sd}."
            )
        if not 0 < self.accuracy < 1 or not 0 < self.accuracy + self.gain < 1:
            raise InputError(
                f"accuracy and accuracy + gain must lie in (0, 1), got {self.accuracy} and {self.accuracy + self.gain}."
            )
        if self.effect > self.largest_effect:
            raise InputError(
                f"effect d_z={self.effect} cannot be planted at density {self.density}: a feature that fires on few "
                f"prompts reaches at most {self.largest_effect:.2f}; lower the effect or raise the density."
            )

    @property
    def largest_effect(self) -> float:
        """d_z of the largest shift that can be planted."""
        return float(d_z_of(np.array(MAX_SHIFT), self.density))

    @property
    def models(self) -> list[str]:
        """Model ids: base, then every checkpoint of every run."""
        steps = [STEPS * c for c in range(1, self.checkpoints + 1)]
        return [BASE_MODEL, *(model_id(f"{arm}{r}", s) for arm in ARMS for r in range(1, self.runs + 1) for s in steps)]

    @property
    def arms(self) -> dict[str, str]:
        """Run -> its arm."""
        return {f"{arm}{r}": arm for arm in ARMS for r in range(1, self.runs + 1)}

    @property
    def tasks(self) -> list[str]:
        """Task names, in domain first."""
        return [*(f"in{t + 1}" for t in range(self.tasks_in)), *(f"out{t + 1}" for t in range(self.tasks_out))]


def shift_of(d_z: FloatArray, density: float) -> FloatArray:
    """Shift of a firing feature, in its standard deviations, that gives a paired difference its ``d_z``.

    Notes
    -----
    On the share p of prompts where the feature fires the difference is N(s, v), v = 2 ``MODEL_SHARE``; elsewhere it is
    0. So d_z = p s / sqrt(p (v + s^2) - p^2 s^2), and s^2 = v d^2 / (p - (1 - p) d^2).
    """
    denominator = density - (1 - density) * np.square(d_z)
    return np.asarray(d_z * np.sqrt(2 * MODEL_SHARE / np.maximum(denominator, 1e-300)))


def d_z_of(shift: FloatArray, density: float) -> FloatArray:
    """Inverse of :func:`shift_of`."""
    squared = np.square(shift)
    return np.asarray(np.sqrt(density) * shift / np.sqrt(2 * MODEL_SHARE + (1 - density) * squared))


@dataclass(frozen=True, kw_only=True)
class PlantedTruth:
    """What is planted in every feature and model; [feature], [model, feature] or [prompt] arrays."""

    kind: NDArray[np.str_]
    """One of ``KINDS``, [feature]."""
    scale: NDArray[np.float32]
    """Standard deviation of a firing feature, in contribution units, [feature]."""
    shift: NDArray[np.float32]
    """Planted change against base, in standard deviations of a firing feature, [model, feature]."""
    correct_shift: NDArray[np.float32]
    """Mean on correctly answered prompts less mean on others, in the same unit, [feature]; zero but for decoys."""
    settles_at: FloatArray
    """Step from which a planted change is complete, [arm, feature]; NaN where nothing is planted."""
    labels: dict[str, NDArray[Any]]
    """Prompt labels."""

    @property
    def in_domain(self) -> NDArray[np.bool_]:
        """[prompt]."""
        return np.asarray(self.labels[DOMAIN] == "in")


def plant_truth(simulation: Simulation) -> PlantedTruth:
    """Choose the features that carry each effect, and their course over runs and checkpoints."""
    kind = _kinds(simulation)
    random = generator(simulation, "effects")
    n = simulation.n_features
    scale = np.exp(0.5 * random.standard_normal(n))
    sign = random.choice(np.array([-1.0, 1.0]), n)
    settles = np.stack([random.integers(1, _last_settling(simulation, arm), n, endpoint=True) for arm in ARMS])
    limit = simulation.largest_effect
    changes = {"sft": kind == "drifting", "rl": np.isin(kind, ("drifting", "generalising", "narrow"))}
    shift = [np.zeros(n)]
    for arm, checkpoint_settled in zip(ARMS, settles, strict=True):
        for run in range(1, simulation.runs + 1):
            run_deviation = generator(simulation, "run", arm, run).standard_normal(n)
            d_z = np.where(kind == "drifting", sign, 1.0) * simulation.effect + simulation.run_sd * run_deviation
            final = np.where(changes[arm], shift_of(np.clip(d_z, -limit, limit), simulation.density), 0.0)
            shift += [final * np.minimum(c / checkpoint_settled, 1.0) for c in range(1, simulation.checkpoints + 1)]
    # A point-biserial correlation r needs group means apart by r / (sd of correctness * sqrt(1 - r^2)).
    spread = np.sqrt(simulation.accuracy * (1 - simulation.accuracy))
    r = simulation.outcome_correlation
    return PlantedTruth(
        kind=kind,
        scale=scale.astype(np.float32),
        shift=np.stack(shift).astype(np.float32),
        correct_shift=np.where(kind == "decoy", r / (spread * np.sqrt(1 - r * r)), 0.0).astype(np.float32),
        settles_at=np.where(np.stack([changes[arm] for arm in ARMS]), STEPS * settles.astype(np.float64), np.nan),
        labels=_prompt_labels(simulation),
    )


def generator(simulation: Simulation, *names: object, block: int = 0) -> np.random.Generator:
    """The generator of one named quantity and feature block; no draw depends on what else is drawn, or when."""
    return stream(derive_seed(simulation.seed, "simulate", *names), block)


def _last_settling(simulation: Simulation, arm: str) -> int:
    return max(1, round(SETTLED[arm] * simulation.checkpoints))


def _kinds(simulation: Simulation) -> NDArray[np.str_]:
    n = simulation.n_features
    order = generator(simulation, "kinds").permutation(n)
    shares = {
        "dead": simulation.dead,
        "drifting": simulation.drifting,
        "generalising": simulation.generalising,
        "narrow": simulation.narrow,
        "decoy": simulation.decoys,
    }
    kind = np.full(n, "null", dtype=np.dtype(f"U{max(map(len, KINDS))}"))
    start = 0
    for name, share in shares.items():
        stop = min(n, start + round(share * n))
        kind[order[start:stop]] = name
        start = stop
    return kind


def _prompt_labels(simulation: Simulation) -> dict[str, NDArray[Any]]:
    """Labels of the prompts: a cluster is consecutive prompts of one task and one split; tasks alternate by cluster."""
    i = np.arange(simulation.n_prompts)
    cluster = i // simulation.cluster_size
    tasks = np.array(simulation.tasks)
    task = tasks[cluster % len(tasks)]
    return {
        PROMPT: np.array([f"p{n:07d}" for n in i]),
        TASK: task,
        DOMAIN: np.where(np.char.startswith(task, "in"), "in", "out"),
        SPLIT: np.array(SPLITS)[(cluster // len(tasks)) % len(SPLITS)],
        CLUSTER: np.array([f"c{n:07d}" for n in cluster]),
    }


def truth_table(simulation: Simulation, planted: PlantedTruth) -> xr.Dataset:
    """The planted truth of every feature: ``kind``, ``d_z`` and ``mean_change`` per model, ``settles_at`` per arm.

    ``d_z`` and ``mean_change`` hold for the prompts a change is planted on: all, or those in domain for ``narrow``.
    """
    alive = planted.kind != "dead"
    shift = planted.shift.astype(np.float64)
    return xr.Dataset(
        {
            "kind": (FEATURE, planted.kind),
            "d_z": ((MODEL, FEATURE), d_z_of(shift, simulation.density)),
            "mean_change": ((MODEL, FEATURE), simulation.density * shift * planted.scale),
            "settles_at": ((ARM, FEATURE), planted.settles_at),
            "density": (FEATURE, np.where(alive, simulation.density, 0.0)),
            "scale": (FEATURE, planted.scale.astype(np.float64)),
            "outcome_correlation": (FEATURE, np.where(planted.correct_shift > 0, simulation.outcome_correlation, 0.0)),
        },
        coords={
            MODEL: (MODEL, np.array(simulation.models)),
            FEATURE: (FEATURE, np.arange(simulation.n_features)),
            ARM: (ARM, np.array(ARMS)),
        },
    )
