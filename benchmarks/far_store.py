"""A store of a folder's files that is as far away as is asked: enough of S3 to list, to read ranges and to write.

    python benchmarks/far_store.py FOLDER --milliseconds 30 --megabytes 100

Prints its address, then, for each line that comes in, a line of JSON: what it was asked and what it carried since the
last.  Every answer waits for so long, and all share a link that carries so much in a second, each way.  Every bucket
is the folder; what is written stays in it, the parts of an upload in a file each.

Bodies go between files and sockets without passing through Python, so that the store takes next to nothing of the
processors whose time is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import mmap
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

_PAGE = 1000
_PIECE = 256 << 10
_CAUGHT_UP = 0.05  # seconds for which the link makes up, as this process may get no processor while bodies wait
TICK = 0.05
"""Seconds of which each has a count of bytes carried."""


class Link:
    """One way of a link: bytes pass one after another, so many in a second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0
        self._bodies = 0
        self._lock = threading.Lock()
        self.passed: Counter[int] = Counter()

    @contextmanager
    def body(self) -> Iterator[None]:
        """Within, a body is on its way; while there is none, the link stands still."""
        with self._lock:
            if not self._bodies:
                self._free_at = max(time.monotonic(), self._free_at)
            self._bodies += 1
        try:
            yield
        finally:
            with self._lock:
                self._bodies -= 1

    def carry(self, nbytes: int) -> None:
        """Wait until so many bytes more have passed."""
        with self._lock:
            self._free_at = max(time.monotonic() - _CAUGHT_UP, self._free_at) + nbytes / self._rate
            arrival = self._free_at
            self.passed[int(arrival / TICK)] += nbytes
        time.sleep(max(0.0, arrival - time.monotonic()))

    def told(self) -> dict[int, int]:
        """Bytes by tick since the last time."""
        with self._lock:
            passed, self.passed = self.passed, Counter()
        return dict(sorted(passed.items()))


class Store:
    """What is in the folder, as files of which an object is made one after another, and what was asked."""

    def __init__(self, folder: Path, latency: float, rate: float) -> None:
        self.folder = folder
        self.latency = latency
        self.sent, self.received = Link(rate), Link(rate)
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.numbers = itertools.count(1)
        self.tags: dict[str, str] = {}
        self.parts: dict[str, dict[int, Path]] = {}
        self.objects = {str(path.relative_to(folder)): [path] for path in sorted(folder.rglob("*")) if path.is_file()}

    def size(self, key: str) -> int:
        return sum(path.stat().st_size for path in self.objects[key])

    def tag(self, key: str) -> str:
        return self.tags.get(key) or f'"{hashlib.md5(key.encode()).hexdigest()}"'

    def fresh(self) -> Path:
        """The name of a file for bytes that come in."""
        return self.folder / f".received-{next(self.numbers)}"

    def put(self, key: str, paths: list[Path]) -> None:
        self.forget(key)
        self.objects[key] = paths
        self.tags[key] = f'"{next(self.numbers)}"'

    def forget(self, key: str) -> None:
        for path in self.objects.pop(key, []):
            path.unlink()

    def told(self) -> dict[str, Any]:
        with self.lock:
            requests, self.requests = self.requests, Counter()
        ways = {"sent": self.sent.told(), "received": self.received.told()}
        return {
            "requests": dict(requests),
            **{way: sum(ticks.values()) for way, ticks in ways.items()},
            "ticks": ways,
            "processor_seconds": time.process_time(),
        }


