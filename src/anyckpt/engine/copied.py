"""Copying what a plan reads of live state into shared memory, and the plan with it, for another process to carry out.

State changes as soon as training goes on, so nothing else of saving has to happen before that.  What is copied are the
bytes that the plan reads and that this process supplies, each once, however many tensors share them.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyckpt.engine.plan import Plan, SourceData, TensorData
from anyckpt.storage.owned import OwnedSource
from anyckpt.storage.requests import coalesced
from anyckpt.storage.shared_memory import CopiedSource, SharedMemory
from anyckpt.storage.source import ByteSource

Piece = tuple[ByteSource, int, memoryview]
"""A source, the first byte that is copied of it, and where the bytes go."""

Copy = Callable[[Sequence[Piece]], None]
"""Copies pieces; when it returns, all are there."""

_ALIGNMENT = 64


class Copies:
    """What of a plan has to be copied, and where it goes.

    Args:
        plan: what will be written.
        share: the number of the share that this process supplies; None if it is the only one.

    Attributes:
        nbytes: bytes of live state.
    """

    def __init__(self, plan: Plan, share: int | None) -> None:
        self._share = share
        self._parts = _read_by(plan)
        ranges: dict[int, tuple[ByteSource, list[tuple[int, int]]]] = {}
        for source, start, length in _wanted(plan, share):
            if length and source.is_live:
                ranges.setdefault(id(source), (source, []))[1].append((start, length))
        self._runs: dict[int, tuple[tuple[int, int, int], ...]] = {}
        self._sources: list[ByteSource] = []
        position = 0
        for key, (source, found) in ranges.items():
            runs = []
            for request in coalesced(found, gap=0, most=sys.maxsize):
                runs.append((request.start, request.stop, position))
                position += -(-(request.stop - request.start) // _ALIGNMENT) * _ALIGNMENT
            self._runs[key] = tuple(runs)
            self._sources.append(source)
        self.nbytes = position

    def are_of(self, plan: Plan, share: int | None) -> bool:
        """Whether another plan reads the very same things, whatever else it writes."""
        return share == self._share and _read_by(plan) == self._parts

    def pickled(self, plan: Plan, number: int) -> bytes:
        """The plan, with what was copied in the place of live state, for whoever receives the memory ``number``."""
        stream = io.BytesIO()
        pickler = pickle.Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)

        def of_live(source: ByteSource) -> Any:
            runs = self._runs.get(id(source))
            if runs is None:
                return source.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            return CopiedSource, (number, runs, source.size, source.name)

        def of_owned(source: OwnedSource) -> Any:
            return source.sent_to(self._share)

        kinds: dict[type, Callable[[Any], Any]] = {type(source): of_live for source in self._sources}
        pickler.dispatch_table = {**copyreg.dispatch_table, **kinds, OwnedSource: of_owned}
        pickler.dump(plan)
        return stream.getvalue()

    def pieces(self, memory: memoryview) -> list[Piece]:
        """All that has to be copied, into memory of at least ``nbytes``; each piece goes to a multiple of 64."""
        return [
            (source, start, memory[where : where + stop - start])
            for source in self._sources
            for start, stop, where in self._runs[id(source)]
        ]


def read(pieces: Sequence[Piece]) -> None:
    """The plainest ``Copy``."""
    for source, start, memory in pieces:
        source.read_into(start, memory)


def put(
    plan: Plan,
    share: int | None,
    memory: SharedMemory,
    number: int,
    copy: Copy = read,
    kept: list[Copies] | None = None,
) -> tuple[int, int]:
    """Copy live state and plan into shared memory.

    Args:
        plan: what will be written.
        share: as for ``Copies``.
        memory: for all of it.
        number: of the memory.
        copy: copies live state.
        kept: what was found out for an earlier plan, which is used again where it does, and else exchanged.

    Returns:
        where the plan lies in it: first byte and length.

    Raises:
        OutputError: there is not enough memory.
        FormatError: a source turns out to be damaged.
    """
    copies = kept[0] if kept and kept[0].are_of(plan, share) else Copies(plan, share)
    if kept is not None:
        kept[:] = [copies]
    data = copies.pickled(plan, number)
    view = memory.reserve(copies.nbytes + len(data))
    copy(copies.pieces(view))
    view[copies.nbytes : copies.nbytes + len(data)] = data
    return copies.nbytes, len(data)


def _read_by(plan: Plan) -> list[SourceData | TensorData]:
    """The parts of a plan that read something."""
    return [part for file in plan.files for part in file.parts if isinstance(part, (SourceData, TensorData))]


def _wanted(plan: Plan, share: int | None) -> Iterator[tuple[ByteSource, int, int]]:
    for file in plan.files:
        for part in file.parts:
            if isinstance(part, SourceData):
                if _is_supplied(part.source, share):
                    yield from part.source.wanted(0, part.source.size)
            elif isinstance(part, TensorData):
                for piece in part.tensor.pieces():
                    if _is_supplied(piece.source, share):
                        yield from piece.source.wanted(piece.offset, piece.stored_bytes())


def _is_supplied(source: ByteSource, share: int | None) -> bool:
    return share is None or source.owner() in (None, share)
