"""A local server that answers as the Hub does to create a repository, to commit to it and to download from it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import yaml


class Repositories:
    """What the server holds: files by repository and path, of the last commit; uploads that no commit names yet."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.address = ""
        self.refuse = ""
        """Requests whose line has this are refused."""

    def commit(self, repository: str) -> str:
        """Name of the present commit."""
        content = {path: hashlib.sha256(data).hexdigest() for path, data in self.files[repository].items()}
        return hashlib.sha1(json.dumps([repository, content], sort_keys=True).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Repositories

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        self._answer()

    do_GET = do_HEAD = do_PUT = do_POST

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {self.path.partition('?')[0]}"
        self.hub.asked.append(line)
        if self.hub.refuse and self.hub.refuse in line:
            return self._send(403, {"error": "not now"})
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, line):
                return answer(self, *match.groups())
        return self._send(404, {"error": f"unknown: {line}"})

    def _send(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        exists = name in self.hub.files
        self.hub.created.append(asked)
        self.hub.files.setdefault(name, {})
        self._send(409 if exists else 200, {"url": f"http://{self.headers['Host']}/{name}"})

    def validate(self) -> None:
        """What the Hub says of a card's metadata."""
        yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, repository: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [{"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False} for one in files]
        self._send(200, {"files": modes})

    def batch(self, repository: str) -> None:
        objects = json.loads(self.body)["objects"]
        url = f"http://{self.headers['Host']}/upload/"
        actions = [one | {"actions": {"upload": {"href": url + one["oid"]}}} for one in objects]
        self._send(200, {"transfer": "basic", "objects": actions})

    def upload(self, oid: str) -> None:
        self.hub.uploads[oid] = self.body
        self._send(200, {})

    def commit(self, repository: str) -> None:
        files = dict(self.hub.files[repository])
        for line in filter(None, self.body.split(b"\n")):
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        self.hub.files[repository] = files
        url = f"http://{self.headers['Host']}/{repository}/commit/{self.hub.commit(repository)}"
        self._send(200, {"commitUrl": url, "commitOid": self.hub.commit(repository), "success": True})

    def info(self, repository: str, _revision: str) -> None:
        if repository not in self.hub.files:
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        names = [{"rfilename": path} for path in self.hub.files[repository]]
        return self._send(200, {"id": repository, "sha": self.hub.commit(repository), "siblings": names})

    def tree(self, repository: str, _revision: str) -> None:
        files = self.hub.files[repository].items()
        self._send(200, [{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files])

    def resolve(self, _method: str, repository: str, _revision: str, path: str) -> None:
        data = self.hub.files[repository].get(path)
        if data is None:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        return self._send(200, data, ETag=f'"{_oid(data)}"', X_Repo_Commit=self.hub.commit(repository))


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.validate,
    rf"POST /api/models/{_REPO}/preupload/\w+": _Handler.preupload,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /upload/(\w+)": _Handler.upload,
    rf"POST /api/models/{_REPO}/commit/\w+": _Handler.commit,
    rf"GET /api/models/{_REPO}(/revision/\w+)?": _Handler.info,
    rf"GET /api/models/{_REPO}/tree/(\w+)": _Handler.tree,
    rf"(GET|HEAD) /{_REPO}/resolve/(\w+)/(.+)": _Handler.resolve,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repositories]:
    """A running server, which huggingface_hub takes for the Hub."""
    hub = Repositories()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        files = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_DISABLE_XET": True}
        for name, value in (settings | {"HF_HUB_CACHE": str(tmp_path / "cache")}).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_local")
        yield hub
        server.shutdown()
        thread.join()
