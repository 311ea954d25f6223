"""A planted cause is found: by drift, by selection, and by editing the live model.

What must hold exactly is asked of a planted dictionary, which has one feature along the planted direction. Of trained
dictionaries only loose claims are made, over several initial weights: which features one training run learns hangs on
the last digits of its sums (tests/README.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import LlamaForCausalLM

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.stores import (
    Provenance,
    StudyFolder,
    open_activations,
    open_features,
    open_outcomes,
    open_results,
    read_json,
)
from rlgen_stats.toolkit.crosscoder import ArrayReader, Crosscoder, encode_features, load_crosscoder, train_replicates
from rlgen_stats.toolkit.statistics import SelectionRule, SelectionTests, select_features
from rlgen_stats.toolkit.study import read_spec, run_study
from tests.end_to_end.planted import LAYER, planted_dictionary, write_study
from tests.end_to_end.verdict_consistency import contradictions

pytestmark = pytest.mark.slow
SMALL = {"n_features": 96, "steps": 700, "batch_size": 512, "learning_rate": 3e-3}
VIEWS = ("base@0", "sft@2", "rl@2")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    write_study(
        root,
        crosscoders=[
            {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "k": 6, **SMALL},
            {"name": "pair-sft", "views": ["base@0", "sft@final"], "k": 6, **SMALL},
            {"name": "pair-rl", "views": ["base@0", "rl@final"], "k": 6, **SMALL},
        ],
        statistics={"n_resamples": 199, "n_bootstrap": 199, "n_halvings": 10, "top_k": 10},
        selection={"max_features": 4},
        intervention={
            **{"n_controls": 19, "max_prompts": 160, "doses": [0.0, 0.5, 2.0]},
            "accept_undecidable": True,  # all tasks are shifted alike: none is unrelated
        },
    )
    run_study(root)
    return root


@pytest.fixture(scope="module")
def shift(planted: Path) -> torch.Tensor:
    """What was added to the RL copy's residual stream."""
    models = (LlamaForCausalLM.from_pretrained(planted / "models" / name) for name in ("base", "rl-2"))
    base, rl = (model.model.layers[LAYER].mlp.down_proj.bias.detach() for model in models)
    return rl - base


@pytest.fixture(scope="module")
def dictionaries(planted: Path) -> list[Crosscoder]:
    """The study's own, and four trained from other initial weights on the same activations."""
    main = load_crosscoder(planted / "crosscoder/main")
    stored = open_activations(planted / "activations.zarr")["activation"].sel(model=list(VIEWS))
    rows = stored.transpose("token", "model", "channel").values[stored["position"].values >= 1]
    spec = CrosscoderSpec.model_validate(main.facts["spec"])
    reader = ArrayReader(rows, batch_size=spec.batch_size, seed=0)
    return [main, *train_replicates(reader, spec, views=VIEWS, seeds=[1, 2, 3, 4])]


def test_every_verdict_follows_from_the_studys_own_tables(planted: Path) -> None:
    assert contradictions(planted) == []


def features_and_selection(
    study: Path, crosscoder: Crosscoder, place: Path, *, max_features: int
) -> tuple[xr.Dataset, xr.Dataset]:
    """Base and the final models read with a dictionary, and what selection chooses from it."""
    place.mkdir()
    for name in ("models", "data", "activations.zarr", "outcomes.zarr"):
        (place / name).symlink_to(study / name)
    spec, folder = read_spec(study), StudyFolder(place)
    final = [run.model_copy(update={"checkpoints": {2: run.checkpoints[2]}}) for run in spec.runs]
    alone = spec.primary_crosscoder.model_copy(update={"replicates": 1})
    spec = spec.model_copy(update={"runs": tuple(final), "crosscoders": (alone,)})
    crosscoder.save(folder.crosscoder("main"))
    outcomes = open_outcomes(folder.outcomes)
    encode_features(spec, folder, provenance=Provenance(outcomes.attrs["study_id"], "planted"))
    features = open_features(folder.features).load()
    selection = select_features(
        features,
        outcomes,
        target="rl@2",
        rule=SelectionRule(max_features=max_features),
        tests=SelectionTests(n_resamples=199, n_bootstrap=199),
        stability=None,
    )
    return features, selection.load()


def test_behaviour_shows_what_was_planted(planted: Path) -> None:
    behaviour = open_results(planted / "results.zarr", "behaviour").load()
    accuracy = behaviour.accuracy.sel(task="first")
    assert abs(float(accuracy.sel(model="base@0")) - 0.5) < 0.1
    assert float(accuracy.sel(model="rl@2")) > 0.9
    assert int(behaviour.forgotten.sel(model="sft@2", task="first")) <= 1


def test_drift_finds_the_planted_run_and_not_the_copy(planted: Path) -> None:
    drift = open_results(planted / "results.zarr", "drift").load()
    called = (drift.call == "DRIFT").sum("feature")
    assert int(called.sel(model="sft@2")) == 0
    assert int(called.sel(model="rl@2")) > 0
    assert int(called.sel(model="rl@2")) > 0.5 * int(called.sel(model="rl@1"))


