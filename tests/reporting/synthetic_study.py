"""A synthetic study: valid datasets for every layout, with planted numbers, and the stores of its folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, append_model
from rlgen_stats.toolkit.statistics.causal.findings import Check, Finding, as_columns

N_FEATURES = 240
SFT_STEPS, RL_STEPS = (30, 60, 90, 120, 150), (16, 32, 48, 64, 80)
TASKS = {
    "addition": ("in", "in_domain"),
    "parity": ("out", "out_of_domain"),
    "maximum": ("out", "out_of_domain"),
    "counting": ("out", "out_of_domain"),
    "reversal": ("out", "held_out"),
    "sorting": ("out", "held_out"),
    "riddle": ("out", "control"),
}
SELECTED = (7, 19, 23, 88, 131)
N_PROMPTS = 60
HOSTILE = "<script>alert('prompt')</script> & \"quoted\""
PROVENANCE = Provenance("study-hash-0123", "key-hash-4567", {"stage": "test", "seed": 5})


def make_spec(**changes: Any) -> StudySpec:
    raw: dict[str, Any] = {
        "name": "synthetic",
        "seed": 5,
        "base": {"path": "models/base"},
        "runs": [
            {"name": "sft", "arm": "sft", "checkpoints": {s: f"models/sft/step-{s}" for s in SFT_STEPS}},
            {"name": "rl", "arm": "rl", "checkpoints": {s: f"models/rl/step-{s}" for s in RL_STEPS}},
        ],
        "crosscoders": [
            {
                "name": "main",
                "views": ["base@0", "sft@final", "rl@final"],
                "n_features": N_FEATURES,
                "k": 16,
                "replicates": 1,
            },
            {"name": "pair-sft", "views": ["base@0", "sft@final"], "n_features": N_FEATURES, "k": 16},
            {"name": "pair-rl", "views": ["base@0", "rl@final"], "n_features": N_FEATURES, "k": 16},
            {"name": "null", "views": ["base@0", "base@repeat"], "n_features": N_FEATURES, "k": 16},
        ],
        "data": {"prompts": "data/prompts.csv", "train": None},
        "selection": {"held_out_tasks": ["reversal", "sorting"], "control_tasks": ["riddle"]},
    }
    return StudySpec.model_validate(raw | changes)


def models_and_coords(*, base: bool) -> tuple[list[str], dict[str, Any]]:
    rows = [("base", 0, "base")] * base + [("sft", s, "sft") for s in SFT_STEPS] + [("rl", s, "rl") for s in RL_STEPS]
    models = [f"{run}@{step}" for run, step, _ in rows]
    return models, {
        "model": models,
        "run": ("model", [run for run, _, _ in rows]),
        "step": ("model", [step for _, step, _ in rows]),
        "arm": ("model", [arm for _, _, arm in rows]),
    }


def share(steps: tuple[int, ...]) -> np.ndarray:
    return np.array(steps) / steps[-1]


POOLED = {"all:in": ("in", "pooled"), "all:out": ("out", "pooled")}
TEST_ATTRS = {
    "test": "a test",
    "null": "a null",
    "unit": "prompt",
    "family": "a family",
    "family_size": 210,
    "seed": 11,
    "alpha": 0.05,
}


def behaviour(*, pooled: bool = True) -> xr.Dataset:
    """Per task, and pooled rows whose counts are the sums over the domain's tasks without controls."""
    data = task_behaviour()
    if not pooled:
        return data
    parts = [data]
    for name, (domain, role) in POOLED.items():
        pooled_tasks = data.isel(task=np.flatnonzero((data.domain == domain) & (data.role != "control")))
        total = pooled_tasks[["n_prompts", "gained", "forgotten", "kept_right", "kept_wrong"]].sum("task")
        accuracy = (total.gained + total.kept_right) / total.n_prompts
        half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / total.n_prompts)
        total = total.assign(
            accuracy=accuracy,
            accuracy_low=accuracy - half,
            accuracy_high=accuracy + half,
            sampled_accuracy=accuracy - 0.01,
            terminated=pooled_tasks.terminated.mean("task"),
            answered=pooled_tasks.answered.mean("task"),
            p_value=xr.full_like(accuracy, 0.002),
            q_value=xr.full_like(accuracy, 0.004),
            difference=accuracy - accuracy[0],
            difference_low=accuracy - accuracy[0] - 0.04,
            difference_high=accuracy - accuracy[0] + 0.04,
        )
        parts.append(
            total.expand_dims(task=[name], axis=1).assign_coords(domain=("task", [domain]), role=("task", [role]))
        )
    return xr.concat(parts, "task", data_vars="minimal").assign_attrs(TEST_ATTRS)


def task_behaviour() -> xr.Dataset:
    models, coords = models_and_coords(base=True)
    level = {"base": (0.40, 0.35), "sft": (0.80, 0.30), "rl": (0.90, 0.75)}
    values: dict[str, np.ndarray] = {
        name: np.zeros((len(models), len(TASKS)))
        for name in ("accuracy", "sampled_accuracy", "forgotten", "gained", "kept_right", "kept_wrong")
    }
    for i, model in enumerate(models):
        run, step = model.split("@")
        last = {"base": 1, "sft": 150, "rl": 80}[run]
        for j, (domain, role) in enumerate(TASKS.values()):
            start = level["base"][domain == "out"] - 0.02 * j
            end = start if role == "control" else level[run][domain == "out"] - 0.02 * j
            accuracy = round((start + (end - start) * min(int(step) / last, 1)) * N_PROMPTS) / N_PROMPTS
            right = round(accuracy * N_PROMPTS)
            base_right = round(start * N_PROMPTS)
            lost = 0 if run == "base" else {"sft": 9, "rl": 2}[run] * (domain == "out")
            values["accuracy"][i, j] = accuracy
            values["sampled_accuracy"][i, j] = accuracy - 0.01
            values["forgotten"][i, j] = lost
            values["kept_right"][i, j] = base_right - lost
            values["gained"][i, j] = right - base_right + lost
            values["kept_wrong"][i, j] = N_PROMPTS - right - lost
    dims = ("model", "task")
    accuracy = values["accuracy"]
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / N_PROMPTS)
    floats = {
        "accuracy": accuracy,
        "accuracy_low": accuracy - half,
        "accuracy_high": np.minimum(accuracy + half, 1),
        "sampled_accuracy": values["sampled_accuracy"],
        "terminated": np.where(np.arange(len(TASKS)) == 2, 0.94, 0.97) + 0 * accuracy,
        "answered": np.where(np.arange(len(TASKS)) == 1, 0.85, 0.95) + 0 * accuracy,
        "p_value": np.where(accuracy > 0.5, 1e-6, 0.4),
        "q_value": np.where(accuracy > 0.5, 2e-6, 0.6),
        "difference": accuracy - accuracy[0],
        "difference_low": accuracy - accuracy[0] - 0.08,
        "difference_high": accuracy - accuracy[0] + 0.08,
    }
    counts = {n: values[n].astype(int) for n in ("kept_right", "forgotten", "gained", "kept_wrong")}
    counts["n_prompts"] = np.full(accuracy.shape, N_PROMPTS)
    return xr.Dataset(
        {k: (dims, v) for k, v in (floats | counts).items()},
        coords=coords
        | {
            "task": list(TASKS),
            "domain": ("task", [d for d, _ in TASKS.values()]),
            "role": ("task", [r for _, r in TASKS.values()]),
        },
        attrs=TEST_ATTRS,
    )


