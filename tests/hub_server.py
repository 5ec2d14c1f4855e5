"""A stand-in of the Hugging Face Hub's API, as far as uploads go: repositories, large files, commits, tags."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

_SMALL = 1000  # bytes; larger files go another way


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    url: str = ""
    token: str = "a-token"
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    failing: bool = False
    """Refuse commits."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._body()
        self._answer({"error": "Invalid credentials"}, 401)
        return False

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if match := re.fullmatch(r"/api/models/(.+)/refs.*", self.path):
            repository = self.hub.repositories[match[1]]
            tags = [
                {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
                for name, commit in repository.tags.items()
            ]
            self._answer({"branches": [], "converts": [], "tags": tags})
        elif match := re.fullmatch(r"/api/models/(.+)/tree/main.*", self.path):
            files = self.hub.repositories[match[1]].files
            self._answer([{"type": "file", "path": path, "size": len(data), "oid": ""} for path, data in files.items()])
        else:
            self._answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        if not self._allowed():
            return
        body = self._body()
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            block = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(block)["license"], str)
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            modes = [
                {**each, "uploadMode": "lfs" if each["size"] > _SMALL else "regular", "shouldIgnore": False}
                for each in files
            ]
            self._answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}} for each in wanted
            ]
            self._answer({"transfer": "basic", "objects": upload})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self._commit(match[1], body)
        elif match := re.fullmatch(r"/api/models/(.+)/tag/(.+)", self.path):
            self.hub.repositories[match[1]].tags[json.loads(body)["tag"]] = match[2]
            self._answer({})
        else:
            self._answer({"error": self.path}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.hub.repositories:
            self._answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repositories[name] = Repository(
            "private" in (asked.get("visibility"), "private" if asked.get("private") else "")
        )
        self._answer({"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        if self.hub.failing:
            self._answer({"error": "disk full"}, 507)
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "deletedFile":
                del repository.files[value["path"]]
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.hub.large[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                repository.files[value["path"]] = data
        repository.commits.append(hashlib.sha1(body).hexdigest())
        self._answer(
            {
                "success": True,
                "commitOid": repository.commits[-1],
                "commitUrl": f"{self.hub.url}/{name}/commit/{repository.commits[-1]}",
            }
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