def test_selection_finds_the_planted_feature_of_a_planted_dictionary(
    planted: Path, shift: torch.Tensor, tmp_path: Path
) -> None:
    stored = open_activations(planted / "activations.zarr")["activation"]
    centre = torch.from_numpy(stored.sel(model="base@0").values.mean(axis=0))
    crosscoder = planted_dictionary(shift, centre, VIEWS)
    learned = crosscoder.feature_direction("rl@2")
    cosine = torch.nn.functional.cosine_similarity(learned, shift[None], dim=-1).numpy()
    assert cosine[0] > 0.99
    assert np.abs(np.delete(cosine, [0, len(shift)])).max() < 0.01
    _, selection = features_and_selection(planted, crosscoder, tmp_path / "study", max_features=1)
    assert np.flatnonzero(selection.selected).tolist() == [0]
    assert np.flatnonzero(selection.paper_selected).tolist() == [0]
    assert float(selection["rank"][0]) == 1
    assert selection.tier.values[0] == "CONFIRMED"
    effect = selection.verification_effect.values
    along = (effect[0] - effect[len(shift)]) / float(crosscoder.contribution_norm()[0])  # both ends of its axis
    assert along == pytest.approx(float(shift.norm()), rel=1e-3)
    assert np.delete(effect, [0, len(shift)]) == pytest.approx(0.0, abs=1e-4), "nothing else was planted"


def test_selected_features_carry_more_of_the_planted_direction_than_random_sets(
    planted: Path, shift: torch.Tensor, dictionaries: list[Crosscoder], tmp_path: Path
) -> None:
    """How much of the planted shift the set adds to the RL model's activations: the median of five dictionaries."""
    random, ratios = np.random.default_rng(0), []
    added = shift.numpy()
    for number, crosscoder in enumerate(dictionaries):
        features, selection = features_and_selection(planted, crosscoder, tmp_path / str(number), max_features=4)
        mean = features["mean"].where(features["split"] == "verification").mean("prompt")
        change = (mean.sel(model="rl@2") - mean.sel(model="base@0")).values / crosscoder.contribution_norm().numpy()
        decoded = change[:, None] * crosscoder.feature_direction("rl@2").numpy()  # [feature, channel]
        whole = decoded.sum(axis=0)
        assert whole @ added > 0.95 * np.linalg.norm(whole) * np.linalg.norm(added)
        share = decoded @ added / (added @ added)
        chosen = np.flatnonzero(selection.selected)
        directions = crosscoder.feature_direction("rl@2")[chosen]
        cosine = torch.nn.functional.cosine_similarity(directions, shift[None], dim=-1)
        assert float(cosine.max()) > 0.8, "one of the set points along the planted direction"
        others = np.setdiff1d(np.flatnonzero(features["firing"].sel(model="rl@2").sum("prompt")), chosen)
        sets = [share[random.choice(others, len(chosen), replace=False)].sum() for _ in range(999)]
        ratios.append(share[chosen].sum() / np.quantile(sets, 0.95))
    assert np.median(ratios) > 1.0, "the set carries more than 95% of random sets do"


def test_lowering_them_moves_the_live_copy_toward_base(planted: Path) -> None:
    """Set to base's level; zero, a dose of its own, is far from what either model has and may break the model."""
    results, lowered = planted / "results.zarr", []
    for group in ("trial-dictionary", "trial-dictionary.2", "trial-dictionary.3"):
        trial = open_results(results, group).load().sel(direction="disable")
        divergence = dict(zip(trial["condition"].values, trial.kl_to_base.values, strict=True))
        unedited = divergence["unedited"]
        assert unedited > 0.1
        assert divergence["passthrough"] == pytest.approx(unedited, rel=1e-4)
        assert divergence["steering"] < 0.1 * unedited, "one constant direction was planted: subtracting it undoes it"
        lowered.append(divergence["lower"] / unedited)
    assert np.median(lowered) < 0.97


def test_the_copy_that_did_not_change_is_reported_as_such(planted: Path) -> None:
    claims = {claim["id"]: claim for claim in read_json(planted / "report/report.json")["claims"]}
    movement = open_results(planted / "results.zarr", "movement").load()
    assert float(movement.activation_shift.sel(model="sft@2")) == pytest.approx(0, abs=1e-6)
    assert float(movement.activation_shift.sel(model="rl@2")) > 0.05
    assert claims["C1"]["verdict"] in ("UNDETERMINED", "CONTRADICTED", "NOT_SUPPORTED")


def test_one_constant_vector_is_found_to_explain_the_whole_difference(planted: Path) -> None:
    data = open_results(planted / "results.zarr", "separation").load()
    assert float(data["share"].sel(model="rl@2")) == pytest.approx(1.0, abs=1e-3)
    assert np.isnan(data["share"].sel(model="sft@2"))
    raw = data.sel(comparison="models")["auc"].sel(predictor=["raw", "mean shift"])
    assert (raw > 0.99).all()
    assert not data["beats_raw"].any()
    claims = {claim["id"]: claim for claim in read_json(planted / "report/report.json")["claims"]}
    assert any("is no news here" in caveat for caveat in claims["C3"]["caveats"])
