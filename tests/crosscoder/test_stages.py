from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from rlgen_stats.schemas.dims import CHANNEL, TOKEN
from rlgen_stats.schemas.errors import InputError, StageError, StoreError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, committed_models, open_activations, open_features, open_tokens
from rlgen_stats.toolkit.crosscoder import (
    Crosscoder,
    SplicedText,
    encode_features,
    export_crosscoder,
    load_crosscoder,
    splice_ce,
    summarise_prompts,
    train_crosscoders,
)
from rlgen_stats.toolkit.crosscoder.data.text_bounds import spread, text_bounds
from rlgen_stats.toolkit.crosscoder.training import stage as stage_module
from rlgen_stats.toolkit.crosscoder.uses.encode import Prompts, summarise, view_of
from rlgen_stats.toolkit.extraction import find_model, load_model, load_tokenizer, token_mask
from tests.crosscoder.planted import LAYER, PROVENANCE, save_tokenizer, slow_contribution, study_spec, token_tables

Study = tuple[StudySpec, StudyFolder]
MODELS = ["base@0", "sft@2", "sft@4", "rl@2", "rl@4"]


# -- training stage ---------------------------------------------------------------------------------------------------


def test_stage_trains_all_on_the_declared_tokens_and_keeps_what_is_finished(
    encoded: Study, copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = copied
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    for name, views in (("main", ("base@0", "sft@4", "rl@4")), ("null", ("base@0", "base.repeat@0"))):
        crosscoder = load_crosscoder(folder.crosscoder(name))
        assert crosscoder.views == views
        tokens, _ = token_tables()
        assert crosscoder.facts["data_tokens"] == int((tokens["position"] >= 1).sum())
        same = load_crosscoder(encoded[1].crosscoder(name))
        assert same.weights_sha256 == crosscoder.weights_sha256  # the same study twice
    calls: list[str] = []
    monkeypatch.setattr(stage_module, "train_replicates", lambda *a, **k: calls.append("train"))
    monkeypatch.setattr(stage_module, "measure_health", lambda *a, **k: calls.append("health"))
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    assert calls == []
    (folder.crosscoder("null") / "health.json").unlink()
    monkeypatch.setattr(stage_module, "measure_health", real_health(calls))
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    assert calls == ["health"]


def real_health(calls: list[str]):  # type: ignore[no-untyped-def]
    from rlgen_stats.toolkit.crosscoder.uses.health import measure_health

    def call(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append("health")
        return measure_health(*args, **kwargs)

    return call


def test_changed_settings_train_again_and_only_those(encoded: Study, copied: Study) -> None:
    spec, folder = copied
    shutil.copytree(encoded[1].root / "crosscoder", folder.root / "crosscoder")
    before = {name: load_crosscoder(folder.crosscoder(name)).weights_sha256 for name in ("main", "null")}
    content = spec.model_dump(mode="json")
    content["crosscoders"][1]["steps"] = 20
    content["crosscoders"][0]["readout"] = "own"
    train_crosscoders(StudySpec.model_validate(content), folder, provenance=PROVENANCE)
    after = {name: load_crosscoder(folder.crosscoder(name)) for name in ("main", "null")}
    assert after["null"].weights_sha256 != before["null"]
    assert after["main"].weights_sha256 == before["main"]
    assert after["main"].default_readout == "own"
    assert json.loads((folder.crosscoder("main") / "health.json").read_text())["readout"] == "own"


def test_splice_of_the_joint_code_is_what_health_reports(
    encoded: Study, main: Crosscoder, activations: xr.Dataset
) -> None:
    record = json.loads((encoded[1].crosscoder("main") / "health.json").read_text())
    assert set(record["ce"]) == {"base@0", "sft@4", "rl@4"}
    tokens, _ = token_tables()
    raw = torch.from_numpy(activations.activation.sel(model=list(main.views)).transpose(TOKEN, "model", CHANNEL).values)
    back = main.decode(main.encode(raw * main.scale[:, None])).view(raw.shape) / main.scale[:, None]
    for slot, view in enumerate(main.views):
        rows = tokens.groupby(["source", "prompt"], sort=False).indices.values()
        texts = [
            SplicedText(tokens["token_id"].to_numpy()[i], back[i, slot].numpy(), tokens["position"].to_numpy()[i] >= 1)
            for i in rows
        ]
        model = load_model(find_model(view, *encoded))
        wanted = splice_ce(model, LAYER, texts, constant=main.mean[slot].numpy(), batch_size=7)
        found = record["ce"][view]
        assert found["n_tokens"] == wanted.n_tokens == int((tokens["position"] >= 1).sum()) - 90
        for name in ("clean", "spliced", "ablated"):
            assert found[name] == pytest.approx(getattr(wanted, name), rel=1e-5)
        assert found["increase"] == pytest.approx(found["spliced"] - found["clean"])


def test_stage_refuses_what_it_must(copied: Study) -> None:
    spec, folder = copied
    train_crosscoders(study_spec(crosscoders=[quick(spec, 0)]), folder, provenance=PROVENANCE)
    with pytest.raises(StoreError, match=r"crosscoder of another study \(tiny-study, this one is other\)"):
        train_crosscoders(spec, folder, provenance=replace(PROVENANCE, study_id="other"))
    shutil.rmtree(folder.activations / "rl@4")
    with pytest.raises(StoreError, match=r"lists the group\(s\) rl@4/block0, of which zarr.json is missing"):
        train_crosscoders(spec, folder, provenance=PROVENANCE)
    shutil.rmtree(folder.activations)
    with pytest.raises(StageError, match=r"run the extract stage before training"):
        train_crosscoders(spec, folder, provenance=PROVENANCE)


def quick(spec: StudySpec, index: int) -> dict[str, object]:
    return spec.crosscoders[index].model_dump(mode="json") | {"steps": 5}


# -- encoding ---------------------------------------------------------------------------------------------------------


def test_features_store_holds_every_model_but_the_repeat(encoded: Study, main: Crosscoder) -> None:
    features = validate(open_features(encoded[1].features), "features")
    assert list(features.model.values) == MODELS
    assert list(features.arm.values) == ["base", "sft", "sft", "rl", "rl"]
    assert features.attrs["readout"] == "swap"
    assert features.attrs["scale"] == "contribution"
    assert features.attrs["text_mode"] == "forced"
    assert features.attrs["crosscoder"] == main.weights_sha256
    np.testing.assert_allclose(features.decoder_norm.values, main.decoder_norm().numpy(), rtol=1e-6)
    _, prompts = token_tables()
    for name in ("prompt", "task", "domain", "split", "cluster"):
        assert list(features[name].values) == list(prompts[name])


def test_every_dictionary_is_encoded_in_a_store_of_its_own(encoded: Study) -> None:
    spec, folder = encoded
    names = spec.primary_crosscoder.names
    assert names == ("main", "main.2", "main.3")
    stores = [open_features(folder.features_of(number)).load() for number in (1, 2, 3)]
    for name, features in zip(names, stores, strict=True):
        crosscoder = load_crosscoder(folder.crosscoder(name))
        assert features.attrs["crosscoder"] == crosscoder.weights_sha256
        np.testing.assert_array_equal(features["decoder_norm"].values, crosscoder.decoder_norm().numpy())
        assert features["model"].values.tolist() == MODELS
    assert float(np.abs(stores[0]["mean"].values - stores[1]["mean"].values).max()) > 0.1
    assert not folder.features_of(4).exists()


def test_summaries_equal_a_loop_over_prompts(encoded: Study, main: Crosscoder, activations: xr.Dataset) -> None:
    features = open_features(encoded[1].features)
    tokens = open_tokens(encoded[1].activations)
    mask = token_mask(tokens, encoded[0].extraction, "summary")
    for model in ("base@0", "rl@2"):
        raw = activations.activation.sel(model=model).values.astype(np.float64)
        for prompt in ("p0", "p7", "p29"):
            rows = np.flatnonzero((tokens.prompt.values == prompt) & mask)
            x = np.array([slow_contribution(main, raw[row]) for row in rows])
            found = features.sel(model=model, prompt=prompt)
            assert int(found.n_tokens) == len(rows) > 10
            np.testing.assert_allclose(found["mean"], x.mean(axis=0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.firing, (x > 0).mean(axis=0), atol=1e-6)
            np.testing.assert_allclose(found["max"], x.max(axis=0), rtol=1e-4, atol=1e-5)
    assert float(features["mean"].max()) > 0.1


def test_histograms_count_every_summarised_token(encoded: Study, main: Crosscoder, activations: xr.Dataset) -> None:
    mask = token_mask(open_tokens(encoded[1].activations), encoded[0].extraction, "summary")
    prompts = Prompts(encoded[1].activations, mask)
    raw = activations.activation.sel(model="rl@4")
    table = summarise(main, raw, prompts, view="rl@4", readout="swap", block_tokens=37, histograms=True)
    counts = table.histogram.values
    assert (counts.sum(axis=2) == table.n_tokens.values[:, None]).all()
    rows = np.flatnonzero(prompts.codes(0, len(prompts)) == 7)
    x = np.array([slow_contribution(main, raw.values[row].astype(np.float64)) for row in rows])
    edges = table.bin.values[1:]
    for feature in np.argsort(-x.max(axis=0))[:5]:
        fired = x[:, feature][x[:, feature] > 0]
        assert counts[7, feature, 0] == len(rows) - len(fired)
        np.testing.assert_array_equal(counts[7, feature, 1:], np.histogram(fired, [*edges, np.inf])[0])
    stored = open_features(encoded[1].features).sel(model=["rl@4"])
    validate(stored.assign(histogram=table.histogram.expand_dims(model=["rl@4"])), "features")


def test_fve_is_of_the_readouts_reconstruction_in_the_models_slot(
    encoded: Study, main: Crosscoder, activations: xr.Dataset
) -> None:
    features = open_features(encoded[1].features)
    mask = token_mask(open_tokens(encoded[1].activations), encoded[0].extraction, "summary")
    for model, view in (("base@0", "base@0"), ("sft@2", "sft@4"), ("rl@4", "rl@4")):
        raw = activations.activation.sel(model=model).values[mask]
        f = main.readout(torch.from_numpy(raw))
        residual = raw - main.reconstruct(f, view).numpy()
        wanted = 1 - (residual**2).sum() / ((raw - raw.mean(axis=0)) ** 2).sum()
        assert float(features.fve.sel(model=model)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", ["swap", "own"])
def test_summaries_do_not_depend_on_the_block_size(
    encoded: Study, main: Crosscoder, activations: xr.Dataset, kind: str
) -> None:
    tokens = open_tokens(encoded[1].activations)
    prompts = Prompts(encoded[1].activations, token_mask(tokens, encoded[0].extraction, "summary"))
    raw = activations.activation.sel(model="rl@4").transpose(TOKEN, CHANNEL)
    tables = [
        summarise(main, raw, prompts, view="rl@4", readout=kind, block_tokens=size)  # type: ignore[arg-type]
        for size in (7, 100, 10_000)
    ]
    for table in tables[:2]:
        xr.testing.assert_allclose(table, tables[2], rtol=1e-5, atol=1e-6)


def test_a_prompt_without_summarised_tokens_is_missing_not_zero(
    encoded: Study, main: Crosscoder, activations: xr.Dataset
) -> None:
    tokens = open_tokens(encoded[1].activations)
    mask = token_mask(tokens, encoded[0].extraction, "summary") & (tokens.prompt.values != "p4")
    table = summarise(
        main,
        activations.activation.sel(model="base@0"),
        Prompts(encoded[1].activations, mask),
        view="base@0",
        readout="swap",
    )
    assert table.n_tokens.values[4] == 0
    assert np.isnan(table["mean"].values[4]).all()
    assert np.isnan(table.firing.values[4]).all()
    assert np.isfinite(table["mean"].values[[3, 5]]).all()


def test_encoding_resumes_and_refuses_another_crosscoder(encoded: Study, copied: Study) -> None:
    spec, folder = copied
    shutil.copytree(encoded[1].root / "crosscoder", folder.root / "crosscoder")
    shutil.move(folder.activations / "rl@4", folder.root / "hidden")
    with pytest.raises(StageError, match=r"lacks the activations of \['rl@4'\]; run the extract stage"):
        encode_features(spec, folder, provenance=PROVENANCE)
    shutil.move(folder.root / "hidden", folder.activations / "rl@4")

    class Stop(Exception):
        pass

    class StopAfterTwo:
        """Progress that dies after two models."""

        def task(self, *args: object, **kwargs: object) -> StopAfterTwo:
            self.left = 2
            return self

        def __enter__(self) -> StopAfterTwo:
            return self

        def __exit__(self, *exc: object) -> None:
            return None

        def skip(self, *args: object, **facts: object) -> None:
            pass

        def advance(self, *args: object, **facts: object) -> None:
            self.left -= 1
            if not self.left:
                raise Stop

        def log(self, message: str) -> None:
            pass

    with pytest.raises(Stop):
        encode_features(spec, folder, provenance=PROVENANCE, progress=StopAfterTwo())
    assert committed_models(folder.features) == MODELS[:2]
    encode_features(spec, folder, provenance=PROVENANCE)
    xr.testing.assert_equal(open_features(folder.features).load(), open_features(encoded[1].features).load())
    other = load_crosscoder(folder.crosscoder("main"))
    other.encoder_bias += 0.1
    other.save(folder.crosscoder("main"))
    with pytest.raises(StoreError, match=r"features of different crosscoders are never mixed"):
        encode_features(spec, folder, provenance=PROVENANCE)


def test_the_slot_of_a_model() -> None:
    views = ("base@0", "sft@4", "rl@4")
    assert [view_of(m, views) for m in ("rl@4", "rl@2", "other@9", "base@0")] == ["rl@4", "rl@4", "base@0", "base@0"]
    assert view_of("other@9", ("sft@4", "rl@4")) == "sft@4"


def test_text_bounds_and_spread() -> None:
    tokens = xr.Dataset(
        coords={
            "prompt": ("token", ["a", "a", "b", "b", "b", "a"]),
            "source": ("token", ["m", "m", "m", "m", "m", "m"]),
            "position": ("token", [0, 1, 0, 1, 0, 0]),
        }
    )
    assert text_bounds(tokens).tolist() == [[0, 2], [2, 4], [4, 5], [5, 6]]
    assert spread(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread(101, 3).tolist() == [0, 50, 100]


def test_tokenizer_of_the_fixture_round_trips(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("what is 2 plus 3")["input_ids"] == [5, 6, 10, 4, 11]


# -- weights trained elsewhere ----------------------------------------------------------------------------------------


def with_weights(spec: StudySpec, **changes: object) -> StudySpec:
    content = spec.model_dump(mode="json")
    content["crosscoders"] = [content["crosscoders"][0] | {"replicates": None} | changes]
    return StudySpec.model_validate(content)


@pytest.mark.parametrize("layout", ["ours", "theirs"])
def test_weights_trained_elsewhere_are_used_instead_of_training(
    encoded: Study, copied: Study, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = copied
    trained = load_crosscoder(encoded[1].crosscoder("main"))
    source = folder.root / "elsewhere"
    if layout == "ours":
        trained.save(source)
    else:
        export_crosscoder(trained, source)
    train_crosscoders(with_weights(spec, weights="elsewhere"), folder, provenance=PROVENANCE)
    taken = load_crosscoder(folder.crosscoder("main"))
    assert taken.views == ("base@0", "sft@4", "rl@4")
    assert taken.facts["study_id"] == PROVENANCE.study_id
    torch.testing.assert_close(taken.decoder_matrix, trained.decoder_matrix)
    torch.testing.assert_close(taken.means, trained.means)
    assert json.loads((folder.crosscoder("main") / "health.json").read_text())["n_tokens"] > 100
    monkeypatch.setattr(stage_module, "measure_health", lambda *a, **k: pytest.fail("measured again"))
    train_crosscoders(with_weights(spec, weights="elsewhere"), folder, provenance=PROVENANCE)


def test_weights_that_do_not_fit_the_study_are_refused(encoded: Study, copied: Study) -> None:
    spec, folder = copied
    trained = load_crosscoder(encoded[1].crosscoder("main"))
    trained.save(folder.root / "elsewhere")
    with pytest.raises(StoreError, match=r"has 48 features, but study.yaml says n_features: 64"):
        train_crosscoders(with_weights(spec, weights="elsewhere", n_features=64), folder, provenance=PROVENANCE)
    turned = with_weights(spec, weights="elsewhere", views=["sft@final", "base@0", "rl@final"])
    with pytest.raises(StoreError, match=r"they must be the same in the same order"):
        train_crosscoders(turned, folder, provenance=PROVENANCE)
    with pytest.raises(InputError, match=r"there is nothing at .*fix the path"):
        train_crosscoders(with_weights(spec, weights="nowhere"), folder, provenance=PROVENANCE)
    with pytest.raises(ValueError, match="weights trained elsewhere have no replicates here"):
        with_weights(spec, weights="elsewhere", replicates=2)


# -- joint readout ----------------------------------------------------------------------------------------------------


def test_joint_readout_is_the_joint_code_weighed_by_the_views_own_norm(encoded: Study, main: Crosscoder) -> None:
    spec, folder = encoded
    mask = token_mask(open_tokens(folder.activations), spec.extraction, purpose="summary")
    site = "block0"
    stored = open_activations(folder.activations)["activation"]

    def joint(model: str, view: str) -> np.ndarray:
        slots = [model if name == view else name for name in main.views]
        raw = [torch.from_numpy(stored.sel(model=name).values) for name in slots]
        f = main.encode(main.normalise(raw)).numpy() * main.decoder_norm()[main.view_index(view)].numpy()
        prompts = np.asarray(open_tokens(folder.activations)["prompt"])
        return np.stack([f[mask & (prompts == name)].mean(axis=0) for name in dict.fromkeys(prompts)])

    for model, view in (("rl@4", "rl@4"), ("rl@2", "rl@4"), ("base@0", "base@0")):
        found = summarise_prompts(main, folder.activations, site, mask, model=model, readout="joint")
        np.testing.assert_allclose(found["mean"].values, joint(model, view), rtol=1e-4, atol=1e-5)
    other = summarise_prompts(main, folder.activations, site, mask, model="rl@4", readout="swap")
    assert not np.allclose(other["mean"], joint("rl@4", "rl@4"), rtol=0.01)
