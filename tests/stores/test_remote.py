"""Every store on a real S3 protocol server on loopback: writing, crashing, resuming, locking, reading, verifying."""

import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError, StoreCorruptError, StoreError, StoreLockedError
from rlgen_stats.stores import (
    ActivationWriter,
    PairedReader,
    Provenance,
    append_model,
    committed_models,
    complete_models,
    create_activations,
    describe,
    open_activations,
    open_features,
    open_results,
    open_study,
    place,
    result_groups,
    select_tokens,
    verify,
    write_results,
)
from rlgen_stats.stores import locks as locks_module
from rlgen_stats.stores import writer as writer_module
from tests.stores.conftest import feature_table, token_table

moto_server = pytest.importorskip("moto.server")

N, WIDTH, SHARD = 1000, 4, 128
VALUES = np.random.default_rng(0).normal(size=(N, WIDTH)).astype("f4")
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    name = f"b{abs(hash(request.node.name)) % 10**9}"
    system = fsspec.filesystem("s3")
    system.mkdir(name)
    yield f"s3://{name}"
    system.clear_instance_cache()


def write(path: str, model: str = "rl@80", **how: object) -> None:
    with ActivationWriter(path, model=model, site="block2", width=WIDTH, **how) as writer:  # type: ignore[arg-type]
        for start in range(writer.n_committed, N, 50):
            writer.append(VALUES[start : start + 50])


def contents(path: str) -> dict[str, bytes]:
    system = fsspec.filesystem("s3")
    system.invalidate_cache()
    root = path.removeprefix("s3://")
    return {name.removeprefix(root): system.cat_file(name) for name in system.find(root)}


@pytest.mark.slow
def test_a_store_on_s3_does_all_that_a_folder_does(bucket: str, provenance: Provenance, tmp_path: Path) -> None:
    remote, local = f"{bucket}/study/activations.zarr", tmp_path / "activations.zarr"
    for path in (remote, str(local)):
        create_activations(path, *token_table(N), provenance=provenance, shard_tokens=SHARD)
        write(path)
        write(path, "base@0")
    on_disk = {f"/{file.relative_to(local)}": file.read_bytes() for file in local.rglob("*") if file.is_file()}
    assert contents(remote) == on_disk
    acts = open_activations(remote).sel(task="sciq", segment="completion")
    xr.testing.assert_identical(acts.load(), open_activations(local).sel(task="sciq", segment="completion").load())
    np.testing.assert_array_equal(select_tokens(remote, task="math"), select_tokens(local, task="math"))
    ours, theirs = (
        list(PairedReader(path, ["base@0", "rl@80"], "block2", batch_size=100, seed=3).epoch(1))
        for path in (remote, local)
    )
    np.testing.assert_array_equal(np.stack(ours), np.stack(theirs))
    for i, model in enumerate(("base@0", "rl@80")):
        append_model(f"{bucket}/study/features.zarr", "features", feature_table(model, float(i)), provenance=provenance)
    notes = xr.Dataset({"effect": ("feature", np.arange(4.0))})
    for scale in (1, 2):
        write_results(f"{bucket}/study/results.zarr", "notes", notes * scale, provenance=provenance)
    assert open_results(f"{bucket}/study/results.zarr", "notes").effect.values.tolist() == [0, 2, 4, 6]
    assert result_groups(f"{bucket}/study/results.zarr") == ["notes"]
    assert open_features(f"{bucket}/study/features.zarr")["mean"].sel(model="rl@80").values.min() == 1
    assert committed_models(f"{bucket}/study/features.zarr") == ["base@0", "rl@80"]
    report = verify(f"{bucket}/study")
    assert report.ok, report.problems
    facts = describe(f"{bucket}/study")
    assert facts["activations.zarr"]["models"][0]["complete"]
    assert facts["activations.zarr"]["bytes"] == sum(map(len, on_disk.values()))
    place(f"{bucket}/study/study.yaml").write_text("name: x\n")
    assert set(open_study(f"{bucket}/study").children) == {"activations", "features", "results"}


@pytest.mark.slow
def test_a_missing_or_changed_object_raises_and_is_named(bucket: str, provenance: Provenance) -> None:
    path = f"{bucket}/activations.zarr"
    create_activations(path, *token_table(N), provenance=provenance, shard_tokens=SHARD)
    write(path)
    system = fsspec.filesystem("s3")
    chunk = f"{path}/rl@80/block2/activation/c.2.0"
    sound = system.cat_file(chunk)
    system.pipe_file(chunk, sound[:50] + b"?" + sound[51:])
    with pytest.raises(StoreCorruptError, match="fails its crc32c"):
        open_activations(path).activation.values  # noqa: B018
    system.rm(chunk)
    system.invalidate_cache()
    with pytest.raises(StoreCorruptError, match="is missing"):
        open_activations(path).activation.values  # noqa: B018
    assert "tokens 256 to 383" in verify(path).problems[0]


