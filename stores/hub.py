"""Checkpoints and tables on the Hugging Face Hub, as fsspec writes them.

``hf://OWNER/NAME[@REVISION][/SUBFOLDER]`` is a model, ``hf://datasets/OWNER/NAME[@REVISION]/PATH`` a table: PATH is a
file, a folder of one, or what the shards of one are called (``main/test`` of ``main/test-00000-of-00002.parquet``).

The first time a study asks for a revision, the commit it stands for and the names of its files are noted in
``stages/hub.json``, so that a branch that moves later does not change the study. Files are downloaded into
huggingface_hub's cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from rlgen_stats.schemas.errors import ModelError
from rlgen_stats.stores.atomic import explain_damage, read_object, write_json
from rlgen_stats.stores.folder import StudyFolder
from rlgen_stats.stores.table_files import SHARD, SUFFIXES

SCHEME: Final = "hf://"
MAIN: Final = "main"
"""Revision of a path that names none."""
RECORD: Final = "hub.json"
MODEL_FILES: Final = re.compile(
    r"(.*\.safetensors|(pytorch_model|adapter_model).*\.bin)(\.index\.json)?|(config|generation_config|adapter_config)\.json"
    r"|tokenizer.*|vocab.*|merges\.txt|.*\.(model|tiktoken)|special_tokens_map\.json|added_tokens\.json|chat_template.*"
)
"""Names of the files of a checkpoint that transformers and peft read; a README or an optimiser's state beside them
changes no number."""
_PATH: Final = re.compile(
    r"(hf://)?(?P<datasets>datasets/)?(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<subfolder>.+?))?/?"
)


def is_on_hub(path: str) -> bool:
    """Whether a path of the spec names a model or table of the Hub."""
    return path.startswith(SCHEME)


@dataclass(frozen=True)
class HubPath:
    """A place in a repository."""

    repo: str
    revision: str | None
    subfolder: str
    """Empty for the repository's root."""
    kind: str = "model"
    """``model`` or ``dataset``."""

    def within(self, name: str) -> str:
        """Path in the repository of a file in the place."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    @property
    def repository(self) -> str:
        """Its name as in an address: models stand first."""
        return f"datasets/{self.repo}" if self.kind == "dataset" else self.repo

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}" + (f"/{self.subfolder}" if self.subfolder else "")


def hub_path(path: str) -> HubPath:
    """The parts of a path on the Hub, with or without ``hf://``.

    Raises
    ------
    ModelError
        If it is malformed.
    """
    match = _PATH.fullmatch(path)
    if match is None or {".", ".."} & set(path.split("/")):
        raise ModelError(f"{path!r} is no model of the Hub; expected hf://OWNER/NAME, @REVISION and /SUBFOLDER if any.")
    revision = unquote(match["revision"]) if match["revision"] else None
    return HubPath(match["repo"], revision, match["subfolder"] or "", "dataset" if match["datasets"] else "model")


@contextmanager
def explain_hub_errors(what: str) -> Iterator[None]:
    """Turn whatever the Hub, the network or the disk refuses into one sentence that begins with ``what``."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{what} ({_line(error)}); check access (hf auth login), name and network.") from error


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository at one commit."""

    repo: str
    commit: str
    subfolder: str
    """Empty for the repository's root."""
    files: tuple[str, ...]
    """Paths in the repository of all files at this commit."""
    kind: str = "model"
    """``model`` or ``dataset``."""

    @property
    def snapshot(self) -> Path:
        """Where huggingface_hub's cache has the repository at this commit, or will."""
        from huggingface_hub import constants  # slow to import, and most studies have local folders

        repository = Path(constants.HF_HUB_CACHE) / f"{self.kind}s--{self.repo.replace('/', '--')}"
        return repository / "snapshots" / self.commit

    @property
    def path(self) -> Path:
        """The folder therein."""
        return self.snapshot / self.subfolder

    def download(self, *, weights: bool = True) -> Path:
        """Bring the folder's checkpoint into the cache, what is there aside; without ``weights`` all but these.

        Raises
        ------
        ModelError
            If the folder has no checkpoint, or it cannot be downloaded.
        """
        from huggingface_hub import snapshot_download

        needed = self._needed(weights)
        if not needed:
            raise ModelError(
                f"hf://{self.repo} has no checkpoint in {self.subfolder or 'its root'!r} at commit {self.commit[:12]}; "
                f"expected config.json and weights: correct the subfolder, or remove stages/{RECORD} to ask anew."
            )
        if all((self.path / name).exists() for name in needed):
            return self.path
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        with explain_hub_errors(f"hf://{self.repo} cannot be downloaded"):
            snapshot_download(self.repo, revision=self.commit, allow_patterns=[prefix + name for name in needed])
        return self.path

    def download_table(self) -> Path:
        """Bring a table into the cache: its file, the folder of its files, or its shards by what they are called.

        Raises
        ------
        ModelError
            If there is nothing of this name, or it cannot be downloaded.
        """
        from huggingface_hub import snapshot_download

        shard = re.compile(rf"{re.escape(self.subfolder)}(/[^/]+|-\d+-of-\d+\.\w+)?")
        needed = [name for name in self.files if self.subfolder and shard.fullmatch(name)]
        if not needed:
            tables = {SHARD.sub("", name) for name in self.files if name.endswith(SUFFIXES)}
            first = sorted(tables, key=lambda name: (name.endswith(".json"), name))[:8]  # most .json are settings
            raise ModelError(
                f"hf://datasets/{self.repo} has no table {self.subfolder!r} at commit "
                f"{self.commit[:12]}; it has {', '.join(first) or 'none'}: name one after the repository."
            )
        if not all((self.snapshot / name).exists() for name in needed):
            with explain_hub_errors(f"hf://datasets/{self.repo} cannot be downloaded"):
                snapshot_download(self.repo, repo_type="dataset", revision=self.commit, allow_patterns=needed)
        return self.path

    def _needed(self, weights: bool) -> list[str]:
        """Names of the files that make this folder a checkpoint."""
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        names = [file.removeprefix(prefix) for file in self.files if file.startswith(prefix)]
        names = [name for name in names if MODEL_FILES.fullmatch(name) and not name.startswith("consolidated")]
        if any(name.endswith(".safetensors") for name in names):  # the same weights again
            names = [name for name in names if ".bin" not in name]
        return [name for name in names if weights or not name.endswith((".safetensors", ".bin"))]