def claim_power() -> xr.Dataset:
    rows = (("C1", "more are specific", "SUPPORTED", 0.85), ("C4, C5", "nothing changes", "NO_EFFECT", 0.6))
    names = ("claim", "truth", "verdict", "power")
    return xr.Dataset(
        {name: ("row", list(column)) for name, column in zip(names, zip(*rows, strict=True), strict=True)},
        attrs={"n_worlds": 20, "size": "{}"},
    )


def movement() -> xr.Dataset:
    _, coords = models_and_coords(base=True)
    shift = [0.0, *(0.55 * share(SFT_STEPS) ** 0.5), *(0.21 * share(RL_STEPS))]
    return xr.Dataset(
        {
            "activation_shift": ("model", np.array(shift)),
            "weight_distance": ("model", 0.4 * np.array(shift)),
            "kl_from_base": ("model", 0.9 * np.array(shift)),
        },
        coords=coords,
    )


def health() -> xr.Dataset:
    names = ["main", "pair-sft", "pair-rl", "null"]
    views = ["base@0", "sft@150", "rl@80", "base.repeat@0"]
    fve = np.full((4, 4), np.nan)
    for i, row in enumerate(([0, 1, 2], [0, 1], [0, 2], [0, 3])):
        fve[i, row] = 0.93 - 0.01 * i
    return xr.Dataset(
        {
            "fve": (("crosscoder", "view"), fve),
            "fve_readout": (("crosscoder", "view"), fve - 0.05),
            "ce_increase": (("crosscoder", "view"), (1 - fve) / 2),
            "l0": ("crosscoder", [15.8, 14.9, 15.2, 15.0]),
            "dead_fraction": ("crosscoder", [0.02, 0.04, 0.03, 0.05]),
            "n_features": ("crosscoder", [N_FEATURES] * 4),
            "healthy": ("crosscoder", [True, True, True, False]),
            "reasons": ("crosscoder", ["", "", "", "explained variance of base.repeat@0 below 0.9"]),
        },
        coords={"crosscoder": names, "view": views},
        attrs={"fve_min": 0.8},
    )


def attribution() -> xr.Dataset:
    rng = np.random.default_rng(1)
    names = ["pair-sft", "pair-rl", "null"]
    nrn = np.stack([np.clip(rng.normal(0.5, s, N_FEATURES), 0.01, 0.99) for s in (0.11, 0.06, 0.02)])
    nrn[0, :30] = rng.uniform(0.75, 0.99, 30)
    nrn[1, :8] = rng.uniform(0.72, 0.95, 8)
    mas = rng.dirichlet((60, 60, 60), N_FEATURES).T[None]
    return xr.Dataset(
        {
            "nrn_l1": (("crosscoder", "feature"), nrn),
            "nrn_l2": (("crosscoder", "feature"), nrn),
            "log_ratio": (("crosscoder", "feature"), np.log(nrn / (1 - nrn))),
            "firing": (("crosscoder", "feature"), rng.uniform(0, 0.3, nrn.shape)),
            "alive": (("crosscoder", "feature"), rng.uniform(size=nrn.shape) > 0.04),
            "mas_l1": (("mas_crosscoder", "view", "feature"), mas),
            "mas_l2": (("mas_crosscoder", "view", "feature"), mas),
        },
        coords={
            "crosscoder": names,
            "mas_crosscoder": ["main"],
            "view": ["base@0", "sft@150", "rl@80"],
            "feature": np.arange(N_FEATURES),
            "target": ("crosscoder", ["sft@150", "rl@80", "base.repeat@0"]),
        },
    )


def attribution_contrast() -> xr.Dataset:
    """The final models are comparable; at equal distance from base there is no dictionary of sft."""
    dims = ("comparison", "tau")
    unknown = [math.nan] * 2

    def final(*values: float) -> tuple[tuple[str, ...], list[list[float]]]:
        return dims, [list(values), unknown, unknown]

    too_far = "NOT_COMPARABLE: no checkpoint of sft is so near to base"
    return xr.Dataset(
        {
            "tail_sft": final(0.131, 0.052),
            "tail_rl": final(0.034, 0.011),
            "tail_null": final(0.004, 0.0),
            "tail_floor": (("floor", "tau"), [[0.0, 0.0], [0.004, 0.0]]),
            "tail_sft_low": final(0.09, 0.03),
            "tail_sft_high": final(0.17, 0.08),
            "tail_rl_low": final(0.01, 0.0),
            "tail_rl_high": final(0.06, 0.03),
            "effect": final(0.097, 0.041),
            "effect_low": final(0.052, 0.012),
            "effect_high": final(0.141, 0.069),
            "effect_each": ((*dims, "dictionary"), [[[0.097], [0.041]], [[math.nan]] * 2, [[math.nan]] * 2]),
            "p_value": final(0.002, 0.012),
            "superiority": ("comparison", [0.61, *unknown]),
            "superiority_low": ("comparison", [0.55, *unknown]),
            "superiority_high": ("comparison", [0.67, *unknown]),
            "superiority_each": (("comparison", "dictionary"), [[0.61], [math.nan], [math.nan]]),
            "distance_sft": ("comparison", [0.55, *unknown]),
            "distance_rl": ("comparison", [0.21, *unknown]),
            "comparable": ("comparison", ["COMPARABLE: parity of fit", too_far, too_far]),
        },
        coords={
            "comparison": ["final", "matched_shift", "matched_kl"],
            "tau": [0.7, 0.9],
            "dictionary": [1],
            "floor": ["base read again", "disjoint halves of the prompts"],
        },
        attrs={
            "test": "bootstrap over clusters",
            "null": "equal tail mass",
            "unit": "cluster of features; dictionary",
            "seed": 3,
            "alpha": 0.05,
            "decided_by": "final",
        },
    )


