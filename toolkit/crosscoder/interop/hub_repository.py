"""Crosscoders in repositories of the Hugging Face Hub, with a model card made from their spec and health."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.errors import InputError, RlgenStatsError
from rlgen_stats.stores import replacing
from rlgen_stats.stores.crosscoder_weights import SPEC, WEIGHTS
from rlgen_stats.stores.health_records import HEALTH, READOUT_MODELS, read_health
from rlgen_stats.stores.hub import SCHEME, HubPath, explain_hub_errors, hub_path
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.loading import load_crosscoder

CARD: Final = "README.md"
FILES: Final = (WEIGHTS, SPEC, HEALTH, CARD)
"""What a repository holds of a crosscoder; the first two make one."""
_MARKUP: Final = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~&:$^=@/])")
"""Punctuation that Markdown, HTML, mathematics or the Hub (@user, links) may read as markup."""


def push_crosscoder(
    folder: Path | str, repository: str, *, private: bool | None = None, license: str | None = None
) -> str:
    """Put a saved crosscoder into a repository of the Hub, in one commit: all files are there afterwards, or none.

    Parameters
    ----------
    folder
        Folder of the crosscoder; health.json goes along if it is of these weights.
    repository
        ``OWNER/NAME``, created if it does not exist, with ``/SUBFOLDER`` for several in one and ``@REVISION`` for a
        branch.
    private
        Whether a new repository is; default the owner's setting.
    license
        Named in the card, e.g. ``apache-2.0``.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    StoreError, StoreCorruptError
        If the folder holds no whole crosscoder.
    ModelError
        If the name is none, or the Hub refuses or cannot be reached; run it again then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder, target = Path(folder), hub_path(repository)
    crosscoder = load_crosscoder(folder)
    health = read_health(folder) if (folder / HEALTH).exists() else {}
    health = health if health.get("weights_sha256") == crosscoder.weights_sha256 else {}
    content: dict[str, Path | bytes] = {name: folder / name for name in (WEIGHTS, SPEC, *([HEALTH] if health else []))}
    content[CARD] = model_card(crosscoder, health, target, license=license).encode()
    operations = [CommitOperationAdd(target.within(name), part) for name, part in content.items()]
    with explain_hub_errors(f"{target} cannot be written, and is as it was"):
        api = HfApi()
        api.create_repo(target.repo, private=private, exist_ok=True)
        commit = api.create_commit(
            target.repo, operations, commit_message=f"Crosscoder {crosscoder.name}", revision=target.revision
        )
    return str(commit.commit_url)


def pull_crosscoder(repository: str, folder: Path | str) -> Crosscoder:
    """Bring a crosscoder from a repository of the Hub, checked against the hash of its weights.

    Parameters
    ----------
    repository
        ``OWNER/NAME``, with ``@REVISION`` and ``/SUBFOLDER`` where needed.
    folder
        New or empty folder; it appears whole or not at all.

    Returns
    -------
    Crosscoder
        As loaded from the folder.

    Raises
    ------
    InputError
        If the folder is not empty, or the repository holds no crosscoder of ours.
    StoreError, StoreCorruptError
        If it holds one that is not whole.
    ModelError
        If the name is none or it cannot be downloaded.
    """
    from huggingface_hub import HfApi

    folder, source = Path(folder), hub_path(repository)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder.")
    with explain_hub_errors(f"{source} cannot be downloaded"):
        wanted = [source.within(name) for name in FILES]
        snapshot = HfApi().snapshot_download(source.repo, revision=source.revision, allow_patterns=wanted)
    files = [file for name in FILES if (file := Path(snapshot) / source.within(name)).is_file()]
    if [file.name for file in files[:2]] != [WEIGHTS, SPEC]:
        raise InputError(
            f"{source} holds no {WEIGHTS} with {SPEC}; name the subfolder that does, or download a crosscoder of "
            f"another tool (hf download {source.repo}) and use import-crosscoder."
        )
    with replacing(folder) as temporary:
        temporary.mkdir()
        for file in files:
            shutil.copyfile(file, temporary / file.name)
        try:
            load_crosscoder(temporary)
        except RlgenStatsError as error:
            raise type(error)(str(error).replace(str(temporary), str(source))) from error
    return load_crosscoder(folder)


def model_card(crosscoder: Crosscoder, health: dict[str, Any], target: HubPath, *, license: str | None = None) -> str:
    """README.md of a repository: what the crosscoder is, how healthy, how to load it; names are shown, not rendered.

    Parameters
    ----------
    crosscoder
        Described.
    health
        Content of its health.json; empty if it was not measured.
    target
        Repository that the card is for.
    license
        Named in its metadata.
    """
    from huggingface_hub import ModelCardData

    spec = crosscoder.facts.get("spec", {})
    rows = {
        "views": ", ".join(crosscoder.views),
        "channels": ", ".join(map(str, crosscoder.widths)),
        "site": crosscoder.facts.get("site"),
        "features": crosscoder.n_features,
        "sparsity": f"{crosscoder.sparsity}, k = {crosscoder.k}" if crosscoder.k else crosscoder.sparsity,
        "objective": crosscoder.facts.get("objective"),
        "readout of one model": crosscoder.default_readout,
        "steps x tokens": f"{spec['steps']} x {spec['batch_size']}" if {"steps", "batch_size"} <= spec.keys() else None,
        "imported from": crosscoder.facts.get("imported_from"),
        "weights, SHA-256": crosscoder.weights_sha256,
    }
    metadata = ModelCardData(
        library_name="rlgen-stats", tags=["crosscoder", "sparse-autoencoder", "model-diffing"], license=license
    )
    checks = [*health.get("checks", []), *health.get(READOUT_MODELS, {}).get("checks", [])]
    lines = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {_shown(crosscoder.name)}\n",
        "A crosscoder: one sparse code for the activations of several models.\n",
        *_table(("", ""), [(name, str(value)) for name, value in rows.items() if value is not None]),
        "## Health\n",
        *([] if checks else ["Not measured.\n"]),
        *_table(("passed", "check"), [("yes" if one["ok"] else "**no**", str(one["reason"])) for one in checks]),
        "## Use\n",
        f"```\nrlgen-stats pull-crosscoder {str(target).removeprefix(SCHEME)} --to crosscoder\n```\n",
        "```python\nfrom rlgen_stats.toolkit.crosscoder import load_crosscoder\n\n"
        'crosscoder = load_crosscoder("crosscoder")\n```',
    ]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return [*lines, *(f"| {first} | {_shown(second)} |" for first, second in rows), ""]


def _shown(text: str) -> str:
    """Text as one line that is shown as it is."""
    return _MARKUP.sub(r"\\\1", " ".join("".join(c if c.isprintable() else " " for c in text).split()))
