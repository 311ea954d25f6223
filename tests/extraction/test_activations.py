import filecmp
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rlgen_stats.schemas.errors import InputError, StageError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import ExtractionSpec, StudySpec
from rlgen_stats.stores import (
    Provenance,
    StudyFolder,
    complete_models,
    create_activations,
    open_activations,
    open_tokens,
)
from rlgen_stats.stores import creation as store
from rlgen_stats.stores import writer as writer_module
from rlgen_stats.stores.study_models import list_models
from rlgen_stats.toolkit.extraction import (
    LayerStore,
    activations,
    extract_activations,
    load_model,
    load_prompts,
    load_tokenizer,
    read_completions,
    token_mask,
)
from rlgen_stats.toolkit.extraction.activations import (
    contrasted_models,
    forced_texts,
    plan_windows,
    read_texts,
    token_table,
)
from tests.extraction.conftest import study_spec

Study = tuple[StudySpec, StudyFolder]


def test_every_model_reads_the_texts_as_generated(sampled: Study, provenance: Provenance) -> None:
    """Against one plain forward pass a text, without padding, by ``output_hidden_states``."""
    spec, folder = sampled
    extract_activations(spec, folder, provenance=provenance)
    stored = open_activations(folder.activations).load()
    assert list(stored.model.values) == sorted(["base@0", "sft@3", "sft@6", "rl@4", "rl@8", "base.repeat@0"])
    assert stored.attrs["site"] == "block1"
    tokenizer, prompts = load_tokenizer(list_models(spec, folder)[0]), load_prompts(spec, folder)
    for source in ("base@0", "sft@6", "rl@8"):
        drawn = read_completions(folder, source).set_index(["prompt", "sample"])
        for prompt, words in zip(prompts.prompt, prompts.text, strict=True):
            here = stored.isel(token=np.flatnonzero((stored.source == source) & (stored.prompt == prompt)))
            given, written = tokenizer(words)["input_ids"], list(drawn.loc[(prompt, 0), "token_ids"])
            assert here.token_id.values.tolist() == given + written
            assert here.position.values.tolist() == list(range(len(given + written)))
            assert here.segment.values.tolist() == ["prompt"] * len(given) + ["completion"] * len(written)
    for ref in list_models(spec, folder):
        model = load_model(ref)
        for source, prompt in (("base@0", "p0"), ("sft@6", "p5"), ("rl@8", "p11")):
            here = stored.isel(token=np.flatnonzero((stored.source == source) & (stored.prompt == prompt)))
            ids = torch.tensor(here.token_id.values)[None].long()
            plain = model(ids, output_hidden_states=True).hidden_states[2][0].numpy()
            np.testing.assert_allclose(here.activation.sel(model=ref.model), plain, rtol=1e-4, atol=2e-5)


def test_sources_are_base_and_the_contrasted_finals(study: Study) -> None:
    spec, folder = study
    assert contrasted_models(spec, folder) == ("base@0", "sft@6", "rl@8")
    assert contrasted_models(study_spec(contrast=["rl", "sft"]), folder) == ("base@0", "rl@8", "sft@6")


