"""That nothing of a source is lost without a word, whatever an operation did to it: checked against the plan itself."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.plan import Plan, SourceData
from anyckpt.errors import UsageError
from anyckpt.operations.steps.extra_states import is_kept
from anyckpt.operations.steps.file_sizes import above_limit
from anyckpt.operations.steps.pipeline import Pipeline
from anyckpt.tensor import LazyTensor, Stored

_LOST = "nothing of it is in the output"
_SHOWN = 3


def accounted(
    plan: Plan, source: Checkpoint, steps: Pipeline, made_of: Sequence[Checkpoint], max_shard_size: int | None
) -> Plan:
    """A plan that says of everything what became of it.

    Args:
        plan: as the target's format has laid it out.
        source: what got other names, of which everything is written or told.
        steps: what the steps have told.
        made_of: every checkpoint that the output is made of, opened as a whole.
        max_shard_size: bytes of a file that were asked for, or None.
    """
    ignored = {**source.ignored, **steps.ignored, **_unused_files(source, plan), **plan.ignored}
    notes = (*source.warnings, *steps.notes, *plan.notes)
    plan = replace(plan, ignored=ignored, casts=dict(steps.casts), notes=notes)
    ignored |= steps.without_moved(unaccounted(made_of, plan))
    plan = replace(plan, ignored=ignored)
    more = (*forms_not_kept(made_of, plan), *([] if max_shard_size is None else above_limit(plan, max_shard_size)))
    if source.extra_states is not None:
        ignored = {name: reason for name, reason in ignored.items() if not is_kept(name)}
    return replace(plan, ignored=ignored, notes=(*plan.notes, *more))


def _unused_files(checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Artifacts and tokenizer files that no part of the plan copies."""
    files = {**checkpoint.artifacts, **(checkpoint.tokenizer.files if checkpoint.tokenizer is not None else {})}
    used = {id(part.source) for file in plan.files for part in file.parts if isinstance(part, SourceData)}
    return {
        name: f"a {plan.format} checkpoint has no place for it"
        for name, source in files.items()
        if id(source) not in used and name not in plan.carried
    }


def unaccounted(sources: Iterable[Checkpoint], plan: Plan) -> dict[str, str]:
    """Tensors of sources of which no byte is in a plan's files and that its ``ignored`` does not name, with a reason.

    What the plan has under a source's name takes that tensor's place, as an adapter's whole tensors do.  An operation
    says itself what it leaves out.  This is for what it does not know that it has lost, and looks at nothing but where
    bytes come from.

    Args:
        sources: every checkpoint that the output is made of, opened as a whole.
        plan: of the output, with what is ignored.
    """
    written = {id(part.tensor) for part in plan.tensors()}
    told = plan.ignored.keys() | {part.name for part in plan.tensors()}
    open_ends = [
        (name, tensor)
        for source in sources
        for name, tensor in source.tensors.items()
        if id(tensor) not in written and name not in told and name.removeprefix(source.model_prefix) not in told
    ]
    begun = {_start(piece) for part in plan.tensors() for piece in part.tensor.pieces() if piece.size}
    open_ends = [(name, tensor) for name, tensor in open_ends if not any(_start(p) in begun for p in tensor.pieces())]
    if not open_ends:
        return {}
    used = _Used(part.tensor for part in plan.tensors())
    return {name: _LOST for name, tensor in open_ends if not used.any_of(tensor)}


def _start(piece: Stored) -> tuple[Hashable, int]:
    """Where a piece begins: enough for most, which are used from their first byte on."""
    where, offset = piece.source.place()
    return where, offset + piece.offset


class _Used:
    """The bytes of sources that tensors are made of.

    Args:
        tensors: they.
    """

    def __init__(self, tensors: Iterable[LazyTensor]) -> None:
        found: dict[Any, list[tuple[int, int]]] = {}
        for tensor in tensors:
            for where, start, stop in _runs(tensor):
                found.setdefault(where, []).append((start, stop))
        self._runs = {where: _joined(sorted(runs)) for where, runs in found.items()}

    def any_of(self, tensor: LazyTensor) -> bool:
        """Whether any byte of a tensor is among them; true of a tensor that has none."""
        empty = True
        for where, start, stop in _runs(tensor):
            empty = False
            runs = self._runs.get(where, [])
            place = bisect_right(runs, (stop - 1, stop)) - 1
            if place >= 0 and runs[place][1] > start:
                return True
        return empty


def _runs(tensor: LazyTensor) -> Iterator[tuple[Any, int, int]]:
    for piece in tensor.pieces():
        size = piece.stored_bytes()
        if size:
            where, offset = piece.source.place()
            yield where, offset + piece.offset, offset + piece.offset + size


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted runs without overlaps."""
    result: list[tuple[int, int]] = []
    for start, stop in runs:
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def forms_not_kept(sources: Iterable[Checkpoint], plan: Plan) -> tuple[str, ...]:
    """A note of what sources say of the tensors that are written and the output does not; nothing if there is none.

    A format's plan says in ``formed`` what it gives back; all else is told, whatever the format.

    Args:
        sources: every checkpoint that the output is made of, opened as a whole.
        plan: of the output, with all that is ignored.
    """
    lost: dict[str, dict[str, None]] = {}
    for source in sources:
        said = source.forms.particulars() if source.forms is not None else {}
        left = [name for name in said if name not in plan.formed and name not in plan.ignored]
        if source.forms is None or not left:
            continue
        prefix, told = source.model_prefix, plan.ignored.keys()
        written = {name for name in source.tensors if not {name, name.removeprefix(prefix)} & told}
        for name in left:
            if name in written or (name not in source.tensors and source.forms.holds(name, written)):
                for kind, _ in said[name]:
                    lost.setdefault(kind, {})[name] = None
    if not lost:
        return ()
    listed = (f"{kind} of {', '.join(list(names)[:_SHOWN])}{_more(names)}" for kind, names in lost.items())
    return (f"the output has the same elements, and not all that the source says of its objects: {'; '.join(listed)}",)


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def names_alone(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether there are weights without elements, of which a container may hold the name and no bytes."""
    weights = checkpoint.weights()
    return any(not weights[name].nbytes for name in weights.keys() - plan.ignored.keys())


def nothing_to_write(checkpoint: Checkpoint) -> UsageError:
    """What to say of a source whose output would hold no weights."""
    state = [*checkpoint.tensors, *checkpoint.objects]
    names = ", ".join(state[:_SHOWN]) + _more(state)
    tensors, objects = len(checkpoint.tensors), len(checkpoint.objects)
    held = f"{tensors} tensors of training state and {objects} objects: {names}" if state else "nothing at all"
    return UsageError(
        "holds no weights, and the output would be empty",
        path=checkpoint.path,
        expected="tensors of a model",
        found=held,
        remedy="--optimizer keep carries such state where the target can hold it" if state else None,
    )
