"""Do verdict, text, figures and tables of a report agree? Asked whenever a report is made, and in tests.

The rules of docs/method.md are written a second time here, apart from the code that gave the verdicts, so that a slip
in either is seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

import numpy as np
import xarray as xr

from rlgen_stats.toolkit.reporting.figures.plotting import Graphic, Missing
from rlgen_stats.toolkit.reporting.formatting import fixed, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, by_dictionary
from rlgen_stats.toolkit.statistics.causal.findings import Check, from_columns, of_check
from rlgen_stats.toolkit.statistics.causal.verdict import decide
from rlgen_stats.toolkit.statistics.task_accuracy import DomainAccuracy

ONE_IN_A_HUNDRED, A_TWENTIETH, ONE_IN_FIFTY, HALF, TWO_POINTS = 0.01, 0.05, 0.02, 0.5, 0.02
DRAWN_EXACTLY: Final = 0.005
"""Largest difference between a claim's number and that in a figure, in the claim's unit: a hundredth is not seen."""
DRAWN_ROUGHLY: Final = 5.0
"""Points of training by which curves may lie apart under a verdict that says they do not differ by that much."""
CAUSAL: Final = {
    "CAUSAL_SPECIFIC": {"SUPPORTED", "CONTRADICTED", "UNDETERMINED"},
    "CAUSAL_NONSPECIFIC": {"NOT_SUPPORTED", "CONTRADICTED"},
    "DESTRUCTIVE": {"NOT_SUPPORTED", "CONTRADICTED"},
    "NO_EFFECT": {"NOT_SUPPORTED", "CONTRADICTED"},
    "INCONCLUSIVE": {"UNDETERMINED", "CONTRADICTED"},
    "NOT_ESTIMABLE": {"NOT_ESTIMABLE"},
}
"""Verdict of a trial -> verdicts of its claim that it allows."""


def disagreements(
    claims: Sequence[Mapping[str, Any]],
    results: Results,
    *,
    domains: Iterable[DomainAccuracy] = (),
    figures: Mapping[str, Graphic | Missing] | None = None,
    drawn: Mapping[str, Mapping[str, float]] | None = None,
) -> list[str]:
    """What a report says in two ways, a sentence each; empty if nothing.

    Parameters
    ----------
    claims
        The claims as in report.json.
    results
        Results groups by name.
    domains
        Accuracy by domain, as said at the top.
    figures
        Figures by name; their ``numbers`` are the claims', and what they show ``roughly`` may not contradict a verdict.
    drawn
        Panels of the overview: ``name -> numbers``.
    """
    by_id = {str(claim["id"]): claim for claim in claims}
    found = [*against_tables(claims, results), *in_text(claims), *_accuracies(domains)]
    shown = {f"the overview's panel {name!r}": numbers for name, numbers in (drawn or {}).items()}
    for name, figure in (figures or {}).items():
        if isinstance(figure, Graphic):
            shown[f"the figure {name!r}"] = figure.numbers
            found += [fault for claim, value in figure.roughly.items() for fault in _roughly(by_id[claim], name, value)]
    for where, numbers in shown.items():
        for path, value in numbers.items():
            claim, said = by_id[path[:2]], _at(by_id, path.split("."))
            if said is not None and _known(said, value) and abs(value - said) > DRAWN_EXACTLY:
                found.append(f"{claim['id']} {claim['verdict']}: {where} draws {value:g}, {path} is {said:g}")
    return found


def _at(value: Any, path: Sequence[str]) -> float | None:
    """What report.json has in a place; None where the claim does not say it."""
    for key in path:
        if isinstance(value, Mapping) and key not in value:
            return None
        value = value[int(key) if key.isdigit() else key]
    return cast(float | None, value)


def _known(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _roughly(claim: Mapping[str, Any], figure: str, value: float) -> Iterator[str]:
    """A figure must not show the opposite of a directed verdict, nor a difference where there is said to be none."""
    if not _known(claim["estimate"], value):
        return
    said = f"{claim['id']} {claim['verdict']}: its figure {figure!r} shows {value:.3g}"
    if claim["verdict"] in ("SUPPORTED", "CONTRADICTED") and value * claim["estimate"] <= 0:
        yield f"{said}, the claim says {claim['estimate']:.3g}"
    if claim["verdict"] == "NOT_SUPPORTED" and abs(value) >= DRAWN_ROUGHLY:
        yield f"{said}, which is no small difference"


def in_text(claims: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The answers on one difference name it, and say why it is not enough where its interval is clear of zero.

    C1's answer names the two shares instead, C3's what each dictionary counts.
    """
    for claim in claims:
        if not _known(claim["estimate"]):
            continue
        for numbers in _to_name(claim):
            forms = "|".join(map(re.escape, numbers))
            if not re.search(rf"(?<![\d.,])(?:{forms})(?!\d|[.,]\d)", claim["answer"], re.IGNORECASE):
                yield f"{claim['id']} {claim['verdict']}: its answer does not name {' or '.join(numbers)}"
        if claim["id"] in ("C2", "C4", "C5"):
            clear = _known(claim["low"], claim["high"]) and claim["low"] * claim["high"] > 0
            if clear and claim["verdict"] in ("NOT_SUPPORTED", "UNDETERMINED") and not claim["in_short"]:
                yield f"{claim['id']} {claim['verdict']}: its interval leaves out zero, and nothing says why"


