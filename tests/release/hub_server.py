"""A server on the loopback address that speaks the part of the Hub's protocol that an upload uses: create, branch,
preupload, LFS batch and PUT, commit. Faults are planted by method and path."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "Secret" * 6
DROP = "drop"
"""A fault: the connection is reset in the middle of the request."""
TEAR = "tear"
"""A fault: the request is carried out, and the connection is reset in the middle of the answer."""
STALL = "stall"
"""A fault: nothing is answered until the other side gives up."""


class HubServer(ThreadingHTTPServer):
    """What was asked for (`requests`: method, path), the repositories, and the objects that arrived by their hash.

    `faults` (DROP, TEAR, STALL, or (status, text)) are taken in turn by requests whose "METHOD path" contains their
    key. `planted` gives the fault of the n-th request of all, from 1 on, or None.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, str]] = []
        self.authorizations: set[str] = set()
        self.faults: dict[str, list[Any]] = {}
        self.planted: Callable[[int], Any] = lambda number: None
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = defaultdict(dict)
        self.objects: dict[str, bytes] = {}
        self.on_put: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, method: str, part: str) -> list[str]:
        return [path for verb, path in self.requests if verb == method and part in path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what the tests are about."""


@contextmanager
def running() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    _torn = False
    server: HubServer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a test's output is its own."""

    def _handle(self) -> None:
        hub = self.server
        hub.requests.append((self.command, self.path))
        hub.authorizations.add(self.headers.get("authorization", ""))
        fault = self._fault() or hub.planted(len(hub.requests))
        if fault == STALL:
            self._body()
            self.connection.recv(1)
            self.close_connection = True
            return
        if fault == DROP:
            self.rfile.read(min(16, int(self.headers.get("content-length") or 0)))
            self._reset()
            return
        body = self._body()
        self._torn = fault == TEAR
        if fault is not None and not self._torn:
            self._answer(fault[0], {"error": fault[1]}, {"x-error-message": fault[1]})
            return
        self._route(self.path.partition("?")[0].strip("/"), body)

    def _reset(self) -> None:
        """End the connection with a reset instead of an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def __getattr__(self, name: str) -> Any:
        # BaseHTTPRequestHandler asks for do_GET and its like.
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _fault(self) -> Any:
        for key, waiting in self.server.faults.items():
            if waiting and key in f"{self.command} {self.path}":
                return waiting.pop(0)
        return None

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _route(self, path: str, body: bytes) -> None:
        hub = self.server
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(
                name, {"private": asked.get("visibility") == "private" or asked.get("private")}
            )
            self._answer(409 if known else 200, {"url": f"{hub.url}/{name}", "name": name})
        elif path == "api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer(200, {"objects": [self._action(each) for each in json.loads(body)["objects"]]})
        elif path.startswith("lfs/"):
            if hub.on_put is not None:
                hub.on_put()
            found = hashlib.sha256(body).hexdigest()
            if found == path.removeprefix("lfs/"):
                hub.objects[found] = body
            self._answer(200 if found in hub.objects else 400, {"error": "these bytes have another hash"})
        elif path.startswith("api/models/"):
            self._model(path.removeprefix("api/models/").split("/"), body)
        else:
            self._answer(200, {})

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}
        return {
            "oid": wanted["oid"],
            "size": wanted["size"],
            **({} if wanted["oid"] in self.server.objects else upload),
        }

    def _model(self, parts: list[str], body: bytes) -> None:
        hub, name, what = self.server, "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        if what == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif what == "commit":
            self._commit(hub.files[(name, parts[3])], [json.loads(line) for line in body.splitlines()])
            self._answer(200, {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40})
        elif what == "branch":
            self._answer(200, {})
        elif name in hub.repositories:
            self._answer(200, {"id": name, "private": bool(hub.repositories[name]["private"]), "siblings": []})
        else:
            self._answer(404, {"error": "Repository not found"}, {"x-error-code": "RepoNotFound"})

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = b"" if self.command == "HEAD" else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "content-type": "application/json",
            "content-length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self._torn:
            self.wfile.write(data[: len(data) // 2])
            self._reset()
        else:
            self.wfile.write(data)