def latent_scaling() -> xr.Dataset:
    names, views = ["pair-sft", "pair-rl", "null"], ["base@0", "sft@150", "rl@80", "base.repeat@0"]
    by_view = np.full((len(names), len(views), N_FEATURES), 0.9)
    kinds = [
        f"{kind}_{target}{se}"
        for kind in ("beta", "nu")
        for target in ("error", "reconstruction")
        for se in ("", "_se")
    ]
    table = (("crosscoder", "feature"), np.full((len(names), N_FEATURES), 400))
    return xr.Dataset(
        dict.fromkeys(kinds, (("crosscoder", "view", "feature"), by_view))
        | {
            "feature_class": (("crosscoder", "feature"), np.full((len(names), N_FEATURES), "shared")),
            "specific_to": (("crosscoder", "feature"), np.full((len(names), N_FEATURES), "", dtype="<U8")),
            "n_active": table,
            "n_groups": table,
        },
        coords={"crosscoder": names, "view": views, "feature": np.arange(N_FEATURES)},
        attrs={"unit": "group", "tau": 0.7, "alpha": 0.05, "nu_error_max": 0.2, "nu_reconstruction_max": 0.5},
    )


def matching() -> xr.Dataset:
    rng = np.random.default_rng(11)
    shape = (1, 1, N_FEATURES)
    numbers = {name: rng.uniform(0.5, 1, shape) for name in ("similarity", "best_similarity", "q_value", "correlation")}
    return xr.Dataset(
        {name: (("crosscoder", "replicate", "feature"), values) for name, values in numbers.items()}
        | {
            "match": (("crosscoder", "replicate", "feature"), np.arange(N_FEATURES).reshape(shape)),
            "matched": (("crosscoder", "replicate", "feature"), np.arange(N_FEATURES).reshape(shape) % 2 == 0),
            "reappearance": (("crosscoder", "feature"), (np.arange(N_FEATURES)[None] % 2 == 0).astype(float)),
            "subspace_overlap": (("crosscoder", "replicate"), [[0.8]]),
            "subspace_overlap_chance": (("crosscoder", "replicate"), [[0.3]]),
        },
        coords={"crosscoder": ["main"], "replicate": ["main.2"], "feature": np.arange(N_FEATURES)},
        attrs={"test": "target-decoy", "null": "decoys", "unit": "feature", "by": "decoder", "alpha": 0.05},
    )


def drift() -> xr.Dataset:
    rng = np.random.default_rng(2)
    models, coords = models_and_coords(base=False)
    scale = np.array([*(0.5 * share(SFT_STEPS)), *(0.3 * share(RL_STEPS))])[:, None]
    d_z = rng.normal(0, 1, (len(models), N_FEATURES)) * scale * (rng.uniform(size=N_FEATURES) < 0.3) + rng.normal(
        0, 0.05, (len(models), N_FEATURES)
    )
    p = np.clip(10 ** (-np.abs(d_z) * 25), 1e-12, 1)
    p[:, 200:230] = np.nan
    call = np.where(p < 1e-3, "DRIFT", np.where(p > 0.5, "NO_DRIFT", "UNDETERMINED"))
    flag = np.where(np.isnan(p), "untestable", np.where((p < 0.01) & (call != "DRIFT"), "below_margin", "ok"))
    call = np.where(np.isnan(p), "UNTESTABLE", call)
    dims = ("model", "feature")
    floats = {
        "statistic": d_z * 9,
        "effect": d_z * 0.2,
        "effect_low": d_z * 0.2 - 0.05,
        "effect_high": d_z * 0.2 + 0.05,
        "p_value": p,
        "q_value": np.minimum(p * 3, 1),
        "effect_sd": d_z * 0.9,
        "p_minimum": np.sqrt(p),
        "q_minimum": np.minimum(np.sqrt(p) * 3, 1),
        "p_max_t": np.minimum(p * 50, 1),
        "d_z": d_z,
        "firing_change": d_z / 10,
    }
    return xr.Dataset(
        {k: (dims, v) for k, v in floats.items()}
        | {"n": (dims, np.full(p.shape, 360)), "flag": (dims, flag), "call": (dims, call)}
        | {"typical_effect": ("model", np.nanmedian(np.abs(d_z), axis=1) * 0.9)},
        coords=coords | {"feature": np.arange(N_FEATURES)},
        attrs=TEST_ATTRS | {"reference": "base@0", "variable": "mean"},
    )


