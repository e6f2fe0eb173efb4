"""A store of a folder's files that is as far away as is asked: enough of S3 to list and to read ranges.

    python benchmarks/far_store.py FOLDER --milliseconds 30 --megabytes 100

Prints its address, then, for each line that comes in, what it was asked since the last: requests and bytes sent.
Every answer waits for so long, and all share a link that carries so much in a second.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PAGE = 1000
_PIECE = 64 << 10
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class Store:
    """What is in the folder, and what was asked."""

    def __init__(self, folder: Path, latency: float, rate: float) -> None:
        self.folder = folder
        self.latency = latency
        self.rate = rate
        self.free_at = 0.0
        self.requests = 0
        self.sent = 0
        self.files = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode("latin-1").split("\r\n"), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, lines: list[str], writer: asyncio.StreamWriter) -> None:
        method, target, _ = lines[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        split = urlsplit(target)
        key = unquote(split.path).lstrip("/").partition("/")[2]
        self.requests += 1
        await asyncio.sleep(self.latency)
        if not key:
            await self._send(writer, "200 OK", {}, self._listing(parse_qs(split.query)))
        elif key not in self.files:
            await self._send(writer, "404 Not Found", {}, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            await self._send_file(writer, method, key, headers.get("range"))

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
        return f'"{hashlib.md5(key.encode()).hexdigest()}"'

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
        for start in range(0, len(body), _PIECE):
            piece = body[start : start + _PIECE]
            now = time.monotonic()
            self.free_at = max(now, self.free_at) + len(piece) / self.rate
            if self.free_at - now > 0.002:
                await asyncio.sleep(self.free_at - now)
            writer.write(piece)
            await writer.drain()
        self.sent += len(body)
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
            print(store.requests, store.sent, flush=True)
            store.requests = store.sent = 0
        os._exit(0)

    async def run() -> None:
        server = await asyncio.start_server(store.serve, "127.0.0.1", 0, backlog=1024)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        threading.Thread(target=tell, daemon=True).start()
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
