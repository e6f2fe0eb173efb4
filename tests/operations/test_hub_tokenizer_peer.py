"""A tokenizer by its name, from a stand-in of the hub that huggingface_hub itself asks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from tests.support import fixture_path

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.peer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = fixture_path("families/llama/hf")
PROGRAM = """
import json, sys, anyckpt
try:
    done = anyckpt.convert(sys.argv[1], sys.argv[2], to="nemo2", tokenizer=sys.argv[3], tokenizer_library="huggingface")
    found = anyckpt.open(done.output).tokenizer
    print(json.dumps({"files": sorted(found.files), "name": found.hub_name, "notes": done.notes}))
except anyckpt.AnyckptError as error:
    print(json.dumps({"error": str(error)}))
"""


def tag_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """What the hub answers about one repository, and of two that nobody may read."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if "gated" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/org/llama/tree/"):
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": tag_of(file)}
                for file in FOLDER.iterdir()
            ]
            return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        if path.startswith("/api/models/org/llama"):
            names = [{"rfilename": file.name} for file in FOLDER.iterdir()]
            about = {"id": "org/llama", "modelId": "org/llama", "sha": COMMIT, "siblings": names, "tags": []}
            return self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        file = FOLDER / path.rpartition("/")[2]
        if path.startswith("/org/llama/resolve/") and file.is_file():
            return self.answer(200, file.read_bytes(), {"ETag": f'"{tag_of(file)}"', "X-Repo-Commit": COMMIT})
        return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def converted(name: str, endpoint: str, folder: Path) -> dict[str, object]:
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_ETAG_TIMEOUT": "5",
    }
    source = str(fixture_path("nemo/nemo1_dist_tp1/model.nemo"))
    command = [sys.executable, "-c", PROGRAM, source, str(folder / "out"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_its_files_travel_and_no_others_are_fetched(hub: str, tmp_path: Path) -> None:
    found = converted("org/llama", hub, tmp_path)
    assert found["files"] == ["tokenizer.json", "tokenizer_config.json"], found
    assert not any("safetensors" in path for path in Hub.asked if "resolve" in path)
    written = tmp_path / "out" / "context" / "nemo_tokenizer" / "tokenizer.json"
    assert written.read_bytes() == (FOLDER / "tokenizer.json").read_bytes()


def test_who_may_not_read_it_is_told_to_log_in(hub: str, tmp_path: Path) -> None:
    assert "hf auth login" in str(converted("org/gated", hub, tmp_path)["error"])
    assert "is not on the Hub, or is private" in str(converted("org/other", hub, tmp_path)["error"])


def test_without_a_network_the_name_is_recorded(tmp_path: Path) -> None:
    found = converted("org/llama", "http://127.0.0.1:9", tmp_path)
    assert found["name"] == "org/llama" and found["files"] == []
    assert any("recorded by its name" in note for note in found["notes"])  # type: ignore[attr-defined]
