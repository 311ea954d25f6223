from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder import ArrayReader, Crosscoder, measure_health, train_crosscoder
from rlgen_stats.toolkit.crosscoder.data.paired import Batch, endless, joined, measure_views
from rlgen_stats.toolkit.crosscoder.model import sparse as sparse_module
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks, smallest_kept
from rlgen_stats.toolkit.crosscoder.training.train import learning_rate, start_run
from tests.crosscoder.planted import BASE_ONLY, PAIR, SFT_ONLY, SHARED, Planted, crosscoder_spec, planted


class InterruptError(Exception):
    pass


class DyingReader(ArrayReader):
    """Dies after so many batches."""

    def __init__(self, data: NDArray[np.float32], *, alive: int, **how: Any) -> None:
        super().__init__(data, **how)
        self._left = alive

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(epoch, start_batch=start_batch):
            if self._left == 0:
                raise InterruptError
            self._left -= 1
            yield batch


def weights(crosscoder: Crosscoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in crosscoder.state_dict().items()}


def assert_same(a: Crosscoder, b: Crosscoder) -> None:
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor.nan_to_num(-1), b.state_dict()[name].nan_to_num(-1)), name


def reader_of(world: Planted, **how: Any) -> ArrayReader:
    return ArrayReader(world.data, batch_size=512, seed=1, **how)


# -- planted truth ----------------------------------------------------------------------------------------------------


def test_planted_features_are_recovered_in_every_view_that_has_them(world: Planted, either: Crosscoder) -> None:
    learned = either.decoder.numpy()
    learned = learned / np.linalg.norm(learned, axis=-1, keepdims=True).clip(1e-9)
    for view, kinds in ((0, (*SHARED, *BASE_ONLY)), (1, (*SHARED, *SFT_ONLY))):
        truth = world.decoder[view, list(kinds)]
        cosine = (truth / np.linalg.norm(truth, axis=1, keepdims=True)) @ learned[view].T
        assert cosine.max(axis=1).mean() > 0.9


def test_norm_shares_tell_shared_from_exclusive_features(world: Planted, either: Crosscoder) -> None:
    together = either.decoder.numpy().transpose(1, 0, 2).reshape(48, -1)
    together = together / np.linalg.norm(together, axis=1, keepdims=True).clip(1e-9)
    scale = either.scale.numpy()
    truth = (world.decoder * np.array([1.0, 3.0])[:, None, None] * scale[:, None, None]).transpose(1, 0, 2)
    truth = truth.reshape(24, -1)
    match = (truth / np.linalg.norm(truth, axis=1, keepdims=True) @ together.T).argmax(axis=1)
    norms = either.decoder_norm().numpy()[:, match]
    share = norms[1] / norms.sum(axis=0)
    assert (abs(share[list(SHARED)] - 0.5) < 0.15).mean() >= 0.9
    assert (share[list(BASE_ONLY)] < 0.15).mean() >= 0.8
    assert (share[list(SFT_ONLY)] > 0.85).mean() >= 0.8


# -- sparsity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_keep", [1, 7, 500, 3000])
@pytest.mark.parametrize("error", [None, 0.99, 1.02, 0.5, 3.0])
def test_smallest_kept_is_the_sorted_one_whatever_the_hint(n_keep: int, error: float | None) -> None:
    values = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    wanted = max(values.flatten().sort(descending=True).values[n_keep - 1].item(), torch.finfo(torch.float32).tiny)
    hint = float("nan") if error is None else wanted * error
    assert smallest_kept(values, n_keep, hint=hint) == wanted


@pytest.mark.parametrize(("objective", "rows"), [("joint", 512), ("both", 256 + 2 * 256), ("paired", 2 * 512)])
def test_training_batches_keep_exactly_k_on_average(
    world: Planted, monkeypatch: pytest.MonkeyPatch, objective: str, rows: int
) -> None:
    monkeypatch.setattr(sparse_module, "SPARSE_SHARE", -1.0)  # features as [row, feature]
    spec = crosscoder_spec(k=3, objective=objective)
    run = start_run(
        spec,
        PAIR,
        measure_views(reader_of(world)),
        seed=2,
        key="",
        folder=None,
        device=torch.device("cpu"),
        ranks=Ranks(),
    )
    for step, batch in zip((spec.steps - 2, spec.steps - 1), reader_of(world).epoch(0), strict=False):
        fit = run.objective.fit(torch.from_numpy(joined(batch)), step)
        pre = torch.cat([group.pre for group, _ in fit.groups])
        assert pre.shape == (rows, 48)
        contribution = pre * run.crosscoder.selection_norm()
        kept = contribution >= contribution.flatten().sort(descending=True).values[3 * rows - 1]
        assert int(kept.sum()) == 3 * rows
        assert torch.equal(torch.cat([found.features for _, found in fit.groups]), pre * kept)
        assert torch.equal(fit.fired > 0, kept.any(dim=0))