def replicability() -> xr.Dataset:
    """Three dictionaries that share a tenth of their features, and nearly all of what they decode."""
    models, pair, each = ["sft@150", "rl@80"], ("dictionary", "other", "model"), ("dictionary", "model")
    off = 1 - np.eye(3)[:, :, None] * np.ones(2)
    distance = off * (0.01 * np.arange(9).reshape(3, 3) + 0.01 * np.arange(9).reshape(3, 3).T)[:, :, None]

    def agree(level: float) -> tuple[tuple[str, ...], np.ndarray]:
        return pair, 1 - off * (1 - level) - distance / 4

    values: dict[str, Any] = {
        "decoded_cosine": agree(0.97),
        "decoded_correlation": agree(0.95),
        "error_cosine": agree(0.72),
        "error_correlation": agree(0.7),
    }
    for name, level in (("set_correlation", 0.85), ("set_within", 0.75)):
        values |= {name: agree(level), f"{name}_random": agree(0.4), f"{name}_random_high": agree(0.55)}
    by_replicate = ("criterion", "replicate", "model")
    values |= {
        "dfve": (each, [[0.78, 0.73], [0.77, 0.74], [0.79, 0.71]]),
        "true_cosine": (each, np.full((3, 2), 0.9)),
        "true_correlation": (each, np.full((3, 2), 0.87)),
        "n_drift": (each, [[60, 40], [66, 44], [63, 42]]),
        "n_set": ("dictionary", [5, 6, 5]),
        "n_matched": (by_replicate[:2], [[115, 138], [18, 21]]),
        "matched_share": (by_replicate[:2], [[0.5, 0.6], [0.08, 0.09]]),
        "matched_energy": (by_replicate, [[[0.7, 0.9], [0.6, 0.8]], [[0.5, 0.61], [0.48, 0.58]]]),
        "matched_energy_random": (by_replicate, [[[0.5, 0.5], [0.6, 0.6]], [[0.08, 0.08], [0.09, 0.09]]]),
        "matched_energy_random_high": (by_replicate, [[[0.7, 0.7], [0.8, 0.8]], [[0.14, 0.15], [0.16, 0.17]]]),
        "top_shared": (by_replicate, [[[19, 22], [20, 21]], [[9, 12], [10, 11]]]),
        "top_expected": (by_replicate, [[[3.2, 3.9], [3.5, 3.6]], [[2.2, 2.9], [2.5, 2.6]]]),
        "n_drift_mean": ("model", [63.0, 42.0]),
        "n_drift_low": ("model", [55.5, 37.0]),
        "n_drift_high": ("model", [70.5, 47.0]),
    }
    labels = {"run": ("model", ["sft", "rl"]), "step": ("model", [150, 80]), "arm": ("model", ["sft", "rl"])}
    pairs = {"dictionary": [1, 2, 3], "other": [1, 2, 3], "replicate": ["main.2", "main.3"]}
    return xr.Dataset(
        values,
        coords={"model": models, "criterion": ["matched", "close"]} | pairs | labels,
        attrs={k: TEST_ATTRS[k] for k in ("test", "null", "unit", "seed", "alpha")}
        | {"top_k": 50, "n_features": 230, "n_random": 99, "n_prompts": 28, "close_cosine": 0.7},
    )


def stabilization() -> xr.Dataset:
    rng = np.random.default_rng(3)
    _, coords = models_and_coords(base=False)
    curve = np.array([0.20, 0.62, 0.81, 0.84, 0.88, 0.05, 0.15, 0.31, 0.52, 0.70])
    both, per_run = ("model", "feature"), ("trained_run", "feature")
    return xr.Dataset(
        {
            "p_value": (both, rng.uniform(size=(10, N_FEATURES))),
            "effect": (both, rng.normal(size=(10, N_FEATURES))),
            "stabilized_at": (per_run, rng.choice([30.0, 60.0, np.nan], (2, N_FEATURES))),
            "flag": (per_run, rng.choice(["STABILISED", "NOT_STABILISED", "UNTESTABLE"], (2, N_FEATURES))),
            "total_effect": (per_run, rng.normal(size=(2, N_FEATURES))),
            "share": ("model", curve),
            "share_low": ("model", curve - 0.04),
            "share_high": ("model", curve + 0.05),
            "share_in_stratum": (("model", "stratum"), np.stack([np.ones(10), curve, curve * 0.9], axis=1)),
        },
        coords=coords
        | {
            "trained_run": ["sft", "rl"],
            "stratum": ["unchanged", "moderate", "large"],
            "feature": np.arange(N_FEATURES),
        },
        attrs={k: TEST_ATTRS[k] for k in ("test", "null", "unit", "seed", "alpha")}
        | {"margin": 0.2, "persist": 0.2, "margin_unit": "sd of base@0"},
    )


def set_stability() -> xr.Dataset:
    _, coords = models_and_coords(base=False)
    delta = np.array([0.21, 0.03, 0.02, 0.01, 0.0, 0.44, 0.37, 0.30, 0.19, 0.0])
    half = np.array([0.05, 0.04, 0.04, 0.04, 0.0, 0.06, 0.06, 0.06, 0.05, 0.0])
    ceiling = np.array([0.80, 0.86, 0.88, 0.88, 0.88, 0.55, 0.63, 0.70, 0.76, 0.79])
    final = np.repeat([0.88, 0.79], 5)
    attainable = np.sqrt(ceiling * final)
    cross = attainable - delta
    return xr.Dataset(
        {
            "overlap": ("model", np.minimum(cross + 0.12, 1)),
            "cross": ("model", cross),
            "noise_ceiling": ("model", ceiling),
            "final_ceiling": ("model", final),
            "attainable": ("model", attainable),
            "delta": ("model", delta),
            "delta_low": ("model", delta - half),
            "delta_high": ("model", delta + half),
            "delta_lower": ("model", delta - 0.84 * half),
            "delta_upper": ("model", delta + 0.84 * half),
            "chance": ("model", np.full(10, 0.21)),
            "overlap_p": ("model", np.full(10, 1e-9)),
            "rbo": ("model", cross),
            "paper_overlap": ("model", PAPER_OVERLAP.ravel()),
            "delta_replicate": (("model", "replicate"), delta[:, None] + half[:, None] * np.linspace(-0.1, 0.1, 20)),
            "verdict": ("trained_run", ["SET_STABLE", "EVOLVING"]),
            "stable_from": ("trained_run", [60.0, np.nan]),
            "nogueira": ("trained_run", [0.83, 0.52]),
            "reason": ("trained_run", ["upper bound of delta below 0.1 at 60", "delta 0.19 at the last but one"]),
        },
        coords=coords | {"trained_run": ["sft", "rl"]},
        attrs={k: TEST_ATTRS[k] for k in ("test", "null", "unit", "seed", "alpha")} | {"top_k": 50},
    )


PAPER_OVERLAP = np.array([[0.71, 0.82, 0.90, 0.95, 1.0], [0.42, 0.53, 0.64, 0.75, 1.0]])


