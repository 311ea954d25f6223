"""Gradients of the training loss against a slow one in float64: dense, view by view, with autograd alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder import ArrayReader
from rlgen_stats.toolkit.crosscoder.data.paired import measure_views
from rlgen_stats.toolkit.crosscoder.model import sparse as sparse_module
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode
from rlgen_stats.toolkit.crosscoder.training.auxk import AUX_WEIGHT
from rlgen_stats.toolkit.crosscoder.training.products import DecodedEntries, EncodedEntries, Step
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks
from rlgen_stats.toolkit.crosscoder.training.sparsity_rules import JUMP_BANDWIDTH
from rlgen_stats.toolkit.crosscoder.training.train import TrainingRun, compute_gradients, start_run
from tests.crosscoder.planted import crosscoder_spec
from tests.crosscoder.three_views import VIEWS, World, three_views

RULES: dict[str, dict[str, Any]] = {
    "batchtopk": {},
    "topk": {"k": 3},
    "jumprelu": {"l0_coefficient": 0.5},
    "l1": {"l1_coefficient": 0.7},
    "dfc": {"exclusive_features": (9, 10, 11)},
}
CASES = [
    (rule, objective)
    for rule in RULES
    for objective in ("joint", "paired", "both")
    if rule != "dfc" or objective == "joint"
]
DEAD = torch.arange(60) % 5 == 0
LOG_THETA = torch.linspace(0.1, 1.5, 60).log()
TOKENS = 90


@pytest.fixture(scope="module")
def truth() -> World:
    return three_views(2000)


class Jump(torch.autograd.Function):
    """JumpReLU of a contribution with the straight-through derivative for log theta, one equation at a time."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, norm: Tensor, log_theta: Tensor) -> Tensor:
        ctx.save_for_backward(f, norm, log_theta)
        return f * (f * norm > log_theta.exp())

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        f, norm, log_theta = ctx.saved_tensors
        theta = log_theta.exp()
        kernel = ((f * norm / theta - 1).abs() < JUMP_BANDWIDTH / 2).double() / JUMP_BANDWIDTH
        return outputs[0] * (f * norm > theta), None, -(outputs[0] * kernel * theta / norm).sum(0)


class Count(torch.autograd.Function):
    """1 where a contribution exceeds theta, with the straight-through derivative for log theta."""

    @staticmethod
    def forward(ctx: Any, contribution: Tensor, log_theta: Tensor) -> Tensor:
        ctx.save_for_backward(contribution, log_theta)
        return (contribution > log_theta.exp()).double()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        contribution, log_theta = ctx.saved_tensors
        kernel = ((contribution / log_theta.exp() - 1).abs() < JUMP_BANDWIDTH / 2).double() / JUMP_BANDWIDTH
        return None, -(outputs[0] * kernel).sum(0)


def largest(contribution: Tensor, n: int) -> Tensor:
    """True for the n largest entries that are positive."""
    limit = contribution.flatten().sort(descending=True).values[n - 1]
    return (contribution >= limit) & (contribution > 0)


