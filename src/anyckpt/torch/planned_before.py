"""The plan of an earlier save, which does for the next one if its state is the same but for contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from itertools import chain
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.copied import Copies
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.engine.shared_run import SharedRun
from anyckpt.indexing import Shape
from anyckpt.operations.steps.writing import NOTHING_SAID, destination_at
from anyckpt.storage.place import scheme_of
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.integrity import RankRecord
from anyckpt.torch.laid_out import Laid
from anyckpt.torch.live import LivePiece, LiveState
from anyckpt.torch.objects import Frozen
from anyckpt.torch.options import Options
from anyckpt.torch.settling import settled
from anyckpt.torch.whole import LiveSource

Nesting = tuple[list[Any], ...]


def nesting_of(live: LiveState) -> Nesting:
    """Names, the keys that lead to them and these keys' types, in order, and which of the names are objects'."""
    paths = list(live.paths.values())
    return list(live.paths), paths, list(map(type, chain.from_iterable(paths))), [one.name for one in live.objects]


def boxes_of(pieces: Sequence[LivePiece]) -> list[tuple[Any, ...]]:
    """What a plan depends on of each piece: all but its elements."""
    return [(one.name, one.dtype, one.offset, one.shape, one.tensor.shape) for one in pieces]


@dataclass(frozen=True)
class Earlier:
    """A save that was planned, whose plan does for the next one if nothing has another length."""

    laid: Laid
    plan: Plan
    only_objects: Plan
    settled: bool
    run: SharedRun
    boxes: list[tuple[Any, ...]]
    reads: tuple[Reads, ...]
    nesting: Nesting
    copies: list[Copies] = field(default_factory=list)

    def is_of(self, live: LiveState) -> bool:
        """Whether a rank has boxes of the same tensors, in a state of the same names that is nested alike."""
        return boxes_of(live.pieces) == self.boxes and nesting_of(live) == self.nesting

    def plan_of(self, objects: Mapping[str, Frozen]) -> Plan | None:
        """The plan with other objects; None if they take another size."""
        return _with_objects(self.plan, self.only_objects, self.laid.plan({}, objects))

    def again(
        self, plan: Plan, pieces: Sequence[LivePiece], path: str, key: str, ranks: Ranks
    ) -> tuple[Plan, SharedRun]:
        """The same with other contents."""
        for piece, reads in zip(pieces, self.reads, strict=True):
            for start, source in reads:
                if start is None:
                    source.follow(piece.tensor)
                else:
                    source.follow(piece.part(start, source.shape))
        ready = settled(plan, ranks, key) if self.settled else plan
        overwrite = self.laid.options.overwrite
        place = destination_at(path, overwrite=overwrite, said=NOTHING_SAID)
        return ready, self.run.renewed(ready, place, key, overwrite=overwrite)


Reads = tuple[tuple[Shape | None, LiveSource], ...]
"""What is read of a piece, by where that begins in the whole tensor; None if it is all of the piece."""


def pieces_read(pieces: Sequence[LivePiece], sources: Mapping[tuple[str, Shape], LiveSource]) -> tuple[Reads, ...]:
    """What is read of each piece.

    Args:
        pieces: of a rank.
        sources: by tensor's name and first index.
    """
    by_name: dict[str, list[tuple[Shape, LiveSource]]] = {}
    for (name, start), source in sources.items():
        by_name.setdefault(name, []).append((start, source))
    return tuple(
        tuple(
            (None if source.shape == piece.tensor.shape else start, source)
            for start, source in by_name.get(piece.name, ())
            if piece.holds(start, source.shape)
        )
        for piece in pieces
    )


Plans = dict[Any, Earlier]
"""Plans of earlier saves, by what they were asked for; they hold the tensors that they were made for."""

PLANNED: Plans = {}


def kind_of(options: Options, ranks: Ranks, path: str) -> Any:
    """What a plan is kept by."""
    return ranks.group, ranks.size, options.format, options.parallel_save, options.max_shard_size, scheme_of(path)


def objects_of(records: list[RankRecord]) -> dict[str, Frozen]:
    """The objects of all ranks, each once."""
    found: dict[str, Frozen] = {}
    for record in records:
        for name, one in record.objects.items():
            if one.value is not None:
                found.setdefault(name, one.value)
    return found


def _with_objects(plan: Plan, old: Plan, new: Plan) -> Plan | None:
    """A plan with other objects; None if it has to be made anew.

    That is so if their lengths differ, and in formats in which objects are not at the start of their files or in files
    of their own, laid out as if there were nothing else.

    Args:
        plan: of tensors and objects.
        old: of the objects alone.
        new: of the other objects alone.
    """
    before = {file.path: file.parts for file in old.files if file.stage == 0}
    after = {file.path: file.parts for file in new.files if file.stage == 0}
    if before.keys() != after.keys():
        return None
    files = []
    for file in plan.files:
        parts = after.get(file.path, ())
        if file.stage or parts == before.get(file.path, ()):
            files.append(file)
        elif file.parts[: len(before[file.path])] != before[file.path]:
            return None
        elif [part.nbytes for part in parts] == [part.nbytes for part in before[file.path]]:
            files.append(OutputFile(file.path, (*parts, *file.parts[len(parts) :]), file.stage))
        else:
            return None
    return replace(plan, files=tuple(files))
