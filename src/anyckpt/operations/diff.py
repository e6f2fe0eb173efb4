"""Comparing two checkpoints by value, whatever their formats and layouts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, field, replace
from functools import partial
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, LastingError, UsageError, few
from anyckpt.operations.difference import Difference, TensorDifference
from anyckpt.operations.steps.adapter_names import adapter_names
from anyckpt.operations.steps.common_names import CommonNames, common_names
from anyckpt.operations.steps.compare import compare
from anyckpt.operations.steps.compare_objects import compare_objects
from anyckpt.operations.steps.configurations import Setting, Settings, compare_configurations
from anyckpt.operations.steps.globs import as_patterns, matching
from anyckpt.operations.steps.joining import check_whole, open_checkpoint
from anyckpt.operations.steps.looking import Asked, Looking, Unit, looking
from anyckpt.operations.steps.movement import Movement, Sums
from anyckpt.operations.steps.threads import Advance, Meter, Progress, each_of_tensors
from anyckpt.operations.steps.tolerances import Tolerances
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

_BLOCK = 1 << 20


def diff(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    *,
    rtol: float | Mapping[str, float] = 0.0,
    atol: float | Mapping[str, float] = 0.0,
    tensors: str | Sequence[str] | None = None,
    statistics: bool = False,
    raw: bool = False,
    weights_only: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    share: str | None = None,
    wait: float | None = None,
    records: str | os.PathLike[str] | None = None,
    engine: str | None = None,
) -> Difference:
    """Compare two checkpoints: every weight, what the configurations say, and the training state.

    Weights meet under their Megatron-Core names where the model family of both is known, so formats, shards, fused
    tensors and the padding of the vocabulary do not matter; else under their stored names.  Parts of a larger model
    that no rule knows meet under their own.  Configurations are compared by what they mean where that is known.
    Optimizers' state meets by parameter, whatever form it is kept in (``optimizer.exp_avg.<weight's name>``), and what
    only one of the two has is a difference.

    Args:
        a: a path, or a checkpoint that is open.
        b: another.
        rtol: relative tolerance: ``|a - b| <= atol + rtol * |b|`` is equal.  With both zero only the same type and
            the same bits are; with a tolerance types may differ and NaN equals NaN.  One number, or one for each
            element type (``{"bfloat16": 1e-2, "float32": 1e-6}``; ``""`` for all others): of tensors of two types,
            the larger one.
        atol: absolute tolerance, likewise.
        tensors: glob or globs of the names that are compared; all that is no tensor is left aside then.
        statistics: tell how far each tensor moved, those that are equal too (``Difference.movements``).
        raw: compare all tensors and objects under their stored names, the configuration's keys as they are, and the
            bytes of files of one name.
        weights_only: leave aside configurations and training state.
        workers: threads; as many as processors, up to 4, if None.
        progress: called with (bytes done, bytes to do) of the second checkpoint, from any thread.
        share: ``I/N``: compare the I-th of N parts, as many processes do; one of them returns the whole, for the others
            ``part`` says what they did.  ``auto``: which one ``torchrun``, ``srun`` or ``mpirun`` says.
        wait: with ``share``: the first one waits for the others, until nothing was seen of them for so many seconds,
            and returns the whole; 600 with ``auto``.  Otherwise the last one does.
        records: with ``share``: a folder that all processes see, in which they find one another.
        engine: ``ray``: the nodes of a Ray cluster, which see what is read under the same paths, read it.

    Raises:
        FormatError: a checkpoint is damaged.
        MappingError: one is a part of a model, and ``raw`` is not asked for.
        OutputError: with ``share``, records of other work are in the folder, or other shares do not come.
        UsageError: a tolerance is negative or of no element type, a glob matches nothing, or no tensor of the one has
            a name that the other has.
    """
    tolerances = Tolerances.of(rtol, atol)
    globs = as_patterns(tensors)
    options = {"tolerances": tolerances, "tensors": globs, "statistics": statistics, "raw": raw}
    options["weights_only"] = weights_only
    paths = [side.path if isinstance(side, Checkpoint) else side for side in (a, b)]
    with looking("diff", paths, options, Asked(share, wait, records, engine, workers), progress) as work:
        return _diff(a, b, tolerances, globs, statistics, raw, weights_only, workers, progress, work)


def _diff(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    tolerances: Tolerances,
    globs: Sequence[str],
    statistics: bool,
    raw: bool,
    weights_only: bool,
    workers: int | None,
    progress: Progress | None,
    work: Looking,
) -> Difference:
    first = a if isinstance(a, Checkpoint) else open_checkpoint(a)
    second = b if isinstance(b, Checkpoint) else open_checkpoint(b)
    if not raw:
        check_whole(first)
        check_whole(second)
    names = (None if raw else adapter_names(first, second)) or common_names(first, second, raw=raw)
    notes = [*names.notes, *(_with_tied_heads(names, first.path, second.path) if names.kind == "hub" else ())]
    left_out: list[str] = []
    state: list[Setting] = []
    complete = not (weights_only or globs)
    by_parameter = True
    if raw:
        names = _with_optimizers(names, first, second, left_out)
    elif not weights_only and (_has_state(first) or _has_state(second)):
        from anyckpt.operations.steps.state_tensors import state_tensors

        training = state_tensors(first, second, names)
        names = replace(names, a={**names.a, **training.a}, b={**names.b, **training.b})
        by_parameter, complete = training.by_parameter, complete and training.complete
        state += () if globs else training.different
        left_out += training.not_compared
    if globs:
        names = _chosen(names, globs)
    shared = [name for name in names.a if name in names.b]
    only_in_a = [name for name in names.a if name not in names.b]
    only_in_b = [name for name in names.b if name not in names.a]
    if not shared and names.a and names.b:
        raise UsageError(
            "; ".join((f"have no tensor name in common: {first.path} and {second.path}", *names.notes)),
            expected=f"names such as {next(iter(names.a))}",
            found=next(iter(names.b)),
        )
    pairs = [(name, names.a[name], names.b[name]) for name in shared]
    comparing = _Comparing(tolerances, statistics)
    known = work.look(lambda: comparing.units(pairs))
    if work.part is not None:
        return Difference(len(shared), [], [], [], names.kind, complete=False, part=work.part)
    different, movements = comparing.all(pairs, known, workers, progress)
    settings = Settings()
    if weights_only or globs:
        left_out += _state_aside(first, second)
    else:
        settings = compare_configurations(first, second, names.models, raw=raw)
        if settings.obstacle is not None and bool(first.config) != bool(second.config):
            there = ["there" if checkpoint.config else None for checkpoint in (first, second)]
            settings = Settings((*settings.different, Setting("configuration", there[0], there[1])))
        if settings.obstacle is not None:
            left_out.append(f"the configurations: {settings.obstacle}")
        left_out += settings.beyond_the_model()
        state += _positions(first, second)
        if raw:
            state += _objects(first, second, with_tensors=bool(left_out))
            complete = complete and not left_out
        elif _has_state(first) or _has_state(second):
            from anyckpt.operations.steps.training_objects import compare_training_objects

            configured = settings.obstacle is None and bool(first.config and second.config)
            objects = compare_training_objects(first, second, by_parameter=by_parameter, configured=configured)
            state += objects.different
            left_out += objects.not_compared
        complete = complete and settings.obstacle is None and not settings.beyond
    unlike = _UnlikeFiles() if weights_only or globs else _unlike_files(first, second)
    left_out += [*_files_aside(first, second, () if not raw else unlike.looked_at), *unlike.unread]
    if unlike.different and not raw:
        left_out.append(f"what is in files of which each has its own: {few([*unlike.different], 5)} (the bytes differ)")
    complete = complete and not unlike.unread and (raw or not unlike.different)
    return Difference(
        len(shared),
        only_in_a,
        only_in_b,
        different,
        names.kind,
        tuple(notes),
        settings.different,
        tuple(state),
        tuple(left_out),
        complete,
        tuple(movements) if statistics else None,
        tuple(Setting(name, *sides) for name, sides in unlike.different.items()) if raw else (),
    )


def _with_optimizers(names: CommonNames, a: Checkpoint, b: Checkpoint, left_out: list[str]) -> CommonNames:
    """With the moments of optimizers that are no tensors of their checkpoint, because its files are of ranks."""
    found = []
    for checkpoint in (a, b):
        slots: dict[str, LazyTensor] = {}
        if checkpoint.optimizer is not None and len(checkpoint.weights()) == len(checkpoint.tensors):
            try:
                for slot, own in checkpoint.optimizer().slots.items():
                    slots.update({f"optimizer.{slot}.{name}": tensor for name, tensor in own.items()})
            except LastingError as error:
                left_out.append(f"the optimizer's state of {checkpoint.path} by parameter: {error}")
        found.append(slots)
    if left_out:
        return names
    return replace(names, a={**names.a, **found[0]}, b={**names.b, **found[1]})


def _has_state(checkpoint: Checkpoint) -> bool:
    """Whether there is anything that may be training state; if not, what knows such need not be imported."""
    beside = len(checkpoint.weights()) < len(checkpoint.tensors)
    return beside or bool(checkpoint.objects) or checkpoint.optimizer is not None or checkpoint.extra_states is not None


def _positions(a: Checkpoint, b: Checkpoint) -> Iterator[Setting]:
    """Where training stood, if that is not the same; nowhere is the same as at zero."""
    for name in ("step", "epoch", "consumed_samples"):
        one, other = getattr(a.training, name), getattr(b.training, name)
        if (one or 0) != (other or 0):
            yield Setting(name, *(None if value is None else str(value) for value in (one, other)))


def _objects(a: Checkpoint, b: Checkpoint, *, with_tensors: bool) -> Iterator[Setting]:
    held = [{**c.objects, **(c.extra_states() if c.extra_states is not None else {})} for c in (a, b)]
    if a.forms is not None and b.forms is not None and a.format == b.format:
        for objects, forms in zip(held, (a.forms, b.forms), strict=True):
            objects.update({f"form of {name}": text for name, text in forms.described().items()})
    return compare_objects(held[0], held[1], tensors=with_tensors or a.optimizer is None or b.optimizer is None)


def _state_aside(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """What is no tensor, or no weight, and was not asked for."""
    if any(c.config for c in (a, b)):
        yield "the configurations, as asked"
    if any(c.objects or c.optimizer is not None or len(c.weights()) < len(c.tensors) for c in (a, b)):
        yield "training state, as asked"


def _files_aside(a: Checkpoint, b: Checkpoint, looked_at: Collection[str]) -> Iterator[str]:
    files = {name for c in (a, b) for name in _files(c) if name not in looked_at}
    if files:
        shown = sorted(files)
        yield f"files besides weights and configuration: {', '.join(shown[:3])}" + (
            f" and {len(shown) - 3} more" if shown[3:] else ""
        )


def _files(checkpoint: Checkpoint) -> dict[str, ByteSource]:
    return {**checkpoint.artifacts, **(checkpoint.tokenizer.files if checkpoint.tokenizer is not None else {})}


@dataclass
class _UnlikeFiles:
    """Files that both have under one name and not with the same bytes; whether they mean the same is not known.

    Attributes:
        different: name -> what each is.
        looked_at: names of those that were read.
        unread: which could not be, and why.
    """

    different: dict[str, tuple[str, str]] = field(default_factory=dict)
    looked_at: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)


def _unlike_files(a: Checkpoint, b: Checkpoint) -> _UnlikeFiles:
    first, second = _files(a), _files(b)
    found = _UnlikeFiles()
    for name in sorted(first.keys() & second.keys()):
        try:
            sides = _contents(first[name]), _contents(second[name])
        except LastingError as error:
            found.unread.append(f"{name}: {error}")
        else:
            found.looked_at.add(name)
            if sides[0] != sides[1]:
                found.different[name] = sides
    return found


def _contents(source: ByteSource) -> str:
    """A file's size and its whole digest, which tell it from any other."""
    digest = hashlib.sha256()
    for start in range(0, source.size, _BLOCK):
        digest.update(source.read(start, min(_BLOCK, source.size - start)))
    return f"{source.size:,} bytes, sha256:{digest.hexdigest()}"