def timing_contrast() -> xr.Dataset:
    """RL settles 28 points of training later, and 12 points more of its top set are still to change."""
    per_run = ("measure", "trained_run")
    value, difference, half = np.array([[0.22, 0.50], [0.05, 0.17]]), np.array([0.28, 0.12]), np.array([0.08, 0.06])
    pairs = [[f"sft@{sft}", f"rl@{rl}"] for sft, rl in zip(SFT_STEPS, RL_STEPS, strict=True)]
    in_stratum = np.array([np.nan, 0.25, 0.34])
    return xr.Dataset(
        {
            "difference": ("measure", difference),
            "low": ("measure", difference - half),
            "high": ("measure", difference + half),
            "p_value": ("measure", [0.0004, 0.002]),
            "dictionary_difference": (("measure", "dictionary"), difference[:, None]),
            "value": (per_run, value),
            "value_low": (per_run, value - 0.03),
            "value_high": (per_run, value + 0.03),
            "weight": ("stratum", [0, 2 / 3, 1 / 3]),
            "stratum_difference": ("stratum", in_stratum),
            "stratum_difference_low": ("stratum", in_stratum - 0.1),
            "stratum_difference_high": ("stratum", in_stratum + 0.1),
            "stratum_difference_p": ("stratum", [np.nan, 0.001, 0.001]),
            "stratum_time": (("stratum", "trained_run"), np.stack([in_stratum, 2 * in_stratum], axis=1)),
            "n_in_stratum": (("stratum", "trained_run"), [[120.0, 150.0], [60.0, 40.0], [30.0, 20.0]]),
            "checkpoint": (("node", "trained_run"), pairs),
            "training_share": ("node", share(SFT_STEPS)),
            "determined": ("node", [True] * 5),
            "paper_overlap": (("node", "trained_run"), PAPER_OVERLAP.T),
        },
        coords={
            "measure": ["time", "turnover"],
            "trained_run": ["sft", "rl"],
            "stratum": ["unchanged", "moderate", "large"],
            "dictionary": [1],
        },
        attrs={k: TEST_ATTRS[k] for k in ("test", "null", "unit", "seed", "alpha")} | {"top_k": 50},
    )


def selection() -> xr.Dataset:
    rng = np.random.default_rng(4)
    n_tasks, used = len(TASKS), np.array([role.endswith("domain") for _, role in TASKS.values()])
    both = ("task", "feature")
    score = np.abs(rng.normal(0, 0.05, (n_tasks, N_FEATURES)))
    score[:, list(SELECTED)] += 0.6
    kept = score > 0.2 * score.max(axis=1, keepdims=True)
    kept[0, 40:52], kept[1, 45:60], kept[2, 60:70], kept[3, 41:48] = True, True, True, True
    kept[~used] = False
    chosen = np.isin(np.arange(N_FEATURES), SELECTED)
    tier = np.where(
        chosen, "CONFIRMED", np.where(np.isin(np.arange(N_FEATURES), (45, 46, 90)), "CANDIDATE", "REJECTED")
    )
    tier[200:230] = "UNTESTED"
    p = np.where(chosen, 1e-4, rng.uniform(0.05, 1, N_FEATURES))
    p[200:230] = np.nan
    verification = np.where(tier == "REJECTED", np.nan, np.where(chosen, 0.001, 0.3))
    verification[200:230] = np.nan
    gain = {"addition": 30, "parity": 25, "maximum": 24, "counting": 23, "reversal": 25, "sorting": 22, "riddle": 0}
    contrast_p = np.where(used[:, None], rng.uniform(size=(n_tasks, N_FEATURES)), np.nan)
    effect = np.where(chosen, 0.62, 0.01)
    return xr.Dataset(
        {
            "score": (both, score),
            "kept": (both, kept),
            "p_flip": (both, rng.uniform(size=score.shape)),
            "contrast": (both, score),
            "contrast_p": (both, contrast_p),
            "excess": (both, score / 2),
            "excess_p": (both, contrast_p),
            "p_guard": (both, contrast_p),
            "guard": ("task", np.where(used, "contrast", "no: not selected on")),
            "n_selected_prompts": ("task", list(gain.values())),
            "n_gain": ("task", list(gain.values())),
            "n_loss": ("task", [22, 21, 20, 24, 20, 21, 0]),
            "n_kept": ("task", kept.sum(axis=1)),
            "estimable": ("task", ["yes"] * 4 + ["no: not selected on"] * 3),
            "excess_estimable": ("task", ["yes"] * 4 + ["no: not selected on"] * 3),
            "verification_excess_estimable": ("task", ["yes"] * 4 + ["no: not selected on"] * 3),
            "role": ("task", [role for _, role in TASKS.values()]),
            "paper_selected": ("feature", kept[used].all(axis=0)),
            "p_value": ("feature", p),
            "q_value": ("feature", np.minimum(p * 20, 1)),
            "rank": ("feature", np.argsort(np.argsort(p)) + 1.0),
            "tier": ("feature", tier),
            "specific_p": ("feature", p),
            "specific_tier": ("feature", tier),
            "verification_specific_q": ("feature", np.minimum(8 * verification, 1)),
            "verification_effect": ("feature", effect),
            "verification_low": ("feature", effect - 0.1),
            "verification_high": ("feature", effect + 0.1),
            "verification_p": ("feature", verification),
            "verification_q": ("feature", np.minimum(8 * verification, 1)),
            "selected": ("feature", chosen),
            "flag": ("feature", np.where(tier == "UNTESTED", "untestable", "ok")),
        },
        coords={"task": list(TASKS), "feature": np.arange(N_FEATURES)},
        attrs=TEST_ATTRS
        | {
            "split_hash": "split-hash-89ab",
            "score_correlation": 0.61,
            "shift_rank": 3.4,
            "n_paper": int(kept[used].all(axis=0).sum()),
            "p_n1": 0.001,
            "p_n2": 0.001,
            "rule": "CONFIRMED",
            "carried_share": 0.71,
            "carried_low": 0.58,
            "carried_high": 0.84,
            "carried_best_high": 0.9,
            "n_carrying": 15,
            "most_features": 21,
            "no_rise_p": 1.0,
            "accompanying_p": np.nan,
        },
    )


