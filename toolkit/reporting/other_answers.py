"""What a study answers beside one report: its further layers and contrasts, and their verdicts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, read_json
from rlgen_stats.stores.atomic import explain_damage
from rlgen_stats.toolkit.reporting.formatting import listed
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict


@dataclass(frozen=True)
class OtherAnswer:
    """The report on another layer or contrast."""

    asked: str
    """Layer, contrast or both."""
    path: str
    """Its page, from this report's folder."""
    verdicts: dict[str, Verdict]
    """Claim -> verdict; empty before there is a report."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"asked": self.asked, "path": self.path, "verdicts": {k: v.value for k, v in self.verdicts.items()}}


def asked(spec: StudySpec) -> str:
    """The layer and the contrast that a spec answers, of those of which it asks several."""
    parts = [f"layer {spec.extraction.layer}"] if len(spec.extraction.layers) > 1 else []
    return ", ".join([*parts, *(_against(pair) for pair in spec.contrasts[:1])])


def answered_note(spec: StudySpec) -> str:
    """Which of several layers and contrasts a report answers, and at which level; empty where it is the only one."""
    n, alpha = len(spec.answers), spec.statistics.alpha
    if n == 1:
        return ""
    _, *layers = spec.extraction.layers or (None,)
    _, *pairs = spec.contrasts or (None,)
    counts = [f"{len(others) + 1} {name}" for others, name in ((layers, "layers"), (pairs, "contrasts")) if others]
    others = [f"layer {layer}" for layer in layers] + [_against(pair) for pair in pairs if pair]
    return (
        f"{asked(spec)}; {' and '.join(counts)} asked, each at level {alpha:.3g} ({alpha * n:.3g} in all), the others "
        f"{listed(others)}"
    )


def _against(pair: tuple[str, str]) -> str:
    return f"{pair[0]} against {pair[1]}"


def other_answers(folder: StudyFolder, linked: Iterable[tuple[StudyFolder, StudySpec]]) -> tuple[OtherAnswer, ...]:
    """What the reports of linked studies say, as seen from the report of ``folder``.

    Parameters
    ----------
    folder
        Study folder.
    linked
        Folders of its further layers and contrasts, with what each answers.

    Raises
    ------
    StoreError
        If one of their report.json cannot be read.
    """
    return tuple(
        OtherAnswer(asked(spec), os.path.relpath(other.report / "index.html", folder.report), _verdicts(other))
        for other, spec in linked
    )


def _verdicts(folder: StudyFolder) -> dict[str, Verdict]:
    file = folder.report / "report.json"
    if not file.exists():
        return {}
    with explain_damage(file):
        return {claim["id"]: Verdict(claim["verdict"]) for claim in read_json(file)["claims"]}
