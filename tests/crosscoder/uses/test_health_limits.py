"""One case just inside and one just outside each limit of a dictionary's health and of its readout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen_stats.stores import write_json
from rlgen_stats.stores.health_records import HEALTH, READOUT_MODELS, read_health
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    ModelReadout,
    SpliceCE,
    judge_readout,
    measure_readout,
)
from rlgen_stats.toolkit.crosscoder.uses import health as health_module
from rlgen_stats.toolkit.crosscoder.uses.health import Health, judge_again, judge_health
from rlgen_stats.toolkit.crosscoder.uses.readout_health import models_of_record, own_l0
from tests.crosscoder.planted import PAIR

N_FEATURES = 1000


def crosscoder(sparsity: Any = "batchtopk", k: int = 20, width: Any = 100) -> Crosscoder:
    return Crosscoder(PAIR, width=width, n_features=4, sparsity=sparsity, k=k)


def firing(dead: int = 0, dense: int = 0, rate: float = 0.5) -> np.ndarray:
    """So many features of 1,000 that never fire, and so many that fire at this rate; the others at .02."""
    return np.concatenate([np.zeros(dead), np.full(dense, rate), np.full(N_FEATURES - dead - dense, 0.02)])


HEALTHY = Health(
    views=PAIR,
    fve=np.array([0.9, 0.9]),
    fve_readout=np.array([0.9, 0.9]),
    l0=20.0,
    firing_readout=np.zeros((2, N_FEATURES)),
    firing=firing(),
    bias=np.array([1.0, 1.0]),
    n_tokens=1000,
    ce={},
    checks=(),
)


def failed(health: Health, of: Crosscoder | None = None) -> set[str]:
    return {check.name for check in judge_health(of or crosscoder(), health) if not check.ok}


def losses(recovered: float, kl_recovered: float) -> SpliceCE:
    return SpliceCE(1.0, 1.0 + 2 * (1 - recovered), 3.0, 10, 2 * (1 - kl_recovered), 2.0)


@pytest.mark.parametrize(
    ("inside", "outside", "name"),
    [
        ({"fve": np.array([0.9, 0.8])}, {"fve": np.array([0.9, 0.799])}, "fve"),
        ({"bias": np.array([0.905, 1.095])}, {"bias": np.array([0.895, 1.0])}, "reconstruction_bias"),
        ({"bias": np.array([0.905, 1.095])}, {"bias": np.array([1.0, 1.105])}, "reconstruction_bias"),
        ({"l0": 18.0}, {"l0": 17.9}, "l0"),
        ({"l0": 22.0}, {"l0": 22.1}, "l0"),
        ({"firing": firing(dead=250)}, {"firing": firing(dead=251)}, "dead_fraction"),
        ({"firing": firing(dense=100)}, {"firing": firing(dense=101)}, "dense_fraction"),
        ({"firing": firing(dead=200, dense=80)}, {"firing": firing(dead=200, dense=81)}, "dense_fraction"),
        ({"firing": firing(dense=500, rate=0.2)}, {"firing": firing(dense=500, rate=0.201)}, "dense_fraction"),
        ({"ce": {"rl@9": losses(0.901, 1.0)}}, {"ce": {"rl@9": losses(0.899, 1.0)}}, "ce_recovered"),
        ({"ce": {"rl@9": losses(1.0, 0.901)}}, {"ce": {"rl@9": losses(1.0, 0.899)}}, "kl_recovered"),
        ({"ce": {"rl@9": losses(1.0, 1.0)}}, {"ce": {"rl@9": losses(1.0, np.nan)}}, "kl_recovered"),
    ],
)
def test_limits_of_health(inside: dict[str, Any], outside: dict[str, Any], name: str) -> None:
    assert failed(HEALTHY) == set()
    assert failed(replace(HEALTHY, **inside)) == set()
    assert failed(replace(HEALTHY, **outside)) == {name}


@pytest.mark.parametrize("of", [crosscoder("l1", k=20, width=(100, 160)), crosscoder(k=0, width=(100, 160))])
def test_without_a_target_l0_may_be_half_of_the_smaller_width(of: Crosscoder) -> None:
    assert failed(replace(HEALTHY, l0=50.0), of) == set()
    assert failed(replace(HEALTHY, l0=50.1), of) == {"l0"}
    assert failed(replace(HEALTHY, l0=0.01), of) == set()
    assert failed(replace(HEALTHY, l0=0.0), of) == {"l0"}


def test_a_target_of_one_feature_is_a_target() -> None:
    one = crosscoder(k=1)
    assert failed(replace(HEALTHY, l0=1.0), one) == failed_readout(replace(FAITHFUL, l0=1.0), one) == set()
    assert failed(replace(HEALTHY, l0=1.2), one) == {"l0"}
    assert failed_readout(replace(FAITHFUL, l0=1.3), one) == {"readout_l0"}


def test_nothing_that_fires_is_not_dense() -> None:
    assert failed(replace(HEALTHY, firing=firing(dead=N_FEATURES))) == {"dead_fraction"}


def test_the_histogram_has_a_bin_for_every_decade() -> None:
    rates = [share * 10.0**power for power in range(-6, 1) for share in (0.95, 1.05)]
    counts = replace(HEALTHY, firing=np.array([0.0, 0.0, *rates[:-1]])).firing_histogram()
    assert counts.tolist() == [2, 1, 2, 2, 2, 2, 2, 2]


FAITHFUL = ModelReadout(
    model="rl@9", view=PAIR[1], fve=0.9, l0=20.0, change=0.1, correlation=0.95, dfve=0.9, code_r2=0.9, artefact=0.0
)


def failed_readout(model: ModelReadout, of: Crosscoder | None = None) -> set[str]:
    health = judge_readout(of or crosscoder(), [model], own_fve=0.9, contrasted=("rl@9",))
    return {check.name for check in health.checks if not check.ok}


@pytest.mark.parametrize(
    ("inside", "outside", "name"),
    [
        ({"fve": 0.7201}, {"fve": 0.7199}, "readout_fve"),  # 80% of the dictionary's own .9
        ({"l0": 15.0}, {"l0": 14.9}, "readout_l0"),
        ({"l0": 25.0}, {"l0": 25.1}, "readout_l0"),
        ({"correlation": 0.3}, {"correlation": 0.299}, "one_base"),
        ({"correlation": 0.3}, {"correlation": np.nan}, "one_base"),
        ({"change": 0.99e-8, "correlation": 0.0}, {"change": 1.01e-8, "correlation": 0.0}, "one_base"),
        ({"dfve": 0.3}, {"dfve": 0.299}, "readout_dfve"),
        ({"dfve": 0.3}, {"dfve": np.nan}, "readout_dfve"),
        ({"code_r2": 0.001}, {"code_r2": 0.0}, "readout_code_r2"),
        ({"artefact": 0.1}, {"artefact": 0.101}, "readout_artefact"),
        ({"change": 0.99e-8, "dfve": 0.0}, {"change": 1.01e-8, "dfve": 0.0}, "readout_dfve"),
        ({"model": "sft@9", "dfve": 0.0}, {"dfve": 0.0}, "readout_dfve"),  # another model than the contrasted one
    ],
)
def test_limits_of_the_readout(inside: dict[str, Any], outside: dict[str, Any], name: str) -> None:
    assert failed_readout(FAITHFUL) == set()
    assert failed_readout(replace(FAITHFUL, **inside)) == set()
    assert failed_readout(replace(FAITHFUL, **outside)) == {name}


@pytest.mark.parametrize("of", [crosscoder("l1", k=20), crosscoder(k=0)])
def test_the_readout_of_a_dictionary_without_a_target_has_no_l0_to_keep(of: Crosscoder) -> None:
    assert failed_readout(replace(FAITHFUL, l0=400.0), of) == set()


def of_a_corpus() -> Crosscoder:
    trained = crosscoder()
    trained.facts["spec"] = {"corpus": "data/corpus.parquet"}
    return trained


def test_on_other_texts_than_those_trained_on_a_dictionary_need_not_keep_its_k() -> None:
    short = replace(HEALTHY, l0=12.0)
    assert failed(short) == {"l0"}
    assert failed(short, of_a_corpus()) == set()
    assert failed(replace(HEALTHY, l0=50.0), of_a_corpus()) == set()
    assert failed(replace(HEALTHY, l0=50.1), of_a_corpus()) == {"l0"}, "half the width is dense"
    assert own_l0(crosscoder(), short) is None


@pytest.mark.parametrize(("inside", "outside"), [(18.0, 17.9), (22.0, 22.1)])
def test_it_keeps_its_k_on_the_texts_that_it_was_trained_on(inside: float, outside: float) -> None:
    trained = of_a_corpus()
    for l0, expected in ((inside, set()), (outside, {"l0_trained"})):
        trained.facts["l0_trained"] = l0
        assert failed(replace(HEALTHY, l0=12.0), trained) == expected
    trained.facts["objective"] = "both"
    assert failed(HEALTHY, trained) == set(), "shares k with paired rows"
    own = crosscoder()
    own.facts["l0_trained"] = outside
    assert failed(HEALTHY, own) == set(), "measured on all of the study's texts"


@pytest.mark.parametrize(("inside", "outside"), [(9.0, 8.9), (15.0, 15.1)])
def test_there_a_models_readout_keeps_the_dictionarys_own_l0(inside: float, outside: float) -> None:
    trained = of_a_corpus()
    own = own_l0(trained, replace(HEALTHY, l0=12.0))
    for l0, expected in ((inside, set()), (outside, {"readout_l0"})):
        models = [replace(FAITHFUL, l0=l0)]
        health = judge_readout(trained, models, own_fve=0.9, own_l0=own, contrasted=("rl@9",))
        assert {check.name for check in health.checks if not check.ok} == expected


def test_what_was_measured_is_judged_again_by_other_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else of the record changes."""
    before = replace(HEALTHY, ce={"rl@9": losses(0.95, 0.95)})
    before = replace(before, checks=judge_health(crosscoder(), before))
    described = {"weights_sha256": "a", READOUT_MODELS: {"models": [vars(replace(FAITHFUL, dfve=None))]}}
    write_json(tmp_path / HEALTH, described | before.describe())
    again = judge_again(crosscoder(), tmp_path)
    assert again.healthy
    assert read_health(tmp_path) == described | json.loads(json.dumps(before.describe()))
    (model,) = models_of_record(read_health(tmp_path))
    assert np.isnan(model.dfve)
    assert replace(model, dfve=0.9) == FAITHFUL
    monkeypatch.setattr(health_module, "FVE_MIN", 0.95)
    assert not judge_again(crosscoder(), tmp_path).healthy
    record = read_health(tmp_path)
    assert record["reasons"].startswith("fraction of variance explained of base@0 0.900, at least 0.95 needed")
    assert record["ce"] == json.loads(json.dumps(before.describe()))["ce"]


@pytest.mark.parametrize(("share", "constant"), [(0.9895, False), (0.9905, True)])
def test_a_change_that_is_one_vector_has_no_variance_to_explain(share: float, constant: bool) -> None:
    """A dictionary without decoders predicts no change: none of its square, and of its variance far less than none."""
    empty = crosscoder("l1", width=8).requires_grad_(False)
    empty.decoder_matrix.zero_()
    random = np.random.default_rng(0)
    base = random.normal(size=(400, 8))
    sign = np.where(np.arange(400) % 2, 1.0, -1.0)[:, None]
    change = np.eye(8)[:1] * (1 + sign * np.sqrt(1 / share - 1))  # mean 1; its square is this share of the mean square
    data = np.stack([base, base + change], axis=1).astype(np.float32)
    readouts = measure_readout(empty, ArrayReader(data, batch_size=100, seed=0), PAIR)
    assert readouts[1].dfve == pytest.approx(0 if constant else 1 - 1 / (1 - share), abs=0.05)
    assert torch.all(empty.decoder == 0)
