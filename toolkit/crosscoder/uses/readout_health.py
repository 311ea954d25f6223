"""Whether the features of one model mean something: the declared readout, judged on every model of a study.

f^A - f^base is what drift, timing, selection and edits rest on, so it is not enough that the joint code of all views
reconstructs them: one model's features must reconstruct that model, and their difference the difference of the models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import Readout
from rlgen_stats.stores.health_records import READOUT_MODELS
from rlgen_stats.toolkit.crosscoder.data.moments import ExplainedVariance
from rlgen_stats.toolkit.crosscoder.data.paired import PairedActivations, batches_of, views_of
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.uses.encode import contribution_scale, view_of
from rlgen_stats.toolkit.crosscoder.uses.health import L0_PART_TOLERANCE, Check, Health, expects_k

READOUT_TOKENS: Final = 1 << 14
"""Tokens a readout is judged on: of a demo and of a real model (66,000 and 92,000 tokens) four samples of so many
differ from all by at most .003 in shares of variance and by .8% in active features."""
FVE_SHARE_MIN: Final = 0.8
"""Smallest share of the dictionary's own FVE that one model's features keep; less describes another model."""
ARTEFACT_MAX: Final = 0.1
"""Largest share of f^A - f^base that the readouts' own difference makes on the same activations."""
CODE_R2_MIN: Final = 0.0
"""At or below it the change of the code says no more about the change of the model than no change at all."""
CONSTANT: Final = 0.99
"""Share of a change that its mean makes from which on the change counts as one constant vector: it has no variance to
explain, and shares are of its square."""
UNCHANGED: Final = 1e-8
"""Change relative to base's variance below which nothing changed and there is nothing to describe."""
ONE_BASE_MIN: Final = 0.3
"""Smallest correlation of a model's activations with base's: the demo's post-trained models have .89 and more, models
that share no training about 0 with a standard deviation near width**-.5. Below it f^A - f^base compares two bases."""
DFVE_MIN: Final = 0.3
"""Smallest share of var(a_A - a_base) that reconstructions explain: planted drifts correlate .5 and more above it."""


@dataclass(frozen=True, kw_only=True)
class ModelReadout:
    """What one model's features, read from its activations alone, say about it."""

    model: str
    view: str
    """View that stands for it, whose decoder reconstructs it."""
    fve: float
    """Fraction of its variance explained, about the mean."""
    l0: float
    """Mean active features per token."""
    change: float
    """sum |a_A - a_base|^2 / sum |a_base - mean|^2; 0 for base."""
    correlation: float
    """With base over tokens and channels, about the means of channels; NaN for base."""
    dfve: float
    """1 - sum |(a_A - a_base) - (a_hat_A - a_hat_base)|^2 / sum |(a_A - a_base) - mean|^2, NaN for base; of a change
    that is one constant vector, over sum |a_A - a_base|^2."""
    code_r2: float
    """The same for the prediction D (f^A - f^base), D the mean of both decoders: what the code alone explains."""
    artefact: float
    """sum |enc_A(a_base) - enc_base(a_base)|^2 / sum |f^A - f^base|^2, contributions f_k ||d_k||; 0 for one encoder."""
    n_tokens: int = 0
    """Tokens it was measured on; 0 in the records of earlier releases."""


