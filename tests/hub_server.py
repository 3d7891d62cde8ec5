"""A server on this machine that speaks the Hugging Face hub's protocol: repositories are made, files committed and fetched."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

WRITER, READER = "hf_writer", "hf_reader"
Files = dict[str, bytes]


@dataclass
class HubServer:
    """revisions: of each repository, files by the name of a branch or commit. large: files that were put, by their SHA-256."""

    url: str = ""
    revisions: dict[str, dict[str, Files]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers."""
        path = unquote(request.path.partition("?")[0])
        self.asked.append(f"{request.command} {path}")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if "/resolve/" in path:
            return self._resolve(path, token)
        if request.command == "PUT":
            self.large[path.rpartition("/")[2]] = body
            return 200, b"", {}
        if token not in (WRITER, READER):
            return (
                401,
                {"error": "Invalid username or password."},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        if path == "/api/validate-yaml":
            return (200, {"errors": [], "warnings": []}, {}) if json.loads(body)["content"].startswith("---\n") else (400, {}, {})
        if token == READER:
            return 403, {"error": "You don't have the rights"}, {"X-Error-Message": "You don't have the rights"}
        return self._write(path, body)

    def _write(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.revisions:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}, {}
            self.revisions[repo] = {"main": {}}
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(repo)
            return 200, {"url": f"{self.url}/{repo}", "name": repo}, {}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "authenticated": True, "actions": {"upload": {"href": f"{self.url}/put/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
        if "/commit/" in path:
            return self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        return 404, {}, {}

    def _mode(self, path: str) -> dict[str, Any]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}

    def _commit(self, repo: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        files = dict(self.revisions[repo]["main"])
        for line in (json.loads(line)["value"] for line in body.splitlines()):
            if "content" in line:
                files[line["path"]] = base64.b64decode(line["content"])
            elif "oid" in line:
                files[line["path"]] = self.large[line["oid"]]
        commit = hashlib.sha1(b"".join(files.values())).hexdigest()
        self.revisions[repo].update({"main": files, commit: files})
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit}, {}

    def _resolve(self, path: str, token: str) -> tuple[int, Any, dict[str, str]]:
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo not in self.revisions or (repo in self.private and not token):
            return 401 if not token else 404, b"", {"X-Error-Code": "RepoNotFound"}
        files = self.revisions[repo].get(revision)
        if files is None:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if name not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        commit = next(c for c, held in reversed(self.revisions[repo].items()) if held is files and len(c) == 40)
        return 200, files[name], {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": commit}


@contextmanager
def serving() -> Iterator[HubServer]:
    """The server, while it runs."""
    served = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            status, body, headers = served.answer(self)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_HEAD = do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def hub_server(home: Any) -> Iterator[HubServer]:
    """The server, with the hub's client of this process pointed at it; `home`: folder for its cache."""
    with serving() as served, pytest.MonkeyPatch.context() as patch:
        point_client_at(patch, served.url, home)
        yield served


def point_client_at(patch: pytest.MonkeyPatch, url: str, home: Any) -> None:
    """Its settings are read when it is imported."""
    for name, value in (
        ("ENDPOINT", url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(home)),
        ("HF_TOKEN_PATH", str(home / "token")),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_OFFLINE", False),
    ):
        patch.setattr(f"huggingface_hub.constants.{name}", value)
    patch.setenv("NO_PROXY", "*")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