class Slow:
    """The loss as its definition says, from weights [view, channel, feature] in float64."""

    def __init__(
        self, run: TrainingRun, spec: CrosscoderSpec, variance: float, difference_weights: list[float]
    ) -> None:
        c = run.crosscoder
        self.spec, self.variance, self.difference_weights = spec, variance, difference_weights
        self.encoder = c.encoder.detach().double().requires_grad_()
        self.bias = c.encoder_bias.detach().double().requires_grad_()
        self.decoder = c.decoder.detach().double().requires_grad_()
        self.offset = c.decoder_bias.detach().double().requires_grad_()
        self.log_theta = LOG_THETA.double().requires_grad_()
        self.scale = c.scale.double()

    def loss(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Loss without and with AuxK of raw activations [token, view, channel]."""
        n_joint = {"joint": TOKENS, "both": TOKENS // 2, "paired": 0}[str(self.spec.objective)]
        x = raw.double() * self.scale[:, None]
        pre = [torch.einsum("tvc,vcf->tf", x[:n_joint], self.encoder) + self.bias]
        for view in range(3):  # this view's raw activation in every slot, each with its own scale
            swapped = raw[n_joint:, view].double()[:, None] * self.scale[:, None]
            pre.append(torch.einsum("tvc,vcf->tf", swapped, self.encoder) + self.bias)
        f, chosen, penalty = self.sparsify(torch.cat(pre), [len(part) for part in pre])
        joint, *by_view = f.split([len(part) for part in pre])
        revived_joint, *revived = chosen.split([len(part) for part in pre])

        error = torch.einsum("tf,vfc->tvc", joint, self.decoder) + self.offset - x[:n_joint]
        again = torch.einsum("tf,vfc->tvc", revived_joint, self.decoder) + error.detach()
        loss, aux, errors = error.square().sum(), again.square().sum(), []
        shared = (self.decoder / self.scale[:, None, None]).mean(0)  # of all models, raw units
        offset = (self.offset / self.scale[:, None]).mean(0)
        for view in range(3):
            error = (by_view[view] @ shared + offset) * self.scale[view] - x[n_joint:, view]
            aux = aux + (revived[view] @ shared * self.scale[view] + error.detach()).square().sum()
            loss = loss + error.square().sum()
            errors.append(error)
        for view in (1, 2):  # in base's units
            difference = errors[view] / self.scale[view] * self.scale[0] - errors[0]
            loss = loss + self.difference_weights[view] * difference.square().sum()
        loss = loss / TOKENS + penalty
        return loss, loss + AUX_WEIGHT * aux / TOKENS if self.spec.sparsity != "l1" else loss

    def sparsify(self, pre: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Features, those of dead features that AuxK revives, and the penalty."""
        spec, rows, norm = self.spec, len(pre), self.decoder.norm(dim=-1).sum(dim=0)
        contribution, penalty = (pre * norm).detach(), torch.zeros(())
        dead = largest(contribution * DEAD, spec.k * rows) if spec.sparsity != "l1" else torch.zeros(60)
        if spec.sparsity == "l1":
            f = pre.relu()
            per_row = (f * norm).sum(dim=1)
            weight = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3]).repeat_interleave(torch.tensor(sizes))
            penalty = spec.l1_coefficient * (per_row * weight).sum() / TOKENS
        elif spec.sparsity == "jumprelu":
            f = Jump.apply(pre, norm.detach(), self.log_theta)  # type: ignore[no-untyped-call]
            l0 = Count.apply(contribution, self.log_theta).sum() / rows  # type: ignore[no-untyped-call]
            penalty = spec.l0_coefficient * self.variance * (l0 / spec.k - 1) ** 2
        elif spec.sparsity == "topk":
            f = pre * torch.stack([largest(row, spec.k) for row in contribution])
        else:
            f = pre * largest(contribution, spec.k * rows)
        return f, pre * dead, penalty

    def gradients(self, run: TrainingRun) -> dict[str, Tensor]:
        """By the names of the crosscoder's weights."""
        encoder, bias, decoder, offset = (w.grad for w in (self.encoder, self.bias, self.decoder, self.offset))
        assert encoder is not None
        assert bias is not None
        assert decoder is not None
        assert offset is not None
        for view, features in run.crosscoder.exclusive.items():
            others = [i for i, name in enumerate(VIEWS) if name != view]
            encoder[others, :, features] = 0.0
            decoder[others, features] = 0.0
        found = {
            "encoder_matrix": encoder.flatten(0, 1),
            "encoder_bias": bias,
            "decoder_matrix": decoder.transpose(0, 1).flatten(1),
            "decoder_offset": offset.flatten(),
        }
        return found if self.log_theta.grad is None else found | {"log_threshold": self.log_theta.grad}