@dataclass(frozen=True, kw_only=True)
class ReadoutHealth:
    """The readout of one crosscoder, measured and judged."""

    readout: Readout
    models: tuple[ModelReadout, ...]
    contrasted: tuple[str, ...]
    """Models whose difference from base is judged too."""
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> str:
        """The failed lines, of each kind the worst model's and how many others fail; empty if there are none."""
        failed: dict[str, list[Check]] = {}
        for check in self.checks:
            if not check.ok:
                failed.setdefault(check.name, []).append(check)
        lines = []
        for checks in failed.values():
            worst = max(checks, key=lambda check: abs(check.value - check.limit))
            others = f" (and of {len(checks) - 1} more)" if len(checks) > 1 else ""
            lines.append(f"{worst.reason}{others}")
        return "; ".join(lines)

    def describe(self) -> dict[str, Any]:
        """Part ``readout_models`` of health.json."""
        return {
            "models": [_jsonable(vars(one)) for one in self.models],
            "contrasted": list(self.contrasted),
            "checks": [vars(check) for check in self.checks],
            "healthy": not self.reasons,
            "reasons": self.reasons,
            "dfve_min": DFVE_MIN,
        }


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one model, NaN as null."""
    return {name: None if value != value else value for name, value in values.items()}


class _Against:
    """Sums over tokens of one model against base."""

    def __init__(self, width: int) -> None:
        self.explained, self.by_code = ExplainedVariance((width,)), ExplainedVariance((width,))
        self.artefact = self.change = self.squares = 0.0


@torch.no_grad()
def measure_readout(
    crosscoder: Crosscoder,
    reader: PairedActivations,
    models: Sequence[str],
    *,
    readout: Readout | None = None,
    max_tokens: int = READOUT_TOKENS,
) -> tuple[ModelReadout, ...]:
    """How well a readout describes models, each read from its own activations alone, and their change from base.

    Parameters
    ----------
    crosscoder
        Trained or imported.
    reader
        Raw activations of ``models`` on the same tokens, base first: a ``PairedReader``, or an ``ArrayReader``. They
        need not be views of the crosscoder.
    models
        Model ids of the reader's slots.
    readout
        A readout of one model; default the declared one.
    max_tokens
        All tokens are read, or a shuffled sample of about this many.

    Returns
    -------
    tuple of ModelReadout
        One a model, in order; sums in float64, everything in raw units but the artefact.

    Raises
    ------
    InputError
        If the models' widths differ from the crosscoder's, or the readout is not one of single models.
    """
    kind = readout or crosscoder.default_readout
    views = [view_of(model, crosscoder.views) for model in models]
    maps = {view: crosscoder.readout_map(view=view, kind=kind) for view in views}
    scale = contribution_scale(crosscoder, views[0], kind)
    widths = [crosscoder.widths[crosscoder.view_index(view)] for view in views]
    own = [ExplainedVariance((width,)) for width in widths]
    against = [_Against(width) for width in widths]
    active, n_tokens = np.zeros(len(models)), 0
    for batch in batches_of(reader, max_tokens=max_tokens):
        raw = [torch.from_numpy(np.ascontiguousarray(part)).to(scale.device) for part in views_of(batch)]
        if [part.shape[1] for part in raw] != widths or len(set(widths)) > 1:
            raise InputError(
                f"activations of {list(models)} must have one width, that of their views {widths}, got "
                f"{[part.shape[1] for part in raw]}."
            )
        base_f = maps[views[0]](raw[0])
        base_back = crosscoder.reconstruct(base_f, views[0])
        for slot, (part, view) in enumerate(zip(raw, views, strict=True)):
            f = maps[view](part) if slot else base_f
            back = crosscoder.reconstruct(f, view) if slot else base_back
            own[slot].update(part.cpu().numpy(), back.cpu().numpy())
            active[slot] += float((f > 0).sum())
            if slot:
                sums, change = against[slot], (part - raw[0]).cpu().numpy()
                sums.squares += float(np.square(change.astype(np.float64)).sum())
                sums.explained.update(change, (back - base_back).cpu().numpy())
                decoder = (crosscoder.feature_direction(view) + crosscoder.feature_direction(views[0])) / 2
                sums.by_code.update(change, ((f - base_f) @ decoder).cpu().numpy())
                if view != views[0] and kind == "own":  # all other readouts encode every model the same way
                    sums.artefact += _squares((maps[view](raw[0]) - base_f) * scale)
                sums.change += _squares((f - base_f) * scale)
        n_tokens += len(raw[0])
    return tuple(
        ModelReadout(
            model=model,
            view=view,
            fve=float(own[slot].value()),
            l0=float(active[slot] / n_tokens),
            change=against[slot].squares / float(own[0].moments.m2.sum()) if slot else 0.0,
            correlation=_correlation(own[0], own[slot], against[slot].explained) if slot else math.nan,
            dfve=_of_change(against[slot].explained) if slot else math.nan,
            code_r2=_of_change(against[slot].by_code) if slot else math.nan,
            artefact=_share(against[slot].artefact, against[slot].change) if slot else math.nan,
            n_tokens=n_tokens,
        )
        for slot, (model, view) in enumerate(zip(models, views, strict=True))
    )


def _correlation(base: ExplainedVariance, model: ExplainedVariance, change: ExplainedVariance) -> float:
    """Of two models, from var(A - base) = var(A) + var(base) - 2 cov(A, base); NaN where one does not vary."""
    of_base, of_model, of_change = (float(one.moments.m2.sum()) for one in (base, model, change))
    norms = math.sqrt(of_base * of_model)
    return (of_base + of_model - of_change) / (2 * norms) if norms else math.nan


def _of_change(explained: ExplainedVariance) -> float:
    """Share of a change that is explained: of its variance, or of its square where it is one constant vector."""
    constant = float(explained.constant_share()) > CONSTANT
    return float(explained.share_of_squares() if constant else explained.value())


def _squares(values: Tensor) -> float:
    return float(values.double().square().sum())


def _share(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole > 0 else math.inf


def models_of_record(record: Mapping[str, Any]) -> tuple[ModelReadout, ...]:
    """What health.json says was measured of each model."""
    models = record.get(READOUT_MODELS, {}).get("models", [])
    known: list[dict[str, Any]] = [{name: math.nan if of is None else of for name, of in one.items()} for one in models]
    return tuple(ModelReadout(**one) for one in known)


def own_l0(crosscoder: Crosscoder, health: Health) -> float | None:
    """The dictionary's own L0, to which that of single models is compared where it says nothing of k."""
    return None if expects_k(crosscoder) else health.l0


