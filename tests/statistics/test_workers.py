"""The same numbers from one thread, four threads, processes, and a dask scheduler with workers on loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import dask
import numpy as np
import pytest
import xarray as xr
from distributed import Client

from rlgen_stats.stores import open_features, open_outcomes
from rlgen_stats.toolkit.statistics import (
    SelectionTests,
    drift_test,
    select_features,
    set_stability,
    stabilization_test,
)
from rlgen_stats.toolkit.statistics.planning.planted_truth import Simulation
from rlgen_stats.toolkit.statistics.planning.simulate import WrittenStudy, write_simulation

SECONDS_TO_START = 60


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> WrittenStudy:
    """Four features blocks of 512 on disk."""
    folder = tmp_path_factory.mktemp("workers") / "planted"
    return write_simulation(
        str(folder), Simulation(n_prompts=120, n_features=1600, runs=1, checkpoints=3, seed=3, effect=0.4)
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler and two workers as processes of their own, as a user starts them."""
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    dask_command = [sys.executable, "-P", "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    processes = [
        subprocess.Popen(
            [*dask_command, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
             "--scheduler-file", str(file)], **quiet,
        )
    ]  # fmt: skip
    processes += [
        subprocess.Popen(
            [*dask_command, "worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard",
             "--no-nanny", "--local-directory", str(folder)], **quiet,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        yield str(file)
    finally:
        for process in reversed(processes):
            process.kill()
        for process in processes:
            process.wait(timeout=30)


def analyses(study: WrittenStudy) -> dict[str, Callable[[], xr.Dataset]]:
    features, outcomes = open_features(study.features), open_outcomes(study.outcomes)
    last = ["sft1@60", "rl1@60"]
    return {
        "drift": lambda: drift_test(features, models=last, clusters="cluster", n_resamples=127, n_bootstrap=99),
        "stabilization": lambda: stabilization_test(features, runs=["sft1", "rl1"], n_bootstrap=49),
        "sets": lambda: set_stability(features, runs=["sft1", "rl1"], k=20, n_halvings=5, n_groups=5),
        "selection": lambda: select_features(
            features,
            outcomes,
            target="rl1@60",
            tests=SelectionTests(n_resamples=99, n_bootstrap=49, min_discordant=4),
        ),
    }


@pytest.fixture(scope="module")
def expected(study: WrittenStudy) -> dict[str, xr.Dataset]:
    with dask.config.set(scheduler="synchronous"):
        return {name: one().compute() for name, one in analyses(study).items()}


def same(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Bitwise for what is counted or named, rtol 1e-12 for floats."""
    assert set(found.variables) == set(expected.variables)
    for name in expected.variables:
        a, b = found[name].values, expected[name].values
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=1e-12, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_numbers(
    study: WrittenStudy, cluster: str, expected: dict[str, xr.Dataset]
) -> None:
    with Client(scheduler_file=cluster, timeout=SECONDS_TO_START) as client:
        client.wait_for_workers(2, timeout=SECONDS_TO_START)
        for name, one in analyses(study).items():
            with dask.config.set(scheduler=client):
                same(one().compute(), expected[name])
        ran = client.run(lambda dask_worker: dask_worker.state.transition_counter)
    assert len(ran) == 2
    assert min(ran.values()) > 0, "one worker did nothing"


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param({"scheduler": "threads", "num_workers": 4}, id="threads"),
        pytest.param({"scheduler": "processes", "num_workers": 2}, id="processes", marks=pytest.mark.slow),
    ],
)
def test_threads_and_processes_give_the_same_numbers(
    study: WrittenStudy, expected: dict[str, xr.Dataset], scheduler: dict[str, object]
) -> None:
    names = ("drift", "stabilization") if scheduler["scheduler"] == "processes" else tuple(expected)
    for name in names:
        with dask.config.set(**scheduler):
            same(analyses(study)[name]().compute(), expected[name])
