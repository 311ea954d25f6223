"""All exceptions that the toolkit raises on purpose.

Each class joins the toolkit's base with the closest standard exception, so that both
``except RlgenStatsError`` and ``except ValueError`` work. A message names what was expected,
what came, and the fix; the command line prints it as one sentence and exits with code 2.
"""

from __future__ import annotations


class RlgenStatsError(Exception):
    """Base of all errors whose cause is the input or the machine, not a bug."""


class SpecError(RlgenStatsError, ValueError):
    """A study file is missing, malformed, or contradicts itself."""


class InputError(RlgenStatsError, ValueError):
    """An argument or a data file cannot be used."""


class ModelError(RlgenStatsError, ValueError):
    """A checkpoint cannot be loaded or does not fit the study."""


class StoreError(RlgenStatsError, ValueError):
    """A store does not have the declared layout, or belongs to another study."""


class StoreCorruptError(StoreError):
    """Bytes on disk fail their checksum or are missing."""


class StoreLockedError(StoreError):
    """Another living writer holds the array."""


class StageError(RlgenStatsError, RuntimeError):
    """A stage cannot run because something it needs is not there."""


class NotEstimableError(RlgenStatsError, ValueError):
    """The data cannot answer the question; the result says so and the run goes on."""


class RefusedError(RlgenStatsError, ValueError):
    """The request would compute a number that does not mean what it seems to mean."""


class OutOfSpaceError(RlgenStatsError, OSError):
    """The disk or quota is full; everything already committed is kept."""
