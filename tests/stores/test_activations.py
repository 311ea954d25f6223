"""The activation store: labels, resumption to the same bytes, checksums, refusals."""

import os
import subprocess
import sys
import time
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError, StoreError, StoreLockedError
from rlgen_stats.stores import (
    ActivationWriter,
    Provenance,
    complete_models,
    create_activations,
    open_activations,
    verify,
)
from rlgen_stats.stores.creation import SHARD_TOKENS
from tests.stores.conftest import N_TOKENS, WIDTH, activation_values, hashes, token_table


def write(store: Path, model: str = "rl@80", values: np.ndarray | None = None, batch: int = 700) -> None:
    values = activation_values(model) if values is None else values
    with ActivationWriter(store, model=model, site="block2", width=WIDTH) as writer:
        for start in range(writer.n_committed, len(values), batch):
            writer.append(values[start : start + batch])


def _no_compute(*_: object, **__: object) -> None:
    raise AssertionError("something computed")


def test_values_and_labels_come_back_and_stay_lazy(store: Path) -> None:
    write(store, "base@0")
    write(store, "rl@80")
    with dask.config.set(scheduler=_no_compute):
        dataset = open_activations(store)
        chosen = dataset.sel(model="rl@80").isel(token=dataset.task.values == "sciq")
    tokens, prompts = token_table()
    task = dict(zip(prompts.prompt, prompts.task, strict=True))
    expected = activation_values("rl@80")[[task[p] == "sciq" for p in tokens.prompt]]
    np.testing.assert_array_equal(chosen.activation.values, expected)
    for name in ("prompt", "source", "segment", "position", "token_id"):
        np.testing.assert_array_equal(dataset[name].values, tokens[name].to_numpy())
    assert dataset.run.values.tolist() == ["base", "rl"]
    assert dataset.step.values.tolist() == [0, 80]


def test_plain_xarray_opens_it(store: Path) -> None:
    write(store)
    plain = xr.open_zarr(store, group="rl@80/block2", consolidated=False)
    assert plain.activation.dims == ("token", "channel")
    np.testing.assert_array_equal(plain.activation.values, activation_values("rl@80"))


@pytest.mark.parametrize("stop", [0, 1, SHARD_TOKENS - 1, SHARD_TOKENS, SHARD_TOKENS + 1, N_TOKENS - 1])
def test_resumed_store_equals_uninterrupted_one(tmp_path: Path, provenance: Provenance, stop: int) -> None:
    whole, resumed = tmp_path / "a.zarr", tmp_path / "b.zarr"
    for path in (whole, resumed):
        create_activations(path, *token_table(), provenance=provenance)
    write(whole)
    values = activation_values("rl@80")

    def crash() -> None:
        with ActivationWriter(resumed, model="rl@80", site="block2", width=WIDTH) as writer:
            writer.append(values[:stop])
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert complete_models(resumed) == []
    write(resumed)
    assert hashes(whole) == hashes(resumed)


KILLED = """
import sys, time, numpy as np
from pathlib import Path
from rlgen_stats.stores import ActivationWriter
store, values = Path(sys.argv[1]), np.load(sys.argv[2])
with ActivationWriter(store, model="rl@80", site="block2", width=values.shape[1]) as writer:
    print("ready", flush=True)
    for start in range(writer.n_committed, len(values), 500):
        writer.append(values[start:start + 500]); time.sleep(0.001)
"""


def test_killed_writer_leaves_a_store_that_resumes_to_the_same_bytes(tmp_path: Path, provenance: Provenance) -> None:
    whole, killed = tmp_path / "a.zarr", tmp_path / "b.zarr"
    values = activation_values("rl@80")
    np.save(tmp_path / "values.npy", values)
    for path in (whole, killed):
        create_activations(path, *token_table(), provenance=provenance)
    write(whole)
    random = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", KILLED, str(killed), str(tmp_path / "values.npy")], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(random.uniform(0, 0.05)))
        process.kill()
        process.wait()
    write(killed)
    left = {name: digest for name, digest in hashes(killed).items() if not name.endswith(".partial")}
    assert left == hashes(whole)


def test_second_writer_is_refused_and_a_closed_one_is_not_in_the_way(store: Path) -> None:
    with (
        ActivationWriter(store, model="rl@80", site="block2", width=WIDTH),
        pytest.raises(StoreLockedError, match=f"written by process {os.getpid()}.*one writer"),
    ):
        ActivationWriter(store, model="rl@80", site="block2", width=WIDTH).__enter__()
    write(store)
    assert complete_models(store) == ["rl@80"]


