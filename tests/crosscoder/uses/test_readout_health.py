"""The readout of one model is judged: planted weights whose numbers are known, and what a failed readout does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.study import Readout, StudySpec
from rlgen_stats.stores import StudyFolder, read_json, write_json
from rlgen_stats.stores.health_records import readout_accepted, unusable_readout
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    ReadoutHealth,
    health_dataset,
    judge_readout,
    measure_readout,
    require_healthy,
)
from rlgen_stats.toolkit.crosscoder.uses.readout_health import ARTEFACT_MAX, DFVE_MIN
from tests.crosscoder.planted import PAIR, Planted

MODELS = ("base@0", "sft@5", "sft@9")
WIDTH = 24


def shared_code(n_tokens: int = 3000, *, change: float = 0.5) -> tuple[Crosscoder, NDArray[np.float32]]:
    """A dictionary that is right about base and sft@9: one code, read alike in both, changed by ``change`` in sft@9.

    Base and sft share orthonormal directions; half of the features fire ``change`` more in sft@9, and half as much more
    in sft@5, which is no view.
    """
    random = np.random.default_rng(3)
    rows = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    code = np.where(random.random((n_tokens, WIDTH)) < 0.1, random.uniform(1, 2, (n_tokens, WIDTH)), 0.0)
    more = np.where(np.arange(WIDTH) < 12, change, 0.0) * (code > 0)
    noise = 0.01 * random.normal(size=(n_tokens, 3, WIDTH))
    data = np.stack([(code + share * more) @ rows for share in (0.0, 0.5, 1.0)], axis=1) + noise
    crosscoder = Crosscoder(PAIR, width=WIDTH, n_features=WIDTH, sparsity="batchtopk", k=2, name="planted")
    with torch.no_grad():
        crosscoder.encoder_matrix.copy_(torch.from_numpy(np.concatenate([rows.T, rows.T]) / 2))
        crosscoder.decoder_matrix.copy_(torch.from_numpy(np.concatenate([rows, rows], axis=1)))
        crosscoder.threshold.fill_(0.5 * 2)  # on f_k (|d_base| + |d_sft|), so f_k > .5
    return crosscoder.requires_grad_(False), data.astype(np.float32)


def judged(crosscoder: Crosscoder, data: NDArray[np.float32], readout: Readout) -> ReadoutHealth:
    models = measure_readout(crosscoder, ArrayReader(data, batch_size=100, seed=0), MODELS, readout=readout)
    return judge_readout(crosscoder, models, own_fve=1.0, contrasted=("sft@9",), readout=readout)


def test_a_sample_says_nearly_the_same() -> None:
    crosscoder, data = shared_code()
    reader = ArrayReader(data, batch_size=100, seed=0)
    every, some = (
        measure_readout(crosscoder, reader, MODELS),
        measure_readout(crosscoder, reader, MODELS, max_tokens=950),
    )
    assert {one.n_tokens for one in every} == {len(data)}
    assert {one.n_tokens for one in some} == {1000}, "whole batches"
    for sampled, whole in zip(some, every, strict=True):
        assert sampled.fve == pytest.approx(whole.fve, abs=0.01)
        assert sampled.fve != whole.fve
        assert sampled.l0 == pytest.approx(whole.l0, rel=0.05)
    assert some[2].dfve == pytest.approx(every[2].dfve, abs=0.01)


def test_numbers_equal_the_textbook(batchtopk: Crosscoder, world: Planted) -> None:
    base, final = world.data[:1500, 0], world.data[:1500, 1] / 3  # not the scale trained on
    data = np.stack([base, (base + final) / 2, final], axis=1)
    models = measure_readout(batchtopk, ArrayReader(data, batch_size=100, seed=0), MODELS, readout="own")
    assert [(one.model, one.view) for one in models] == list(zip(MODELS, (*PAIR, PAIR[1]), strict=True))
    f, back = {}, {}
    for slot, one in enumerate(models):
        raw = torch.from_numpy(np.ascontiguousarray(data[:, slot]))
        f[slot] = batchtopk.readout(raw, view=one.view, kind="own").double().numpy()
        back[slot] = batchtopk.reconstruct(torch.from_numpy(f[slot]).float(), one.view).double().numpy()
        x = data[:, slot].astype(float)
        assert one.fve == pytest.approx(1 - ((x - back[slot]) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), abs=1e-5)
        assert one.l0 == pytest.approx((f[slot] > 0).sum(axis=1).mean())
    raw_decoders = [batchtopk.feature_direction(view).double().numpy() for view in PAIR]
    base_as_sft = batchtopk.readout(torch.from_numpy(np.ascontiguousarray(base)), view=PAIR[1], kind="own").numpy()
    norm = np.sqrt((batchtopk.decoder.double().numpy() ** 2).sum(axis=(0, 2)))
    for slot, one in list(enumerate(models))[1:]:
        change = data[:, slot].astype(float) - base
        apart = [part - part.mean(0) for part in (data[:, 0].astype(float), data[:, slot].astype(float))]
        assert one.correlation == pytest.approx(np.corrcoef(apart[0].ravel(), apart[1].ravel())[0, 1], abs=1e-6)
        total = ((change - change.mean(0)) ** 2).sum()
        wanted = 1 - ((change - (back[slot] - back[0])) ** 2).sum() / total
        assert one.dfve == pytest.approx(wanted, abs=1e-4)
        by_code = (f[slot] - f[0]) @ (sum(raw_decoders) / 2)
        assert one.code_r2 == pytest.approx(1 - ((change - by_code) ** 2).sum() / total, abs=1e-4)
        artefact = (((base_as_sft - f[0]) * norm) ** 2).sum() / (((f[slot] - f[0]) * norm) ** 2).sum()
        assert one.artefact == pytest.approx(artefact, rel=1e-4)
    assert np.isnan([models[0].dfve, models[0].code_r2, models[0].artefact]).all()


def test_a_readout_that_tells_the_truth_passes() -> None:
    crosscoder, data = shared_code()
    health = judged(crosscoder, data, "swap")
    assert health.reasons == ""
    by_model = {one.model: one for one in health.models}
    assert by_model["sft@9"].dfve > 0.95
    assert by_model["sft@5"].dfve > 0.9
    assert by_model["sft@9"].code_r2 == pytest.approx(by_model["sft@9"].dfve, abs=1e-3)
    assert by_model["sft@9"].artefact == 0


def test_a_readout_that_invents_differences_fails() -> None:
    """Encoders that are turned apart: equal activations give other features in each model."""
    crosscoder, data = shared_code()
    crosscoder.means.zero_()
    crosscoder.encoder_matrix[:WIDTH] *= 2  # base's slot alone gives all of the code, sft's a quarter
    crosscoder.encoder_matrix[WIDTH:] *= 0.5
    health = judged(crosscoder, data, "own")
    assert health.models[2].artefact > ARTEFACT_MAX
    assert health.models[2].dfve < DFVE_MIN
    assert "of the difference in features between base and sft@9 arises on equal activations" in health.reasons
    assert "reconstructions explain -" in health.reasons


def test_models_of_two_bases_are_not_subtracted() -> None:
    """The same tokens and features in other directions, as another pretraining would leave them."""
    crosscoder, data = shared_code()
    turned = data.copy()
    turned[:, 2] = data[:, 2] @ np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
    health = judged(crosscoder, turned.astype(np.float32), "swap")
    assert abs(health.models[2].correlation) < 0.2
    assert "features of two bases cannot be subtracted" in health.reasons
    assert "sft@5" not in {check.view for check in health.checks if check.name == "one_base" and not check.ok}


def test_each_limit_is_noticed() -> None:
    crosscoder, data = shared_code()
    models = measure_readout(crosscoder, ArrayReader(data, batch_size=100, seed=0), MODELS)
    crosscoder.k = 4
    health = judge_readout(crosscoder, models, own_fve=1.3, contrasted=())
    assert {check.name for check in health.checks if not check.ok} == {"readout_fve", "readout_l0"}
    assert "L0 2." in health.reasons
    assert "expected 4 within 25% (and of 2 more)" in health.reasons
    assert "at least 1.040 needed, 80% of the dictionary's own 1.300 (and of 2 more)" in health.reasons
    crosscoder.k = 0  # an imported dictionary that does not say
    assert "readout_l0" not in {c.name for c in judge_readout(crosscoder, models, own_fve=1.0, contrasted=()).checks}
    still = data.copy()
    still[:, 2] = still[:, 0]  # no change at all: nothing to describe
    checks = judged(crosscoder, still, "swap").checks
    assert not any(check.name in ("readout_dfve", "readout_code_r2") and check.view == MODELS[2] for check in checks)


@pytest.mark.parametrize(("spread", "of_square"), [(0.05, True), (0.2, False)])
def test_a_change_that_is_one_constant_vector_is_judged_by_its_square(spread: float, of_square: bool) -> None:
    """Shift of length 1 on all tokens, varying by ``spread``: .05 is .25% of its square, .2 is 4%."""
    crosscoder, data = shared_code()
    shifted, draw = data.copy(), np.random.default_rng(0)
    shift = np.full(24, 24**-0.5) + spread * 24**-0.5 * draw.standard_normal((len(data), 24))
    shifted[:, 2] = shifted[:, 0] + shift
    rl = measure_readout(crosscoder, ArrayReader(shifted, batch_size=100, seed=0), MODELS)[2]
    read = [crosscoder.readout(torch.from_numpy(shifted[:, i])) for i in (0, 2)]
    back = [crosscoder.reconstruct(f, view).numpy() for f, view in zip(read, (MODELS[0], MODELS[2]), strict=True)]
    change = shifted[:, 2] - shifted[:, 0]
    whole = np.square(change if of_square else change - change.mean(axis=0)).sum()
    assert rl.dfve == pytest.approx(1 - np.square(change - (back[1] - back[0])).sum() / whole, rel=1e-4)


def test_models_of_another_width_are_refused() -> None:
    crosscoder, data = shared_code(200)
    with pytest.raises(
        InputError, match=r"must have one width, that of their views \[24, 24, 24\], got \[23, 23, 23\]"
    ):
        measure_readout(crosscoder, ArrayReader(data[:, :, :23], batch_size=100, seed=0), MODELS)


# -- in a study -------------------------------------------------------------------------------------------------------


def test_the_stage_judges_base_and_every_checkpoint(encoded: tuple[StudySpec, StudyFolder]) -> None:
    folder = encoded[1]
    readout = read_json(folder.crosscoder("main") / "health.json")["readout_models"]
    by_model = {one["model"]: one for one in readout["models"]}
    assert list(by_model) == ["base@0", "sft@2", "sft@4", "rl@2", "rl@4"]
    assert readout["contrasted"] == ["sft@4", "rl@4"]
    assert by_model["rl@2"]["view"] == "rl@4"
    assert "readout_models" not in read_json(folder.crosscoder("null") / "health.json")  # its features are not read
    table = validate(health_dataset(folder, ["main", "null"]), "health")
    assert table.dfve.sel(crosscoder="main", model="rl@2") == by_model["rl@2"]["dfve"]
    assert np.isnan(table.dfve.sel(crosscoder="null")).all()
    assert np.isnan(table.dfve.sel(crosscoder="main", model="base@0"))
    assert table.attrs["dfve_min"] == DFVE_MIN
    assert str(table.readout_reasons.sel(crosscoder="main").values) == readout["reasons"]
    assert readout["reasons"] in str(table.reasons.sel(crosscoder="main").values)


@pytest.fixture
def failing(encoded: tuple[StudySpec, StudyFolder], tmp_path: Path) -> StudyFolder:
    """A crosscoder that is healthy but for its readout."""
    folder = StudyFolder(tmp_path)
    shutil.copytree(encoded[1].crosscoder("main"), folder.crosscoder("main"))
    file = folder.crosscoder("main") / "health.json"
    record = read_json(file)
    record["readout_models"] |= {"healthy": False, "reasons": "dFVE too low"}
    write_json(file, record | {"healthy": True, "reasons": "ok"})
    return folder


def test_a_failed_readout_is_used_for_numbers_and_accepted_for_claims_by_encode_alone(failing: StudyFolder) -> None:
    place = failing.crosscoder("main")
    require_healthy(failing, {"main": False}, stage="encode", force=False)  # refused for other reasons only
    assert unusable_readout(place, accepted=False) == "dFVE too low"
    table = health_dataset(failing, ["main"])
    assert (bool(table.healthy[0]), str(table.reasons[0].values), bool(table.readout_accepted[0])) == (
        False,
        "dFVE too low",
        False,
    )
    assert unusable_readout(place, accepted=True) == ""
    require_healthy(failing, {"main": False}, stage="align", force=True)
    assert unusable_readout(place, accepted=False) == "dFVE too low"
    require_healthy(failing, {"main": False}, stage="encode", force=True)
    assert unusable_readout(place, accepted=False) == ""
    note = read_json(place / "accepted.json")
    assert (note["reasons"], note["by"], note["readout"]) == ("dFVE too low", "encode", "swap")
    require_healthy(failing, {"main": False}, stage="align", force=True)  # does not take it back
    assert readout_accepted(place)
    assert bool(health_dataset(failing, ["main"]).readout_accepted[0])
    record = read_json(place / "health.json")
    write_json(place / "health.json", record | {"readout": "own"})  # accepted was another readout
    assert unusable_readout(place, accepted=False) == "dFVE too low"