def _to_name(claim: Mapping[str, Any]) -> list[list[str]]:
    """Numbers that a claim's answer has to name, of each list one.

    C3's answer is of the dictionaries that agree, and says "no feature" of none.
    """
    if claim["id"] == "C1":
        return [[percent(claim["details"]["tails_percent"][arm] / 100)] for arm in ("sft", "rl")]
    if claim["id"] == "C3":
        counts = sorted(set(claim["details"]["n_confirmed_by_dictionary"]))
        return [[f"{count:,}" for count in counts] + ["no feature", "no task"] * (0 in counts)]
    return [[fixed(abs(claim["estimate"]))]]


def _accuracies(domains: Iterable[DomainAccuracy]) -> Iterator[str]:
    """Accuracy gained is prompts gained less forgotten."""
    for row in domains:
        if row.run != "base" and _known(row.difference):
            counted = (row.gained - row.forgotten) / max(row.n_prompts, 1)
            if abs(counted - row.difference) > 0.5 / max(row.n_prompts, 1):
                yield (
                    f"{row.model}, domain {row.domain!r}: accuracy changes by {row.difference:g}, but {row.gained} "
                    f"prompts gained and {row.forgotten} forgotten of {row.n_prompts} are {counted:g}"
                )


# -- verdicts against tables -------------------------------------------------------------------------------------------
def against_tables(claims: Iterable[Mapping[str, Any]], results: Results) -> list[str]:
    """What the five verdicts say that the results do not, a sentence each; empty if nothing."""
    curve = results.get("mediated_share")
    checks: dict[str, tuple[str, Callable[[Mapping[str, Any], list[xr.Dataset]], Iterable[str]]]] = {
        "C1": ("attribution_contrast", _specificity),
        "C2": ("timing_contrast", _timing),
        "C3": ("selection", partial(_selection, curve=curve)),
        "C4": ("intervention", partial(_trial, direction="disable", claimed=-1)),
        "C5": ("intervention", partial(_trial, direction="amplify", claimed=1)),
    }
    found = []
    for claim in claims:
        group, check = checks[str(claim["id"])]
        if claim["verdict"] != "NOT_ESTIMABLE" and group in results:
            tables = by_dictionary(results, group)
            found += [f"{claim['id']} {claim['verdict']}: {fault}" for fault in check(claim, tables)]
    return found


def _directed(claim: Mapping[str, Any], low: float, high: float, each: Any) -> Iterator[str]:
    """What a directed verdict needs: its interval and every dictionary (four fifths of five or more) on its side."""
    if claim["verdict"] not in ("SUPPORTED", "CONTRADICTED"):
        return
    sign = 1 if claim["verdict"] == "SUPPORTED" else -1
    if not sign * low > 0 or not sign * high > 0:
        yield f"its interval [{low:g}, {high:g}] is not on its side"
    each = np.asarray(each, dtype=float)
    needed = len(each) if len(each) < 5 else math.ceil(0.8 * len(each))
    if (sign * each > 0).sum() < needed:
        yield f"the dictionaries do not agree: {each.tolist()}"


