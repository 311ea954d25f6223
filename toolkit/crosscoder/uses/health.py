"""Health of a crosscoder: reconstruction, sparsity, dead features and model loss, each with a limit and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import MODEL, VIEW
from rlgen_stats.schemas.errors import StageError
from rlgen_stats.schemas.study import Readout
from rlgen_stats.stores import StudyFolder, write_json
from rlgen_stats.stores.health_records import (
    HEALTH,
    READOUT_MODELS,
    accept,
    failed_readout,
    is_accepted,
    read_health,
    readout_accepted,
)
from rlgen_stats.toolkit.crosscoder.data.moments import ExplainedVariance
from rlgen_stats.toolkit.crosscoder.data.paired import PairedActivations, batches_of, joined
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.uses.remedies import failures
from rlgen_stats.toolkit.crosscoder.uses.splice import SpliceCE
from rlgen_stats.toolkit.progress import SILENT, Progress

CROSSCODER: Final = "crosscoder"

HEALTH_TOKENS: Final = 1 << 20
"""Tokens health is measured on: a feature that fires on one token in 100,000 is then seen ten times on average."""
FVE_MIN: Final = 0.8
"""Below it, every later test misses more than a fifth of a model's variance."""
DEAD_MAX: Final = 0.25
"""Above it the dictionary is effectively smaller than declared, and shares of features compare badly."""
L0_TOLERANCE: Final = 0.1
"""Relative deviation of L0 from k under the fixed threshold; more means that threshold and training disagree. Where
another corpus was trained on, that of training's last batches."""
L0_PART_TOLERANCE: Final = 0.25
"""The same of rows that share k with others (objective both, single models): those with more to describe get more."""
DENSE_SHARE: Final = 0.5
"""An l1 code with more active features than this share of the channels is no sparse code."""
DENSE_RATE: Final = 0.2
"""A feature that fires on more than a fifth of all tokens distinguishes few of them."""
DENSE_MAX: Final = 0.1
"""Largest share of such features among those that fire."""
BIAS_TOLERANCE: Final = 0.1
"""Relative reconstruction bias further from 1 means that activations, and all effects in their units, are shrunk."""
RATE_EDGES: Final = tuple(10.0**power for power in range(-6, 1))
"""Bins of the firing-rate histogram: never, below 1e-6, six decades up to always."""
CE_RECOVERED_MIN: Final = 0.9
"""Share of the mean-ablation loss that splicing must avoid; below it the model relies on what the code drops."""


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    name: str
    view: str
    """Empty where the number is the crosscoder's as a whole."""
    value: float
    limit: float
    ok: bool
    """False also where the value could not be measured."""
    reason: str
    """The line in words."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """Health of one crosscoder."""

    views: tuple[str, ...]
    fve: NDArray[np.float64]
    """[view] under the joint code of all views."""
    fve_readout: NDArray[np.float64]
    """[view] under the declared readout of that view alone, which features.zarr and edits use."""
    l0: float
    """Mean active features per token, joint code."""
    firing_readout: NDArray[np.float64]
    """[view, feature] share of tokens with f > 0 under the readout of that view."""
    firing: NDArray[np.float64]
    """[feature] share of tokens with f > 0, joint code."""
    bias: NDArray[np.float64]
    """[view] relative reconstruction bias of the joint code: below 1 where reconstructions are shrunk."""
    n_tokens: int
    ce: Mapping[str, SpliceCE]
    """Cross-entropy by view, where the model was at hand."""
    checks: tuple[Check, ...]

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Health:
        """What health.json says was measured; without its verdict."""
        measured = {field.name for field in fields(SpliceCE)}
        ce = {view: {name: of[name] for name in measured & of.keys()} for view, of in record["ce"].items()}
        return cls(
            views=tuple(record["views"]),
            fve=np.array(record["fve"]),
            fve_readout=np.array(record["fve_readout"]),
            l0=record["l0"],
            firing_readout=np.array(record["firing_readout"]),
            firing=np.array(record["firing"]),
            bias=np.array(record["reconstruction_bias"]),
            n_tokens=record["n_tokens"],
            ce={view: SpliceCE(**of) for view, of in ce.items()},
            checks=(),
        )

    @property
    def l0_readout(self) -> NDArray[np.float64]:
        """[view] mean active features per token under the readout."""
        return np.asarray(self.firing_readout.sum(axis=1))

    @property
    def dead_fraction(self) -> float:
        """Share of features that never fire."""
        return float((self.firing == 0).mean())

    @property
    def dense_fraction(self) -> float:
        """Share of the features that fire which do so on more than ``DENSE_RATE`` of the tokens."""
        alive = self.firing[self.firing > 0]
        return float((alive > DENSE_RATE).mean()) if len(alive) else 0.0

    def firing_histogram(self) -> NDArray[np.int64]:
        """Features that never fire, below the first of ``RATE_EDGES``, and between its neighbours."""
        edges = np.array([0.0, np.nextafter(0.0, 1.0), *RATE_EDGES[:-1], np.inf])
        return np.histogram(self.firing, edges)[0]

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def reasons(self) -> str:
        """The failed lines, or "ok"."""
        return "; ".join(check.reason for check in self.checks if not check.ok) or "ok"

    def describe(self) -> dict[str, Any]:
        """Contents of health.json."""
        return {
            "views": list(self.views),
            "n_tokens": self.n_tokens,
            "fve": self.fve.tolist(),
            "fve_readout": self.fve_readout.tolist(),
            "l0": self.l0,
            "l0_readout": self.l0_readout.tolist(),
            "firing_readout": self.firing_readout.tolist(),
            "dead_fraction": self.dead_fraction,
            "dense_fraction": self.dense_fraction,
            "reconstruction_bias": self.bias.tolist(),
            "firing": self.firing.tolist(),
            "firing_histogram": {"edges": RATE_EDGES, "counts": self.firing_histogram().tolist()},
            "ce": {
                view: {**vars(ce), "increase": ce.increase, "recovered": ce.recovered, "kl_recovered": ce.kl_recovered}
                for view, ce in self.ce.items()
            },
            "checks": [vars(check) for check in self.checks],
            "healthy": self.healthy,
            "reasons": self.reasons,
        }


@torch.no_grad()
def measure_health(
    crosscoder: Crosscoder,
    reader: PairedActivations,
    *,
    readout: Readout | None = None,
    ce: Mapping[str, SpliceCE] | None = None,
    max_tokens: int = HEALTH_TOKENS,
    folder: Path | None = None,
) -> Health:
    """Measure FVE, L0, dead features and firing rates, and judge each.

    Parameters
    ----------
    crosscoder
        Trained model.
    reader
        Paired raw activations of its views.
    readout
        Readout for ``fve_readout``; default the declared one.
    ce
        Cross-entropies of :func:`splice_ce` by view; judged too where given.
    max_tokens
        All tokens are read, or a shuffled sample of about this many.
    folder
        Where health.json goes; None keeps nothing.

    Returns
    -------
    Health

    Notes
    -----
    A dictionary without a joint code (an SAE of one model) is measured through its readout throughout.

    FVE is 1 - residual sum of squares / sum of squares about the mean, in float64. The joint code is what training
    optimised; the readout is what features.zarr and interventions use, and is never better.
    """
    kind = readout or crosscoder.default_readout
    device = crosscoder.encoder_matrix.device
    joint = [ExplainedVariance((width,)) for width in crosscoder.widths]
    readout_alone = [ExplainedVariance((width,)) for width in crosscoder.widths]
    readouts = [None if kind == "joint" else crosscoder.readout_map(view=view, kind=kind) for view in crosscoder.views]
    firing = torch.zeros(crosscoder.n_features, dtype=torch.float64, device=device)
    alone = torch.zeros(len(readouts), crosscoder.n_features, dtype=torch.float64, device=device)
    n_tokens = 0
    for batch in batches_of(reader, max_tokens=max_tokens):
        raw = torch.from_numpy(joined(batch)).to(device)
        f = crosscoder.encode(crosscoder.normalise(raw))
        firing += (f > 0).sum(dim=0)
        for slot, (view, part) in enumerate(zip(crosscoder.views, crosscoder.split(raw), strict=True)):
            read = readouts[slot]
            f_readout = f if read is None else read(part)
            f_own = f if crosscoder.has_joint_code else f_readout
            data = part.cpu().numpy()
            joint[slot].update(data, crosscoder.reconstruct(f_own, view, joint=crosscoder.has_joint_code).cpu().numpy())
            readout_alone[slot].update(data, crosscoder.reconstruct(f_readout, view, joint=read is None).cpu().numpy())
            alone[slot] += (f_readout > 0).sum(dim=0)
        n_tokens += len(raw)
    firing_readout = (alone / n_tokens).cpu().numpy()
    rate = (firing / n_tokens).cpu().numpy() if crosscoder.has_joint_code else firing_readout.mean(axis=0)
    fve, l0 = np.array([float(each.value()) for each in joint]), float(rate.sum())
    fve_readout = np.array([float(each.value()) for each in readout_alone])
    bias = np.array([float(each.bias()) for each in joint])
    health = Health(
        views=crosscoder.views,
        fve=fve,
        fve_readout=fve_readout,
        l0=l0,
        firing_readout=firing_readout,
        firing=rate,
        bias=bias,
        n_tokens=n_tokens,
        ce=dict(ce or {}),
        checks=(),
    )
    health = replace(health, checks=judge_health(crosscoder, health))
    if folder is not None:
        facts = {"crosscoder": crosscoder.name, "weights_sha256": crosscoder.weights_sha256, "readout": kind}
        write_json(folder / HEALTH, facts | health.describe())
    return health


def judge_again(crosscoder: Crosscoder, folder: Path) -> Health:
    """Hold what health.json says was measured against the limits of this version, and write the verdict there."""
    record = read_health(folder)
    health = Health.of_record(record)
    health = replace(health, checks=judge_health(crosscoder, health))
    write_json(folder / HEALTH, record | health.describe())
    return health


def judge_health(crosscoder: Crosscoder, health: Health) -> tuple[Check, ...]:
    """Hold what was measured against its limits; a value that could not be measured fails its check."""
    checks, l0, dead = [], health.l0, health.dead_fraction
    for view, value, bias in zip(crosscoder.views, health.fve.tolist(), health.bias.tolist(), strict=True):
        checks.append(_at_least("fve", view, value, FVE_MIN, "fraction of variance explained"))
        reason = f"relative reconstruction bias of {view} {bias:.3f}, expected 1 within {BIAS_TOLERANCE:g}"
        checks.append(Check("reconstruction_bias", view, bias, 1.0, abs(bias - 1.0) <= BIAS_TOLERANCE, reason))
    if expects_k(crosscoder):
        checks.append(_near_k("l0", crosscoder, l0, "L0"))
    else:
        limit = DENSE_SHARE * min(crosscoder.widths)
        checks.append(Check("l0", "", l0, limit, 0 < l0 <= limit, f"L0 {l0:.2f}, expected above 0 to {limit:g}"))
    if has_k(crosscoder) and not expects_k(crosscoder) and (trained := crosscoder.facts.get("l0_trained")) is not None:
        checks.append(_near_k("l0_trained", crosscoder, trained, "L0 on the texts trained on"))
    reason = f"dead fraction {dead:.3f}, at most {DEAD_MAX:g} allowed"
    checks.append(Check("dead_fraction", "", dead, DEAD_MAX, dead <= DEAD_MAX, reason))
    dense = health.dense_fraction
    reason = (
        f"share of features that fire on over {DENSE_RATE:.0%} of tokens {dense:.3f}, at most {DENSE_MAX:g} allowed"
    )
    checks.append(Check("dense_fraction", "", dense, DENSE_MAX, dense <= DENSE_MAX, reason))
    for view, loss in health.ce.items():
        checks.append(_at_least("ce_recovered", view, loss.recovered, CE_RECOVERED_MIN, "cross-entropy recovered"))
        checks.append(_at_least("kl_recovered", view, loss.kl_recovered, CE_RECOVERED_MIN, "KL recovered"))
    return tuple(checks)


def expects_k(crosscoder: Crosscoder) -> bool:
    """Whether as many features as the declared k are active a token of the study's texts.

    Not under an l1 penalty, and not where the fixed threshold is that of another corpus: short answers to short prompts
    may need two thirds of the features that prose needs.
    """
    return has_k(crosscoder) and crosscoder.facts.get("spec", {}).get("corpus") is None


def has_k(crosscoder: Crosscoder) -> bool:
    """Whether training aimed at a number of active features a token: not under an l1 penalty."""
    return crosscoder.sparsity != "l1" and crosscoder.k > 0


def _near_k(name: str, crosscoder: Crosscoder, l0: float, words: str) -> Check:
    # of objective paired l0 is the mean over all rows that share k
    tolerance = L0_PART_TOLERANCE if crosscoder.facts.get("objective") == "both" else L0_TOLERANCE
    ok = abs(l0 - crosscoder.k) <= tolerance * crosscoder.k
    return Check(
        name, "", l0, float(crosscoder.k), ok, f"{words} {l0:.2f}, expected {crosscoder.k} within {tolerance:.0%}"
    )


def _at_least(name: str, view: str, value: float, limit: float, words: str) -> Check:
    return Check(name, view, value, limit, value >= limit, f"{words} of {view} {value:.3f}, at least {limit:g} needed")


def require_healthy(
    folder: StudyFolder, crosscoders: Mapping[str, bool], *, stage: str, force: bool, progress: Progress = SILENT
) -> None:
    """Refuse to go on with a crosscoder that failed its checks, unless that was accepted.

    A readout that failed is no reason to refuse: its numbers are exploratory, and the claims that rest on it are not
    estimable unless encode is forced or study.yaml accepts it.

    Parameters
    ----------
    folder
        Study folder.
    crosscoders
        Name -> whether study.yaml accepts it unhealthy.
    stage
        The stage that uses them, for the message.
    force
        Accept them now; noted beside the weights, for these weights only.
    progress
        Receives a line for each crosscoder that is used although it failed.

    Raises
    ------
    StageError
        Naming the failed checks and the remedy.
    """
    for name, accepted in crosscoders.items():
        place = folder.crosscoder(name)
        record = read_health(place)
        readout = failed_readout(record)
        if record["healthy"] and not readout:
            continue
        known = is_accepted(place, record)
        if not (record["healthy"] or force or accepted or known):
            lines = "".join(f"\n  {line}" for line in failures(place, record))
            raise StageError(
                f"crosscoder {name!r} failed its health check:{lines}\n"
                "Change these settings of 'crosscoders' in study.yaml, or use it as it is: "
                f"rlgen-stats {stage} --force, or accept_unhealthy: true (recorded, and the report says so)."
            )
        if force:  # what study.yaml accepts stands there, and can be taken back there
            accept(place, record, stage=stage)
        if not record["healthy"]:
            progress.log(f"crosscoder {name} is used although it failed its health check: {record['reasons']}")
        if readout:
            used = accepted or readout_accepted(place)
            consequence = "accepted" if used else "claims C2 to C5 will not be estimable"
            progress.log(f"the readout of crosscoder {name} failed its health check ({consequence}): {readout}")


def health_dataset(folder: StudyFolder, names: list[str]) -> xr.Dataset:
    """Health of several crosscoders as one table (layout ``health``).

    Parameters
    ----------
    folder
        Study folder.
    names
        Crosscoders.

    Returns
    -------
    Dataset
        ``fve``, ``fve_readout``, ``ce_increase``, ``ce_recovered``, ``kl``, ``kl_recovered``, ``reconstruction_bias``
        [crosscoder, view], NaN where a crosscoder lacks the view; ``l0``, ``dead_fraction``, ``dense_fraction``,
        ``n_features``, ``healthy``, ``reasons`` [crosscoder]; ``firing_histogram[crosscoder, rate_bin]``, features by
        firing rate (coordinate: lower edge, the silent at 0). Where a readout was judged: ``fve_model``, ``l0_model``,
        ``n_tokens_model``, ``dfve``, ``code_r2``, ``artefact`` [crosscoder, model]; ``readout_reasons``, its failed
        checks, which ``reasons`` lists too, and ``readout_accepted`` [crosscoder].

    Raises
    ------
    StageError
        If one has no health.json.
    """
    records = {name: read_health(folder.crosscoder(name)) for name in names}
    views = list(dict.fromkeys(view for record in records.values() for view in record["views"]))

    def by_view(pick: Any) -> tuple[tuple[str, str], NDArray[np.float64]]:
        table = np.full((len(records), len(views)), np.nan)
        for row, record in zip(table, records.values(), strict=True):
            for slot, view in enumerate(record["views"]):
                row[views.index(view)] = pick(record, slot, view)
        return (CROSSCODER, VIEW), table

    def loss(record: dict[str, Any], view: str, key: str) -> float:
        value = record["ce"].get(view, {}).get(key)
        return math.nan if value is None else float(value)

    def each(key: str, kind: Any) -> tuple[str, NDArray[Any]]:
        return CROSSCODER, np.array([record[key] for record in records.values()], dtype=kind)

    readout = [failed_readout(record) for record in records.values()]
    listed = [[record["reasons"], failed] for record, failed in zip(records.values(), readout, strict=True)]
    dataset = xr.Dataset(
        {
            "fve": by_view(lambda record, slot, view: record["fve"][slot]),
            "fve_readout": by_view(lambda record, slot, view: record["fve_readout"][slot]),
            "ce_increase": by_view(lambda record, slot, view: loss(record, view, "increase")),
            "ce_recovered": by_view(lambda record, slot, view: loss(record, view, "recovered")),
            "kl": by_view(lambda record, slot, view: loss(record, view, "kl")),
            "kl_recovered": by_view(lambda record, slot, view: loss(record, view, "kl_recovered")),
            "reconstruction_bias": by_view(lambda record, slot, view: record["reconstruction_bias"][slot]),
            "l0": each("l0", np.float64),
            "dead_fraction": each("dead_fraction", np.float64),
            "dense_fraction": each("dense_fraction", np.float64),
            "firing_histogram": (
                (CROSSCODER, "rate_bin"),
                np.array([record["firing_histogram"]["counts"] for record in records.values()], dtype=np.int64),
            ),
            "healthy": (
                CROSSCODER,
                [bool(r["healthy"]) and not f for r, f in zip(records.values(), readout, strict=True)],
            ),
            "reasons": (CROSSCODER, ["; ".join(r for r in both if r not in ("", "ok")) or "ok" for both in listed]),
            "n_features": (CROSSCODER, np.array([len(record["firing"]) for record in records.values()])),
        },
        coords={CROSSCODER: list(records), VIEW: views, "rate_bin": [0.0, np.finfo(float).tiny, *RATE_EDGES[:-1]]},
        attrs={
            "fve_min": FVE_MIN,
            "dead_max": DEAD_MAX,
            "l0_tolerance": L0_TOLERANCE,
            "l0_part_tolerance": L0_PART_TOLERANCE,
            "dense_max": DENSE_MAX,
            "bias_tolerance": BIAS_TOLERANCE,
            "ce_recovered_min": CE_RECOVERED_MIN,
        },
    )
    accepted = [readout_accepted(folder.crosscoder(name)) for name in names]
    return dataset.merge(_readout_table(records, readout, accepted), combine_attrs="no_conflicts")


def _readout_table(records: dict[str, dict[str, Any]], reasons: list[str], accepted: list[bool]) -> xr.Dataset:
    """The share of :func:`health_dataset` about readouts; empty if none was judged."""
    measured = [record.get(READOUT_MODELS, {}).get("models", []) for record in records.values()]
    by_name = [{one["model"]: one for one in models} for models in measured]
    models = list(dict.fromkeys(model for of_model in by_name for model in of_model))
    if not models:
        return xr.Dataset()
    columns = {"fve_model": "fve", "l0_model": "l0", "n_tokens_model": "n_tokens"}
    columns |= {name: name for name in ("dfve", "code_r2", "artefact")}
    table = {
        name: (
            (CROSSCODER, MODEL),
            np.array([[_cell(of_model, model, key) for model in models] for of_model in by_name]),
        )
        for name, key in columns.items()
    }
    labels = {"readout_reasons": (CROSSCODER, reasons), "readout_accepted": (CROSSCODER, accepted)}
    limits = {record[READOUT_MODELS]["dfve_min"] for record in records.values() if READOUT_MODELS in record}
    coords = {CROSSCODER: list(records), MODEL: models}
    return xr.Dataset(table | labels, coords=coords, attrs={"dfve_min": max(limits)})


def _cell(measured: Mapping[str, Any], model: str, name: str) -> float:
    value = measured.get(model, {}).get(name)
    return math.nan if value is None else float(value)
