"""Starved and refused writers: what is left is sound, and the next writer goes on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlgen_stats.schemas.errors import OutOfSpaceError, StoreError
from rlgen_stats.stores import (
    ActivationWriter,
    Provenance,
    complete_models,
    create_activations,
    open_activations,
    verify,
)
from tests.stores.conftest import token_table

N, WIDTH, SHARD = 3000, 16, 64

WRITER = """
import sys, numpy as np
from rlgen_stats.stores import ActivationWriter
values = np.load(sys.argv[2])
with ActivationWriter(sys.argv[1], model="rl@80", site="block2", width=values.shape[1]) as writer:
    print("ready", flush=True)
    for start in range(writer.n_committed, len(values), 50):
        writer.append(values[start:start + 50])
"""


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


def test_a_read_only_folder_is_explained(tmp_path: Path, provenance: Provenance) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match=r"permission denied.*folder you own"):
        create_activations(tmp_path / "a.zarr", *token_table(100), provenance=provenance)
