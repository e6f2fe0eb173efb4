"""A single file that is compressed by gzip while it is written, and appears whole under its name or not at all.

The plan's bytes are cut into runs, each a gzip member of its own, as pigz and bgzip write them: threads compress
several at once, and the bytes do not depend on how many there are.  Whoever reads gzip reads such a file.  How large it
becomes shows only when it is written, so that nothing of it is reserved, continued, or divided between processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from isal import isal_zlib

from anyckpt.engine.checksum import RunningDigest
from anyckpt.engine.destination import Destination, Share
from anyckpt.engine.files import Bytes, sync_file, write_error
from anyckpt.engine.manifest import Manifest, ManifestEntry
from anyckpt.engine.plan import Computed, Plan
from anyckpt.engine.records import BlockKey, BlockRecord
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import OutputError, UsageError

RUN_BYTES = 4 << 20
"""Bytes of the plan in one member: weights shrink no better in longer ones."""
_LEVEL = 1  # of ISA-L, which takes a tenth of zlib's time; levels 2 and 3 gain a thousandth on weights
_GZIP = 31  # ``wbits``; ISA-L's header has no name and no time


class GzipFile(Destination):
    """A path that gets a compressed file.

    Args:
        destination: the path.
        overwrite: what is there may be replaced, at the end.
        threads: how many compress; each holds a run and what comes of it.
    """

    in_order = True

    def __init__(self, destination: str, *, overwrite: bool = False, threads: int = 1) -> None:
        self.name = destination
        self._staging = StagingDirectory(destination, overwrite=overwrite)
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._file: BinaryIO | None = None
        self._run = bytearray()
        self._due: deque[Future[bytes]] = deque()
        self._position = 0
        self._size = 0
        self._digest = RunningDigest()

    def begin(self, plan: Plan, fingerprint: str, *, share: Share | None, resume: bool) -> None:
        if share is not None or resume:
            raise UsageError(
                "a file that is compressed is written by one process from its start to its end",
                path=self.name,
                remedy="leave out --share and --resume, or --gzip",
            )
        if plan.is_directory:
            raise UsageError("only a single file is compressed", path=self.name, remedy="leave out --gzip")
        for index, part in enumerate(plan.files[0].parts):
            if isinstance(part, Computed) and any(needed > index for needed in part.parts):
                raise UsageError(
                    "cannot be written from its start to its end, as something in it tells checksums of what follows",
                    path=self.name,
                    remedy="leave out --gzip",
                )
        self._staging.begin(plan, fingerprint, share=None, resume=False)
        try:
            self._file = open(self._staging.output, "wb", buffering=0)
        except OSError as error:
            self.discard()
            raise write_error(self.name, error) from error
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="anyckpt-gzip")

    def records(self, fingerprint: str) -> dict[BlockKey, BlockRecord]:
        return {}

    def write(self, file: int, offset: int, data: Bytes) -> None:
        assert offset == self._position, "bytes of a compressed file come in their order"
        taken = 0
        while taken < len(data):
            part = data[taken : taken + RUN_BYTES - len(self._run)]
            self._run += part.data
            taken += len(part)
            if len(self._run) == RUN_BYTES:
                self._compress()
        self._position += taken

    def _compress(self) -> None:
        """Give the run to a thread, and write what the threads have done, waiting where all are busy."""
        assert self._pool is not None
        run, self._run = self._run, bytearray()
        self._due.append(self._pool.submit(isal_zlib.compress, run, _LEVEL, _GZIP))
        while self._due and (len(self._due) > self._threads or self._due[0].done()):
            self._put(self._due.popleft().result())

    def _put(self, member: bytes) -> None:
        assert self._file is not None
        left = memoryview(member)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._refused(error) from error
        self._digest.add(member)
        self._size += len(member)

    def _refused(self, error: OSError) -> OutputError:
        told = write_error(self.name, error)
        if told.remedy is not None:
            told.remedy = "free some space and do the same again"
        return told

    def sync(self, files: Collection[int]) -> None:
        """Nothing: all is durable when the file is sealed, and is not continued before."""

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        """Nothing: see ``sync``."""

    def seal(self, files: Collection[int]) -> None:
        if self._file is None:
            return
        if self._run:
            self._compress()
        while self._due:
            self._put(self._due.popleft().result())
        try:
            sync_file(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        self._stop()

    def described(self, manifest: Manifest) -> Manifest:
        """One digest of the whole file: where a tensor's bytes lie in it, nobody can say."""
        entry = ManifestEntry("", "", "", 0, self._size, self._digest.value())
        return Manifest(manifest.format, manifest.plan, {"": self._size}, (entry,), manifest.notes)

    def publish(self, manifest: bytes) -> None:
        self._staging.publish(manifest)

    def weaker(self) -> tuple[str, ...]:
        return self._staging.weaker()

    def is_published(self, fingerprint: str) -> bool:
        return self._staging.is_published(fingerprint)

    def close(self, failure: str = "") -> None:
        self.discard()

    def discard(self) -> None:
        self._stop()
        self._staging.discard()

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._due.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
