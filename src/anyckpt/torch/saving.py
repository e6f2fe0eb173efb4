"""Saving live state: every rank describes what it has, all make one plan, and each writes its share.

``prepare`` is collective and gives the plan and what this rank reads for it; ``write`` carries it out, and the last
step, giving the output its name, is taken by rank 0 when every rank has written.  Whatever fails on one rank fails on
all, and leaves nothing.
"""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.copied import Copies
from anyckpt.engine.destination import Share
from anyckpt.engine.execute import Report
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.engine.shared_run import SharedRun
from anyckpt.errors import OutputError, UsageError
from anyckpt.formats.lightning.keys import META
from anyckpt.formats.megatron_core.location import COMMIT
from anyckpt.indexing import Shape
from anyckpt.operations.steps.destination import check_destination
from anyckpt.operations.steps.unfinished import clear, discard, is_finished
from anyckpt.operations.steps.writing import NOTHING_SAID, OBJECT_STORES, destination_at
from anyckpt.storage.place import scheme_of
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.describing import described
from anyckpt.torch.integrity import RankRecord, record_of, survey
from anyckpt.torch.laid_out import Laid
from anyckpt.torch.live import LiveState
from anyckpt.torch.options import WHOLE, Options, check_agreed
from anyckpt.torch.planned_before import PLANNED, Earlier, Plans, boxes_of, kind_of, nesting_of, objects_of, pieces_read
from anyckpt.torch.settling import settled
from anyckpt.torch.whole import LiveSource, shared_out, whole_of

if TYPE_CHECKING:
    from anyckpt.torch.async_saving import SaveHandle

_AFTERWARDS = (COMMIT, META)
"""Files that Megatron-Core and Lightning put into a directory that a strategy of ours wrote."""

_AGREED = (
    "format",
    "parallel_save",
    "parallel_optimizer",
    "reshardable_optimizer",
    "save_optimizer",
    "asynchronous",
    "assume_constant_structure",
    "overwrite",
    "max_shard_size",
)
"""Options that ranks must have alike; with others they would write different checkpoints, or wait for one another."""


@dataclass(frozen=True)
class SaveReport:
    """What a save did, as one rank sees it.

    Attributes:
        path: the checkpoint.
        format: its format.
        bytes_total: of the whole checkpoint.
        bytes_written: of this rank's share.
        planned: the save was planned; False if the plan of an earlier one did.
        planning_seconds: from the records of all ranks to the plan.
        seconds: the whole save.
        ignored: names that the format has no place for, with the reason.
        notes: what a user should know about the output.
        handle: of a save that is under way (``Options.asynchronous``), of which nothing is known to be written; None
            of one that is done.
    """

    path: str
    format: str
    bytes_total: int
    bytes_written: int
    planned: bool
    planning_seconds: float
    seconds: float
    ignored: Mapping[str, str]
    notes: tuple[str, ...]
    handle: SaveHandle | None = None


@dataclass(frozen=True)
class Prepared:
    """A save that is planned, and not yet begun.

    Attributes:
        plan: the same on all ranks; this rank's bytes are read from ``sources``.
        run: carries it out.
        sources: the live tensors that this rank writes, by tensor's name and first index; ``bind`` gives one another
            memory (a staged copy) to read from.
        key: names this save among all others.
        planning_seconds: what planning took.
        planned: False if the plan of an earlier save did.
        copies: what of its sources has to be copied for another process, kept as long as the plan.
    """

    plan: Plan
    run: SharedRun
    sources: dict[tuple[str, Shape], LiveSource]
    key: str
    planning_seconds: float
    planned: bool = True
    copies: list[Copies] | None = None


