"""Of which bytes of files a digest or a checksum tells whether they are what they should be."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable
from dataclasses import field

from anyckpt.data_classes import dataclass
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor, Stored


@dataclass
class _Runs:
    """Runs of bytes, by what holds them, and the sizes of members of archives by where these begin."""

    runs: dict[Hashable, list[tuple[int, int]]] = field(default_factory=dict)
    members: dict[Hashable, set[int]] = field(default_factory=dict)

    def add(self, source: ByteSource) -> None:
        where, start = source.place()
        self.runs.setdefault(where, []).append((start, start + source.size))
        if isinstance(where, tuple):
            self.members.setdefault(where[:2], set()).add(source.size)

    def sorted(self) -> _Runs:
        return _Runs({where: sorted(own) for where, own in self.runs.items()}, self.members)

    def has(self, piece: Stored) -> bool:
        """Whether a piece is in a run, as far as that is known without reading anything.

        Runs are of whole files or of whole members of archives, so that where a piece begins is enough.  In an archive
        of one tensor, which is all that a chunk of a distributed checkpoint says of itself, its member is the one of
        its size.
        """
        where, start = piece.source.place()
        start += piece.offset
        while True:
            own = self.runs.get(where, [])
            found = bisect_right(own, (start, 1 << 62)) - 1
            if found >= 0 and own[found][0] <= start < own[found][1]:
                return True
            if not (isinstance(where, tuple) and len(where) == 3):
                return False
            if piece.source.size in self.members.get(where[:2], ()) and not isinstance(where[2], int):
                return True
            where, start = where[0], where[1] + (where[2] if isinstance(where[2], int) else 0)


@dataclass
class Proof:
    """What digests and checksums tell of bytes."""

    _right: _Runs = field(default_factory=_Runs)
    _wrong: _Runs = field(default_factory=_Runs)

    def add(self, source: ByteSource, *, holds: bool) -> None:
        """A digest of all of a source agrees with it or does not."""
        (self._right if holds else self._wrong).add(source)

    def told(self, tensors: Iterable[LazyTensor]) -> tuple[int, int]:
        """How many tensors are proved, all pieces being right and none wrong, and how many have one of no digest."""
        right, wrong = self._right.sorted(), self._wrong.sorted()
        proved = unknown = 0
        for tensor in tensors:
            states = {(right.has(piece), wrong.has(piece)) for piece in tensor.pieces()}
            proved += states <= {(True, False)}
            unknown += (False, False) in states
        return proved, unknown
