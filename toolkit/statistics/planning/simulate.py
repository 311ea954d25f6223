"""Simulated studies: feature and outcome stores with known truth, to check error rates and plan sample size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import BASE_MODEL, MODEL, model_id
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores import Provenance, append_model, committed_models, place, result_groups, write_results
from rlgen_stats.stores.tables import check_owner
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.core.own_arrays import features_dataset, outcomes_dataset
from rlgen_stats.toolkit.statistics.planning.planted_truth import (
    ARMS,
    DIFFICULTY_SHARE,
    LEVEL,
    MODEL_SHARE,
    STEPS,
    PlantedTruth,
    Simulation,
    generator,
    plant_truth,
    truth_table,
)

BLOCK: Final = 512
"""Features generated together, each block from streams of its own: the chunk size of features.zarr."""

TOKENS: Final = 64
"""Tokens of every prompt."""

N_SUMMARIES: Final = 3
"""Mean, firing share and maximum of a prompt's tokens."""


@dataclass(frozen=True)
class SimulatedStudy:
    """A simulated study and its planted truth."""

    features: xr.Dataset
    """Layout ``features``, lazy."""
    outcomes: xr.Dataset
    """Layout ``outcomes``."""
    truth: xr.Dataset
    """``kind`` [feature]; ``d_z`` and ``mean_change`` [model, feature]; ``settles_at`` [arm, feature]."""


@dataclass(frozen=True)
class WrittenStudy:
    """Stores of a simulated study."""

    features: str
    outcomes: str
    results: str
    """Holds the group ``truth``."""
    n_models: int
    n_resumed: int
    """Models that an earlier call had written."""


def simulate_features(simulation: Simulation) -> SimulatedStudy:
    """Generate features and outcomes of a study whose true changes are known.

    Parameters
    ----------
    simulation
        Sizes, effects, dependence and seed.

    Returns
    -------
    SimulatedStudy
        Features (float32, lazy, one chunk per model and 512 features), outcomes, and the planted truth.

    Notes
    -----
    A feature fires on a share ``density`` of the clusters of prompts. Where it fires its prompt mean is
    scale (4 + z + e + shift + correct_shift (correct - accuracy)), cut at zero: z is the prompt's, the same in every
    model; e differs between models; ``shift`` is the planted change against base; ``correct_shift`` is zero but for
    decoys.
    Both z and e are normal with correlation ``icc`` within clusters and ``correlation`` within groups of features.
    Given the prompt, the values of two models without planted change are exchangeable, so every paired difference is
    symmetric about zero: the sign-flip null holds exactly. A greedy completion is correct where the prompt's difficulty
    plus noise of model and prompt is below the model's threshold. Every value depends on the seed, the model and the
    block of 512 features alone, not on what is computed, in which order, or by how many workers.

    Decoys without planted changes (``generalising=narrow=drifting=0``) show the confounding of docs/method.md 4c: the
    models do not differ, and yet decoys differ between them on prompts selected because base is wrong
    and the target right.

    Not a model of real activations: normal where a feature fires, one density and one effect size for all features.

    Examples
    --------
    >>> study = simulate_features(Simulation(n_prompts=80, n_features=64, runs=1, checkpoints=1, seed=1))
    >>> dict(study.features.sizes)["model"], int((study.truth.kind == "drifting").sum())
    (3, 6)
    """
    planted, models = plant_truth(simulation), simulation.models
    correct, samples = _outcomes(simulation, planted)
    stacks = {model: _model_array(simulation, planted, correct[m], m) for m, model in enumerate(models)}
    mean, firing, largest = ({model: stack[v] for model, stack in stacks.items()} for v in range(N_SUMMARIES))
    views = [BASE_MODEL, *(model_id(f"{arm}1", STEPS * simulation.checkpoints) for arm in ARMS)]
    shared: dict[str, Any] = {"prompts": pd.DataFrame(planted.labels), "arms": simulation.arms}
    features = features_dataset(
        mean,
        firing=firing,
        maximum=largest,
        n_tokens=dict.fromkeys(models, np.full(simulation.n_prompts, TOKENS)),
        fve=dict.fromkeys(models, 0.9),
        decoder_norm=dict.fromkeys(views, np.ones(simulation.n_features)),
        scale="contribution",
        readout="swap",
        text_mode="forced",
        crosscoder="simulated",
        **shared,
    )
    outcomes = outcomes_dataset(
        dict(zip(models, correct, strict=True)), samples=dict(zip(models, samples, strict=True)), **shared
    )
    provenance = _provenance(simulation).attrs()
    return SimulatedStudy(
        features.assign_attrs(provenance),
        outcomes.assign_attrs(provenance),
        truth_table(simulation, planted).assign_attrs(asdict(simulation)),
    )


