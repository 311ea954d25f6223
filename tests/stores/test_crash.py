"""Killed and starved writers: what is left resumes to the bytes of an uninterrupted run."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlgen_stats.schemas.errors import OutOfSpaceError, StoreError
from rlgen_stats.stores import (
    ActivationWriter,
    Provenance,
    append_model,
    committed_models,
    complete_models,
    create_activations,
    open_activations,
    open_features,
    verify,
)
from rlgen_stats.stores.shards import PARTIAL
from tests.stores.conftest import feature_table, hashes, token_table

N, WIDTH, SHARD = 3000, 16, 64
KILLS = int(os.environ.get("RLGEN_STATS_KILLS", "12"))
"""Random points at which a writer is killed; ``make faults`` asks for more."""

WRITER = """
import sys, numpy as np
from rlgen_stats.stores import ActivationWriter
values = np.load(sys.argv[2])
with ActivationWriter(sys.argv[1], model="rl@80", site="block2", width=values.shape[1]) as writer:
    print("ready", flush=True)
    for start in range(writer.n_committed, len(values), 50):
        writer.append(values[start:start + 50])
"""


def left_behind(store: Path) -> dict[str, str]:
    """Hashes without partial files: no reader looks at them, and the next attempt overwrites them."""
    return {name: digest for name, digest in hashes(store).items() if not name.endswith(PARTIAL)}


def test_killed_anywhere_a_writer_resumes_to_the_same_bytes(tmp_path: Path, provenance: Provenance) -> None:
    values = np.random.default_rng(0).normal(size=(N, WIDTH)).astype("f4")
    np.save(tmp_path / "values.npy", values)
    whole, killed = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    for path in (whole, killed):
        create_activations(path, *token_table(N), provenance=provenance, shard_tokens=SHARD)
    began = time.monotonic()
    command = [sys.executable, "-P", "-c", WRITER]
    subprocess.run([*command, whole, tmp_path / "values.npy"], check=True, capture_output=True)
    seconds = time.monotonic() - began
    random, kills, seen = np.random.default_rng(1), 0, set()
    while kills < KILLS:
        process = subprocess.Popen([*command, killed, tmp_path / "values.npy"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        if random.random() < 0.8:  # most kills while it writes, some while it opens the store
            process.stdout.readline()
            time.sleep(float(random.uniform(0, 0.06)))
        else:
            time.sleep(float(random.uniform(0, seconds)))
        process.kill()
        process.wait()
        kills += 1
        seen.add(len(list(killed.glob("rl@80/block2/committed/c.*"))))
        assert set(left_behind(killed).items()) - set(left_behind(whole).items()) <= {
            item for item in left_behind(killed).items() if item[0] in ("zarr.json", "rl@80/block2/zarr.json")
        }
        assert verify(killed).ok
        if complete_models(killed) == ["rl@80"]:
            shutil.rmtree(killed)  # begin again: there are kills left
            create_activations(killed, *token_table(N), provenance=provenance, shard_tokens=SHARD)
    assert len(seen) > 1
    with ActivationWriter(killed, model="rl@80", site="block2", width=WIDTH) as writer:
        writer.append(values[writer.n_committed :])
    assert hashes(killed) == hashes(whole)


def test_a_full_disk_loses_nothing_and_is_explained(tmp_path: Path, provenance: Provenance) -> None:
    values = np.random.default_rng(0).normal(size=(N, WIDTH)).astype("f4")
    np.save(tmp_path / "values.npy", values)
    path = tmp_path / "a.zarr"
    create_activations(path, *token_table(N), provenance=provenance, shard_tokens=1024)
    resource = pytest.importorskip("resource")
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + WRITER.replace(
        'print("ready", flush=True)', "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", limited, path, tmp_path / "values.npy"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert complete_models(path) == []
    assert verify(path).ok
    with ActivationWriter(path, model="rl@80", site="block2", width=WIDTH) as writer:
        writer.append(values[writer.n_committed :])
    np.testing.assert_array_equal(open_activations(path).activation.values[0], values)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path: Path, provenance: Provenance) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        path = disk / "a.zarr"
        create_activations(path, *token_table(60_000), provenance=provenance, shard_tokens=4096)
        values = np.random.default_rng(0).normal(size=(60_000, WIDTH)).astype("f4")

        def fill() -> None:
            with ActivationWriter(path, model="rl@80", site="block2", width=WIDTH) as writer:
                writer.append(values)

        with pytest.raises(OutOfSpaceError, match=r"disk or quota holding .* is full .*committed so far is kept"):
            fill()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        records = path / "rl@80" / "block2" / "committed"
        kept = next(i for i in range(16) if not (records / f"c.{i}.0").exists())  # one after a gap is written again
        with ActivationWriter(path, model="rl@80", site="block2", width=WIDTH) as writer:
            assert writer.n_committed == kept * 4096 > 0
            writer.append(values[writer.n_committed :])
        np.testing.assert_array_equal(open_activations(path).activation.values[0], values)
        assert verify(path).ok
    finally:
        subprocess.run(["umount", disk], check=True)


APPENDER = """
import sys, pickle
from rlgen_stats.stores import Provenance, append_model
import xarray as xr
for model in sys.argv[2:]:
    dataset = xr.open_dataset(f"{sys.argv[1]}.{model}.zarr", engine="zarr", consolidated=False).load()
    print("ready", flush=True)
    append_model(sys.argv[1], "features", dataset, provenance=Provenance("study-one", "key-one"))
"""


def test_a_killed_append_is_invisible_and_repeated(tmp_path: Path, provenance: Provenance) -> None:
    path = tmp_path / "features.zarr"
    models = ["base@0", *(f"rl@{10 * i}" for i in range(1, 5))]
    for i, model in enumerate(models):
        feature_table(model, float(i)).to_zarr(f"{path}.{model}.zarr", zarr_format=3, consolidated=False)
    random = np.random.default_rng(2)
    for _ in range(max(4, KILLS // 3)):
        left = [model for model in models if model not in committed_models(path)]
        process = subprocess.Popen([sys.executable, "-P", "-c", APPENDER, path, *left], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(random.uniform(0, 0.3)))
        process.kill()
        process.wait()
        if committed_models(path):
            assert verify(path).ok, verify(path).problems
            assert open_features(path).model.values.tolist() == committed_models(path)
    for i, model in enumerate(models):
        if model not in committed_models(path):
            append_model(path, "features", feature_table(model, float(i)), provenance=provenance)
    read = open_features(path)["mean"].sel(model=models).values
    assert (read == np.arange(5.0)[:, None, None]).all()
    assert verify(path).ok


def test_a_read_only_folder_is_explained(tmp_path: Path, provenance: Provenance) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match=r"permission denied.*folder you own"):
        create_activations(tmp_path / "a.zarr", *token_table(100), provenance=provenance)
