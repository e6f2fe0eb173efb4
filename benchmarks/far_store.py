"""A store of a folder's files that is as far away as is asked: enough of S3 to list, to read ranges and to write.

    python benchmarks/far_store.py FOLDER --milliseconds 30 --megabytes 100

Prints its address, then, for each line that comes in, what it was asked since the last: requests, bytes sent and bytes
received.  Every answer waits for so long, and all share a link that carries so much in a second, each way.  Every
bucket is the folder; what is written stays in it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

_PAGE = 1000
_PIECE = 64 << 10
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class Store:
    """What is in the folder, and what was asked."""

    def __init__(self, folder: Path, latency: float, rate: float) -> None:
        self.folder = folder
        self.latency = latency
        self.rate = rate
        self.free_at = {"sent": 0.0, "received": 0.0}
        self.bodies = {"sent": 0, "received": 0}
        self.requests = 0
        self.passed = {"sent": 0, "received": 0}
        self.numbers = itertools.count(1)
        self.tags: dict[str, str] = {}
        self.parts: dict[str, dict[int, Path]] = {}
        self.files = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode("latin-1").split("\r\n"), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, lines: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, target, _ = lines[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        split = urlsplit(target)
        key = unquote(split.path).lstrip("/").partition("/")[2]
        self.requests += 1
        body = self.folder / f".body-{next(self.numbers)}"
        if method in ("PUT", "POST"):
            await self._receive(reader, body, int(headers.get("content-length", "0")))
        await asyncio.sleep(self.latency)
        query = parse_qs(split.query, keep_blank_values=True)
        if method in ("PUT", "POST", "DELETE"):
            await self._change(writer, method, key, query, headers, body)
        elif not key:
            await self._send(writer, "200 OK", {}, self._listing(query))
        elif key not in self.files:
            await self._send(writer, "404 Not Found", {}, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            await self._send_file(writer, method, key, headers.get("range"))

    async def _receive(self, reader: asyncio.StreamReader, path: Path, left: int) -> None:
        with path.open("wb", buffering=0) as file, self._carrying("received"):
            while left:
                data = await reader.read(min(left, _PIECE))
                if not data:
                    raise ConnectionError
                left -= len(data)
                await self._carried("received", len(data))
                file.write(data)

    async def _carried(self, way: str, nbytes: int) -> None:
        """Wait until the link has carried so many bytes more."""
        self.free_at[way] += nbytes / self.rate
        self.passed[way] += nbytes
        wait = self.free_at[way] - time.monotonic()
        if wait > 0.002:
            await asyncio.sleep(wait)

    @contextmanager
    def _carrying(self, way: str) -> Iterator[None]:
        """Within, a body is on its way: what the link could have carried meanwhile, it catches up with."""
        if not self.bodies[way]:
            self.free_at[way] = max(time.monotonic(), self.free_at[way])
        self.bodies[way] += 1
        try:
            yield
        finally:
            self.bodies[way] -= 1

    async def _change(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        key: str,
        query: dict[str, list[str]],
        headers: dict[str, str],
        body: Path,
    ) -> None:
        """What changes objects; ``body`` holds what was sent."""
        upload = query.get("uploadId", [""])[0]
        if method == "DELETE":
            self.parts.pop(upload, None) if upload else self._forget(key)
            await self._send(writer, "204 No Content", {}, b"")
        elif "delete" in query:
            names = re.findall(r"<Key>(.*?)</Key>", body.read_text())
            for name in names:
                self._forget(unescape(name))
            gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            await self._send(writer, "200 OK", {}, f"<DeleteResult xmlns='{_NAMESPACE}'>{gone}</DeleteResult>".encode())
        elif "uploads" in query:
            upload = f"upload-{next(self.numbers)}"
            self.parts[upload] = {}
            made = f"<InitiateMultipartUploadResult xmlns='{_NAMESPACE}'><UploadId>{upload}</UploadId>"
            await self._send(writer, "200 OK", {}, f"{made}</InitiateMultipartUploadResult>".encode())
        elif "partNumber" in query:
            part = body.rename(self.folder / f".{upload}-{query['partNumber'][0]}")
            self.parts[upload][int(query["partNumber"][0])] = part
            await self._send(writer, "200 OK", {"ETag": f'"{part.name}"'}, b"")
        elif (headers.get("if-none-match") and key in self.files) or (
            headers.get("if-match") and headers["if-match"] != self._tag(key)
        ):
            await self._send(writer, "412 Precondition Failed", {}, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            if upload:
                self._join([path for _, path in sorted(self.parts.pop(upload).items())], body)
            (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
            self.files[key] = body.rename(self.folder / key).stat().st_size
            self.tags[key] = f'"{next(self.numbers)}"'
            made = f"<CompleteMultipartUploadResult xmlns='{_NAMESPACE}'><ETag>{escape(self._tag(key))}</ETag>"
            text = f"{made}</CompleteMultipartUploadResult>".encode() if upload else b""
            await self._send(writer, "200 OK", {"ETag": self._tag(key)}, text)
        body.unlink(missing_ok=True)

    def _join(self, parts: list[Path], into: Path) -> None:
        with into.open("wb") as whole:
            for path in parts:
                with path.open("rb") as part:
                    while os.sendfile(whole.fileno(), part.fileno(), None, 1 << 30):  # type: ignore[arg-type]
                        pass
                path.unlink()

    def _forget(self, key: str) -> None:
        if self.files.pop(key, None) is not None:
            (self.folder / key).unlink()

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", [""])[0]
        delimiter = query.get("delimiter", [""])[0]
        keys = [key for key in self.files if key.startswith(prefix)]
        folders: list[str] = []
        if delimiter:
            inner = [key[len(prefix) :] for key in keys]
            folders = sorted({prefix + name.partition("/")[0] + "/" for name in inner if "/" in name})
            keys = [key for key, name in zip(keys, inner, strict=True) if "/" not in name]
        keys = sorted(key for key in keys if key > after)
        page, more = keys[:_PAGE], len(keys) > _PAGE
        parts = ["<?xml version='1.0'?>", f"<ListBucketResult xmlns='{_NAMESPACE}'><Name>far</Name>"]
        parts += [f"<IsTruncated>{str(more).lower()}</IsTruncated>"]
        if more:
            parts.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for key in page:
            parts.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{self._tag(key)}</ETag><Size>{self.files[key]}</Size></Contents>"
            )
        parts += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders]
        return "".join([*parts, "</ListBucketResult>"]).encode()

    def _tag(self, key: str) -> str:
        return self.tags.get(key) or f'"{hashlib.md5(key.encode()).hexdigest()}"'

    async def _send_file(self, writer: asyncio.StreamWriter, method: str, key: str, asked: str | None) -> None:
        size = self.files[key]
        start, stop, status = 0, size, "200 OK"
        headers = {"ETag": self._tag(key), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(size, int(last) + 1), "206 Partial Content"
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if method == "HEAD":
            await self._send(writer, status, headers, b"", size)
            return
        with open(self.folder / key, "rb") as file:
            data = os.pread(file.fileno(), stop - start, start)
        await self._send(writer, status, headers, data)

    async def _send(
        self, writer: asyncio.StreamWriter, status: str, headers: dict[str, str], body: bytes, length: int | None = None
    ) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        with self._carrying("sent"):
            for start in range(0, len(body), _PIECE):
                piece = body[start : start + _PIECE]
                await self._carried("sent", len(piece))
                writer.write(piece)
                await writer.drain()
        await writer.drain()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--megabytes", type=float, default=100)
    options = parser.parse_args()
    store = Store(options.folder, options.milliseconds / 1e3, options.megabytes * 1e6)

    def tell() -> None:
        for _ in sys.stdin:
            print(store.requests, *store.passed.values(), flush=True)
            store.requests = 0
            store.passed = dict.fromkeys(store.passed, 0)
        os._exit(0)

    async def run() -> None:
        server = await asyncio.start_server(store.serve, "127.0.0.1", 0, backlog=1024, limit=1 << 20)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        threading.Thread(target=tell, daemon=True).start()
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