def _said(claim: Mapping[str, Any], value: float, low: float, high: float, p_value: float) -> Iterator[str]:
    """The claim's numbers are the table's (in percent)."""
    table = [100 * value, 100 * low, 100 * high, p_value]
    said = [claim[name] for name in ("estimate", "low", "high", "p_value")]
    if not np.allclose(np.array(said, dtype=float), table, rtol=1e-9, atol=1e-9, equal_nan=True):
        yield f"the claim says {said}, the table {table}"


def _specificity(claim: Mapping[str, Any], tables: list[xr.Dataset]) -> Iterator[str]:
    (data,) = tables
    prefix = "agreed_" if "agreed_effect" in data else ""
    at = data.sel(tau=float(claim["details"]["tau"]), comparison=str(data.attrs["decided_by"]))
    value, low, high, p_value = (
        float(at[f"{prefix}{name}"]) for name in ("effect", "effect_low", "effect_high", "p_value")
    )
    yield from _said(claim, value, low, high, p_value)
    each = at[f"{prefix}effect_each"].values
    yield from _directed(claim, low, high, each[np.isfinite(each)])
    comparable = str(at["comparable"].values)
    directed = claim["verdict"] in ("SUPPORTED", "CONTRADICTED")
    if directed and comparable.startswith("NOT_COMPARABLE"):
        yield f"the models are not comparable: {comparable}"
    if directed and not (min(abs(low), abs(high)) > ONE_IN_A_HUNDRED and p_value <= data.attrs["alpha"]):
        yield f"an effect beyond one feature in a hundred is not shown: [{low:g}, {high:g}], p={p_value:g}"
    if directed and max(float(at[f"{prefix}tail_sft"]), float(at[f"{prefix}tail_rl"])) <= float(
        at[f"{prefix}tail_null"]
    ):
        yield "the larger share does not exceed its null floor"
    if claim["verdict"] == "NOT_SUPPORTED" and not high < ONE_IN_A_HUNDRED:
        yield f"an effect of {high:g} is not excluded"


def _timing(claim: Mapping[str, Any], tables: list[xr.Dataset]) -> Iterator[str]:
    (data,) = tables
    time, turnover = (data.sel(measure=name) for name in ("time", "turnover"))
    yield from _said(claim, *(float(time[name]) for name in ("difference", "low", "high", "p_value")))
    sign = {"SUPPORTED": 1, "CONTRADICTED": -1}.get(claim["verdict"], 0)
    if sign:
        yield from _directed(claim, float(time["low"]), float(time["high"]), time["dictionary_difference"].values)
        for name, one, least in (("time", time, A_TWENTIETH), ("turnover", turnover, ONE_IN_FIFTY)):
            nearest = min(sign * float(one["low"]), sign * float(one["high"]))
            if not (nearest > least and float(one["p_value"]) <= data.attrs["alpha"]):
                yield f"the {name} does not say so: its interval comes as near as {nearest:g}"
        within = data["stratum_difference"].values
        if not sign * np.nansum(within * data["weight"].values) > 0:
            yield f"the comparison within strata says the opposite: {within.tolist()}"
        opposite = sign * data["stratum_difference_high" if sign > 0 else "stratum_difference_low"] < -A_TWENTIETH
        if bool((opposite & (data["stratum_difference_p"] <= data.attrs["alpha"])).any()):
            yield f"a stratum shows the opposite: {within.tolist()}"
    small = [max(abs(float(one["low"])), abs(float(one["high"]))) for one in (time, turnover)]
    if claim["verdict"] == "NOT_SUPPORTED" and not (small[0] < A_TWENTIETH and small[1] < ONE_IN_FIFTY):
        yield f"differences of {small[0]:g} of training and {small[1]:g} of the set are not excluded"


