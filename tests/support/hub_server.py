"""A model hub on this machine, as far as `huggingface_hub` asks one: commits, ETags, redirects to
another path for what is large, ranges, the errors by their codes. Connections can be broken in the
middle, and files can be larger than any disk: only their first bytes are real."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only one").hexdigest()
LARGE = 10_000  # bytes: from here on a file lies elsewhere
PIECE = 1 << 16


@dataclass(frozen=True)
class Content:
    """A file: `head`, and zeros up to `size`."""

    head: bytes
    size: int

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.head)
        if self.size > 1 << 30:
            digest.update(str(self.size).encode())  # nobody is to read it
        else:
            digest.update(bytes(self.size - len(self.head)))
        return digest.hexdigest()

    def piece(self, start: int, end: int) -> bytes:
        held = self.head[start:end]
        return held + bytes(end - start - len(held))


@dataclass
class Repository:
    files: dict[str, Content]
    refused: str = ""  # a code of X-Error-Code, for everything but what it is about
    branches: tuple[str, ...] = ("main",)
    commit: str = COMMIT


@dataclass
class Served:
    """What was asked for and sent; `breaks` are bytes after which a file's next
    answers end."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    breaks: dict[str, list[int]] = field(default_factory=dict)  # by file
    dead: set[str] = field(default_factory=set)  # files that do not come
    short: dict[str, int] = field(default_factory=dict)  # files that end early, and say so
    dying: set[str] = field(default_factory=set)  # files that do not come after a break
    asked: list[str] = field(default_factory=list)
    sent: int = 0
    broken: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, directory: Path) -> Repository:
        files = {
            str(file.relative_to(directory)): Content(file.read_bytes(), file.stat().st_size)
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        }
        self.repositories[name] = Repository(files)
        return self.repositories[name]


class HubServer:
    """`with HubServer() as hub`: hub.url is what HF_ENDPOINT is to be, hub.served what it has."""

    def __init__(self) -> None:
        self.served = Served()
        handler = type("Handler", (_Handler,), {"served": self.served})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        serve = partial(self._server.serve_forever, poll_interval=0.02)
        threading.Thread(target=serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.served.lock:
            self.served.asked.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        cdn = re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path)
        if cdn:
            content = self.served.repositories[cdn[1]].files[cdn[2]]
            size = self.served.short.get(cdn[2], content.size)
            self._content(Content(content.head, size), cdn[2], {}, body)
        elif api:
            self._api(api[1], api[2], api[3] or "main")
        elif file:
            self._file(file[1], file[2], file[3], body)
        else:
            self._error(404, "")

    def _repository(self, name: str, revision: str) -> Repository | None:
        repository = self.served.repositories.get(name)
        if repository is None:
            self._error(401, "RepoNotFound")
        elif repository.refused:
            self._error(403, repository.refused)
        elif revision not in (*repository.branches, repository.commit):
            self._error(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _api(self, name: str, kind: str | None, revision: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        files = repository.files.items()
        if kind == "tree":
            said: object = [
                {"type": "file", "oid": file, "size": content.size, "path": file}
                for file, content in files
            ]
        else:
            siblings = [{"rfilename": file, "size": content.size} for file, content in files]
            said = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings}
        self._answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        content = repository.files.get(file)
        if content is None:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
            return
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{content.sha256[:40]}"'}
        if content.size < LARGE:
            self._content(content, file, headers, body)
            return
        headers |= {
            "X-Linked-Size": str(content.size),
            "X-Linked-Etag": f'"{content.sha256}"',
            "Location": f"http://localhost:{self.server.server_address[1]}/cdn/{name}/{file}",
        }
        self._answer(302, b"", headers)

    def _content(self, content: Content, file: str, headers: dict[str, str], body: bool) -> None:
        start, end, status = 0, content.size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, status = int(asked[1]), 206
            end = max(start, min(end, int(asked[2]) + 1) if asked[2] else end)
            headers |= {"Content-Range": f"bytes {start}-{end - 1}/{content.size}"}
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if not body:
            return
        stop = self._break(file, end - start)
        while start < end and stop > 0:
            piece = content.piece(start, min(end, start + min(PIECE, stop)))
            self.wfile.write(piece)
            start, stop = start + len(piece), stop - len(piece)
            with self.served.lock:
                self.served.sent += len(piece)
        if start < end:
            self._hang_up()

    def _break(self, file: str, length: int) -> int:
        """After how many bytes this answer ends."""
        with self.served.lock:
            if file in self.served.dead:
                return 0
            breaks = self.served.breaks.get(file)
            if breaks and breaks[0] < length:
                self.served.broken += 1
                self.served.dead |= {file} & self.served.dying
                return breaks.pop(0)
        return length + 1

    def _hang_up(self) -> None:
        """Every other time as a machine that crashed."""
        self.wfile.flush()
        if self.served.broken % 2 == 0:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, b"", (headers or {}) | ({"X-Error-Code": code} if code else {}))

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            with self.served.lock:
                self.served.sent += len(content)
