"""Checkpoints on the Hugging Face Hub: ``hf://OWNER/NAME[@REVISION][/SUBFOLDER]``, as fsspec writes them.

The first time a study asks for a revision, the commit it stands for and the names of its files are noted in
``stages/hub.json``, so that a branch that moves later does not change the study. Files are downloaded into
huggingface_hub's cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from rlgen_stats.schemas.errors import ModelError
from rlgen_stats.stores.atomic import explain_damage, read_object, write_json
from rlgen_stats.stores.folder import StudyFolder

SCHEME: Final = "hf://"
RECORD: Final = "hub.json"
MODEL_FILES: Final = re.compile(
    r"(.*\.safetensors|(pytorch_model|adapter_model).*\.bin)(\.index\.json)?|(config|generation_config|adapter_config)\.json"
    r"|tokenizer.*|vocab.*|merges\.txt|.*\.(model|tiktoken)|special_tokens_map\.json|added_tokens\.json|chat_template.*"
)
"""Names of the files of a checkpoint that transformers and peft read; a README or an optimiser's state beside them
changes no number."""
_PATH: Final = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<subfolder>.+?))?/?")


def is_on_hub(path: str) -> bool:
    """Whether a path of the spec names a model of the Hub."""
    return path.startswith(SCHEME)


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository at one commit."""

    repo: str
    commit: str
    subfolder: str
    """Empty for the repository's root."""
    files: tuple[str, ...]
    """Paths in the repository of all files at this commit."""

    @property
    def path(self) -> Path:
        """Where huggingface_hub's cache has the folder, or will."""
        from huggingface_hub import constants  # slow to import, and most studies have local folders

        repository = Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"
        return repository / "snapshots" / self.commit / self.subfolder

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
        try:
            snapshot_download(self.repo, revision=self.commit, allow_patterns=[prefix + name for name in needed])
        except Exception as error:  # of the network, the Hub, the disk: all are about this download
            raise ModelError(
                f"hf://{self.repo} cannot be downloaded ({_line(error)}); check access and network."
            ) from error
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
    match = _PATH.fullmatch(path)
    if match is None:
        raise ModelError(f"{path!r} is no model of the Hub; expected hf://OWNER/NAME, @REVISION and /SUBFOLDER if any.")
    repo, revision = match["repo"], unquote(match["revision"] or "main")
    record = _record(folder)
    known = read_object(record) if record.exists() else {}
    name = f"{repo}@{revision}"
    if name not in known:
        commit, files = _ask(repo, revision)
        write_json(record, known | {name: {"commit": commit, "files": files}})
        known[name] = {"commit": commit, "files": files}
    with explain_damage(record):
        return HubFolder(repo, known[name]["commit"], match["subfolder"] or "", tuple(known[name]["files"]))


def locate_checkpoint(path: str, folder: StudyFolder) -> Path:
    """Folder of a checkpoint on this machine; one of the Hub has all files but the weights there.

    Raises
    ------
    ModelError
        If it is on the Hub and has no such folder, or cannot be downloaded.
    """
    return hub_folder(path, folder).download(weights=False) if is_on_hub(path) else folder.resolve(path)


def _record(folder: StudyFolder) -> Path:
    return StudyFolder(folder.spec.parent).stages / RECORD  # one for all contrasts of a study


def _ask(repo: str, revision: str) -> tuple[str, list[str]]:
    """Commit of a revision and its files, from the Hub, or from the cache where the Hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision)
        return str(info.sha), sorted(file.rfilename for file in info.siblings or [])
    except Exception as error:
        try:
            cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:
            raise ModelError(
                f"hf://{repo}@{revision} is neither given by the Hub ({_line(error)}) nor in the cache; check name, "
                f"access and network, or download it beforehand: hf download {repo} --revision {revision}."
            ) from error
        return cached.name, sorted(file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