def _selection(claim: Mapping[str, Any], tables: list[xr.Dataset], *, curve: xr.Dataset | None) -> Iterator[str]:
    each = [int((data["specific_tier"].values == "CONFIRMED").sum()) for data in tables]
    if not math.isclose(claim["estimate"], float(np.mean(each))):
        yield f"the claim counts {claim['estimate']}, the tables {each}"
    carried = [float(data.attrs["carried_low"]) for data in tables]
    best = [float(data.attrs["carried_best_high"]) for data in tables]
    lifted = None if curve is None or "set" not in curve["point"] else curve.sel(direction="amplify")
    if lifted is not None and np.isfinite(lifted["share"].sel(point="set")):
        most = min(float(data.attrs["most_features"]) for data in tables)
        of_set, sizes = lifted.sel(point="set"), lifted["n_features"]
        carried, best = [float(of_set["share_low"])] * len(tables), [_best(lifted, most)] * len(tables)
        if claim["verdict"] == "SUPPORTED" and not (
            sizes.sel(point="set").max() <= most and _comparable(of_set) and of_set["above_low"] > 0
        ):
            yield f"the set is not shown to be few features that do more than random ones of {most:g}"
    if claim["verdict"] == "SUPPORTED" and len(tables) < 5 and not (min(each) > 0 and min(carried) >= HALF):
        yield f"confirmed {each}, carried at least {carried}"
    excluded = [
        high < HALF or float(data.attrs["no_rise_p"]) <= data.attrs["alpha"]
        for high, data in zip(best, tables, strict=True)
    ]
    if claim["verdict"] == "NOT_SUPPORTED" and len(tables) < 5 and not all(excluded):
        yield "a compact set is not excluded in every dictionary"


def _best(lifted: xr.Dataset, most: float) -> float:
    """Largest share not excluded of sets up to the first on the curve that is not smaller than ``most``."""
    sizes = lifted["n_features"].values
    reaching = sizes.min(axis=0)[sizes.min(axis=0) >= most]
    inside = sizes.max(axis=0) <= min(reaching, default=-1)
    return float(max(lifted["share_high"].values[inside], default=math.nan))


def _comparable(of_set: xr.Dataset) -> bool:
    """Whether the random sets' edits are as large as the set's but for a tenth."""
    if "random_sets" in of_set:
        return bool((of_set["random_sets"] != "").all())
    return bool((of_set["random_norm"].mean("random") >= 0.9 * of_set["norm_ratio"]).all())


def _trial(claim: Mapping[str, Any], tables: list[xr.Dataset], *, direction: str, claimed: int) -> Iterator[str]:
    one = tables[0].sel(direction=direction)
    findings = from_columns(cast(Mapping[str, Any], one))
    verdict, decision = decide(findings)
    if (verdict, decision) != (str(one["verdict"].values), str(one["decided_by"].values)):
        yield f"its table of criteria says {verdict} ({decision}), stored is {one['verdict'].values}"
    if claim["verdict"] not in CAUSAL[verdict]:
        yield f"its trial is {verdict}"
    arm = one.isel(condition=int(np.flatnonzero(one["kind"].values == "set")[0]))
    value, low, high, p_value = (float(arm[name]) for name in ("effect", "effect_low", "effect_high", "p_value"))
    yield from _said(claim, value, low, high, p_value)
    if claim["verdict"] == "SUPPORTED" and not min(claimed * low, claimed * high) > TWO_POINTS:
        yield f"an effect beyond two points is not shown: [{low:g}, {high:g}]"
    if claim["verdict"] == "CONTRADICTED" and not max(claimed * low, claimed * high) < 0:
        yield f"the opposite is not shown: [{low:g}, {high:g}]"
    row = of_check(findings, Check.V1_EFFECT)
    if row is not None and not np.allclose([row.statistic, row.p_value], [value, p_value], equal_nan=True):
        yield f"V1 rests on {row.statistic:g} (p={row.p_value:g}), the arm has {value:g} (p={p_value:g})"