def own_fve(crosscoder: Crosscoder, health: Health) -> float:
    """The dictionary's own FVE, to which that of single models is compared.

    Of the joint code, mean over views; where there is none, that of the view it describes best: the one trained on.
    """
    return float(health.fve.mean() if crosscoder.has_joint_code else health.fve.max())


def judge_readout(
    crosscoder: Crosscoder,
    models: Sequence[ModelReadout],
    *,
    own_fve: float,
    contrasted: Collection[str],
    own_l0: float | None = None,
    readout: Readout | None = None,
) -> ReadoutHealth:
    """Hold measured readouts against their limits.

    Parameters
    ----------
    crosscoder
        The crosscoder they were measured with.
    models
        As :func:`measure_readout` gives them.
    own_fve
        The dictionary's own FVE, of which every model must keep ``FVE_SHARE_MIN``: that of the joint code, mean over
        views.
    own_l0
        Its own L0 on the same texts, from which that of a model may differ by ``L0_PART_TOLERANCE``; default its k.
    contrasted
        Models whose difference from base claims rest on: their dFVE, code R^2 and artefact are judged, if they differ.
    readout
        The readout that was measured; default the declared one.

    Returns
    -------
    ReadoutHealth
        A value that could not be measured fails its check.
    """
    checks, expected = [], crosscoder.k if own_l0 is None else own_l0
    least = FVE_SHARE_MIN * own_fve
    for one in models:
        reason = (
            f"readout explains {one.fve:.3f} of the variance of {one.model}, at least {least:.3f} needed, "
            f"{FVE_SHARE_MIN:.0%} of the dictionary's own {own_fve:.3f}"
        )
        checks.append(Check("readout_fve", one.model, one.fve, least, one.fve >= least, reason))
        if crosscoder.k > 0 and crosscoder.sparsity != "l1":
            within = f"expected {expected:.4g} within {L0_PART_TOLERANCE:.0%}"
            ok = abs(one.l0 - expected) <= L0_PART_TOLERANCE * expected
            reason = f"L0 {one.l0:.2f} in the readout of {one.model}, {within}"
            checks.append(Check("readout_l0", one.model, one.l0, float(expected), ok, reason))
        if one.change > UNCHANGED:
            reason = (
                f"activations of {one.model} correlate {one.correlation:.2f} with base's, at least {ONE_BASE_MIN:g} "
                "expected of models trained from one base; features of two bases cannot be subtracted"
            )
            value = one.correlation
            checks.append(Check("one_base", one.model, value, ONE_BASE_MIN, value >= ONE_BASE_MIN, reason))
    for one in (one for one in models if one.model in contrasted and one.change > UNCHANGED):
        against_base = f"of what changed between base and {one.model}"
        reason = f"reconstructions explain {one.dfve:.3f} {against_base}, at least {DFVE_MIN:g} needed"
        checks.append(Check("readout_dfve", one.model, one.dfve, DFVE_MIN, one.dfve >= DFVE_MIN, reason))
        reason = f"the code alone explains {one.code_r2:.3f} {against_base}, more than {CODE_R2_MIN:g} needed"
        checks.append(Check("readout_code_r2", one.model, one.code_r2, CODE_R2_MIN, one.code_r2 > CODE_R2_MIN, reason))
        reason = (
            f"{one.artefact:.3f} of the difference in features between base and {one.model} arises on equal "
            f"activations, at most {ARTEFACT_MAX:g} allowed"
        )
        ok = one.artefact <= ARTEFACT_MAX
        checks.append(Check("readout_artefact", one.model, one.artefact, ARTEFACT_MAX, ok, reason))
    return ReadoutHealth(
        readout=readout or crosscoder.default_readout,
        models=tuple(models),
        contrasted=tuple(contrasted),
        checks=tuple(checks),
    )
