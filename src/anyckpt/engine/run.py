"""Carrying out blocks of a plan: filled, checksummed and written by a few threads, and noted when they are durable.

Memory is one block and a few scratch buffers per thread, whatever the size of the model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress

from anyckpt.blockwise import Tiles, keeping
from anyckpt.engine.ahead import filled
from anyckpt.engine.blocks import Block, Cut, LatePart
from anyckpt.engine.checksum import CHUNK_BYTES, PartSums, chunk_digests
from anyckpt.engine.destination import Destination
from anyckpt.engine.files import BlockBuffer, Bytes
from anyckpt.engine.filling import Filling, built, fill_together, held, is_far
from anyckpt.engine.manifest import ManifestEntry
from anyckpt.engine.plan import Computed, Plan, TensorData
from anyckpt.engine.records import BlockKey, BlockRecord
from anyckpt.engine.together import MOST_TOGETHER, Gang, gangs
from anyckpt.errors import OutputError, UnreachableError, UsageError
from anyckpt.storage.gather import SCRATCH_BYTES
from anyckpt.storage.read_count import ReadCount, counting
from anyckpt.storage.requests import given_up_with

_MEMORY_PER_WORKER = 16 << 20
_SYNC_EVERY = 1 << 30
_FAR_WORKERS = 16
_FOR_TILES = 4  # of so many bytes for blocks in flight, one may be held of what is computed for several outputs

Progress = Callable[[int, int], None]
Ends = Callable[[Block], tuple[int, int]]
_Written = tuple[BlockKey, int, BlockRecord]
_Job = Callable[[list[BlockBuffer]], Iterator[_Written]]


class Run:
    """The state of one process's work on a plan.

    Args:
        plan: what is written.
        cut: its blocks.
        destination: where; it has begun.
        records: the blocks that are there.
        workers: threads.
        memory: bytes for blocks in flight.
        progress: called with (bytes done, ``total``) from any thread.
        total: bytes that this process is to write.
        ends: how many bytes at a block's start and end are left for who finishes.

    Attributes:
        records: the blocks that are written, by this process or before.
        reads: bytes that were read for them.
        resumed_bytes: of the written ones, bytes of those that were there before.
    """

    def __init__(
        self,
        plan: Plan,
        cut: Cut,
        destination: Destination,
        records: dict[BlockKey, BlockRecord],
        *,
        workers: int,
        memory: int,
        progress: Progress | None,
        total: int,
        ends: Ends | None = None,
    ) -> None:
        self._plan = plan
        self._cut = cut
        self._destination = destination
        self._workers = workers
        self._together = min(MOST_TOGETHER, max(1, (memory // workers - 2 * SCRATCH_BYTES) // CHUNK_BYTES))
        self._progress = progress
        self._total = total
        self._ends = ends
        self._far = is_far(plan)
        self._tiles = Tiles(memory // _FOR_TILES)
        self._lock = threading.Lock()
        self._unsynced: dict[BlockKey, BlockRecord] = {}
        self._since_sync = 0
        self._done = 0
        self._at_work = 0
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._wanted_crcs = [
            {i for part in file.parts if isinstance(part, Computed) for i in part.parts} for file in plan.files
        ]
        self.records = records
        self.reads = ReadCount()
        self.resumed_bytes = 0

    def write(self, blocks: Iterable[Block]) -> None:
        """Write those of some blocks that are not there yet, with all late parts of their files if order matters.

        Raises:
            AnyckptError: a source is damaged, or the destination refuses.
        """
        wanted = list(blocks)
        due = [block for block in wanted if (block.file, block.offset) not in self.records]
        resumed = sum(block.nbytes for block in wanted) - sum(block.nbytes for block in due)
        self.resumed_bytes += resumed
        self.advance(resumed)
        if self._destination.in_order:
            numbers = dict.fromkeys(block.file for block in wanted)
            self._run_workers((self._file_job(number) for number in numbers), len(numbers))
        else:
            self._run_workers((self._gang_job(gang) for gang in gangs(self._plan.files, due, self._together)), len(due))

    def sync(self) -> None:
        """Make the blocks written so far durable and note them."""
        with self._lock:
            batch, self._unsynced = self._unsynced, {}
        if batch:
            self._destination.sync({file for file, _ in batch})
            self._destination.record(batch)

    def finish(self, numbers: Collection[int]) -> list[ManifestEntry]:
        """Write what files wait for, all of whose blocks are written; list their parts for the manifest."""
        entries: list[ManifestEntry] = []
        for number in numbers:
            entries += self._finish_file(number)
        self._destination.seal(numbers)
        return entries

    def _run_workers(self, jobs: Iterator[_Job], most: int) -> None:
        """Carry out jobs, of which there are so many at most."""
        threads = [
            threading.Thread(target=self._work, args=(jobs,), name=f"anyckpt-{i}", daemon=True)
            for i in range(min(self._workers, most))
        ]
        self._at_work = len(threads)
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
            self.sync()
            raise
        if self._failure is not None:
            if isinstance(self._failure, (OutputError, UnreachableError)):
                with suppress(OutputError):
                    self.sync()
            raise self._failure

    def _work(self, jobs: Iterator[_Job]) -> None:
        with counting(self.reads), given_up_with(self._stop):
            self._work_off(jobs)
        with self._lock:
            self._at_work -= 1

    def _ahead(self) -> int:
        """Blocks of a file that may be filled while one is written, with the memory of threads that have no file."""
        return self._workers // self._at_work - 1

    def _work_off(self, jobs: Iterator[_Job]) -> None:
        with keeping(self._tiles):
            self._take_jobs(jobs)

    def _take_jobs(self, jobs: Iterator[_Job]) -> None:
        buffers: list[BlockBuffer] = []
        while not self._stop.is_set():
            with self._lock:
                job = next(jobs, None)
            if job is None:
                return
            try:
                for key, nbytes, record in job(buffers):
                    self._note(key, nbytes, record)
                    if self._stop.is_set():
                        return
            except BaseException as error:
                with self._lock:
                    self._failure = self._failure or error
                self._stop.set()
                return

    def _note(self, key: BlockKey, nbytes: int, record: BlockRecord) -> None:
        with self._lock:
            self.records[key] = record
            self._unsynced[key] = record
            self._since_sync += nbytes
            due = self._since_sync >= _SYNC_EVERY
            if due:
                self._since_sync = 0
        if due:
            self.sync()
        self.advance(nbytes)

    def _gang_job(self, gang: Gang) -> _Job:
        return lambda buffers: self._written(gang, buffers)

    def _file_job(self, number: int) -> _Job:
        return lambda buffers: self._file_in_order(number, buffers)

    def _written(self, gang: Gang, buffers: list[BlockBuffer]) -> Iterator[_Written]:
        """Fill and write a gang's blocks; each with its record when it is written."""
        buffers += [BlockBuffer() for _ in range(len(gang.blocks) - len(buffers))]
        for one in self._filled(gang, buffers):
            yield self._put(one)

    def _filled(self, gang: Gang, buffers: Sequence[BlockBuffer]) -> list[Filling]:
        """Fill a gang's blocks, each in a buffer."""
        filling = [
            Filling(block, self._plan.files[block.file], buffer.at(block.offset, block.nbytes))
            for block, buffer in zip(gang.blocks, buffers, strict=False)
        ]
        with held(filling) if self._far else nullcontext():
            for number, shared in enumerate(gang.shared):
                if shared:
                    fill_together(filling, number)
                for one in filling:
                    one.finish_piece(number, filled=shared, wanted=self._wanted_crcs[one.block.file])
        return filling

    def _filled_alone(self, block: Block, buffer: BlockBuffer) -> Filling:
        with keeping(self._tiles):
            return self._filled(Gang((block,), (False,) * len(block.pieces)), (buffer,))[0]

    def _put(self, one: Filling) -> _Written:
        self._write_block(one.block, one.memory, one.record)
        return (one.block.file, one.block.offset), one.block.nbytes, one.record

    def _write_block(self, block: Block, memory: Bytes, record: BlockRecord) -> None:
        start, stop = self._ends(block) if self._ends is not None else (0, 0)
        end = block.nbytes - stop
        if start:
            record.edges.append((block.offset, memory[:start].tobytes()))
        if stop:
            record.edges.append((block.offset + end, memory[end:].tobytes()))
        if end > start:
            self._destination.write(block.file, block.offset + start, memory[start:end])

    def _file_in_order(self, number: int, buffers: list[BlockBuffer]) -> Iterator[_Written]:
        """Write a whole file from its start to its end, and seal it."""
        sums = PartSums()
        buffers += [] if buffers else [BlockBuffer()]
        items: list[Block | LatePart] = [*self._cut.blocks[number], *self._cut.late[number]]
        items.sort(key=lambda item: item.offset)
        due = [item for item in items if isinstance(item, Block) and (number, item.offset) not in self.records]
        with closing(filled(due, self._filled_alone, self._ahead if self._far else None)) as blocks:
            for item in items:
                known = self.records.get((number, item.offset))
                if known is not None:
                    sums.add(known)
                elif isinstance(item, Block):
                    key, nbytes, record = self._put(next(blocks))
                    sums.add(record)
                    yield key, nbytes, record
                else:
                    record = self._write_late(number, item, sums, buffers)
                    sums.add(record)
                    yield (number, item.offset), 0, record
        self.sync()
        self._destination.seal([number])

    def _finish_file(self, number: int) -> list[ManifestEntry]:
        file = self._plan.files[number]
        sums, buffers = PartSums(), [BlockBuffer()]
        for block in self._cut.blocks[number]:
            record = self.records[number, block.offset]
            sums.add(record)
            for offset, data in record.edges:
                self._write_bytes(number, offset, data, buffers)
        for item in self._cut.late[number]:
            sums.add(self.records.get((number, item.offset)) or self._write_late(number, item, sums, buffers))
        entries = []
        offset = 0
        for index, part in enumerate(file.parts):
            name, piece = (part.name, part.piece) if isinstance(part, TensorData) else ("", "")
            entries.append(ManifestEntry(name, piece, file.path, offset, part.nbytes, sums.digest(index)))
            offset += part.nbytes
        return entries

    def _write_late(self, number: int, item: LatePart, sums: PartSums, buffers: Sequence[BlockBuffer]) -> BlockRecord:
        """Write a part that waited for checksums."""
        file = self._plan.files[number]
        computed = file.parts[item.part]
        assert isinstance(computed, Computed)
        data = built(file, computed, [sums.crc32(index) for index in computed.parts])
        self._write_bytes(number, item.offset, data, buffers)
        return BlockRecord(digests=[(item.part, start, digest) for start, digest in chunk_digests(data).items()])

    def _write_bytes(self, number: int, offset: int, data: bytes, buffers: Sequence[BlockBuffer]) -> None:
        buffer = buffers[0]
        step = len(buffer.whole) // 2
        for start in range(0, len(data), step):
            part = data[start : start + step]
            memory = buffer.at(offset + start, len(part))
            memory[:] = memoryview(part)
            self._destination.write(number, offset + start, memory)

    def advance(self, nbytes: int) -> None:
        """Count bytes as done."""
        with self._lock:
            self._done += nbytes
            done = self._done
        if self._progress is not None:
            self._progress(done, self._total)


def worker_count(workers: int | None, memory: int, plan: Plan, *, waits: bool = False) -> int:
    """How many threads to use: as many as processors, up to 8, unless said; no more than ``memory`` allows.

    Where reads are waited for, they are more: while some wait, others write.  So they are if writing ``waits``.

    Raises:
        UsageError: it does not allow one, or less than one is asked for.
    """
    affordable = memory // _MEMORY_PER_WORKER
    if affordable < 1:
        raise UsageError(
            "too little memory for one thread",
            expected=f"at least {_MEMORY_PER_WORKER:,} bytes",
            found=f"{memory:,} bytes",
            remedy=f"give --memory {_MEMORY_PER_WORKER >> 20}MiB or more, or leave it out",
        )
    if workers is not None and workers < 1:
        raise UsageError("at least one worker is needed", found=workers)
    usual = _FAR_WORKERS if waits or is_far(plan) else min(8, max(2, os.cpu_count() or 2))
    return min(workers or usual, affordable)


def of_files(cut: Cut, numbers: Sequence[int]) -> Iterator[Block]:
    """The blocks of some files."""
    return (block for number in numbers for block in cut.blocks[number])
