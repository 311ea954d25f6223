"""What controls are matched on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from rlgen_stats.schemas.dims import FEATURE, MODEL, PROMPT, SPLIT
from rlgen_stats.schemas.errors import InputError, NotEstimableError, StoreCorruptError, StoreError
from rlgen_stats.stores import read_json, write_json
from rlgen_stats.stores.crosscoder_weights import read_decoder
from rlgen_stats.toolkit.intervention import feature_covariates, near_duplicates
from rlgen_stats.toolkit.statistics.causal.covariates import decoder_of, mean_levels
from tests.edits.tiny import BASE, N_FEATURES, RL, tiny_crosscoder

SPLIT_OF_PROMPTS = ["selection"] * 3 + ["verification"] + ["trial"] * 3


def summaries(n_prompts: int = 7) -> xr.Dataset:
    draw = np.random.default_rng(2)
    shape = (2, n_prompts, N_FEATURES)
    return xr.Dataset(
        {
            "mean": ((MODEL, PROMPT, FEATURE), draw.random(shape, dtype=np.float32)),
            "firing": ((MODEL, PROMPT, FEATURE), draw.random(shape, dtype=np.float32)),
            "n_tokens": ((MODEL, PROMPT), draw.integers(1, 40, shape[:2])),
        },
        coords={MODEL: [BASE, RL]},
    )


def test_covariates_by_hand() -> None:
    crosscoder, data = tiny_crosscoder(), summaries()
    covariates = feature_covariates(crosscoder, data, models=[BASE, RL], view=RL)
    fired = total = energy = 0.0
    k = 3
    for m in range(2):
        for p in range(7):
            tokens = float(data["n_tokens"][m, p])
            fired += float(data["firing"][m, p, k]) * tokens
            total += tokens
            energy += float(data["mean"][m, p, k]) ** 2 / 14
    norms = [float(crosscoder.decoder[v, k].norm()) for v in range(3)]
    assert float(covariates["log_firing"][k]) == pytest.approx(np.log(fired / total), rel=1e-6)
    assert float(covariates["contribution_energy"][k]) == pytest.approx(np.log(energy), rel=1e-6)
    assert float(covariates["decoder_norm"][k]) == pytest.approx(float(np.linalg.norm(norms)), rel=1e-6)
    share = norms[2] / sum(norms) * 3
    assert int(covariates["mas_bin"][k]) == sum(share >= edge for edge in (0.5, 0.8, 1.25, 2.0))
    with pytest.raises(InputError, match=r"lack \['rl@9'\]"):
        feature_covariates(crosscoder, data, models=["rl@9"], view=RL)
    with pytest.raises(InputError, match="23 features"):
        feature_covariates(crosscoder, data.isel({FEATURE: slice(0, 23)}), models=[RL], view=RL)


def test_near_duplicates_in_one_view_are_found() -> None:
    crosscoder = tiny_crosscoder()
    with torch.no_grad():
        crosscoder.decoder[1, 8] = 3 * crosscoder.decoder[1, 2] + 0.1
        crosscoder.decoder[:, 9] = -crosscoder.decoder[:, 2]
    covariates = near_duplicates(crosscoder, [2])
    assert covariates[[2, 8]].all()
    assert not covariates[9], "an opposite direction is no duplicate"
    assert covariates.sum() < N_FEATURES / 2


def test_levels_undo_the_contribution_scale() -> None:
    decoder, data = decoder_of(tiny_crosscoder()), summaries().assign_coords({SPLIT: (PROMPT, SPLIT_OF_PROMPTS)})
    levels = mean_levels(decoder, data, model=RL)
    k, tokens, total = 5, 0.0, 0.0
    for p in range(4):  # the prompts of the selection split
        tokens += float(data["n_tokens"][1, p])
        total += float(data["mean"][1, p, k]) * float(data["n_tokens"][1, p])
    assert levels[k] == pytest.approx(total / tokens / np.linalg.norm(decoder.rows[k].astype(float)), rel=1e-6)
    with pytest.raises(InputError, match=r"summaries lack \['rl@9'\]"):
        mean_levels(decoder, data, model="rl@9")


def test_levels_need_prompts_that_no_trial_uses() -> None:
    data = summaries().assign_coords({SPLIT: (PROMPT, ["trial"] * 7)})
    with pytest.raises(NotEstimableError, match="levels of features are measured on prompts not kept"):
        mean_levels(tiny_crosscoder(), data, model=RL)


@pytest.mark.parametrize("width", [16, 40, 13])
def test_a_decoder_read_from_its_file_has_the_norms_that_torch_computes(tmp_path: Path, width: int) -> None:
    """Bit by bit for widths of whole vector registers, as all models have: levels of stored arms hang on it."""
    crosscoder = tiny_crosscoder(width=width)
    crosscoder.save(tmp_path)
    decoder = read_decoder(tmp_path)
    assert (decoder.name, decoder.views, decoder.widths) == (crosscoder.name, crosscoder.views, crosscoder.widths)
    assert decoder.weights_sha256 == crosscoder.weights_sha256
    for norms, by_torch in (
        (decoder.norms(), crosscoder.contribution_norm()),
        (decoder.view_norms(), crosscoder.decoder_norm()),
    ):
        if width % 8 == 0:
            np.testing.assert_array_equal(norms, by_torch.double().numpy())
        np.testing.assert_allclose(norms, by_torch.double().numpy(), rtol=3e-7)
    for a, b in zip(decoder.by_view(), crosscoder.split(crosscoder.decoder_matrix), strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def test_decoders_that_are_not_what_was_saved_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no finished crosscoder: spec\.json is missing"):
        read_decoder(tmp_path)
    tiny_crosscoder().save(tmp_path)
    described = read_json(tmp_path / "spec.json")
    write_json(tmp_path / "spec.json", described | {"n_features": 7})
    with pytest.raises(StoreError, match=r"must have shape \(7, 48\).*do not belong together"):
        read_decoder(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(StoreCorruptError, match="is not the file that was saved"):
        read_decoder(tmp_path)
