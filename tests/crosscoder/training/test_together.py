"""Several dictionaries in one pass, several processes on one dictionary, and cheaper products."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder import ArrayReader, load_crosscoder, train_crosscoder, train_replicates
from tests.crosscoder.planted import PAIR, Planted, crosscoder_spec
from tests.crosscoder.training.test_train import DyingReader, InterruptError, assert_same

SCRIPT = Path(__file__).with_name("ranks_script.py")
RULES = (("batchtopk", "joint"), ("l1", "joint"), ("jumprelu", "joint"), ("batchtopk", "both"), ("jumprelu", "paired"))


def test_replicates_get_the_weights_they_would_get_alone(world: Planted, tmp_path: Path) -> None:
    spec = crosscoder_spec(steps=40)
    seeds, folders = [1, 2, 3], [tmp_path / name for name in ("main", "main.2", "main.3")]
    orders = [None, 7, 8]
    together = train_replicates(
        ArrayReader(world.data, batch_size=512, seed=1), spec, views=PAIR, seeds=seeds, orders=orders, folders=folders
    )
    for seed, order, folder, crosscoder in zip(seeds, orders, folders, together, strict=True):
        reader = ArrayReader(world.data, batch_size=512, seed=1)
        (alone,) = train_replicates(reader, spec, views=PAIR, seeds=[seed], orders=[order])
        assert_same(alone, crosscoder)
        assert_same(alone, load_crosscoder(folder))
    assert not torch.equal(together[0].decoder_matrix, together[1].decoder_matrix)


def test_replicates_saved_at_different_steps_go_on_together(world: Planted, tmp_path: Path) -> None:
    spec = crosscoder_spec(steps=50)
    which = {"views": PAIR, "seeds": [1, 2], "orders": [None, 7]}
    wholes = train_replicates(ArrayReader(world.data, batch_size=512, seed=1), spec, **which)  # type: ignore[arg-type]
    folders = [tmp_path / name for name in ("one", "two")]
    how = which | {"folders": folders, "save_every": 10}
    with pytest.raises(InterruptError):
        train_replicates(DyingReader(world.data, alive=27, batch_size=512, seed=1), spec, **how)  # type: ignore[arg-type]
    with pytest.raises(InterruptError):  # the first alone gets further, as if the disk had filled between two states
        train_crosscoder(
            DyingReader(world.data, alive=18, batch_size=512, seed=1),
            spec,
            views=PAIR,
            seed=1,
            folder=folders[0],
            save_every=10,
        )
    resumed = train_replicates(ArrayReader(world.data, batch_size=512, seed=1), spec, **how)  # type: ignore[arg-type]
    for whole, again in zip(wholes, resumed, strict=True):
        assert_same(whole, again)


def of_rule(rule: str, objective: str) -> CrosscoderSpec:
    name = f"{rule}-{objective}"
    return crosscoder_spec(name=name, sparsity=rule, objective=objective, steps=60, n_features=64, batch_size=250)


@pytest.fixture(scope="module")
def trained_by_two(world: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights and curve for each of the rules, all trained by one pair of processes."""
    if "RLGEN_STATS_WEIGHTS" in os.environ:
        pytest.skip("these processes would begin with the usual weights")
    folder = tmp_path_factory.mktemp("two")
    torch.save(torch.from_numpy(world.data), folder / "data.pt")
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    specs = [of_rule(*rule).model_dump_json() for rule in RULES]
    command = [*launch, str(SCRIPT), str(folder / "data.pt"), str(folder), *specs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "world.json").read_text()) == 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "objective"), RULES)
def test_two_processes_give_the_curve_of_one(
    world: Planted, trained_by_two: Path, tmp_path: Path, rule: str, objective: str
) -> None:
    spec = of_rule(rule, objective)
    reader = ArrayReader(world.data, batch_size=250, seed=1)
    alone = train_crosscoder(reader, spec, views=spec.views, seed=1, log_every=5, folder=tmp_path)
    one, two = (json.loads((folder / "curve.json").read_text()) for folder in (tmp_path, trained_by_two / spec.name))
    assert [point["step"] for point in one] == [point["step"] for point in two]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["l0"] == pytest.approx(a["l0"], rel=2e-2)
        assert b["dead"] == pytest.approx(a["dead"], abs=0.04)
        assert a.keys() == b.keys()
        for kind in ("fve", "dfve")[: 1 + (objective != "joint")]:
            assert b[kind] == pytest.approx(a[kind], abs=2e-3)
    assert min(one[-1]["fve"].values()) > min(one[0]["fve"].values()) + 0.05
    learned = load_crosscoder(trained_by_two / spec.name).decoder_matrix
    torch.testing.assert_close(learned, alone.decoder_matrix, rtol=0.05, atol=0.02)


@pytest.mark.slow
def test_bfloat16_products_keep_weights_and_fit(world: Planted) -> None:
    reader = ArrayReader(world.data, batch_size=512, seed=1)
    full, low = (
        train_crosscoder(reader, crosscoder_spec(precision=precision), views=PAIR, seed=1)
        for precision in ("float32", "bfloat16")
    )
    assert low.decoder_matrix.dtype == torch.float32
    bits = low.decoder_matrix.view(torch.int32) & 0xFFFF
    assert (bits != 0).float().mean() > 0.9  # master weights hold more than bfloat16 can
    for view in PAIR:
        assert low.facts["last"]["fve"][view] == pytest.approx(full.facts["last"]["fve"][view], abs=0.02)
    assert low.facts["last"]["l0"] == pytest.approx(2, rel=0.03)
    assert not torch.equal(low.decoder_matrix, full.decoder_matrix)
