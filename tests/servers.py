"""Servers in the tests' process, for what is read and written far away."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

KEY, SECRET, TOKEN = "AKIAKEYOFTHETESTS", "secret/of+the+tests", "token-of-the-tests"
"""Credentials of the server below, which nothing may tell."""


@dataclass
class S3Server:
    """An S3 server, at an address."""

    url: str

    def client(self) -> Any:
        """Boto3's client of it."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            aws_session_token=TOKEN,
        )

    def bucket(self, name: str, files: Mapping[str, bytes] | None = None, *, everybody: bool = False) -> str:
        """Make a bucket that holds files, which everybody may read or not; its path."""
        self.client().create_bucket(Bucket=name)
        self.put(name, files or {}, everybody=everybody)
        return f"s3://{name}"

    def put(self, bucket: str, files: Mapping[str, bytes], *, everybody: bool = False) -> None:
        """Put files into a bucket, which everybody may read or not."""
        client = self.client()
        for key, data in files.items():
            client.put_object(Bucket=bucket, Key=key, Body=data, ACL="public-read" if everybody else "private")

    def files(self, bucket: str) -> dict[str, bytes]:
        """What a bucket holds."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def s3(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An empty S3 server, which this process's environment leads to."""
    address = urlsplit(moto_server.url)
    connection = http.client.HTTPConnection(address.netloc)
    connection.request("POST", "/moto-api/reset")
    assert connection.getresponse().status == 200
    connection.close()
    nowhere(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return moto_server


def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take from the environment all that says how any cloud is reached."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "STORAGE_")):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent/aws")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@dataclass
class Asked:
    """A request that passed a proxy.

    Attributes:
        method: of HTTP.
        path: with the query.
        range: first byte and byte past the last; None if all was asked for.
        nbytes: of the answer's body.
    """

    method: str
    path: str
    range: tuple[int, int] | None
    nbytes: int = 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The other side has gone, as it may."""


class Proxy:
    """Stands before a server, notes what it is asked, and does to answers what networks do.

    Args:
        target: the server's address.
        fault: what becomes of a request, by its number and itself: one of ``FAULTS``; ``stall``, as of one that
            sends nothing more; ``all``, as of a server that knows no ranges; a status with a word of S3's, such as
            ``403 AccessDenied``; ``done`` and then ``reset`` or a status, as of one that did what it was asked before
            it failed; or None.
        latency: seconds before each answer.

    Attributes:
        asked: the requests, in their order.
    """

    def __init__(
        self, target: str, fault: Callable[[int, Asked], str | None] = lambda number, asked: None, latency: float = 0.0
    ) -> None:
        self.asked: list[Asked] = []
        self.fault = fault
        self.latency = latency
        self.target = urlsplit(target).netloc
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Passing,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def nbytes(self) -> int:
        return sum(asked.nbytes for asked in self.asked)

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


FAULTS = ("reset", "503", "slow", "cut", "reframed", "other range")
"""A connection that is reset; a server that fails; an answer that comes in drops; one that breaks off; one that is
shorter than what was asked for; and one of another range."""


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def _pass(self) -> None:
        given = self.headers.get("Range")
        span = None
        if given:
            first, _, last = given.removeprefix("bytes=").partition("-")
            span = int(first or -int(last)), int(last) + 1 if first and last else 0
        asked = Asked(self.command, self.path, span)
        with self.proxy.lock:
            number = len(self.proxy.asked)
            self.proxy.asked.append(asked)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.proxy.latency:
            time.sleep(self.proxy.latency)
        fault = self.proxy.fault(number, asked)
        is_done = fault is not None and fault.startswith("done ")
        fault = fault.removeprefix("done ") if fault is not None else None
        if not is_done and self._fails(fault):
            return
        connection = http.client.HTTPConnection(self.proxy.target, timeout=30)
        given_headers = {
            name: value for name, value in self.headers.items() if fault != "all" or name.lower() != "range"
        }
        connection.request(self.command, self.path, body, given_headers)
        answer = connection.getresponse()
        data = answer.read()
        asked.nbytes = len(data)
        dropped = ("transfer-encoding", "connection", "content-length", "date", "server")
        headers = {name.lower(): value for name, value in answer.getheaders() if name.lower() not in dropped}
        if self.command == "HEAD":
            headers["content-length"] = answer.getheader("Content-Length") or "0"
        connection.close()
        if is_done and self._fails(fault):
            return
        self._answer(answer.status, headers, data, fault if answer.status in (200, 206) else None)

    def _fails(self, fault: str | None) -> bool:
        """Whether the server fails instead of answering, which it then did."""
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return True
        if fault is None or not fault.split(" ", 1)[0].isdigit():
            return False
        status, _, code = fault.partition(" ")
        self._answer(int(status), {}, f"<Error><Code>{code}</Code></Error>".encode() if code else b"", None)
        return True

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: str | None) -> None:
        length = len(data)
        if fault == "reframed":
            data = data[: length // 2]
            length = len(data)
        elif fault in ("cut", "stall"):
            data = data[: length // 2]
        elif fault == "other range" and "content-range" in headers:
            total = headers["content-range"].rpartition("/")[2]
            headers["content-range"] = f"bytes 0-{length - 1}/{total}"
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "content-length" not in headers:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            pieces = (
                [data[start : start + 97] for start in range(0, min(len(data), 970), 97)] if fault == "slow" else []
            )
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.002)
            self.wfile.write(data[sum(map(len, pieces)) :])
            if fault in ("cut", "stall"):
                self.wfile.flush()
                time.sleep(1.0 if fault == "stall" else 0.0)
                self.close_connection = True
        except OSError:  # the other side has gone
            self.close_connection = True

    def do_GET(self) -> None:
        self._pass()

    def do_HEAD(self) -> None:
        self._pass()

    def do_PUT(self) -> None:
        self._pass()

    def do_POST(self) -> None:
        self._pass()

    def do_DELETE(self) -> None:
        self._pass()


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Stands before the S3 server, and the environment leads to it; what fails is tried again without waiting."""
    from anyckpt.storage.remote import stores

    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    with Proxy(s3.url).running() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running