class _Handler(StreamRequestHandler):
    disable_nagle_algorithm = True
    store: Store

    def handle(self) -> None:
        try:
            while line := self.rfile.readline():
                self._answer(*line.decode("latin-1").split(" ")[:2])
        except ConnectionError:
            pass

    def _answer(self, method: str, target: str) -> None:
        headers: dict[str, str] = {}
        while line := self.rfile.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        split = urlsplit(target)
        key = unquote(split.path).lstrip("/").partition("/")[2]
        query = {name: values[0] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        body = self.store.fresh()
        if method in ("PUT", "POST"):
            self._receive(body, int(headers.get("content-length", "0")))
        time.sleep(self.store.latency)
        with self.store.lock:
            self.store.requests[method] += 1
            status, extra, text = self._done(method, key, query, headers, body)
        body.unlink(missing_ok=True)
        if status == "file":
            self._send_file(method, key, headers.get("range"))
        else:
            self._send(status, extra, text)

    def _receive(self, path: Path, nbytes: int) -> None:
        with path.open("w+b") as file:
            if not nbytes:
                return
            file.truncate(nbytes)
            link = self.store.received
            with link.body(), mmap.mmap(file.fileno(), nbytes) as memory, memoryview(memory) as view:
                for start in range(0, nbytes, _PIECE):
                    piece = view[start : start + _PIECE]
                    got = self.rfile.readinto(piece)  # type: ignore[attr-defined]
                    link.carry(len(piece))
                    piece.release()
                    if got is None or got < min(_PIECE, nbytes - start):
                        raise ConnectionError

    def _done(
        self, method: str, key: str, query: dict[str, str], headers: dict[str, str], body: Path
    ) -> tuple[str, dict[str, str], str]:
        """Do what is asked; the status, headers and text of the answer."""
        store, upload = self.store, query.get("uploadId", "")
        if method in ("GET", "HEAD"):
            if not key:
                return "200 OK", {}, self._listing(query)
            return ("file", {}, "") if key in store.objects else ("404 Not Found", {}, _error("NoSuchKey"))
        if method == "DELETE":
            for path in store.parts.pop(upload, {}).values():
                path.unlink()
            if not upload:
                store.forget(key)
            return "204 No Content", {}, ""
        if "delete" in query:
            names = re.findall(r"<Key>(.*?)</Key>", body.read_text())
            for name in names:
                store.forget(unescape(name))
            return "200 OK", {}, _xml("DeleteResult", *(f"<Deleted><Key>{name}</Key></Deleted>" for name in names))
        if "uploads" in query:
            upload = f"upload-{next(store.numbers)}"
            store.parts[upload] = {}
            return "200 OK", {}, _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        if "partNumber" in query:
            part = store.parts[upload][int(query["partNumber"])] = body.rename(store.fresh())
            return "200 OK", {"ETag": f'"{part.name}"'}, ""
        known = store.tag(key) if key in store.objects else None
        if (headers.get("if-none-match") and known) or headers.get("if-match", known) != known:
            return "412 Precondition Failed", {}, _error("PreconditionFailed")
        if upload:
            store.put(key, [path for _, path in sorted(store.parts.pop(upload).items())])
            return "200 OK", {}, _xml("CompleteMultipartUploadResult", f"<ETag>{escape(store.tag(key))}</ETag>")
        store.put(key, [body.rename(store.fresh())])
        return "200 OK", {"ETag": store.tag(key)}, ""

    def _listing(self, query: dict[str, str]) -> str:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        keys = [key for key in self.store.objects if key.startswith(prefix)]
        folders: list[str] = []
        if query.get("delimiter"):
            inner = [key[len(prefix) :] for key in keys]
            folders = sorted({prefix + name.partition("/")[0] + "/" for name in inner if "/" in name})
            keys = [key for key, name in zip(keys, inner, strict=True) if "/" not in name]
        keys = sorted(key for key in keys if key > after)
        page, more = keys[:_PAGE], len(keys) > _PAGE
        parts = [f"<Name>far</Name><IsTruncated>{str(more).lower()}</IsTruncated>"]
        if more:
            parts.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for key in page:
            parts.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(self.store.tag(key))}</ETag><Size>{self.store.size(key)}</Size></Contents>"
            )
        parts += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders]
        return _xml("ListBucketResult", *parts)

    def _send_file(self, method: str, key: str, asked: str | None) -> None:
        size = self.store.size(key)
        start, stop, status = 0, size, "200 OK"
        headers = {"ETag": self.store.tag(key), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(size, int(last) + 1), "206 Partial Content"
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._begin(status, headers, stop - start)
        if method == "HEAD":
            return
        for path in self.store.objects[key]:
            nbytes = path.stat().st_size
            with path.open("rb") as file, self.store.sent.body():
                for at in range(max(0, start), min(stop, nbytes), _PIECE):
                    count = min(_PIECE, min(stop, nbytes) - at)
                    self.store.sent.carry(count)
                    self.connection.sendfile(file, at, count)
            start, stop = start - nbytes, stop - nbytes

    def _send(self, status: str, headers: dict[str, str], text: str) -> None:
        body = text.encode()
        self._begin(status, headers, len(body))
        with self.store.sent.body():
            for start in range(0, len(body), _PIECE):
                piece = body[start : start + _PIECE]
                self.store.sent.carry(len(piece))
                self.connection.sendall(piece)

    def _begin(self, status: str, headers: dict[str, str], nbytes: int) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {nbytes}"]
        self.connection.sendall(
            "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode(),
            socket.MSG_MORE if nbytes else 0,
        )


def _xml(name: str, *inner: str) -> str:
    return f"<{name} xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>{''.join(inner)}</{name}>"


def _error(code: str) -> str:
    return f"<Error><Code>{code}</Code></Error>"


class _Server(ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--megabytes", type=float, default=100)
    options = parser.parse_args()
    store = Store(options.folder, options.milliseconds / 1e3, options.megabytes * 1e6)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(store.told()), flush=True)


if __name__ == "__main__":
    main()
