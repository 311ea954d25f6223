"""What the report says about one claim: the paper's statement, this study's numbers, and the verdict in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict

VERDICT_SYMBOLS: Final = {
    Verdict.SUPPORTED: "✓",
    Verdict.CONTRADICTED: "✕",
    Verdict.NOT_SUPPORTED: "–",
    Verdict.UNDETERMINED: "?",
    Verdict.NOT_ESTIMABLE: "○",
}
"""Sign on a badge, so that the badge does not rely on colour."""
VERDICT_MEANINGS: Final = {
    Verdict.SUPPORTED: (
        "The effect has the claimed direction at level alpha, and every guard named in the claim's rule held."
    ),
    Verdict.CONTRADICTED: (
        "The opposite effect is shown at level alpha, and no guard says that the number cannot be trusted."
    ),
    Verdict.NOT_SUPPORTED: (
        "The question was asked with enough precision, and the claimed effect is excluded, is too small to matter, "
        "or has another explanation than the claim's."
    ),
    Verdict.UNDETERMINED: (
        "The data neither show nor exclude the claimed effect, or a guard failed so that the number cannot be trusted."
    ),
    Verdict.NOT_ESTIMABLE: (
        "The number that would answer the claim could not be computed in this study; the reason is given."
    ),
}
"""One sentence per verdict for the glossary."""


def verdict_label(verdict: Verdict) -> str:
    """The verdict in words for a badge."""
    return verdict.value.replace("_", " ").lower()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper and this study's answer; numbers are in ``unit``, NaN where not estimable."""

    id: str
    """C1 to C5."""
    statement: str
    """What the paper says."""
    short: str
    """The statement in a few words."""
    estimate: float
    """Point estimate, in ``unit``."""
    low: float
    """Lower end of the 1 - alpha interval."""
    high: float
    """Upper end of the 1 - alpha interval."""
    p_value: float
    """p-value of the test named in ``details['test']``."""
    unit: str
    """Unit of estimate, low and high."""
    verdict: Verdict
    """Answer."""
    answer: str
    """The answer in one sentence."""
    in_short: str = ""
    """Why the verdict is that, in a few words; empty where the interval says so itself."""
    caveats: tuple[str, ...]
    """What limits the answer."""
    paper_figure: str
    """What the paper reports for this claim (docs/method.md section 1)."""
    details: dict[str, Any] = field(default_factory=dict)
    """Everything the verdict rests on, in types that JSON knows."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"verdict": self.verdict.value, "caveats": list(self.caveats)}


@dataclass(frozen=True, kw_only=True)
class PaperClaim:
    """One claim as the paper makes it, before any result is looked at."""

    id: str
    """C1 to C5."""
    statement: str
    """What the paper says."""
    short: str
    """The statement in a few words."""
    unit: str
    """Unit of this study's estimate."""
    paper_figure: str
    """What the paper reports (docs/method.md section 1)."""

    def answered(
        self,
        interval: tuple[float, float, float],
        p_value: float,
        verdict: Verdict,
        answer: str,
        *,
        in_short: str = "",
        caveats: tuple[str, ...],
        details: dict[str, Any],
    ) -> Claim:
        """The claim with this study's answer; ``interval`` is estimate, low and high in ``unit``."""
        estimate, low, high = interval
        return Claim(
            id=self.id,
            statement=self.statement,
            short=self.short,
            estimate=estimate,
            low=low,
            high=high,
            p_value=p_value,
            unit=self.unit,
            verdict=verdict,
            answer=answer,
            in_short=in_short,
            caveats=caveats,
            paper_figure=self.paper_figure,
            details=details,
        )

    def not_estimable(
        self, reason: str, *, caveats: tuple[str, ...] = (), details: dict[str, Any] | None = None
    ) -> Claim:
        """The claim without a number, and why."""
        return self.answered(
            (math.nan, math.nan, math.nan),
            math.nan,
            Verdict.NOT_ESTIMABLE,
            f"Not estimable: {reason}.",
            caveats=caveats,
            details=(details or {}) | {"reason": reason},
        )
