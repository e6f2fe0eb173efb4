"""A stand-in for the Hugging Face Hub and its storage, in the tests' process: what huggingface_hub asks of them.

Facts: the calls of huggingface_hub 2.4 and 0.36, and the headers that it looks at (``X-Repo-Commit``,
``X-Linked-Size``, ``X-Error-Code``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

TOKEN = "hf_tokenOfTheTests"
"""What the stand-in takes for a token, and nothing may tell."""

LARGE = 1000
"""Files of at least so many bytes, and of the names below, are in LFS."""

_LARGE_NAMES = (".safetensors", ".bin", ".pt", ".nemo")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """A repository: what each commit holds, and which commit is the last of a branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main", message: str = "") -> str:
        number = blob(json.dumps([len(self.commits), sorted(files), message]).encode())
        self.commits[number] = dict(files)
        self.branches[branch] = number
        self.messages.append(message)
        return number

    @property
    def files(self) -> dict[str, bytes]:
        """Of the main branch now."""
        return self.commits[self.branches["main"]]


@dataclass
class Asked:
    """A request: whom (``hub`` or ``storage``), what, and how many bytes of contents the answer had."""

    whom: str
    what: str
    range: str
    authorized: bool
    nbytes: int = 0


Fault = Callable[["Handler"], bool]
"""Does something else than to answer; whether it did."""