def save(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    options: Options | None = None,
    *,
    group: Any = None,
    **settings: Any,
) -> SaveReport:
    """Write a nested state dict of live tensors and objects as one checkpoint; every rank calls it.

    Tensors may be plain (alike on all ranks that have them), DTensors of any mesh, or ShardedTensors.  What has
    ``state_dict`` and ``load_state_dict`` is taken by these.  The checkpoint appears when it is whole, or not at all.

    Args:
        state: what this rank has; must not change until the call returns.
        path: the checkpoint, which every rank reaches: on a disk, or in an object store (``s3://``, ``gs://``,
            ``az://``), where each file must be one rank's (``dcp``, ``megatron-core``) and nothing is replaced.
        options: see ``Options``; its fields may be given as keywords instead.
        group: the ranks that save together; all if None.

    Raises:
        MappingError: ranks do not agree, or elements are missing or there twice; every rank raises it.
        OutputError: the destination exists, or some rank cannot write; every rank raises it, and nothing is left.
        RankError: another rank failed otherwise, or did not come.
        UsageError: the state or an option is not possible.
    """
    started = time.monotonic()
    chosen = asked(options, settings)
    ranks = Ranks(group, timeout=chosen.timeout)
    prepared = prepare(lambda: described(state, chosen), path, chosen, ranks)
    plan = prepared.plan
    if chosen.asynchronous:
        from anyckpt.torch.async_saving import begun

        handle = begun(prepared, path, chosen, ranks)
        return SaveReport(
            handle.path,
            plan.format,
            plan.nbytes,
            0,
            prepared.planned,
            prepared.planning_seconds,
            time.monotonic() - started,
            plan.ignored,
            plan.notes,
            handle,
        )
    written, report = write(prepared, path, ranks)
    return SaveReport(
        report.output,
        report.format,
        report.bytes_written,
        written,
        prepared.planned,
        prepared.planning_seconds,
        time.monotonic() - started,
        plan.ignored,
        plan.notes,
    )


def asked(options: Options | None, settings: Mapping[str, Any]) -> Options:
    """The options as given, with what is given by name."""
    try:
        return replace(options or Options(), **settings)
    except TypeError:
        unknown = sorted(set(settings) - set(Options.__dataclass_fields__))
        raise UsageError(
            f"unknown option {', '.join(map(repr, unknown))}",
            expected=f"one of {', '.join(Options.__dataclass_fields__)}",
        ) from None


def prepare(
    describe: Any,
    path: str | os.PathLike[str],
    options: Options,
    ranks: Ranks,
    plans: Plans | None = None,
    *,
    beside: Callable[[str], Sequence[OutputFile]] | None = None,
) -> Prepared:
    """Plan a save together.

    Args:
        describe: gives what this rank has, a ``LiveState``; called once.
        path: the checkpoint.
        options: the same on all ranks.
        ranks: who saves.
        plans: of earlier saves with ``assume_constant_structure``; those of this process if None.
        beside: gives more files of the checkpoint, alike on all ranks, by the key of the save; collective.  Such a save
            is planned anew.

    Raises:
        AnyckptError: as ``save``.
    """
    destination = os.fspath(path)
    kept: list[LiveState] = []
    plans = PLANNED if plans is None else plans
    constant = options.assume_constant_structure and beside is None
    earlier = plans.get(kind_of(options, ranks, destination)) if constant else None

    def look() -> _Look:
        if ranks.rank == 0:
            _check_reachable(destination, options.format, ranks.size)
            check_destination(destination, (), overwrite=options.overwrite, known=_AFTERWARDS, anywhere=True)
            clear(destination, overwrite=options.overwrite)
        with _no_collecting():
            kept.append(describe())
        if not options.save_optimizer:
            kept[0].leave_out_optimizer()
        known = earlier is not None and earlier.laid.options == options and earlier.is_of(kept[0])
        told = LiveState(objects=kept[0].objects) if known else kept[0]
        record = record_of(told, check_objects=options.check_objects and not known)
        return _Look(
            uuid.uuid4().hex, record, _members(options, ranks), known, options.to_agree_on(_AGREED, destination)
        )

    found = ranks.gather(look, "to plan a save")
    check_agreed([one.asked for one in found])
    live, key = kept[0], found[0].key
    records = [one.record for one in found]
    started = time.monotonic()
    if any(one.known for one in found):
        same = earlier is not None and all(one.known for one in found)
        again = earlier.plan_of(objects_of(records)) if same and earlier is not None else None  # alike on all ranks
        if again is not None and earlier is not None:
            ready, run = earlier.again(again, live.pieces, destination, key, ranks)
            seconds = time.monotonic() - started
            return Prepared(ready, run, earlier.laid.sources, key, seconds, planned=False, copies=earlier.copies)
        plans.pop(kind_of(options, ranks, destination), None)
        return prepare(lambda: live, path, options, ranks, plans)
    groups = tuple({frozenset(one.members) for one in found if one.members})

    def lay_out() -> tuple[Laid, Plan]:
        everything = survey(records)
        alone = None if options.parallel_optimizer else everything.is_of_optimizer
        share = shared_out(everything, parallel=options.parallel_save, together=groups, alone=alone)
        whole = whole_of(everything, share, live, ranks.rank, key)
        laid = Laid(options, whole.boxes, dict(everything.paths), whole.sources)
        return laid, laid.plan(whole.tensors, everything.objects)

    with _no_collecting():
        laid, plan = ranks.together(lay_out)
        if beside is not None:
            plan = replace(plan, files=(*plan.files, *beside(key)))
        ready = settled(plan, ranks, key)
        run = ranks.together(
            lambda: SharedRun(
                ready,
                destination_at(destination, overwrite=options.overwrite, said=NOTHING_SAID),
                ranks.size,
                overwrite=options.overwrite,
                workers=options.workers,
            )
        )
    if constant:
        only_objects = laid.plan({}, objects_of(records))
        plans[kind_of(options, ranks, destination)] = Earlier(
            laid,
            plan,
            only_objects,
            ready is not plan,
            run,
            boxes_of(live.pieces),
            pieces_read(live.pieces, laid.sources),
            nesting_of(live),
        )
    return Prepared(ready, run, laid.sources, key, time.monotonic() - started)