UPLOADER = """
import sys, numpy as np, time
from rlgen_stats.stores import ActivationWriter
values = np.load(sys.argv[2])
with ActivationWriter(sys.argv[1], model="rl@80", site="block2", width=values.shape[1]) as writer:
    for start in range(writer.n_committed, len(values), 50):
        writer.append(values[start:start + 50])
        print(start, flush=True)
        time.sleep(0.01)
"""


@pytest.mark.slow
def test_an_interrupted_upload_resumes_to_the_same_objects(
    bucket: str, provenance: Provenance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = f"{bucket}/whole.zarr", f"{bucket}/killed.zarr"
    np.save(tmp_path / "values.npy", VALUES)
    for path in (whole, killed):
        create_activations(path, *token_table(N), provenance=provenance, shard_tokens=SHARD)
    write(whole)
    for n_batches in (2, 7):  # of 20 in all: shards are on their way or done, and some are left
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", UPLOADER, killed, tmp_path / "values.npy"], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        for _ in range(n_batches):
            process.stdout.readline()
        process.kill()
        process.wait()
        assert not complete_models(killed)
        assert verify(killed).ok
    real, calls = writer_module.write_chunk, itertools.count(1)

    def failing(*args: object, **how: object) -> int:  # the connection breaks between data and record
        if next(calls) == 2:
            raise OSError("Connection reset")
        return real(*args, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_chunk", failing)
        with pytest.raises(OSError, match="Connection reset"):
            write(killed)
    write(killed)  # the killed process's lease is recognised as a dead one's
    assert contents(killed) == contents(whole)


@pytest.mark.slow
def test_leases_keep_writers_apart_and_die_with_their_holders(
    bucket: str, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{bucket}/activations.zarr"
    create_activations(path, *token_table(N), provenance=provenance, shard_tokens=SHARD)
    with ActivationWriter(path, model="rl@80", site="block2", width=WIDTH, shards=range(0, 4)):
        with pytest.raises(StoreLockedError, match=rf"written by process {os.getpid()} on .*one writer at a time"):
            write(path)
        with ActivationWriter(path, model="rl@80", site="block2", width=WIDTH, shards=range(4, 8)) as writer:
            writer.append(VALUES[4 * SHARD :])
    lease = place(f"{bucket}/.activations.zarr.rl@80.block2.locks/0-8-00000000.json")
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(StoreLockedError, match="process 1 on elsewhere"):
        write(path)
    monkeypatch.setattr(locks_module, "LEASE_SECONDS", -1.0)  # the lease is old now
    write(path)
    assert complete_models(path) == ["rl@80"]
    assert verify(path).ok


def test_a_held_lease_is_renewed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks_module, "LEASE_SECONDS", 0.4)
    target = place(f"{bucket}/thing.zarr")
    system = fsspec.filesystem("s3")
    with locks_module.exclusive(target):
        (name,) = system.find(f"{bucket}/.thing.zarr.locks")
        first = system.info(name)["LastModified"]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.3)
            system.invalidate_cache()
            if system.info(name)["LastModified"] > first:
                break
        else:
            pytest.fail("the lease was not renewed")
    system.invalidate_cache()
    assert system.find(f"{bucket}/.thing.zarr.locks") == []


def test_wrong_and_missing_places_are_explained(
    bucket: str, endpoint: str, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match=r"not a Zarr v3 store \(no zarr.json below this URL\)"):
        open_activations(f"{bucket}/nothing.zarr")
    with pytest.raises(StoreError, match=r"cannot be reached|no zarr.json below this URL"):
        open_activations("s3://no-such-bucket-here/x.zarr")
    with pytest.raises(InputError, match=r"expected a local path or an fsspec URL whose filesystem is installed"):
        open_activations("nonsense://bucket/x.zarr")
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StoreError, match=r"needs credentials and none were found.*set them in the environment"):
        open_activations(f"{bucket}/nothing.zarr")


def test_refused_credentials_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers 403, as one does to a wrong key."""
    import http.server
    import threading

    class Refusing(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            body = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist.</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = refuse

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StoreError, match=r"refuses these credentials .*check the access key"):
        open_activations("s3://bucket/x.zarr")
    server.shutdown()
    fsspec.filesystem("s3").clear_instance_cache()
