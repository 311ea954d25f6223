"""What an edit is: which features, by how much, at which positions. Pure data; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from rlgen_stats.schemas.errors import InputError

Kind = Literal["disable", "amplify", "passthrough", "lift", "patch", "add_vector"]
Positions = Literal["all", "prompt", "last_prompt", "completion"]
Phase = Literal["prefill", "decode"]

KINDS: Final = ("disable", "amplify", "passthrough", "lift", "patch", "add_vector")
FROM_SOURCE: Final = ("lift", "patch")
"""Kinds that copy from a source model, which reads the same text."""
POSITIONS: Final = ("all", "prompt", "last_prompt", "completion")
PHASES: Final = ("prefill", "decode")
_DEFAULT_DOSE: Final = {"disable": 0.0, "passthrough": 1.0, "lift": 1.0, "patch": 1.0, "add_vector": 1.0}


@dataclass(frozen=True)
class FeatureEdit:
    """An edit of the residual stream at one site.

    Parameters
    ----------
    features
        Ids k of the set; empty means no edit (``passthrough`` then takes the whole dictionary through the code).
    kind
        ``disable``: f' = 0. ``amplify``: f' = dose * f (a dose below 1 weakens); with ``level``, f' = f + (dose - 1) *
        level, not below 0. ``passthrough``: encode, decode, add back the error. ``lift`` (activation patching through
        features, up or down): a' = a + dose * sum_k (f_source,k d_source,k - f_k d_k), the source model reading the
        same text and each model's features written with its directions d (one for all models after paired training).
        ``patch``: a' = a + dose * (a_source - a), no features. ``add_vector``: a' = a + dose * vector, no features.
    dose
        See ``kind``; ``amplify`` needs one, ``disable`` takes none, the others default to 1.
    positions
        ``all`` real tokens; ``prompt``; ``last_prompt`` (the token that predicts the first completion token);
        ``completion``, every position that predicts a completion token: the last prompt token and all after it.
    phases
        ``prefill`` (prompt tokens) and/or ``decode`` (completion tokens).
    skip_first
        Leading tokens of every text left alone (BOS, attention sinks): the crosscoder has never seen them.
    vector
        Raw units, for ``add_vector``.
    level
        For ``amplify``: one declared level a feature, in units of f, to be added instead of the feature's own; so that
        dose 1 is no edit either way.
    gain
        Factor on the whole change of the residual, by which a random set's edit is given the norm of another edit.

    Raises
    ------
    InputError
        If the fields contradict each other.

    Notes
    -----
    a' = a + gain * sum_k (f'_k - f_k) d_k: what the dictionary does not explain stays as it is (docs/method.md 4d).
    """

    features: tuple[int, ...]
    kind: Kind
    dose: float | None = None
    positions: Positions = "all"
    phases: tuple[Phase, ...] = ("prefill", "decode")
    skip_first: int = 0
    vector: tuple[float, ...] = ()
    level: tuple[float, ...] = ()
    gain: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(int(k) for k in self.features))
        if self.kind not in KINDS:
            raise InputError(f"an edit's kind is one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.positions not in POSITIONS:
            raise InputError(f"an edit's positions are one of {', '.join(POSITIONS)}, got {self.positions!r}.")
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise InputError(f"an edit's phases are 'prefill', 'decode' or both, got {self.phases!r}.")
        if len(set(self.features)) != len(self.features) or min(self.features, default=0) < 0:
            raise InputError(f"an edit's features are distinct ids from 0 up, got {self.features}.")
        if (self.kind == "add_vector") != bool(self.vector) or (self.vector and self.features):
            raise InputError("kind 'add_vector' takes a vector and no features; the other kinds take no vector.")
        if self.kind == "patch" and self.features:
            raise InputError(f"kind 'patch' copies the whole residual and takes no features, got {self.features[:5]}.")
        if not (math.isfinite(self.gain) and self.gain > 0):
            raise InputError(f"an edit's gain must be finite and positive, got {self.gain}.")
        if self.level and (self.kind != "amplify" or len(self.level) != len(self.features)):
            raise InputError(
                f"levels are for kind 'amplify', one for each of {len(self.features)} features; "
                f"got {len(self.level)} for kind {self.kind!r}."
            )
        if not all(math.isfinite(level) and level >= 0 for level in self.level):
            raise InputError(f"levels of features are finite and not negative, got {self.level}.")
        if self.skip_first < 0:
            raise InputError(f"skip_first counts tokens and cannot be negative, got {self.skip_first}.")
        self._check_dose()

    def _check_dose(self) -> None:
        if self.dose is None and self.kind not in _DEFAULT_DOSE:
            raise InputError("kind 'amplify' needs a dose, the multiplier of the features; pass dose=2.0 or another.")
        if not math.isfinite(self.strength):
            raise InputError(f"an edit's dose must be finite, got {self.dose}.")
        if self.kind == "disable" and self.strength != 0.0:
            raise InputError(f"kind 'disable' sets features to 0, got dose {self.dose}; use 'amplify' with a dose < 1.")
        if self.kind == "amplify" and self.strength < 0.0:
            raise InputError(f"kind 'amplify' takes a dose of 0 or more (features are not negative), got {self.dose}.")

    @property
    def strength(self) -> float:
        """The dose, with the default of its kind."""
        return _DEFAULT_DOSE[self.kind] if self.dose is None else float(self.dose)

    @property
    def needs_source(self) -> bool:
        """Whether it copies from another model."""
        return self.kind in FROM_SOURCE

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done, so that no hook is installed."""
        return not self.features and self.kind in ("disable", "amplify", "lift")