def test_the_base_is_read_again_in_other_batches_and_differs_by_rounding_at_most(
    sampled: Study, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[tuple[Any, ...]] = []

    def spy(lengths: Any, *how: Any) -> Any:
        plans.append(how)
        return plan_windows(lengths, *how)

    monkeypatch.setattr(activations, "plan_windows", spy)
    extract_activations(*sampled, provenance=provenance)
    assert plans == [(4, 128, None)] * 5 + [(4, 128, derive_seed(7, "repeat"))]
    stored = open_activations(sampled[1].activations).activation
    once, again = stored.sel(model="base@0").values, stored.sel(model="base.repeat@0").values
    np.testing.assert_allclose(once, again, rtol=1e-4, atol=2e-5)  # equal to the bit on some machines, not on others
    assert not np.allclose(once, stored.sel(model="sft@3").values, atol=0.1)


def test_an_interrupted_extraction_ends_with_the_same_bytes(
    sampled: Study, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = sampled
    monkeypatch.setattr(store, "SHARD_TOKENS", 37)  # shards end inside texts
    monkeypatch.setattr(activations, "WINDOW_BATCHES", 2)
    monkeypatch.setattr(activations, "WINDOW_BYTES", 128 * 60)  # some windows are full before they hold two batches
    whole = folder.root / "whole.zarr"
    extract_activations(spec, folder, provenance=provenance)
    folder.activations.rename(whole)

    read, n_read = activations.read_texts_at, 0

    def dying(*args: Any) -> Any:
        nonlocal n_read
        n_read += 1
        if n_read % 15 == 0:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(activations, "read_texts_at", dying)
    attempts = 0
    while True:
        attempts += 1
        try:
            extract_activations(spec, folder, provenance=provenance)
            break
        except KeyboardInterrupt:
            continue
    assert attempts > 3
    assert len(complete_models(folder.activations)) == 6
    assert same_bytes(whole, folder.activations)
    n_read = 1
    extract_activations(spec, folder, provenance=provenance)
    assert n_read == 1  # nothing left to read


def same_bytes(one: Path, other: Path) -> bool:
    files = [p.relative_to(one) for p in one.rglob("*") if p.name.startswith("c.") or p.parent.name == "c"]
    assert len(files) > 50
    return filecmp.cmpfiles(one, other, [str(f) for f in files], shallow=False)[1:] == ([], [])


@pytest.mark.slow
def test_layers_read_in_one_pass_are_those_read_alone_also_after_kills(
    sampled: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sampled[1]
    monkeypatch.setattr(store, "SHARD_TOKENS", 37)
    monkeypatch.setattr(activations, "WINDOW_BATCHES", 2)
    own = {layer: Provenance("tiny-study", f"key-{layer}") for layer in (0, 1, 2)}

    def extract(layer: int, *others: int, to: Path) -> None:
        beside = [LayerStore(other, to / f"{other}.zarr", own[other]) for other in others]
        here = study_spec(extraction={"layer": layer, "batch_size": 4})
        extract_activations(here, folder, provenance=own[layer], beside=beside)
        to.mkdir(exist_ok=True)
        folder.activations.rename(to / f"{layer}.zarr")

    read, passes = activations.read_texts_at, list[tuple[int, ...]]()

    def counting(model: Any, texts: Any, layers: Any, pad: int) -> Any:
        passes.append(tuple(layers))
        return read(model, texts, layers, pad)

    monkeypatch.setattr(activations, "read_texts_at", counting)
    for layer in own:
        extract(layer, to=tmp_path / "alone")
    n_alone = len(passes) // 3
    passes.clear()
    extract(1, 0, 2, to=tmp_path / "together")
    assert passes == [(1, 0, 2)] * n_alone
    for layer, provenance in own.items():
        stored = [tmp_path / name / f"{layer}.zarr" for name in ("alone", "together")]
        assert same_bytes(*stored)
        assert open_activations(stored[1]).attrs["site"] == f"block{layer}"
        assert open_activations(stored[1]).attrs["spec_hash"] == provenance.spec_hash

    def dying(*args: Any) -> Any:
        if len(passes) % 15 == 0:
            passes.append(())
            raise KeyboardInterrupt
        return counting(*args)

    passes.clear()
    monkeypatch.setattr(activations, "read_texts_at", dying)
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "alone/2.zarr", tmp_path / "killed/2.zarr")  # one layer is there already
    attempts, whole = 0, False
    while not whole:
        attempts += 1
        with suppress(KeyboardInterrupt):
            extract(1, 0, 2, to=tmp_path / "killed")
            whole = True
    assert attempts > 3
    assert set(passes) - {()} == {(1, 0)}
    for layer in own:
        assert same_bytes(tmp_path / "alone" / f"{layer}.zarr", tmp_path / "killed" / f"{layer}.zarr")


def test_outcomes_come_first(study: Study, provenance: Provenance) -> None:
    with pytest.raises(StageError, match="no completions of base@0"):
        extract_activations(*study, provenance=provenance)


def test_a_layer_the_models_lack_is_refused(sampled: Study, provenance: Provenance) -> None:
    spec = study_spec(extraction={"layer": 3})
    with pytest.raises(InputError, match=r"layer 3 asked for, .* has 3 layers, .*; correct extraction\.layer"):
        extract_activations(spec, sampled[1], provenance=provenance)


def test_a_prompt_without_a_completion_is_named(sampled: Study) -> None:
    spec, folder = sampled
    file = folder.completions / "sft@6.parquet"
    table = pd.read_parquet(file)
    table[table.prompt != "p3"].to_parquet(file)
    with pytest.raises(InputError, match=r"sft@6 has no sampled completion of 1 prompt\(s\), e\.g\. 'p3'"):
        forced_texts(spec, folder, contrasted_models(spec, folder), load_prompts(spec, folder))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_windows_hold_every_text_once_at_its_offset(seed: int | None, batch_size: int) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 9, size=101)]
    windows = list(plan_windows(lengths, batch_size, 4, seed))
    assert [i for window in windows for i in window.texts] == list(range(101))
    for window in windows:
        assert window.first_token == sum(lengths[: window.texts[0]])
        assert sorted(i for batch in window.batches for i in batch) == list(window.texts)
        assert all(1 <= len(batch) <= max(batch_size, 2) for batch in window.batches)
    assert windows == list(plan_windows(lengths, batch_size, 4, seed))
    if seed is not None:
        assert windows != list(plan_windows(lengths, batch_size, 4))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_windows_and_batches_are_bounded_in_bytes(
    seed: int | None, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "WINDOW_BYTES", 4 * 60)
    monkeypatch.setattr(activations, "BATCH_BYTES", 4 * 30)
    lengths = [int(n) for n in np.random.default_rng(0).integers(4, 16, size=101)] + [15, 15, 16, 31, 61, 90]
    windows = list(plan_windows(lengths, batch_size, 4, seed))
    assert [i for window in windows for i in window.texts] == list(range(len(lengths)))
    n_tokens = [sum(lengths[i] for i in window.texts) for window in windows]
    for n, following in zip(n_tokens, windows[1:], strict=False):
        assert n + lengths[following.texts[0]] > 60, "a window is smaller than it must be"
    for window, n in zip(windows, n_tokens, strict=True):
        assert n <= 60 or len(window.texts) == 1
        assert sorted({i for batch in window.batches for i in batch}) == list(window.texts)
        for batch in window.batches:
            padded = len(batch) * max(lengths[i] for i in batch)
            assert padded <= 30 or len(set(batch)) == 1


