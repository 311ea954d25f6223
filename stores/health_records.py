"""What a crosscoder's health.json says, and whether it is used although it failed; read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.errors import StageError
from rlgen_stats.stores.atomic import read_object, write_json

HEALTH: Final = "health.json"
ACCEPTED: Final = "accepted.json"
"""Note that a crosscoder is used although it failed its checks."""
READOUT_MODELS: Final = "readout_models"
"""Part of health.json: how well the declared readout describes each model, and its checks."""


def read_health(folder: Path) -> dict[str, Any]:
    """Contents of a crosscoder's health.json.

    Raises
    ------
    StageError
        If it is not there.
    """
    if not (folder / HEALTH).exists():
        raise StageError(f"{folder / HEALTH} is missing; run the crosscoder stage, which measures health.")
    return read_object(folder / HEALTH)


def add_readout(folder: Path, described: Mapping[str, Any]) -> None:
    """Add the verdict on the readout to a crosscoder's health.json."""
    write_json(folder / HEALTH, read_health(folder) | {READOUT_MODELS: dict(described)})


def failed_readout(record: Mapping[str, Any]) -> str:
    """The failed checks of a health record's readout; empty if all passed or none was made."""
    return str(record.get(READOUT_MODELS, {}).get("reasons", ""))


def is_accepted(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a note beside the weights accepts them although their health failed."""
    return bool(_note(folder).get("weights_sha256") == record["weights_sha256"])


def readout_accepted(folder: Path) -> bool:
    """Whether a note beside the weights accepts a readout that failed: for these weights and this readout only."""
    if not (folder / ACCEPTED).exists():
        return False
    record, note = read_health(folder), _note(folder)
    return is_accepted(folder, record) and "readout" in note and note["readout"] == record.get("readout")


def accept(folder: Path, record: Mapping[str, Any], *, stage: str) -> None:
    """Note that these weights are used although they failed; a failed readout counts as accepted by encode alone."""
    with_readout = stage == "encode" and bool(failed_readout(record))
    if is_accepted(folder, record) and (readout_accepted(folder) or not with_readout):
        return
    reasons = "; ".join(reason for reason in (record["reasons"], failed_readout(record)) if reason not in ("", "ok"))
    facts = {"weights_sha256": record["weights_sha256"], "reasons": reasons, "by": stage}
    write_json(folder / ACCEPTED, facts | ({"readout": record["readout"]} if with_readout else {}))


def unusable_readout(folder: Path, *, accepted: bool) -> str:
    """Why features of single models say nothing here: the failed checks of the readout, unless they were accepted.

    Parameters
    ----------
    folder
        Of the crosscoder.
    accepted
        Whether study.yaml accepts it unhealthy.

    Returns
    -------
    str
        Empty where the readout can be used, and where it was never judged.
    """
    if accepted or not (folder / HEALTH).exists() or readout_accepted(folder):
        return ""
    return failed_readout(read_health(folder))


def _note(folder: Path) -> dict[str, Any]:
    return read_object(folder / ACCEPTED) if (folder / ACCEPTED).exists() else {}