def tokens() -> xr.Dataset:
    """The first three of the five selected features respond to tokens: two by injection, one by what they explain."""
    by_part, by_class = ("explained_by", "feature"), ("token_class", "feature")
    explained = np.array([[0.8, 0.1, 0.1, 0.0, 0.2], [0.1, 0.2, 0.1, 0.0, 0.1], [0.85, 0.3, 0.6, 0.01, 0.25]])
    odds = np.array([[4.0, 0.5, 1.1, 1.0, 0.9], [9.0, 1.0, 1.0, np.nan, 1.2]])
    return xr.Dataset(
        {
            "explained": (by_part, explained),
            "explained_low": (by_part, explained - 0.05),
            "explained_high": (by_part, explained + 0.05),
            "odds_ratio": (by_class, odds),
            "odds_low": (by_class, odds / 2),
            "odds_high": (by_class, odds * 2),
            "odds_p": (by_class, np.where(odds > 2, 0.001, 0.4)),
            "odds_q": (by_class, np.where(odds > 2, 0.01, 0.6)),
            "n_class_tokens": ("token_class", [900, 120]),
            "injected": ("feature", [0.95, 0.9, 0.3, 0.1, 0.0]),
            "injected_matched": ("feature", [0.1, 0.2, 0.2, 0.1, 0.0]),
            "injection_p": ("feature", [1e-6, 1e-6, 0.04, 0.5, 1.0]),
            "injection_q": ("feature", [2e-6, 2e-6, 0.06, 0.6, 1.0]),
            "fires_alone": ("feature", [True, True, False, False, False]),
            "detector": ("feature", [True, True, True, False, False]),
            "leading": ("feature", ["so then", "7 12", "wait", "x y", ""]),
        },
        coords={
            "explained_by": ["token", "position", "both"],
            "token_class": ["number", "answer marker"],
            "feature": list(SELECTED),
        },
        attrs=TEST_ATTRS | {"n_tokens": 9000, "n_texts": 100},
    )


CLASSES = ("right", "wrong", "no_answer", "empty", "degenerate", "truncated")


def separation() -> xr.Dataset:
    models, coords = models_and_coords(base=False)
    auc = np.array([[0.98, 0.93, 0.91, 0.84], [0.99, 0.94, 0.9, 0.85], [np.nan] * 4])
    both = ("comparison", "predictor")
    one = [-0.07, -0.09, np.nan]
    share = np.linspace(0.4, 0.8, len(models))
    return xr.Dataset(
        {
            "auc": (both, auc),
            "auc_low": (both, auc - 0.02),
            "auc_high": (both, auc + 0.02),
            "pairs_right": (both, auc),
            "advantage": ("comparison", one),
            "advantage_low": ("comparison", np.array(one) - 0.02),
            "advantage_high": ("comparison", np.array(one) + 0.02),
            "beats_raw": ("comparison", [False] * 3),
            "p_random": ("comparison", [0.05, 0.1, np.nan]),
            "n_prompts": ("comparison", [40, 24, 30]),
            "n_units": ("comparison", [20, 12, 6]),
            "estimable": ("comparison", ["yes", "yes", "no: 12 units with gains and 6 with losses, 20 of each needed"]),
            "share": ("model", share),
            "share_low": ("model", share - 0.1),
            "share_high": ("model", share + 0.1),
            "norm_ratio": ("model", share**0.5),
        },
        coords=coords
        | {
            "comparison": ["models", "models on gains", "gain or loss"],
            "predictor": ["raw", "mean shift", "selected", "random"],
        },
        attrs={
            "test": "linear probes of raw activations, of their mean shift and of features",
            "null": "the selected features tell the models apart no better than raw activations do",
            "unit": "cluster",
            "seed": 3,
            "alpha": 0.05,
            "base": "base@0",
            "target": models[-1],
            "split_hash": "s" * 8,
            "n_features": 12,
            "random_sets": "yes",
        },
    )


def criteria(*effects: float) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
    """Columns of the table of criteria, a row a direction, of trials in which everything needed was passed."""
    each = [
        as_columns(
            (
                Finding(check=Check.PASSTHROUGH, passed=True, statistic=0.0, bound=0.05),
                Finding(
                    check=Check.V1_EFFECT,
                    passed=True,
                    statistic=effect,
                    low=effect - 0.06,
                    high=effect + 0.06,
                    bound=0.02,
                    p_value=0.0004,
                ),
                Finding(check=Check.V2_CONTROLS, passed=True),
                Finding(check=Check.V2_RANK, passed=True, statistic=0, bound=0.05, p_value=0.04, n=24),
                Finding(check=Check.V3_DOSE, passed=True, statistic=abs(effect) / 2, p_value=0.001, n=3),
                Finding(check=Check.V4_ACCURACY, passed=True, statistic=0.0, low=-0.04, bound=-0.05, n=60),
                Finding(check=Check.V6_AGREEMENT, passed=True, statistic=0.5, bound=0.1, p_value=0.001, n=90),
            )
        )
        for effect in effects
    ]
    return {name: (("direction", "criterion"), np.array([one[name] for one in each])) for name in each[0]}


