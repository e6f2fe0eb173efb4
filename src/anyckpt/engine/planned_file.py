"""A file of a plan as a file object: its bytes are made when they are read, so that it need not be anywhere."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import field
from typing import Any

from anyckpt.blockwise import Tiles, keeping
from anyckpt.data_classes import dataclass
from anyckpt.engine.blocks import Block, LatePart
from anyckpt.engine.files import BlockBuffer, Bytes
from anyckpt.engine.filling import Filling, held
from anyckpt.engine.plan import Computed, OutputFile
from anyckpt.engine.records import BlockRecord
from anyckpt.errors import FormatError
from anyckpt.storage.read_count import ReadCount, counting

HEAD_BYTES = 512
"""So many bytes of a file are kept."""


@dataclass
class Known:
    """What is known of a file when its bytes have been made for the first time.

    Attributes:
        sha256: of what was made so far.
        head: its first bytes.
        waiting: first bytes and lengths of parts that wait for checksums.
        late: what these are, by their first byte.
        records: of its blocks, by their first byte.
    """

    waiting: dict[int, int]
    sha256: Any = field(default_factory=hashlib.sha256)
    head: bytes = b""
    late: dict[int, bytes] = field(default_factory=dict)
    records: dict[int, BlockRecord] = field(default_factory=dict)

    @staticmethod
    def of(file: OutputFile, late: Iterable[LatePart]) -> Known:
        """Of a file of which nothing is known yet, and its parts that wait."""
        return Known({part.offset: file.parts[part.part].nbytes for part in late})

    def take(self, offset: int, data: bytes) -> None:
        """Take in what is made, from its start to its end."""
        self.sha256.update(data)
        if offset < HEAD_BYTES:
            self.head += data[: HEAD_BYTES - offset]
        for start, nbytes in self.waiting.items():
            if start <= offset < start + nbytes:
                self.late[start] = self.late.get(start, b"") + data


class PlannedFile(io.BufferedIOBase):
    """A file of a plan, which can be read from any byte on, and as often as somebody wants to.

    Args:
        file: of the plan.
        blocks: that it is cut into.
        known: from when its bytes were made for the first time; what comes out otherwise is an error.
        tiles: keeps what is computed for several outputs.
        is_far: whether sources of it are.
        advance: told of bytes that were read for the first time.
        reads: counts what is read of sources.
    """

    def __init__(
        self,
        file: OutputFile,
        blocks: Collection[Block],
        known: Known,
        tiles: Tiles,
        *,
        is_far: bool,
        advance: Callable[[int], None],
        reads: ReadCount,
    ) -> None:
        self._file = file
        self._blocks = {block.offset: block for block in blocks}
        self._known = known
        self._starts = sorted((*self._blocks, *known.late))
        self._tiles = tiles
        self._is_far = is_far
        self._advance = advance
        self._reads = reads
        self._crcs = {i for part in file.parts if isinstance(part, Computed) for i in part.parts}
        self._buffer: BlockBuffer | None = None
        self._start = 0
        self._data = memoryview(b"")
        self._position = 0
        self._reached = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.nbytes}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Bytes from where it stands: as many as asked for, or as are left."""
        left = max(0, self._file.nbytes - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = bytearray()
        while len(data) < wanted:
            self._find(self._position)
            begin = self._position - self._start
            taken = self._data[begin : begin + wanted - len(data)]
            data += taken
            self._position += len(taken)
        new = max(0, self._position - self._reached)
        self._reached += new
        self._advance(new)
        return bytes(data)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read1(self, size: int = -1) -> bytes:
        return self.read(size)

    def _find(self, position: int) -> None:
        """Have the block or part at hand that holds a byte of the file."""
        if self._start <= position < self._start + len(self._data):
            return
        low, high = 0, len(self._starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._starts[middle] <= position else (low, middle)
        self._start = self._starts[low]
        if self._start in self._known.late:
            self._data = memoryview(self._known.late[self._start])
        else:
            self._data = memoryview(self._filled(self._blocks[self._start]).data)

    def _filled(self, block: Block) -> Bytes:
        self._data = memoryview(b"")
        self._buffer = self._buffer or BlockBuffer()
        filling = Filling(block, self._file, self._buffer.at(block.offset, block.nbytes))
        with counting(self._reads), keeping(self._tiles), held([filling]) if self._is_far else nullcontext():
            for number in range(len(block.pieces)):
                filling.finish_piece(number, filled=False, wanted=self._crcs)
        known = self._known.records.get(block.offset)
        if known is not None and known.digests != filling.record.digests:
            raise FormatError(
                f"bytes {block.offset:,} to {block.offset + block.nbytes:,} of the output came out otherwise when they "
                "were made again: a source changed meanwhile",
                path=self._file.path,
                remedy="run it again when nothing writes to the source",
            )
        return filling.memory