def test_threshold_gives_k_on_held_out_tokens() -> None:
    """On activations that thin out towards zero, so that the place of the threshold matters."""
    train, held_out = planted(soft=True), planted(soft=True, seed=1)
    reader = ArrayReader(train.data, batch_size=512, seed=1)
    crosscoder = train_crosscoder(reader, crosscoder_spec(k=3, steps=300), views=PAIR, seed=1)
    held_out_reader = ArrayReader(held_out.data, batch_size=512, seed=0)
    assert measure_health(crosscoder, held_out_reader).l0 == pytest.approx(3, rel=0.05)
    crosscoder.threshold *= 1.3
    assert measure_health(crosscoder, held_out_reader).l0 < 0.95 * 3


def test_last_curve_point_describes_the_training_batch(batchtopk: Crosscoder) -> None:
    last = batchtopk.facts["last"]
    assert last["step"] == 600
    assert last["l0"] == pytest.approx(2, abs=1e-9)
    assert all(value > 0.9 for value in last["fve"].values())


@pytest.mark.parametrize("objective", ["joint", "paired"])
@pytest.mark.parametrize(("steps", "n_last"), [(30, 3), (60, 4)])
def test_l0_under_the_fixed_threshold_is_that_of_the_last_batches(
    world: Planted, objective: str, steps: int, n_last: int
) -> None:
    crosscoder = train_crosscoder(
        reader_of(world), crosscoder_spec(objective=objective, steps=steps), views=PAIR, seed=1
    )
    read = endless(reader_of(world), start=steps - n_last)
    last = np.concatenate([joined(next(read)) for _ in range(n_last)]).reshape(n_last * 512, 2, -1)
    measured = measure_health(crosscoder, ArrayReader(last, batch_size=512, seed=0))
    assert crosscoder.facts["l0_trained"] == pytest.approx(measured.l0, rel=1e-6)


@pytest.mark.parametrize("readout", ["own", "fit", "joint"])
def test_single_views_of_the_last_batches_are_read_as_in_training_whatever_the_readout(
    world: Planted, readout: str
) -> None:
    trained = [
        train_crosscoder(
            reader_of(world), crosscoder_spec(objective="paired", steps=5, readout=kind), views=PAIR, seed=1
        )
        for kind in (readout, "swap")
    ]
    assert trained[0].facts["l0_trained"] == trained[1].facts["l0_trained"]


# -- repeatability ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "objective"), [("l1", "joint"), ("batchtopk", "joint"), ("jumprelu", "paired"), ("batchtopk", "both")]
)
def test_resumed_training_ends_with_the_same_weights(
    world: Planted, tmp_path: Path, sparsity: str, objective: str
) -> None:
    spec = crosscoder_spec(sparsity=sparsity, objective=objective, steps=60, n_features=64)
    how: dict[str, Any] = {"views": PAIR, "seed": 1, "save_every": 20, "log_every": 10}
    whole = train_crosscoder(reader_of(world), spec, folder=tmp_path / "whole", **how)
    dying = DyingReader(world.data, alive=47, batch_size=512, seed=1)
    with pytest.raises(InterruptError):
        train_crosscoder(dying, spec, folder=tmp_path / "cut", **how)
    assert (tmp_path / "cut" / "training.safetensors").exists()
    seen: list[tuple[int, int]] = []

    class Watching(ArrayReader):
        def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Batch]:
            seen.append((epoch, start_batch))
            return super().epoch(epoch, start_batch=start_batch)

    resumed = train_crosscoder(Watching(world.data, batch_size=512, seed=1), spec, folder=tmp_path / "cut", **how)
    assert_same(whole, resumed)
    assert resumed.facts["l0_trained"] == whole.facts["l0_trained"]
    assert seen[0] == divmod(40, 16)  # nothing already used is read again
    files = [(tmp_path / which / "weights.safetensors").read_bytes() for which in ("whole", "cut")]
    assert files[0] == files[1]
    curves = [json.loads((tmp_path / which / "curve.json").read_text()) for which in ("whole", "cut")]
    assert curves[0] == curves[1]
    assert [point["step"] for point in curves[0]] == [10, 20, 30, 40, 50, 60]
    assert not (tmp_path / "cut" / "training.safetensors").exists()