@dataclass
class Hub:
    """The stand-in.

    Attributes:
        url: the Hub's.
        storage: that of its storage, which takes addresses that are signed and no token.
        repositories: by name.
        asked: every request, in order.
        faults: asked one after another before a request is answered.
        signatures: those that the storage takes.
        connections: how many were made.
        direct: large files are given by the Hub itself.
        may_write: whether the token may.
    """

    url: str = ""
    storage: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    signatures: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    connections: int = 0
    direct: bool = False
    may_write: bool = True
    part_size: int | None = None
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, files: Mapping[str, bytes], **facts: Any) -> Repository:
        self.repositories[name] = Repository(**facts)
        self.repositories[name].commit(files)
        return self.repositories[name]

    def of(self, whom: str, what: str = "") -> list[Asked]:
        return [one for one in self.asked if one.whom == whom and what in one.what]

    def expire(self) -> None:
        """No address that was given before is taken any more."""
        self.signatures.clear()

    def is_large(self, name: str, data: bytes | int) -> bool:
        size = data if isinstance(data, int) else len(data)
        return size > 0 and (size >= LARGE * 1000 or (size >= LARGE and name.endswith(_LARGE_NAMES)))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    whom: str

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.hub.lock:
            self.hub.connections += 1

    def do_GET(self) -> None:
        self._take("")

    def do_HEAD(self) -> None:
        self._take("")

    def do_POST(self) -> None:
        self._take("POST ")

    def do_PUT(self) -> None:
        self._take("PUT ")

    def _take(self, verb: str) -> None:
        self.body = self._read_body()
        self.note = Asked(self.whom, verb + self.path, self.headers.get("Range", ""), "Authorization" in self.headers)
        with self.hub.lock:
            self.hub.asked.append(self.note)
            faults = list(self.hub.faults)
        for fault in faults:
            if fault(self):
                return
        path = unquote(self.path.partition("?")[0])
        for pattern, answer in self.answers:
            found = re.fullmatch(pattern, verb + path)
            if found is not None:
                answer(self, **found.groupdict())
                return
        self.send(404, b"{}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, data: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def ranged(self, data: bytes, headers: Mapping[str, str]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None:
            self.note.nbytes = len(data)
            self.send(200, data, headers)
            return
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        self.note.nbytes = stop - start
        self.send(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def log_message(self, *arguments: object) -> None:
        pass

    answers: ClassVar[list[tuple[str, Callable[..., None]]]] = []


class _Storage(Handler):
    whom = "storage"

    def _object(self, oid: str) -> None:
        if self.path.partition("?signature=")[2] not in self.hub.signatures:
            self.send(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif self.command == "PUT" and sha256(self.body) != oid:
            self.send(400, b"<Error><Code>BadDigest</Code></Error>")
        elif self.command == "PUT":
            self.hub.objects[oid] = self.body
            self.send(200, b"", {"ETag": '"e"'})
        else:
            self.ranged(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _part(self, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        self.send(200, b"", {"ETag": f'"part{number}"'})

    answers: ClassVar[list[tuple[str, Callable[..., None]]]] = [
        (r"(?:PUT )?/objects/(?P<oid>[0-9a-f]{64})", _object),
        (r"PUT /parts/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", _part),
    ]


_AFTER = "revision|tree|commit|preupload|branch|auth-check"
_REPOSITORY = rf"/api/(?:models|datasets|spaces)/(?P<name>[^/]+(?:/(?!(?:{_AFTER})/)[^/]+)?)"


class _Hub(Handler):
    whom = "hub"

    def _found(self, name: str, revision: str = "main", *, reading: bool = False) -> dict[str, bytes] | None:
        repository = self.hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if "Authorization" in self.headers and not known:
            self.send(401, b'{"error": "Invalid username or password."}', {"X-Error-Message": "Invalid token"})
        elif repository is None or (repository.private and not known):
            self.send(401 if not known else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and not known and reading:
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            commit = repository.branches.get(revision, revision)
            if commit in repository.commits:
                self.commit = commit
                return repository.commits[commit]
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return None

    def _about(self, name: str, revision: str = "main") -> None:
        files = self._found(name, revision or "main")
        if files is not None:
            listed = [
                {
                    "rfilename": file,
                    "size": len(data),
                    "blobId": blob(data),
                    **(
                        {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 130}}
                        if self.hub.is_large(file, data)
                        else {}
                    ),
                }
                for file, data in files.items()
            ]
            shown = listed if "blobs" in self.path else [{"rfilename": one["rfilename"]} for one in listed]
            self.json({"id": name, "modelId": name, "sha": self.commit, "siblings": shown, "tags": []})

    def _tree(self, name: str, revision: str) -> None:
        files = self._found(name, revision)
        if files is not None:
            self.json(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": blob(data)}
                    | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if large else {})
                    for file, data in files.items()
                    for large in [self.hub.is_large(file, data)]
                ]
            )

    def _resolve(self, name: str, revision: str, file: str) -> None:
        files = self._found(name, revision, reading=True)
        if files is None:
            return
        if file not in files:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
            return
        data = files[file]
        told = {"X-Repo-Commit": self.commit, "ETag": f'"{blob(data)}"'}
        if not self.hub.is_large(file, data):
            self.send(307, b"", {**told, "Location": f"/api/resolve-cache/{name}/{self.commit}/{file}"})
        elif self.hub.direct:
            self.ranged(data, told)
        else:
            self.hub.objects[sha256(data)] = data
            address = f"{self.hub.storage}/objects/{sha256(data)}?signature={self._signature()}"
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            self.send(302, b"", {**told, **linked, "Location": address})

    def _resolve_cache(self, name: str, revision: str, file: str) -> None:
        files = self._found(name, revision, reading=True)
        if files is not None:
            self.ranged(files[file], {"X-Repo-Commit": self.commit, "ETag": f'"{blob(files[file])}"'})

    def _signature(self) -> str:
        with self.hub.lock:
            signature = f"SECRET{len(self.hub.asked)}"
            self.hub.signatures.add(signature)
        return signature

    def _may_write(self) -> bool:
        if self.hub.may_write and self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send(403 if "Authorization" in self.headers else 401, b'{"error": "You may not write"}')
        return False

    def _check_write(self, name: str) -> None:
        if self._found(name) is not None and self._may_write():
            self.send(200, b"{}")

    def _create(self) -> None:
        if self._may_write():
            said = json.loads(self.body)
            name = "/".join(filter(None, (said["organization"], said["name"])))
            if name in self.hub.repositories:
                self.send(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
                return
            private = bool(said.get("private")) or said.get("visibility") == "private"
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
            self.json({"url": f"{self.hub.url}/{name}"})

    def _branch(self, name: str, branch: str) -> None:
        if self._may_write():
            repository = self.hub.repositories[name]
            if branch in repository.branches:
                self.send(409, b"{}")
                return
            repository.branches[branch] = repository.branches["main"]
            self.send(200, b"{}")

    def _preupload(self, name: str, revision: str) -> None:
        if self._may_write():
            repository = self.hub.repositories[name]
            ignored = repository.commits[repository.branches[revision]].get(".gitignore", b"").split()
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if self.hub.is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": file["path"].encode() in ignored,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.json({"files": modes})

    def _batch(self, name: str) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                size = self.hub.part_size
                verify = {"href": f"{self.hub.url}/verify"}
                if size is None:
                    address = f"{self.hub.storage}/objects/{one['oid']}?signature={self._signature()}"
                    upload: dict[str, Any] = {"href": address}
                else:
                    count = -(-one["size"] // size)
                    parts = {str(n + 1): f"{self.hub.storage}/parts/{one['oid']}/{n}" for n in range(count)}
                    upload = {"href": f"{self.hub.url}/complete", "header": {"chunk_size": str(size), **parts}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def _complete(self) -> None:
        oid = json.loads(self.body)["oid"]
        parts = self.hub.parts.pop(oid)
        self.hub.objects[oid] = b"".join(parts[number] for number in sorted(parts))
        self.send(200, b"{}")

    def _verify(self) -> None:
        said = json.loads(self.body)
        good = sha256(self.hub.objects[said["oid"]]) == said["oid"]
        self.send(200 if good else 400, b"{}")

    def _commit(self, name: str, revision: str) -> None:
        if not self._may_write():
            return
        repository = self.hub.repositories[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.branches[revision]):
            self.send(412, b'{"error": "A commit has happened since. Please refresh and try again."}')
            return
        files = dict(repository.commits[repository.branches[revision]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        commit = repository.commit(files, revision, header["summary"])
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _yaml(self) -> None:
        self.json({"warnings": [], "errors": []})

    answers: ClassVar[list[tuple[str, Callable[..., None]]]] = [
        (rf"{_REPOSITORY}", _about),
        (rf"{_REPOSITORY}/revision/(?P<revision>.+)", _about),
        (rf"{_REPOSITORY}/tree/(?P<revision>[^?]+?)/?", _tree),
        (rf"{_REPOSITORY}/auth-check/write", _check_write),
        (r"/api/resolve-cache/(?P<name>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<file>.+)", _resolve_cache),
        (r"/(?:datasets/|spaces/)?(?P<name>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _resolve),
        (r"POST /api/repos/create", _create),
        (rf"POST {_REPOSITORY}/branch/(?P<branch>.+)", _branch),
        (rf"POST {_REPOSITORY}/preupload/(?P<revision>.+)", _preupload),
        (rf"POST {_REPOSITORY}/commit/(?P<revision>.+)", _commit),
        (r"POST /(?P<name>.+)\.git/info/lfs/objects/batch", _batch),
        (r"POST /complete", _complete),
        (r"POST /verify", _verify),
        (r"POST /api/validate-yaml", _yaml),
    ]


def answering(status: int, times: int, whom: str = "storage", what: str = "", **headers: str) -> Fault:
    """The first ``times`` requests get an answer without contents."""
    left = [times]

    def fault(handler: Handler) -> bool:
        if handler.whom != whom or what not in handler.note.what or left[0] <= 0:
            return False
        left[0] -= 1
        handler.send(status, b"", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def breaking(times: int, whom: str = "storage", after: int = 0) -> Fault:
    """The first ``times`` requests lose their connection, when ``after`` bytes of the body have gone."""
    left = [times]

    def fault(handler: Handler) -> bool:
        if handler.whom != whom or left[0] <= 0:
            return False
        left[0] -= 1
        if after:
            real = handler.wfile.write
            whole = bytearray()
            handler.wfile.write = lambda data: whole.extend(data) or len(data)  # type: ignore[method-assign]
            path = unquote(handler.path.partition("?")[0])
            for pattern, answer in handler.answers:
                found = re.fullmatch(pattern, path)
                if found is not None:
                    answer(handler, **found.groupdict())
                    break
            head = whole.index(b"\r\n\r\n") + 4
            real(bytes(whole[: head + after]))
        handler.close_connection = True
        handler.connection.shutdown(2)
        return True

    return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no matter of interest."""


@pytest.fixture(scope="session")
def hub_servers() -> Iterator[Hub]:
    hub = Hub()
    servers = []
    for kind in (_Hub, _Storage):
        handler = type(kind.__name__, (kind,), {"hub": hub})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(hub_servers: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """An empty Hub, which this process takes for the real one; its cache is empty, and nobody has logged in."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    from anyckpt.storage.hub import library, place

    hub = hub_servers
    for mutable in (hub.repositories, hub.asked, hub.faults, hub.signatures, hub.objects, hub.parts):
        mutable.clear()
    hub.connections, hub.direct, hub.may_write, hub.part_size = 0, False, True, None
    disable_progress_bars()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    of_files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", of_files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library, "PAUSE", 0.001)
    place._recent.clear()
    return hub


def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has a token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