def hub_folder(path: str, folder: StudyFolder) -> HubFolder:
    """The repository folder that a path of the spec stands for, at the commit noted in the study.

    Raises
    ------
    ModelError
        If the path is malformed, or the Hub is asked and does not know or give it.
    """
    place = hub_path(path)
    record = _record(folder)
    known = read_object(record) if record.exists() else {}
    name = f"{place.repository}@{place.revision or MAIN}"
    if name not in known:
        commit, files = _ask(place)
        write_json(record, known | {name: {"commit": commit, "files": files}})
        known[name] = {"commit": commit, "files": files}
    with explain_damage(record):
        return HubFolder(place.repo, known[name]["commit"], place.subfolder, tuple(known[name]["files"]), place.kind)


def locate_checkpoint(path: str, folder: StudyFolder) -> Path:
    """Folder of a checkpoint on this machine; one of the Hub has all files but the weights there.

    Raises
    ------
    ModelError
        If it is on the Hub and has no such folder, or cannot be downloaded.
    """
    return hub_folder(path, folder).download(weights=False) if is_on_hub(path) else folder.resolve(path)


def locate_table(path: Path | str, folder: StudyFolder | None = None) -> Path:
    """A table on this machine: relative to a study's folder, or of the Hub, at the commit noted in the study.

    Parameters
    ----------
    path
        Local path, or ``hf://datasets/OWNER/NAME[@REVISION]/PATH``.
    folder
        The study that names it; None: of no study, and of the Hub as it is now.

    Raises
    ------
    ModelError
        If it is on the Hub and has no such table, or cannot be downloaded.
    """
    if not is_on_hub(str(path)):
        return Path(path) if folder is None else folder.resolve(str(path))
    if folder is not None:
        return hub_folder(str(path), folder).download_table()
    place = hub_path(str(path))
    commit, files = _ask(place)
    return HubFolder(place.repo, commit, place.subfolder, tuple(files), place.kind).download_table()


def _record(folder: StudyFolder) -> Path:
    return StudyFolder(folder.spec.parent).stages / RECORD  # one for all contrasts of a study


def _ask(place: HubPath) -> tuple[str, list[str]]:
    """Commit of a revision and its files, from the Hub, or from the cache where the Hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    revision = place.revision or MAIN
    is_table = place.kind == "dataset"
    try:
        ask = HfApi().dataset_info if is_table else HfApi().model_info
        info = ask(place.repo, revision=revision)
        return str(info.sha), sorted(file.rfilename for file in info.siblings or [])
    except Exception as error:
        kind = "dataset" if is_table else "model"
        try:
            cached = Path(snapshot_download(place.repo, repo_type=kind, revision=revision, local_files_only=True))
        except (OSError, ValueError):  # not in the cache; no name of a repository
            typed = " --repo-type dataset" if is_table else ""
            raise ModelError(
                f"{SCHEME}{place.repository}@{revision} is neither given by the Hub ({_line(error)}) nor in the cache; "
                f"check name, access and network, or download it beforehand: hf download {place.repo} --revision "
                f"{revision}{typed}."
            ) from error
        return cached.name, sorted(file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
