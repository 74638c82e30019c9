"""A hub on loopback: the few HTTP calls by which huggingface_hub downloads a model, over real sockets."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<rev>[^/]+))?")
_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")


@dataclass
class Repository:
    """A folder served as the one commit of a repository, by the names in ``revisions``."""

    folder: Path
    commit: str = "c0ffee" + "0" * 34
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False


@dataclass
class Hub:
    """The running server: where, what it serves, what was asked, and how it misbehaves."""

    endpoint: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)
    cuts: dict[str, int] = field(default_factory=dict)
    """Break off the next download of a file after so many bytes (once)."""

    def downloaded(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return sorted(
            match["file"]
            for verb, path in self.requests
            if verb == "GET" and (match := _FILE.fullmatch(path)) is not None
        )


@contextmanager
def serve_hub(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", repositories)
    _HUBS[server] = hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        del _HUBS[server]


_HUBS: dict[object, Hub] = {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are recorded, not printed."""

    @property
    def hub(self) -> Hub:
        return _HUBS[self.server]

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if (match := _API.fullmatch(path)) is not None:
            self._api(match)
        elif (match := _FILE.fullmatch(path)) is not None:
            self._file(match)
        else:
            self._error(404, "EntryNotFound")

    def _repository(self, match: re.Match[str]) -> Repository | None:
        repository = self.hub.repositories.get(match["id"])
        if repository is None:
            self._error(401, "RepoNotFound")
            return None
        if (match["rev"] or "main") not in (*repository.revisions, repository.commit):
            self._error(404, "RevisionNotFound")
            return None
        return repository

    def _api(self, match: re.Match[str]) -> None:
        repository = self._repository(match)
        if repository is None:
            return
        files = [path for path in sorted(repository.folder.rglob("*")) if path.is_file()]
        names = [(path, path.relative_to(repository.folder).as_posix()) for path in files]
        if match["what"] == "tree":
            self._json(
                [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                    for path, name in names
                ]
            )
        else:
            siblings = [{"rfilename": name} for _, name in names]
            self._json({"id": match["id"], "sha": repository.commit, "siblings": siblings})

    def _file(self, match: re.Match[str]) -> None:
        repository = self._repository(match)
        if repository is None:
            return
        if repository.gated:
            self._error(403, "GatedRepo")
            return
        path = repository.folder / match["file"]
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        content = path.read_bytes()
        start = 0
        if (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) is not None:
            start = int(wanted[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[start:]
        cut = self.hub.cuts.pop(match["file"], None)
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:40]