def write_simulation(folder: Path | str, simulation: Simulation, *, progress: Progress = SILENT) -> WrittenStudy:
    """Write a simulated study to ``features.zarr``, ``outcomes.zarr`` and the group ``truth`` of ``results.zarr``.

    Parameters
    ----------
    folder
        Folder or URL; made if it does not exist. Models committed by an interrupted call are kept.
    simulation
        Sizes, effects, dependence and seed.
    progress
        Where progress is reported.

    Returns
    -------
    WrittenStudy
        Paths of the stores, and how many models were written before.

    Raises
    ------
    StoreError
        If the folder holds stores of another simulation.
    OutOfSpaceError
        If the disk is full; committed models stay.

    Examples
    --------
    >>> write_simulation("planted", Simulation(n_prompts=400, seed=1))  # doctest: +SKIP
    """
    root = place(folder)
    provenance = _provenance(simulation)
    paths = {name: root / f"{name}.zarr" for name in ("features", "outcomes", "results")}
    done = {name: committed_models(paths[name]) for name in ("features", "outcomes")}
    for name in ("features", "outcomes"):
        if done[name]:
            check_owner(paths[name], provenance)
    study = simulate_features(simulation)
    tables = {"features": study.features, "outcomes": study.outcomes}
    with progress.task("simulate", total=len(simulation.models), unit="model") as task:
        for m, model in enumerate(simulation.models):
            for name, table in tables.items():
                if model not in done[name]:
                    append_model(paths[name], name, table.isel({MODEL: [m]}), provenance=provenance)
            task.advance(1, model=model)
    if "truth" not in result_groups(paths["results"]):
        write_results(paths["results"], "truth", study.truth, provenance=provenance)
    return WrittenStudy(
        features=str(paths["features"]),
        outcomes=str(paths["outcomes"]),
        results=str(paths["results"]),
        n_models=len(simulation.models),
        n_resumed=len(done["features"]),
    )


def _provenance(simulation: Simulation) -> Provenance:
    key = content_hash(asdict(simulation))
    return Provenance(key, key, {"simulation": asdict(simulation)})


