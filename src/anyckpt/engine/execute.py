"""Carrying out a plan: blocks read, computed and written by a few threads, then committed.

Memory is one block and a few scratch buffers per thread, whatever the size of the model.  The bytes of the output
do not depend on the number of threads, on the order of blocks, or on being interrupted.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from anyckpt.engine.blocks import CHUNK_BYTES, Block, LatePart, cut
from anyckpt.engine.checksum import chunk_digests, join_crc32, join_digests
from anyckpt.engine.commit import BlockRecord, Staging
from anyckpt.engine.files import BlockBuffer, BlockFile, write_error
from anyckpt.engine.filling import Filling, built, fill_together
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.manifest import Manifest, ManifestEntry, beside, read_manifest
from anyckpt.engine.plan import MANIFEST_NAME, Computed, Plan, TensorData
from anyckpt.engine.together import MOST_TOGETHER, Gang, gangs
from anyckpt.errors import AnyckptError, FormatError, OutputError, UsageError
from anyckpt.storage import source as sources
from anyckpt.storage.gather import SCRATCH_BYTES

DEFAULT_MEMORY = 96 << 20
"""Bytes for blocks in flight; the interpreter and its libraries take some 50 MB besides."""

_MEMORY_PER_WORKER = 16 << 20
_SYNC_EVERY = 1 << 30

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        output: the path that now holds the output.
        format: its format.
        tensors: tensors written.
        bytes_read: bytes read from sources.
        bytes_written: size of the output.
        seconds: wall time from the first byte to the rename.
        peak_rss_bytes: the process's largest resident set so far.
        resumed_bytes: bytes that an earlier, interrupted run had written.
    """

    output: str
    format: str
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    resumed_bytes: int = 0


def execute(
    plan: Plan,
    destination: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    source_paths: Sequence[str] = (),
) -> Report:
    """Write a plan's files under ``destination``, durably, and give it its name only when it is whole.

    Args:
        plan: what to write.
        destination: a path that does not exist, unless ``overwrite``.
        overwrite: replace what is there, at the end.
        resume: continue what an interrupted run of the same plan left.
        workers: threads; as many as processors, up to 8, if None, and never more than ``memory`` allows.
        memory: bytes for blocks in flight.
        progress: called with (bytes done, bytes in all) from any thread.
        source_paths: files or directories that the plan reads; a change in them makes resuming an error.

    Raises:
        OutputError: the destination exists, the disk is full, or the work to resume is of another plan.
        FormatError: a source turns out to be damaged; nothing is left behind.
        UsageError: ``memory`` is too small for one thread, or ``resume`` is asked for and something in the plan has no
            identity (``anyckpt.identity``).
    """
    started = time.monotonic()
    read_before = sources.bytes_read()
    count = _worker_count(workers, memory)
    identity = fingerprint(plan, source_paths)
    if resume and identity.obstacle is not None:
        raise UsageError(
            "cannot be continued: part of it has no identity, so that other work might be taken for the same",
            path=destination, found=identity.obstacle, remedy="run without --resume to begin anew",
        )  # fmt: skip
    if resume and not overwrite and _is_done(destination, identity.value):
        return _report(plan, destination, 0, time.monotonic() - started, plan.nbytes)
    staging = Staging(destination, identity.value, resume=resume, overwrite=overwrite)
    run = _Run(plan, identity.value, staging, count, memory, progress, resumable=identity.obstacle is None)
    try:
        manifest = run.write_everything()
        staging.commit(manifest, None if plan.is_directory else beside(destination))
    except OutputError:
        staging.close() if run.worth_keeping else staging.discard()
        raise
    except OSError as error:
        staging.close() if run.worth_keeping else staging.discard()
        raise write_error(destination, error) from error
    except AnyckptError:
        staging.discard()
        raise
    except BaseException:
        staging.close() if run.resumable else staging.discard()
        raise
    seconds = time.monotonic() - started
    return _report(plan, destination, sources.bytes_read() - read_before, seconds, run.resumed_bytes)


def _report(plan: Plan, destination: str, bytes_read: int, seconds: float, resumed_bytes: int) -> Report:
    return Report(
        output=destination,
        format=plan.format,
        tensors=len({part.name for part in plan.tensors()}),
        bytes_read=bytes_read,
        bytes_written=plan.nbytes,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        resumed_bytes=resumed_bytes,
    )