def _with_tied_heads(names: CommonNames, a: str, b: str) -> Iterator[str]:
    """Give a tied model the output layer that the other keeps, which is its embedding; a note says so."""
    for one, other, path in ((names.a, names.b, a), (names.b, names.a, b)):
        if HEAD in other and HEAD not in one and EMBEDDING in one:
            one[HEAD] = one[EMBEDDING]
            yield f"the output layer of {path} is tied to its embedding, which is compared with the other's"


def _chosen(names: CommonNames, globs: Sequence[str]) -> CommonNames:
    """The tensors whose common names match."""
    kept = [{name: side[name] for name in matching(side, globs)} for side in (names.a, names.b)]
    if not any(kept):
        raise UsageError(
            f"no tensor matches {', '.join(globs)}",
            expected=f"a glob of the {names.kind} names that are compared, such as {next(iter(names.a), '*')}",
        )
    return replace(names, a=kept[0], b=kept[1])


_Pair = tuple[str, LazyTensor, LazyTensor]
_Compared = tuple[TensorDifference | None, Movement | None]


@dataclass(frozen=True)
class _Comparing:
    """Comparing tensors of one name.

    Attributes:
        tolerances: what counts as equal.
        statistics: whether to tell how far each moved.
    """

    tolerances: Tolerances
    statistics: bool

    def all(
        self, pairs: list[_Pair], known: Mapping[str, Any], workers: int | None, progress: Progress | None
    ) -> tuple[list[TensorDifference], list[Movement]]:
        """Those that differ, and how far each moved.

        Args:
            pairs: name, tensor and tensor.
            known: what other processes found, by name.
            workers: threads.
            progress: told of bytes.
        """
        meter = Meter(sum(_nbytes(pair) for pair in pairs), progress)

        def one(pair: _Pair, advance: Advance) -> _Compared:
            return _of_json(known[pair[0]]) if pair[0] in known else self._one(pair, advance)

        results = each_of_tensors(one, pairs, lambda pair: () if pair[0] in known else pair[1:], meter, workers)
        return [found for found, _ in results if found is not None], [
            moved for _, moved in results if moved is not None
        ]

    def units(self, pairs: list[_Pair]) -> Iterator[Unit]:
        """The same by units, which several processes divide."""
        for pair in pairs:
            yield Unit(pair[0], _nbytes(pair), partial(self._told, pair), pair[1:])

    def _told(self, pair: _Pair, advance: Advance) -> list[Any]:
        return [None if value is None else asdict(value) for value in self._one(pair, advance)]

    def _one(self, pair: _Pair, advance: Advance) -> _Compared:
        name, a, b = pair
        facts = (f"{a.dtype.name} {list(a.shape)}", f"{b.dtype.name} {list(b.shape)}")
        if a.shape != b.shape:
            return TensorDifference(name, "shape", None, None, *facts), None
        sums = Sums() if self.statistics and a.dtype.numpy is not None and b.dtype.numpy is not None else None
        try:
            found = compare(a, b, self.tolerances.for_types(a.dtype, b.dtype), advance, sums=sums)
        except AnyckptError as error:
            error.tensor = error.tensor or name
            raise
        moved = None if sums is None else sums.movement(name)
        if found is None:
            return None, moved
        counts = (found.elements, found.nonfinite, found.nan)
        return TensorDifference(name, found.reason, found.max_abs, found.max_rel, *facts, *counts), moved


def _of_json(values: list[Any]) -> _Compared:
    different, moved = values
    return (
        None if different is None else TensorDifference(**different),
        None if moved is None else Movement(**moved),
    )


def _nbytes(pair: _Pair) -> int:
    return pair[2].nbytes if pair[1].shape == pair[2].shape else 0