def intervention() -> xr.Dataset:
    rng = np.random.default_rng(6)
    directions = ("disable", "amplify")
    plan = [("unedited", "unedited", 1.0), ("fresh", "fresh", 1.0), ("passthrough", "passthrough", 1.0)]
    plan += [("set", "set", np.nan), ("dose-0.5", "dose", 0.5), ("dose-1.5", "dose", 1.5), ("dose-4", "dose", 4.0)]
    plan += [
        ("replicate-main.2", "replicate", np.nan),
        ("steering", "steering", 1.0),
        ("random-direction", "random_direction", 1.0),
    ]
    plan += [(f"random-{b:03d}", "random", np.nan) for b in range(24)]
    shape = (2, len(plan))
    accuracy, dose, effect = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    kind = np.full(shape, "", dtype="U20")
    start = {"disable": 0.76, "amplify": 0.34}
    main = {"disable": 0.0, "amplify": 2.0}
    by_dose = {
        "disable": {0.0: 0.41, 0.5: 0.60, 1.5: 0.77, 4.0: 0.55},
        "amplify": {0.5: 0.30, 1.5: 0.46, 2.0: 0.55, 4.0: 0.43},
    }
    for i, direction in enumerate(directions):
        sign = -1 if direction == "disable" else 1
        for j, (_, what, at) in enumerate(plan):
            dose[i, j] = main[direction] if np.isnan(at) else at
            kind[i, j] = what
            accuracy[i, j] = {
                "unedited": start[direction],
                "fresh": start[direction] - 0.01,
                "passthrough": start[direction],
                "steering": start[direction] + sign * 0.16,
                "random_direction": start[direction] + sign * 0.02,
                "random": start[direction] + sign * abs(rng.normal(0, 0.03)),
            }.get(what, by_dose[direction].get(dose[i, j], np.nan))
            effect[i, j] = accuracy[i, j] - start[direction]
    shares = np.zeros((*shape, len(CLASSES)))
    rest = np.where(np.isnan(accuracy), np.nan, 1 - accuracy)
    shares[..., 0] = accuracy
    for column, weight in ((1, 0.3), (2, 0.55), (3, 0.02), (4, 0.03), (5, 0.1)):
        shares[..., column] = rest * weight
    tasks = list(TASKS)
    both = ("direction", "condition")
    task_effect = effect[..., None] + np.linspace(-0.05, 0.05, len(tasks))
    unrelated = np.full(shape, 0.75) - 0.001 * np.arange(len(plan))
    unrelated[:, 2] = 0.75  # hooks that edit nothing change nothing
    side = {
        "unrelated_accuracy": unrelated,
        "unrelated_effect": unrelated - 0.75,
        "unrelated_low": unrelated - 0.79,
        "unrelated_high": unrelated - 0.71,
        "unrelated_broken": np.full(shape, 0.0125),
        "unrelated_length": np.full(shape, 6.25),
        "neutral_kl": np.full(shape, 0.0321),
    }
    return xr.Dataset(
        {name: (both, values) for name, values in side.items()}
        | {
            "accuracy": (both, accuracy),
            "effect": (both, effect),
            "effect_low": (both, effect - 0.06),
            "effect_high": (both, effect + 0.06),
            "p_value": (both, np.where(np.abs(effect) > 0.06, 0.0004, 0.6)),
            "kind": (both, kind),
            "dose": (both, dose),
            "kl_to_base": (both, 0.5 + effect),
            "kl_to_rl": (both, 0.5 - effect),
            "length": (both, np.full(shape, 12.5)),
            "task_accuracy": ((*both, "task"), accuracy[..., None] + np.zeros(len(tasks))),
            "task_effect": ((*both, "task"), task_effect),
            "class_share": ((*both, "class"), shares),
            "verdict": ("direction", ["CAUSAL_SPECIFIC", "CAUSAL_SPECIFIC"]),
            "reasons": (
                "direction",
                [
                    "v1_effect: -0.350 [-0.41, -0.29], p=0.0004; v3_dose: contrast p=0.001; dose: accuracy 0: 0.41",
                    "v1_effect: +0.210; over_steering: dose 4 has effect +0.09 and 13% broken completions",
                ],
            ),
            "rank_p": ("direction", [0.04, 0.04]),
            "v1": ("direction", [True, True]),
            "v2": ("direction", [True, True]),
            "v3": ("direction", [True, True]),
            "v4": ("direction", [True, True]),
            "v5": ("direction", ["4 of 6 tasks on their own", "5 of 6 tasks on their own"]),
            "v6": ("direction", [True, True]),
            "decided_by": ("direction", ["all_passed", "all_passed"]),
            "n_prompts": ("direction", [180, 180]),
        }
        | criteria(-0.35, 0.21),
        coords={
            "direction": list(directions),
            "criterion": [str(check) for check in Check],
            "condition": [name for name, _, _ in plan],
            "task": tasks,
            "class": list(CLASSES),
        },
        attrs={k: TEST_ATTRS[k] for k in ("test", "null", "unit", "seed", "alpha")}
        | {
            "features": list(SELECTED),
            "target_tasks": [task for task, (domain, role) in TASKS.items() if domain == "out" and role != "control"],
            "unrelated_tasks": ["riddle"],
        },
    )


def other_trial() -> xr.Dataset:
    """Two features disabled only."""
    trial = intervention().assign_attrs(features=[3, 9], level="own")
    trial["reasons"] = (
        "direction",
        ["v2_failed: matched random sets have at least as large an effect; v1_effect: -0.35", "not_asked: not run"],
    )
    trial["verdict"] = ("direction", ["CAUSAL_NONSPECIFIC", "INCONCLUSIVE"])
    trial["decided_by"] = ("direction", ["", ""])  # its criteria are those of the other trial: they decide nothing
    return trial


def other_parts() -> xr.Dataset:
    """Effects of the two features of :func:`other_trial` alone and left out; the search tried feature 9 first."""
    per_feature = {"alone": [-0.05, -0.3], "left_out": [-0.02, -0.27]}
    values: dict[str, Any] = {}
    for name, column in per_feature.items():
        effect = np.array([column])
        values |= {name: effect, f"{name}_low": effect - 0.04, f"{name}_high": effect + 0.04}
        values[f"{name}_q_value"] = np.array([[0.4, 0.0012]])
    values |= {"order": np.array([[2, 1]]), "in_subset": np.array([[False, True]])}
    whole = {"subset_effect": -0.31, "set_effect": -0.35, "set_minus_subset": -0.04}
    single = {
        f"{name}{end}": [estimate + offset]
        for name, estimate in whole.items()
        for end, offset in (("", 0), ("_low", -0.06), ("_high", 0.06))
    }
    return xr.Dataset(
        {name: (("direction", "feature"), array) for name, array in values.items()}
        | {name: ("direction", array) for name, array in (single | {"subset_size": [1]}).items()},
        coords={"direction": ["disable"], "feature": [3, 9]},
    )


def control_balance() -> xr.Dataset:
    covariates = ("edit_norm", "log_firing", "decoder_norm", "contribution_energy", "mas_bin")
    return xr.Dataset(
        {
            "set_mean": ("covariate", [3.1, -1.2, 1.5, 0.3, 2.0] * 2),
            "control_mean": ("covariate", [3.0, -1.25, 1.46, 0.29, 1.9] * 2),
            "standardized_difference": ("covariate", [0.03, 0.05, 0.04, 0.02, 0.06] * 2),
            "balanced": ("covariate", [True] * 10),
        },
        coords={"covariate": [f"{name}_{direction}" for direction in ("disable", "amplify") for name in covariates]},
    )