def test_a_state_of_other_settings_is_not_continued(world: Planted, tmp_path: Path) -> None:
    spec = crosscoder_spec(steps=40)
    fresh = train_crosscoder(reader_of(world), spec, views=PAIR, seed=1)
    for changes in ({"seed": 2}, {"data_hash": "old"}):
        how: dict[str, Any] = {"views": PAIR, "seed": 1, "save_every": 10, "folder": tmp_path} | changes
        louder = world.data * (2.0 if "data_hash" in changes else 1.0)
        with pytest.raises(InterruptError):
            train_crosscoder(DyingReader(louder, alive=25, batch_size=512, seed=1), spec, **how)
        assert (tmp_path / "training.safetensors").exists()
        again = train_crosscoder(reader_of(world), spec, views=PAIR, seed=1, folder=tmp_path)
        assert_same(fresh, again)


def test_logging_and_saving_change_no_weight(world: Planted, tmp_path: Path) -> None:
    spec = crosscoder_spec(steps=40, n_features=64)
    rare = train_crosscoder(reader_of(world), spec, views=PAIR, seed=1, log_every=1000)
    often = train_crosscoder(reader_of(world), spec, views=PAIR, seed=1, log_every=1, save_every=1, folder=tmp_path)
    assert_same(rare, often)


def test_seed_decides_the_weights(world: Planted) -> None:
    spec = crosscoder_spec(steps=5)
    one, same, other = (train_crosscoder(reader_of(world), spec, views=PAIR, seed=s) for s in (1, 1, 2))
    assert_same(one, same)
    assert not torch.equal(one.decoder, other.decoder)


def test_permuting_views_permutes_the_crosscoder(world: Planted) -> None:
    spec = crosscoder_spec(steps=15)
    straight = train_crosscoder(reader_of(world), spec, views=PAIR, seed=1)
    turned_reader = ArrayReader(world.data[:, ::-1], batch_size=512, seed=1)
    turned = train_crosscoder(turned_reader, spec, views=PAIR[::-1], seed=1)
    for name in ("encoder", "decoder", "decoder_bias", "scale", "mean"):
        a, b = getattr(straight, name), getattr(turned, name).flip(0)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(straight.decoder, turned.decoder, rtol=1e-3, atol=1e-4)
    raw = torch.from_numpy(world.data[:200])
    f = straight.encode(straight.normalise(raw))
    again = turned.encode(turned.normalise(raw.flip(1)))
    assert ((f > 0) == (again > 0)).float().mean() > 0.999
    torch.testing.assert_close(f.sum(0), again.sum(0), rtol=0.02, atol=0.5)


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_stays_and_decays_to_zero() -> None:
    spec = crosscoder_spec(steps=100, warmup_fraction=0.1, learning_rate=1.0)
    rates = [learning_rate(step, spec) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[50] == rates[80] == 1.0
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_endless_visits_every_batch_once_an_epoch_and_skips_without_changing_the_rest(world: Planted) -> None:
    reader = reader_of(world)
    per_epoch = len(world.data) // 512
    batches = endless(reader)
    first = [next(batches).copy() for _ in range(2 * per_epoch)]
    wanted = [*reader.epoch(0), *reader.epoch(1)]
    assert all(np.array_equal(a, b) for a, b in zip(first, wanted, strict=True))
    later = endless(reader, start=per_epoch + 3)
    assert np.array_equal(next(later), wanted[per_epoch + 3])
    batches.close()
    later.close()


def test_errors_say_what_to_do(world: Planted) -> None:
    spec = crosscoder_spec(steps=3)
    with pytest.raises(InputError, match=r"reader has 2 views, but 3 were named"):
        train_crosscoder(reader_of(world), spec, views=("base@0", "sft@9", "rl@9"), seed=0)
    broken = world.data.copy()
    broken[7, 0, 3] = np.nan
    with pytest.raises(InputError, match=r"view\(s\) number \[0\] are zero or not finite"):
        train_crosscoder(ArrayReader(broken, batch_size=512, seed=0), spec, views=PAIR, seed=0)
    silent = world.data.copy()
    silent[:, 1] = 0
    with pytest.raises(InputError, match=r"view\(s\) number \[1\] are zero or not finite"):
        train_crosscoder(ArrayReader(silent, batch_size=512, seed=0), spec, views=PAIR, seed=0)
    wild = crosscoder_spec(steps=60, learning_rate=1e18)
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step 50; lower learning_rate"):
        train_crosscoder(reader_of(world), wild, views=PAIR, seed=0)
    with pytest.raises(InputError, match=r"fewer than one batch of 9000"):
        ArrayReader(world.data, batch_size=9000, seed=0)
