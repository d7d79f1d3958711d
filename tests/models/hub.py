"""A model hub on a loopback address, as far as `huggingface_hub` needs one."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

Repos = dict[str, dict[str, dict[str, bytes]]]
"""Repo to revision to path to content."""


class Hub:
    """What it has, and what it was asked for: `asked` are the files that were sent."""

    def __init__(self, url: str, repos: Repos) -> None:
        self.url = url
        self.repos = repos
        self.asked: list[str] = []

    def put(self, repo: str, folder: Path, revision: str = "main") -> None:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos.setdefault(repo, {})[revision] = files


def _commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", "models", owner, name]:
                self._with(f"{owner}/{name}", "main", self._info)
            case ["api", "models", owner, name, "revision", revision]:
                self._with(f"{owner}/{name}", revision, self._info)
            case ["api", "models", owner, name, "tree", revision]:
                self._with(f"{owner}/{name}", revision, self._tree)
            case [owner, name, "resolve", revision, *path]:
                self._with(f"{owner}/{name}", revision, lambda _, files: self._file(name, "/".join(path), files))
            case _:
                self._send(404, b"")

    do_HEAD = do_GET  # noqa: N815 - as http.server calls it

    def _with(self, repo: str, revision: str, answer: Any) -> None:
        revisions = self.hub.repos.get(repo)
        if revisions is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        found = [files for name, files in revisions.items() if revision in (name, _commit(files))]
        if found:
            answer(repo, found[0])
        else:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})

    def _info(self, repo: str, files: dict[str, bytes]) -> None:
        siblings = [{"rfilename": name} for name in files]
        self._send(200, json.dumps({"id": repo, "sha": _commit(files), "siblings": siblings}).encode())

    def _tree(self, _repo: str, files: dict[str, bytes]) -> None:
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        self._send(200, json.dumps(tree).encode())

    def _file(self, repo: str, path: str, files: dict[str, bytes]) -> None:
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _commit(files)})
            return
        if self.command == "GET":
            self.hub.asked.append(f"{repo}/{path}")
        etag = hashlib.sha1(files[path]).hexdigest()
        self._send(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": _commit(files)})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@contextmanager
def running_hub(cache: Path) -> Iterator[Hub]:
    """A hub without repos, which the client asks as long as the block lasts."""
    from huggingface_hub import constants, hf_api

    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", {})
    handler.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