def _check_reachable(destination: str, format: str, ranks: int) -> None:
    """Raise unless ranks can write a format to where the destination is."""
    scheme = scheme_of(destination)
    if scheme in OBJECT_STORES and ranks > 1 and format in WHOLE:
        raise UsageError(
            f"{format} has files with bytes of several ranks, of which an object store takes each from one only",
            path=destination,
            expected="dcp or megatron-core, whose files are one rank's each",
            remedy="save dcp there and convert it, or save to a disk",
        )
    if scheme in OBJECT_STORES and is_finished(destination):
        raise OutputError(
            "already exists, and ranks that save together replace nothing in an object store",
            path=destination,
            remedy="choose another path, or remove it first",
        )
    if scheme is not None and scheme not in OBJECT_STORES:
        raise UsageError(
            "is no place to which ranks write together",
            path=destination,
            expected="a path on a disk, or s3://, gs:// or az://",
            remedy="save to a disk, and convert what was saved to there",
        )


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Let Python not look for garbage meanwhile: thousands of parts of a plan are none, and it looks at all, often."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def write(prepared: Prepared, path: str | os.PathLike[str], ranks: Ranks) -> tuple[int, Report]:
    """Carry out a save; the bytes that this rank wrote, and what was done in all.

    Raises:
        AnyckptError: as ``save``; nothing is left then.
    """
    run = prepared.run
    try:
        own = ranks.together(lambda: run.write(Share(ranks.rank + 1, ranks.size)), "to the end of writing")
        report = ranks.broadcast(run.finish, what="to the end of a save")
    except BaseException:
        if ranks.rank == 0:
            discard(os.fspath(path))
        raise
    return own.bytes_written, report


@dataclass(frozen=True)
class _Look:
    """What a rank tells the others before a save.

    Attributes:
        key: would name the save if this were rank 0.
        record: what it has; of tensors nothing if it is as it was.
        members: the ranks that it shares copies with, none if these are all.
        known: everything is as it was at the earlier save.
        asked: what all ranks must be asked for alike.
    """

    key: str
    record: RankRecord
    members: tuple[int, ...]
    known: bool
    asked: Mapping[str, Any]


def _members(options: Options, ranks: Ranks) -> tuple[int, ...]:
    """The ranks that share copies with this one, by their numbers among those that save."""
    if options.within is None or ranks.size == 1:
        return ()
    return ranks.numbers_of(options.within)