def _outcomes(simulation: Simulation, planted: PlantedTruth) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Greedy [model, prompt] and sampled [model, prompt, sample] correctness."""
    n, k = simulation.n_prompts, simulation.samples
    difficulty = _clustered(generator(simulation, "difficulty"), simulation, 1, 1)[:, 0]
    greedy, sampled = [], []
    for m, model in enumerate(simulation.models):
        random = generator(simulation, "luck", model)
        model_noise, sample_noise = random.standard_normal(n), random.standard_normal((n, k))
        threshold = stats.norm.ppf(_accuracy(simulation, planted, m))
        common = np.sqrt(DIFFICULTY_SHARE) * difficulty
        greedy.append(common + np.sqrt(1 - DIFFICULTY_SHARE) * model_noise < threshold)
        noise = np.sqrt((1 - DIFFICULTY_SHARE) / 2) * (model_noise[:, None] + sample_noise)
        sampled.append(common[:, None] + noise < threshold[:, None])
    return np.stack(greedy), np.stack(sampled)


def _accuracy(simulation: Simulation, planted: PlantedTruth, m: int) -> NDArray[np.float64]:
    """[prompt] chance of a correct answer: rl gains everywhere, sft in domain, in proportion to training."""
    if m == 0:
        return np.full(simulation.n_prompts, simulation.accuracy)
    run, checkpoint = divmod(m - 1, simulation.checkpoints)
    gained = simulation.gain * (checkpoint + 1) / simulation.checkpoints
    is_rl = run >= simulation.runs  # runs are in order of arm, sft first
    return np.asarray(simulation.accuracy + gained * (planted.in_domain | is_rl), dtype=np.float64)


def _model_array(simulation: Simulation, planted: PlantedTruth, correct: NDArray[np.bool_], m: int) -> da.Array:
    """[variable, prompt, feature] of one model, lazily."""
    blocks = []
    for start in range(0, simulation.n_features, BLOCK):
        part = slice(start, min(start + BLOCK, simulation.n_features))
        # A partial, so that dask neither searches the arguments for graphs nor hashes them.
        call = dask.delayed(partial(_block, simulation, planted, correct, m, part), pure=False)
        shape = (N_SUMMARIES, simulation.n_prompts, part.stop - part.start)
        blocks.append(da.from_delayed(call(), shape, dtype=np.float32))
    return da.concatenate(blocks, axis=2)


def _block(
    simulation: Simulation, planted: PlantedTruth, correct: NDArray[np.bool_], m: int, part: slice
) -> NDArray[np.float32]:
    """Mean, firing share and maximum of a block of features, [variable, prompt, feature]."""
    block, width = part.start // BLOCK, part.stop - part.start
    prompts = generator(simulation, "prompts", block=block)
    n_clusters = -(-simulation.n_prompts // simulation.cluster_size)
    chance = prompts.random((n_clusters, width), dtype=np.float32)
    cluster = np.arange(simulation.n_prompts) // simulation.cluster_size
    # Where it fires, chance / density is uniform: one to 16 tokens, equally often.
    share = np.ceil(16 * chance / simulation.density) / TOKENS  # tokens it fires on, where it fires
    share[(chance >= simulation.density) | (planted.kind[part] == "dead")] = 0.0
    firing = np.maximum(share, 0.0)[cluster]
    x = _clustered(prompts, simulation, width, simulation.group)
    x *= np.float32(np.sqrt(1 - MODEL_SHARE))
    model_random = generator(simulation, "model", simulation.models[m], block=block)
    model_noise = _clustered(model_random, simulation, width, simulation.group)
    model_noise *= np.float32(np.sqrt(MODEL_SHARE))
    x += model_noise
    x += np.float32(LEVEL)
    x += _planted_change(planted, m, part)
    if planted.correct_shift[part].any():
        x += (correct - np.float32(simulation.accuracy))[:, None].astype(np.float32) * planted.correct_shift[part]
    x *= planted.scale[part] * (firing > 0)
    np.maximum(x, 0.0, out=x)
    largest = np.divide(1.5 * x, firing, out=np.zeros_like(x), where=firing > 0)
    return np.stack([x, firing, largest])


def _planted_change(planted: PlantedTruth, m: int, part: slice) -> NDArray[np.float32]:
    """Planted shift [prompt, feature], or [feature] where it is the same on every prompt."""
    shift = planted.shift[m, part]
    narrow = planted.kind[part] == "narrow"
    if not narrow.any():
        return shift
    return np.where(~narrow | planted.in_domain[:, None], shift, np.float32(0.0))


def _clustered(random: np.random.Generator, simulation: Simulation, width: int, group: int) -> NDArray[Any]:
    """Standard normal noise [prompt, feature], correlated within clusters of prompts and groups of features."""
    n, rho, icc = simulation.n_prompts, simulation.correlation, simulation.icc
    cluster = np.arange(n) // simulation.cluster_size
    noise = _grouped(random, n, width, group, rho)
    if icc == 0:
        return noise
    noise *= np.float32(np.sqrt(1 - icc))
    shared = _grouped(random, int(cluster[-1]) + 1, width, group, rho)
    shared *= np.float32(np.sqrt(icc))
    noise += shared[cluster]
    return noise


def _grouped(random: np.random.Generator, n: int, width: int, group: int, rho: float) -> NDArray[Any]:
    noise = random.standard_normal((n, width), dtype=np.float32)
    if rho == 0 or group == 1:
        return noise
    noise *= np.float32(np.sqrt(1 - rho))
    common = random.standard_normal((n, -(-width // group)), dtype=np.float32)
    common *= np.float32(np.sqrt(rho))
    noise += np.repeat(common, group, axis=1)[:, :width]
    return noise
