"""Experiments on families of features, on sets, on selection by outcome, and on causal verdicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from rlgen_stats.toolkit.intervention import Settings, judge
from rlgen_stats.toolkit.statistics.kernels import adjust, max_t, sign_flip_test
from rlgen_stats.toolkit.statistics.planning.planted_truth import Simulation
from rlgen_stats.toolkit.statistics.planning.power import Design, required_prompts
from rlgen_stats.toolkit.statistics.planning.power_check import simulated_power
from rlgen_stats.toolkit.statistics.planning.simulate import simulate_features
from rlgen_stats.toolkit.statistics.selection.options import SelectionTests
from rlgen_stats.toolkit.statistics.selection.select_features import select_features
from rlgen_stats.toolkit.statistics.timing.set_stability import set_stability
from tests.calibration.rows import Row, mean_row, rate_row
from tests.statistics.causal.worlds import world

ALPHA = 0.05
DEAD, GROUP = 0.3, 20


def _dependent(
    random: np.random.Generator, n: int, n_features: int, share: float, effect: float, group: int = GROUP
) -> tuple[np.ndarray, np.ndarray]:
    """Differences in groups that correlate .5, 30% dead, ``share`` of those alive with an effect (sd units)."""
    common = np.repeat(random.standard_normal((n, n_features // group)), group, axis=1)
    d = np.sqrt(0.5) * (common + random.standard_normal((n, n_features)))
    order = random.permutation(n_features)
    dead, true = np.split(order, [round(DEAD * n_features)])
    true = true[: round(share * len(true))]
    d[:, true] += effect
    d *= random.random((n, n_features)) < 0.5
    d[:, dead] = 0.0
    is_true = np.zeros(n_features, dtype=bool)
    is_true[true] = True
    return d, is_true


def false_discoveries(scale: int, seed: int) -> list[Row]:
    """FDR of every adjustment over families with dependent blocks and dead features."""
    rows = []
    for label, n_features, group, methods in (
        ("", 400, GROUP, ("bh", "by", "bky", "storey")),
        (", small family", 100, 10, ("bh", "storey")),
    ):
        n, worlds, q = 60, (120 if not label else 480) * scale, 0.1
        rates: dict[str, list[float]] = {name: [] for name in (*methods, "none")}
        for w in range(worlds):
            random = np.random.default_rng([seed, 10, n_features, w])
            d, true = _dependent(random, n, n_features, 0.1 if not label else 0.3, 0.8, group)
            p = np.asarray(sign_flip_test(d).p_value)
            for name in rates:
                rejected = np.nan_to_num(p if name == "none" else adjust(p, method=name, alpha=q), nan=1.0) <= q
                rates[name].append(float((rejected & ~true).sum() / max(1, rejected.sum())))
        size = f"{worlds:,} families of {n_features} features, {n} prompts, 30% dead, groups of {group} correlating .5"
        for name in methods:
            row = mean_row(
                f"FDR, {name.upper()}{label}",
                q,
                rates[name],
                size,
                at_most=True,
                naive=float(np.mean(rates["none"])),
                naive_name="uncorrected p <= .1",
                known="dependence" if label and name == "storey" else "",
            )
            rows.append(row)
    return rows


def family_wise(scale: int, seed: int) -> list[Row]:
    """Any false finding: max-T in one step and step-down, all null and with true effects."""
    n, n_features, worlds = 40, 200, 400 * scale
    size = f"{worlds:,} families of {n_features} features, {n} prompts, 30% dead, groups of {GROUP} correlating .5"
    rows = []
    for name, share in (("nothing true", 0.0), ("20% true", 0.2)):
        hits = np.zeros(3, dtype=np.int64)
        for w in range(worlds):
            d, true = _dependent(np.random.default_rng([seed, 11, w, int(100 * share)]), n, n_features, share, 0.9)
            result = max_t(d, n_resamples=511, seed=w)
            for i, p in enumerate((result.p_single_step, result.p_step_down, result.p_raw)):
                hits[i] += bool((p[~true] <= ALPHA).any())
        uncorrected = {"naive": hits[2] / worlds, "naive_name": "uncorrected p <= .05"}
        for i, step in enumerate(("single step", "step-down")):
            # With true effects a single step corrects for them too, and so stays below alpha.
            at_most = share > 0
            rows.append(
                rate_row(
                    f"FWER, max-T {step}, {name}", ALPHA, int(hits[i]), worlds, size, at_most=at_most, **uncorrected
                )
            )
    return rows


def outcome_selection(scale: int, seed: int) -> list[Row]:
    """No model difference, activations correlate .1 with correctness: paper score, contrast, whole selection."""
    trap = Simulation(
        n_prompts=1600,
        n_features=100,
        drifting=0,
        generalising=0,
        narrow=0,
        decoys=1,
        dead=0,
        gain=0,
        accuracy=0.5,
        outcome_correlation=0.1,
        density=1.0,
        icc=0,
        cluster_size=1,
        correlation=0,
        runs=1,
        checkpoints=1,
        tasks_in=1,
        tasks_out=0,
    )
    worlds = 10 * scale
    paper, guarded, confirmed, gains = [], [], 0, []
    for w in range(worlds):
        study = simulate_features(replace(trap, seed=1000 * seed + w))
        out = select_features(
            study.features,
            study.outcomes,
            target="rl1@20",
            tests=SelectionTests(n_resamples=499, n_bootstrap=19),
            seed=w,
        )
        paper.append((out.p_flip.values <= ALPHA).ravel())
        guarded.append((out.contrast_p.values <= ALPHA).ravel())
        confirmed += bool((out.tier == "CONFIRMED").any())
        gains.append(int(out.n_gain.values[0]))
    naive, n = float(np.mean(paper)), worlds * trap.n_features
    size = f"{n:,} features in {worlds} worlds, about {np.mean(gains):.0f} gains and as many losses"
    return [
        rate_row(
            "outcome selection: RL-specific contrast",
            ALPHA,
            int(np.sum(guarded)),
            n,
            size,
            naive=naive,
            naive_name="paper score, labels flipped",
        ),
        rate_row(
            "outcome selection: any CONFIRMED feature",
            ALPHA,
            confirmed,
            worlds,
            f"{worlds} worlds of 100 features",
            at_most=True,
            naive=naive,
            naive_name="paper score, labels flipped (per feature)",
        ),
    ]


def set_overlap(scale: int, seed: int) -> list[Row]:
    """The set of true changes is the same at every checkpoint; effects are strong, medium, weak."""
    n, n_features, k, worlds = 120, 200, 20, 16 * scale
    rows = []
    for name, effect in (("strong", 1.0), ("medium", 0.5), ("weak", 0.25)):
        delta, overlap = [], []
        for w in range(worlds):
            random = np.random.default_rng([seed, 12, w])
            truth = effect * np.abs(random.standard_normal(n_features))
            noise = random.standard_normal((3, n, n_features))
            mean = 20 + noise + np.array([0.0, 1.0, 1.0])[:, None, None] * truth
            result = set_stability(_features(mean), runs=["rl"], k=k, n_halvings=20, n_groups=8, seed=w)
            delta.append(float(result.delta[0]))
            overlap.append(float(result.overlap[0]))
        rows.append(
            mean_row(
                f"set change Delta, nothing moves, {name} effects",
                0.0,
                delta,
                f"{worlds} worlds, top {k} of {n_features}",
                naive=1 - float(np.mean(overlap)),
                naive_name="1 - plain top-k overlap",
            )
        )
    return rows


def _features(mean: np.ndarray) -> xr.Dataset:
    models = ["base@0", "rl@10", "rl@20"]
    n = mean.shape[1]
    dims = ("model", "prompt", "feature")
    return xr.Dataset(
        {
            "mean": (dims, mean),
            "firing": (dims, np.ones_like(mean)),
            "n_tokens": (dims[:2], np.full(mean.shape[:2], 8)),
        },
        coords={
            "model": models,
            "run": ("model", ["base", "rl", "rl"]),
            "step": ("model", [0, 10, 20]),
            "arm": ("model", ["base", "rl", "rl"]),
            "prompt": [f"p{i:04d}" for i in range(n)],
        },
        attrs={"scale": "contribution", "readout": "swap", "text_mode": "forced"},
    )


def random_sets(scale: int, seed: int) -> list[Row]:
    """The set is another random set and every edit hurts: CAUSAL_SPECIFIC at most alpha of the time."""
    worlds = 30 * scale
    settings = Settings(alpha=ALPHA, margin=0.05, n_resamples=199, seed=seed)
    specific, effects = 0, 0
    for w in range(worlds):
        random = np.random.default_rng([seed, 13, w])

        def hurt(draw: np.random.Generator) -> float:
            return float(np.clip(0.6 + 0.08 * draw.standard_normal(), 0.0, 1.0))

        level = hurt(random)
        table = world(
            right={"set": level},
            kl={"set": 0.3, "random": 0.3},
            random_right=hurt,
            seed=w,
            n_random=19,
        )
        result = judge(table, settings)
        specific += result.verdict == "CAUSAL_SPECIFIC"
        effects += result.requirements["v1"]
    return [
        rate_row(
            "random set called CAUSAL_SPECIFIC",
            ALPHA,
            specific,
            worlds,
            f"{worlds} trials, 19 random sets, 300 prompts",
            at_most=True,
            naive=effects / worlds,
            naive_name="effect alone (V1)",
        )
    ]


def planned_power(scale: int, seed: int) -> list[Row]:
    """Prompts planned for 90% power; naive: the same plan for independent prompts, or for one feature."""
    design = Design(effect=0.2, n_features=1024, true_share=0.02, density=0.5, icc=0.2, cluster_size=5)
    rows = []
    for control, naive_name, careless in (
        ("fdr", "planned as if prompts were independent", {"icc": 0.0}),
        ("fwer", "planned for one named feature", {"control": "none"}),
    ):
        one = replace(design, control=control)
        planned, wrong = (required_prompts(d, power=0.9).n_prompts for d in (one, replace(one, **careless)))
        result = simulated_power(one, n_prompts=planned, n_worlds=10 * scale, seed=seed)
        naive = simulated_power(one, n_prompts=wrong, n_worlds=10, seed=seed).power
        half = result.power_high - result.power
        rows.append(
            Row(
                f"power planned, {'BH' if control == 'fdr' else 'max-T'}",
                result.planned,
                result.power,
                result.planned - half,
                result.planned + half,
                naive,
                naive_name,
                f"{10 * scale} worlds of 1,024 features, {planned:,} prompts ({wrong:,} naively)",
            )
        )
    return rows