@pytest.mark.parametrize("share", [1.0, -1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize(("rule", "objective"), CASES)
def test_gradients_equal_those_of_the_definition(
    truth: World, monkeypatch: pytest.MonkeyPatch, rule: str, objective: str, share: float
) -> None:
    monkeypatch.setattr(sparse_module, "SPARSE_SHARE", share)
    spec = crosscoder_spec(
        views=VIEWS, sparsity=rule, objective=objective, n_features=60, batch_size=TOKENS, difference_weight=1.7,
        **({"k": 2} | RULES[rule]),
    )  # fmt: skip
    moments = measure_views(ArrayReader(truth.data, batch_size=TOKENS, seed=1))
    run = start_run(
        spec, VIEWS, moments, seed=3, key="", folder=None, device=torch.device("cpu"), ranks=Ranks()
    )  # fmt: skip
    run.step = spec.steps - 50
    state = {"running": torch.tensor(1.0), "log_threshold": LOG_THETA}
    run.objective.load_state(state | {"last_fired": torch.where(DEAD, 0, run.step)})
    with torch.no_grad():  # views that differ, in directions and norms
        for weight in (run.crosscoder.decoder_matrix, run.crosscoder.encoder_matrix):
            weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    raw = torch.from_numpy(truth.data[:TOKENS])
    scale = run.crosscoder.scale.double().numpy()
    base, *others = truth.data.transpose(1, 0, 2).astype(float)
    weights = [1.7 * base.var(axis=0).sum() / np.square(one - base).sum(axis=1).mean() for one in others]
    slow = Slow(run, spec, float((moments.variance * scale**2).sum()), [0.0, *weights])
    loss, total = slow.loss(raw)
    total.backward()  # type: ignore[no-untyped-call]
    fit = compute_gradients(run, raw.flatten(1))
    assert fit.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert (fit.loss + fit.revival).item() == pytest.approx(total.item(), rel=1e-5)
    wanted = slow.gradients(run)
    assert wanted.keys() == run.weights().keys()
    for name, weight in run.weights().items():
        assert weight.grad is not None
        assert wanted[name].norm() > 1e-2, name
        assert (weight.grad - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


def entries(rows: int, features: int) -> SparseCode:
    """Some places, the same one twice and a row and a column without any among them."""
    mask = torch.rand(rows, features, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[2], mask[:, 4] = False, False
    places = mask.nonzero()
    row, column = torch.cat([places[:3], places[2:]]).T.contiguous()
    return SparseCode(row, column, row, (rows, features))


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()


def test_functions_have_the_derivatives_of_what_they_compute() -> None:
    code, x = entries(6, 9), doubles(6, 5).detach()

    def encoded(encoder: Tensor, bias: Tensor) -> Tensor:
        pre = (x @ encoder + bias).detach()
        return EncodedEntries.apply(encoder, bias, x, pre, code)  # type: ignore[no-untyped-call]

    assert gradcheck(encoded, (doubles(5, 9), doubles(9)))
    values, matrix = doubles(len(code.rows)), doubles(9, 4)
    assert gradcheck(lambda v, m: DecodedEntries.apply(v, m, code), (values, matrix))  # type: ignore[no-untyped-call]
    dense = torch.zeros(6, 9, dtype=torch.float64).index_put((code.rows, code.columns), values, accumulate=True)
    torch.testing.assert_close(DecodedEntries.apply(values, matrix, code), dense @ matrix)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_slope_of_a_step_is_that_of_a_sum_over_a_dense_grid(power: int) -> None:
    """sum_{c > theta} c^p over n points a unit has the slope -n theta^(p + 1) in log theta, for narrow windows."""
    n, contribution = 20_000, torch.arange(1, 60_000).double()[:, None] / 20_000
    log_theta = torch.tensor([0.3, 0.9, 1.4]).double().log().requires_grad_()
    active = Step.apply(contribution, log_theta, 0.02)  # type: ignore[no-untyped-call]
    (active * contribution**power).sum().backward()
    assert log_theta.grad is not None
    torch.testing.assert_close(log_theta.grad, -n * log_theta.detach().exp() ** (power + 1), rtol=3e-3, atol=0.0)
    assert active.sum(dim=0).tolist() == pytest.approx([n * (3 - 0.3), n * (3 - 0.9), n * (3 - 1.4)], rel=1e-3)