def mediated_share() -> xr.Dataset:
    """The set carries 70% of the patch's effect, the 50 features with the largest drift 90%, random sets nothing."""
    share = np.array([[0.7, 0.1, 0.9, 1.0]] * 2)
    patch = np.array([-0.3, 0.25])
    each = ("direction", "dictionary", "point")
    random = np.array([0.02, 0.0, 0.1, np.nan])[None, None, :, None] * np.ones((2, 1, 4, 3))
    by_point = {
        "effect": share * patch[:, None],
        **{"share": share, "share_low": share - 0.15, "share_high": share + 0.15},
        **{"above_random": share - 0.02, "above_low": share - 0.2, "above_high": share + 0.2},
    }
    return xr.Dataset(
        {
            "patch_effect": ("direction", patch),
            "patch_low": ("direction", patch - 0.1),
            "patch_high": ("direction", patch + 0.1),
        }
        | {name: (("direction", "point"), values) for name, values in by_point.items()}
        | {
            "dictionary_share": (each, share[:, None]),
            "norm_ratio": (each, np.array([[[0.3, 0.1, 0.6, 1.04]]] * 2)),
            "random_share": ((*each, "random"), random),
            "random_norm": ((*each, "random"), np.array([0.3, 0.1, 0.6, np.nan])[None, None, :, None] + 0 * random),
            "random_sets": (each, [[["nearest", "rescaled", "rescaled", ""]]] * 2),
            "n_features": (("dictionary", "point"), [[5, 1, 50, 512]]),
        },
        coords={"direction": ["disable", "amplify"], "dictionary": [1], "point": ["set", "top-1", "top-50", "all"]},
        attrs={"test": "Fieller", "null": "none of it", "unit": "prompt cluster", "alpha": 0.05, "ranking": "drift"},
    )


BUILDERS: dict[str, Callable[[], xr.Dataset]] = {
    f.__name__: f
    for f in (
        behaviour,
        claim_power,
        movement,
        health,
        attribution,
        attribution_contrast,
        latent_scaling,
        matching,
        drift,
        replicability,
        stabilization,
        set_stability,
        timing_contrast,
        selection,
        separation,
        tokens,
        intervention,
        control_balance,
        mediated_share,
    )
}


def prompt_table() -> pd.DataFrame:
    rows = []
    for task, (domain, _) in TASKS.items():
        for i in range(8):
            text = HOSTILE if (task, i) == ("parity", 0) else f"{task} question {i} ?"
            rows.append(
                (f"{task}-{i}", text, str(i), task, domain, ("selection", "verification")[i % 2], f"{task}-c{i // 2}")
            )
    return pd.DataFrame(rows, columns=["prompt_id", "text", "answer", "task", "domain", "split", "cluster"])


def prompt_coords(prompts: pd.DataFrame) -> dict[str, Any]:
    return {"prompt": prompts["prompt_id"].tolist()} | {
        name: ("prompt", prompts[name].tolist()) for name in ("task", "domain", "split", "cluster")
    }


def write_stores(folder: StudyFolder) -> None:
    """Outcomes, features, completions, contexts and prompts beside the results."""
    prompts = prompt_table()
    n = len(prompts)
    (folder.root / "data").mkdir(parents=True)
    prompts.to_csv(folder.root / "data" / "prompts.csv", index=False)
    folder.completions.mkdir()
    rng = np.random.default_rng(7)
    for run, step, arm in (("base", 0, "base"), ("sft", 150, "sft"), ("rl", 80, "rl")):
        model = f"{run}@{step}"
        right = (np.arange(n) % {"base": 3, "sft": 2, "rl": 1}[run] == 0).astype(int)
        one = {"model": [model], "run": ("model", [run]), "step": ("model", [step]), "arm": ("model", [arm])}
        append_model(
            folder.outcomes,
            "outcomes",
            xr.Dataset(
                {
                    "correct": (("model", "prompt", "sample"), np.repeat(right[None, :, None], 2, axis=2)),
                    "completion_tokens": (("model", "prompt", "sample"), np.full((1, n, 2), 5)),
                    "format_class": (("model", "prompt", "sample"), np.full((1, n, 2), "answer")),
                    "greedy_correct": (("model", "prompt"), right[None]),
                    "greedy_tokens": (("model", "prompt"), np.full((1, n), 5)),
                    "greedy_class": (("model", "prompt"), np.full((1, n), "answer")),
                },
                coords=one | prompt_coords(prompts),
            ),
            provenance=PROVENANCE,
        )
        shape = (1, n, N_FEATURES)
        append_model(
            folder.features,
            "features",
            xr.Dataset(
                {
                    name: (("model", "prompt", "feature"), rng.gamma(1, 0.2, shape).astype("f4"))
                    for name in ("mean", "firing", "max")
                }
                | {
                    "n_tokens": (("model", "prompt"), np.full((1, n), 20)),
                    "fve": ("model", [0.93]),
                    "decoder_norm": (("view", "feature"), np.ones((3, N_FEATURES))),
                },
                coords=one
                | prompt_coords(prompts)
                | {"feature": np.arange(N_FEATURES), "view": ["base@0", "sft@150", "rl@80"]},
                attrs={
                    "readout": "swap",
                    "text_mode": "forced",
                    "crosscoder": "crosscoder-hash-cdef",
                    "scale": "contribution",
                },
            ),
            provenance=PROVENANCE,
        )
        pd.DataFrame(
            {
                "prompt": np.repeat(prompts["prompt_id"], 2),
                "sample": [-1, 0] * n,
                "text": [f"{run} says <b>so</b> & ends . ans {i}" for i in range(2 * n)],
                "n_tokens": 6,
                "correct": np.repeat(right.astype(bool), 2),
                "answered": np.arange(2 * n) % 4 != 1,
                "format_class": "answer",
            }
        ).to_parquet(folder.completions / f"{model}.parquet")
    contexts = [
        (
            feature,
            kind,
            rank + 1,
            model,
            "parity-0",
            "rl@80",
            3 + rank,
            4.2 - rank,
            f"step by <i>step</i> ⟦the⟧ sum of {rank}",
            0.1,
            0.2,
            0.3,
        )
        for feature in SELECTED
        for model in ("base@0", "sft@150", "rl@80")
        for kind in ("top", "quantile")
        for rank in range(3)
    ]
    columns = [
        "feature",
        "kind",
        "rank",
        "model",
        "prompt",
        "source",
        "position",
        "activation",
        "text",
        "activation:base@0",
        "activation:sft@150",
        "activation:rl@80",
    ]
    folder.crosscoder("main").mkdir(parents=True)
    pd.DataFrame(contexts, columns=columns).to_parquet(folder.crosscoder("main") / "contexts.parquet")
    logits = [
        (k, "rl@80", sign, rank, f"<t{sign * rank}>", 1.0) for k in SELECTED for sign in (1, -1) for rank in (2, 1)
    ]
    names = ["feature", "model", "sign", "rank", "token", "effect"]
    pd.DataFrame(logits, columns=names).to_parquet(folder.crosscoder("main") / "logits.parquet")