def _is_done(destination: str, identity: str) -> bool:
    """Whether an earlier run of the same plan was killed after it had finished."""
    if not os.path.lexists(destination):
        return False
    try:
        manifest = read_manifest(destination)
    except FormatError:
        return False
    if manifest is None or manifest.plan != identity:
        return False
    paths = {
        os.path.join(destination, *name.split("/")) if name else destination: n for name, n in manifest.files.items()
    }
    return all(os.path.isfile(path) and os.path.getsize(path) == nbytes for path, nbytes in paths.items())


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had.

    Linux tells it of the program; ``getrusage`` would count what the process that started it held at that moment.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Run:
    """The state of one execution."""

    def __init__(
        self,
        plan: Plan,
        identity: str,
        staging: Staging,
        workers: int,
        memory: int,
        progress: Progress | None,
        *,
        resumable: bool,
    ) -> None:
        self._plan = plan
        self._identity = identity
        self._staging = staging
        self._workers = workers
        self._together = min(MOST_TOGETHER, max(1, (memory // workers - 2 * SCRATCH_BYTES) // CHUNK_BYTES))
        self._progress = progress
        self._lock = threading.Lock()
        self._records: dict[tuple[int, int], BlockRecord] = dict(staging.finished)
        self._unsynced: dict[tuple[int, int], BlockRecord] = {}
        self._since_sync = 0
        self._done = 0
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._wanted_crcs = [
            {i for part in file.parts if isinstance(part, Computed) for i in part.parts} for file in plan.files
        ]
        self.resumable = resumable
        self.resumed_bytes = 0

    @property
    def worth_keeping(self) -> bool:
        """Whether an interrupted run left durable blocks, so that resuming saves work."""
        return self.resumable and (bool(self._staging.finished) or any(True for _ in self._records))

    def write_everything(self) -> bytes:
        """Write all files stage by stage; the output is durable afterwards.  Gives the manifest."""
        output = self._staging.output
        if self._plan.is_directory:
            os.makedirs(output, exist_ok=True)
        self._check_room()
        entries: list[ManifestEntry] = []
        for stage in sorted({file.stage for file in self._plan.files}):
            numbers = [i for i, file in enumerate(self._plan.files) if file.stage == stage]
            entries += self._write_stage(numbers)
        for link, target in self._plan.links.items():
            path = os.path.join(output, link)
            if not os.path.islink(path):
                os.symlink(target, path)
        order = {file.path: number for number, file in enumerate(self._plan.files)}
        entries.sort(key=lambda entry: (order[entry.file], entry.offset))
        sizes = {file.path: file.nbytes for file in self._plan.files}
        manifest = Manifest(self._plan.format, self._identity, sizes, tuple(entries), self._plan.notes)
        data = manifest.to_bytes()
        if self._plan.is_directory:
            with open(os.path.join(output, MANIFEST_NAME), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        return data

    def _check_room(self) -> None:
        parent = os.path.dirname(self._staging.destination)
        status = os.statvfs(parent)
        there = sum(
            os.stat(os.path.join(folder, name)).st_blocks * 512
            for folder, _, names in os.walk(os.path.dirname(self._staging.output))
            for name in names
        )
        free = status.f_bavail * status.f_frsize + there
        if self._plan.nbytes > free:
            raise OutputError(
                "not enough space on the disk for the output",
                path=self._staging.destination,
                expected=f"{self._plan.nbytes:,} bytes",
                found=f"{free:,} bytes free",
                remedy="free some space or choose another disk",
            )

    def _write_stage(self, numbers: list[int]) -> list[ManifestEntry]:
        blocks: list[Block] = []
        late: dict[int, list[LatePart]] = {}
        for number in numbers:
            cut_blocks, late[number] = cut(number, self._plan.files[number])
            blocks += cut_blocks
        self.resumed_bytes += sum(b.nbytes for b in blocks if (b.file, b.offset) in self._staging.finished)
        self._advance(sum(b.nbytes for b in blocks if (b.file, b.offset) in self._staging.finished))
        files = _OpenOutputs(self._plan, self._staging)
        try:
            self._run_workers(blocks, files)
            entries: list[ManifestEntry] = []
            for number in numbers:
                entries += self._finish_file(number, blocks, late[number], files)
            files.sync_all()
        finally:
            files.close_all()
        return entries

    def _run_workers(self, blocks: Sequence[Block], files: _OpenOutputs) -> None:
        due = [b for b in blocks if (b.file, b.offset) not in self._staging.finished]
        waiting = gangs(self._plan.files, due, self._together)
        threads = [
            threading.Thread(target=self._work, args=(waiting, files), name=f"anyckpt-{i}", daemon=True)
            for i in range(self._workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(timeout=1.0)
        except BaseException:
            self._stop.set()
            for thread in threads:
                thread.join()
            self._sync(files)
            raise
        if self._failure is not None:
            if isinstance(self._failure, OutputError):
                self._sync_quietly(files)
            raise self._failure

    def _work(self, waiting: Iterator[Gang], files: _OpenOutputs) -> None:
        buffers: list[BlockBuffer] = []
        while not self._stop.is_set():
            with self._lock:
                gang = next(waiting, None)
            if gang is None:
                return
            try:
                buffers += [BlockBuffer() for _ in range(len(gang.blocks) - len(buffers))]
                for block, record in self._written(gang, buffers, files):
                    with self._lock:
                        self._records[block.file, block.offset] = record
                        self._unsynced[block.file, block.offset] = record
                        self._since_sync += block.nbytes
                        due = self._since_sync >= _SYNC_EVERY
                        if due:
                            self._since_sync = 0
                    if due:
                        self._sync(files)
                    self._advance(block.nbytes)
            except BaseException as error:
                with self._lock:
                    self._failure = self._failure or error
                self._stop.set()
                return

    def _written(
        self, gang: Gang, buffers: Sequence[BlockBuffer], files: _OpenOutputs
    ) -> Iterator[tuple[Block, BlockRecord]]:
        """Fill and write a gang's blocks; each with its record when it is written."""
        filling = [
            Filling(block, self._plan.files[block.file], buffer.at(block.offset, block.nbytes))
            for block, buffer in zip(gang.blocks, buffers, strict=False)
        ]
        for number, shared in enumerate(gang.shared):
            if shared:
                fill_together(filling, number)
            for one in filling:
                one.finish_piece(number, filled=shared, wanted=self._wanted_crcs[one.block.file])
        for one in filling:
            files.get(one.block.file).write(one.block.offset, one.memory)
            yield one.block, one.record

    def _finish_file(
        self, number: int, blocks: Sequence[Block], late: Sequence[LatePart], files: _OpenOutputs
    ) -> list[ManifestEntry]:
        """Write what waits for checksums, and list the file's parts for the manifest."""
        file = self._plan.files[number]
        crcs: dict[int, dict[int, tuple[int, int]]] = {}
        digests: dict[int, dict[int, int]] = {}
        for block in blocks:
            if block.file == number:
                record = self._records[number, block.offset]
                for index, start, crc, length in record.crcs:
                    crcs.setdefault(index, {})[start] = (crc, length)
                for index, start, chunk in record.digests:
                    digests.setdefault(index, {})[start] = chunk
        target = files.get(number)
        buffer = BlockBuffer()
        for item in late:
            computed = file.parts[item.part]
            assert isinstance(computed, Computed)
            data = built(file, computed, [join_crc32(crcs.get(i, {})) for i in computed.parts])
            _write_bytes(target, item.offset, data, buffer)
            digests[item.part] = chunk_digests(data)
        entries = []
        offset = 0
        for index, part in enumerate(file.parts):
            name, piece = (part.name, part.piece) if isinstance(part, TensorData) else ("", "")
            joined = join_digests(digests.get(index, {}))
            entries.append(ManifestEntry(name, piece, file.path, offset, part.nbytes, joined))
            offset += part.nbytes
        return entries

    def _sync(self, files: _OpenOutputs) -> None:
        """Make the blocks written so far durable and note them in the journal."""
        with self._lock:
            batch, self._unsynced = self._unsynced, {}
        if batch:
            files.sync({file for file, _ in batch})
            self._staging.record(batch)

    def _sync_quietly(self, files: _OpenOutputs) -> None:
        try:
            self._sync(files)
        except OutputError:
            return

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            done = self._done
        if self._progress is not None:
            self._progress(done, self._plan.nbytes)


class _OpenOutputs:
    """The output files of a stage, opened when their first block comes."""

    def __init__(self, plan: Plan, staging: Staging) -> None:
        self._plan = plan
        self._staging = staging
        self._lock = threading.Lock()
        self._open: dict[int, BlockFile] = {}

    def get(self, number: int) -> BlockFile:
        with self._lock:
            if number not in self._open:
                file = self._plan.files[number]
                path = os.path.join(self._staging.output, *file.path.split("/")) if file.path else self._staging.output
                os.makedirs(os.path.dirname(path), exist_ok=True)
                keep = any(key[0] == number for key in self._staging.finished)
                self._open[number] = BlockFile(path, file.nbytes, keep=keep)
            return self._open[number]

    def sync(self, numbers: set[int]) -> None:
        for number in numbers:
            self.get(number).sync()

    def sync_all(self) -> None:
        self.sync(set(self._open))

    def close_all(self) -> None:
        for file in self._open.values():
            file.close()


def _write_bytes(target: BlockFile, offset: int, data: bytes, buffer: BlockBuffer) -> None:
    step = len(buffer.whole) // 2
    for start in range(0, len(data), step):
        part = data[start : start + step]
        memory = buffer.at(offset + start, len(part))
        memory[:] = memoryview(part)
        target.write(offset + start, memory)


def _worker_count(workers: int | None, memory: int) -> int:
    affordable = memory // _MEMORY_PER_WORKER
    if affordable < 1:
        raise UsageError("too little memory for one thread", expected=f"at least {_MEMORY_PER_WORKER}", found=memory)
    if workers is not None and workers < 1:
        raise UsageError("at least one worker is needed", found=workers)
    return min(workers or min(8, max(2, os.cpu_count() or 2)), affordable)