def test_flipped_bytes_raise_and_are_named(store: Path) -> None:
    write(store)
    chunk = store / "rl@80/block2/activation/c.1.0"
    sound = chunk.read_bytes()
    for offset in np.random.default_rng(1).integers(0, len(sound), 20):
        broken = bytearray(sound)
        broken[offset] ^= 1
        chunk.write_bytes(bytes(broken))
        with pytest.raises(ValueError, match="checksum"):
            open_activations(store).activation.isel(token=SHARD_TOKENS).values  # noqa: B018
    report = verify(store)
    assert not report.ok
    assert f"model rl@80, site block2, tokens {SHARD_TOKENS} to {2 * SHARD_TOKENS - 1}" in report.problems[0]
    chunk.write_bytes(sound)
    assert verify(store).ok
    chunk.unlink()
    assert "shard 1 (rows 8192 to 16383) is missing" in verify(store).problems[-1]


def test_same_labels_again_change_nothing_other_labels_are_refused(store: Path, provenance: Provenance) -> None:
    before = hashes(store)
    create_activations(store, *token_table(), provenance=provenance)
    tokens, prompts = token_table()
    with pytest.raises(StoreError, match="other tokens than the ones given"):
        create_activations(store, tokens.assign(token_id=1), prompts, provenance=provenance)
    with pytest.raises(StoreError, match="another study or settings"):
        create_activations(store, tokens, prompts, provenance=Provenance("study-two", "key-one"))
    assert hashes(store) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p: (t.drop(columns="segment"), p), r"lacks the column\(s\) \['segment'\]"),
        (lambda t, p: (t.iloc[:0], p), "tokens table is empty"),
        (lambda t, p: (t, p.assign(prompt="p0")), "prompt ids must be unique, 'p0'"),
        (lambda t, p: (t, p.iloc[1:]), "not in the prompts table, e.g. 'p0'"),
        (lambda t, p: (t.assign(segment="answer"), p), r"segments are .*got \['answer'\]"),
        (lambda t, p: (t.assign(position=-1), p), "positions start at 0"),
    ],
)
def test_bad_labels_are_explained(tmp_path: Path, provenance: Provenance, change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        create_activations(tmp_path / "x.zarr", *change(*token_table(500)), provenance=provenance)
    assert not (tmp_path / "x.zarr").exists()


def test_bad_activations_are_explained_and_nothing_is_lost(store: Path) -> None:
    values = activation_values("rl@80")
    with ActivationWriter(store, model="rl@80", site="block2", width=WIDTH) as writer:
        writer.append(values[:SHARD_TOKENS])
        with pytest.raises(InputError, match=r"must be \[n, 6\], got \(3, 7\)"):
            writer.append(np.ones((3, 7)))
        broken = values[SHARD_TOKENS : SHARD_TOKENS + 10].copy()
        broken[[4, 7], 2] = np.nan
        with pytest.raises(InputError, match=f"2 of 10 tokens have NaN or infinite.*first is token {SHARD_TOKENS + 4}"):
            writer.append(broken)
        with pytest.raises(InputError, match="store's texts have 20000"):
            writer.append(np.ones((N_TOKENS, WIDTH)))
    write(store)
    np.testing.assert_array_equal(open_activations(store).activation.values[0], values)
    with pytest.raises(StoreError, match=r"expected \(20000, 3\)"):
        ActivationWriter(store, model="rl@80", site="block2", width=3).__enter__()


def test_float16_overflow_is_refused_not_stored(store: Path) -> None:
    with (
        ActivationWriter(store, model="rl@80", site="block2", width=WIDTH, dtype="float16") as writer,
        np.errstate(over="ignore"),
        pytest.raises(InputError, match="float16"),
    ):
        writer.append(np.full((4, WIDTH), 1e6))


def test_missing_and_unfinished_models_are_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a Zarr v3 store"):
        open_activations(tmp_path / "nowhere.zarr")
    write(store, "base@0")
    with pytest.raises(StoreError, match=r"no complete activations of \['rl@80'\].*base@0"):
        open_activations(store, models=["rl@80"])
    with pytest.raises(InputError, match="site must be letters"):
        ActivationWriter(store, model="rl@80", site="../x", width=WIDTH).__enter__()