def test_a_second_reading_puts_every_text_into_another_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """At either side of the limit: texts of 15 are read in pairs and alone, of 16 alone and beside themselves."""
    monkeypatch.setattr(activations, "BATCH_BYTES", 4 * 30)
    for length, first, second in ((7, 4, 2), (15, 2, 1), (16, 1, 2), (40, 1, 2)):
        for seed, size in ((None, first), (3, second)):
            batches = [batch for window in plan_windows([length] * 24, 8, 4, seed) for batch in window.batches]
            assert {len(batch) for batch in batches} == {size}


def test_small_windows_and_batches_store_what_texts_read_alone_give(
    sampled: Study, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain writing: each text alone, appended token after token, converted at once."""
    spec, folder = sampled
    for dtype in ("float32", "bfloat16"):
        chosen = spec.model_copy(update={"extraction": spec.extraction.model_copy(update={"dtype": dtype})})
        monkeypatch.setattr(activations, "WINDOW_BYTES", 1 << 12)  # 32 tokens
        monkeypatch.setattr(activations, "BATCH_BYTES", 1 << 8)  # no text has two tokens
        monkeypatch.setattr(writer_module, "CONVERTED_BYTES", 1 << 9)
        monkeypatch.setattr(store, "SHARD_TOKENS", 37)
        extract_activations(chosen, folder, provenance=provenance)
        stored = open_activations(folder.activations).activation
        prompts = load_prompts(spec, folder)
        texts = forced_texts(spec, folder, contrasted_models(spec, folder), prompts)
        for ref in list_models(spec, folder)[:2]:
            model = load_model(ref)
            alone = np.concatenate([read_texts(model, [text.ids], 1, 0)[0] for text in texts])
            expected = torch.from_numpy(alone).to(getattr(torch, dtype)).float().numpy()
            assert np.array_equal(stored.sel(model=ref.model).values, expected)
        shutil.rmtree(folder.activations)


TOKENS = pd.DataFrame(
    {
        "position": [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3],
        "segment": ["prompt"] * 3 + ["completion"] * 2 + ["prompt"] * 3 + ["prompt"] * 2 + ["completion", "pad"],
    }
)
"""Three texts: 3 + 2, 3 + 0 and 2 + 1 tokens and a pad."""


@pytest.mark.parametrize(
    ("purpose", "spec", "kept"),
    [
        ("train", {}, [1, 2, 3, 4, 6, 7, 9, 10]),
        ("train", {"skip_first": 0}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("train", {"segments": ["completion"], "skip_first": 4}, [4]),
        ("summary", {}, [2, 3, 4, 7, 9, 10]),
        ("summary", {"summary_segments": ["last_prompt"]}, [2, 7, 9]),
        ("summary", {"summary_segments": ["last_prompt"], "skip_first": 2}, [2, 7]),
        ("summary", {"summary_segments": ["prompt"]}, [1, 2, 6, 7, 9]),
    ],
)
def test_masks_follow_the_declared_rules(purpose: Any, spec: dict[str, Any], kept: list[int]) -> None:
    assert np.flatnonzero(token_mask(TOKENS, ExtractionSpec.model_validate(spec), purpose)).tolist() == kept


def test_a_stores_own_labels_make_the_same_mask(study: Study, tmp_path: Path, provenance: Provenance) -> None:
    tokens = TOKENS.assign(prompt=["a"] * 5 + ["b"] * 3 + ["a"] * 4, source="base@0", token_id=1)
    prompts = pd.DataFrame({"prompt": ["a", "b"], "task": "t", "domain": "in", "split": "selection", "cluster": "c"})
    create_activations(tmp_path / "a.zarr", tokens, prompts, provenance=provenance)
    for purpose in ("train", "summary"):
        stored = token_mask(open_tokens(tmp_path / "a.zarr"), ExtractionSpec(), purpose)  # type: ignore[arg-type]
        assert (stored == token_mask(TOKENS, ExtractionSpec(), purpose)).all()  # type: ignore[arg-type]


def test_masks_that_leave_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="no token of the 12 is left"):
        token_mask(TOKENS, ExtractionSpec(skip_first=9))
    with pytest.raises(InputError, match="purpose must be"):
        token_mask(TOKENS, ExtractionSpec(), "both")  # type: ignore[arg-type]


def test_the_token_table_counts_positions_in_each_text() -> None:
    text = activations.Text
    table = token_table([text("a", "base@0", (5, 6), (7,)), text("b", "base@0", (8,), (9, 1))])
    assert table.position.tolist() == [0, 1, 2, 0, 1, 2]
    assert table.token_id.tolist() == [5, 6, 7, 8, 9, 1]
    assert table.prompt.tolist() == ["a"] * 3 + ["b"] * 3
    assert table.segment.tolist() == ["prompt", "prompt", "completion", "prompt", "completion", "completion"]
