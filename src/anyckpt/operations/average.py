"""Averaging checkpoints of one model: the elements' weighted mean, computed block by block while it is written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anyckpt import models
from anyckpt.checkpoint import Checkpoint, storage_key
from anyckpt.dtypes import DType
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.indexing import Array, Shape
from anyckpt.models import Hub, Model, dialects
from anyckpt.models.config_nemo import restated
from anyckpt.operations.casts import cast_target
from anyckpt.operations.convert import Conversion, choose, convert
from anyckpt.operations.destination import check_destination
from anyckpt.operations.full_precision import in_full_precision
from anyckpt.operations.open import join_ranks
from anyckpt.operations.parallel import Progress
from anyckpt.operations.recut import LayoutRequest
from anyckpt.operations.select import as_patterns
from anyckpt.operations.supplied import read_config
from anyckpt.storage.gather import SCRATCH_BYTES, scratch
from anyckpt.tensor import LazyTensor, Stored, as_numbers

_EQUAL_BYTES = 1 << 20
_SHOWN = 5
_ACCUMULATORS = {"float16": "float32", "bfloat16": "float32", "float32": "float64", "float64": "float64",
                 "complex64": "complex128", "complex128": "complex128"}  # fmt: skip
"""What sums are kept in: wider than the elements, so that the mean of equal elements is that element, and is rounded
once.  Types that are missing here are not averaged: whole numbers and truth values count things, and numbers of 8
bits and fewer mean nothing without the scale that is stored beside them."""

Tensors = dict[str, LazyTensor]


def average(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    weights: Sequence[float] | None = None,
    family: str | None = None,
    config: str | os.PathLike[str] | dict[str, Any] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    layout: LayoutRequest | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Write the mean of checkpoints of one model, of any formats and layouts.

    A tensor of ``float16`` or ``bfloat16`` is summed in float32, one of ``float32`` or ``float64`` in float64; the
    mean is rounded once, to the type that the tensor has.  All other tensors (integers, booleans, 8-bit floats) must
    be equal in all sources; with ``dtype`` among the options, quantized weights are numbers and averaged, too.  Where
    sources name or divide weights differently they meet under the hub's names.  Optimizers and other training state
    are left out.  Configuration and tokenizer are those of the first source.

    Args:
        sources: two or more; their formats are detected.
        destination: what to write; it appears only when it is whole.
        to: name of the target format; the first source's, in its parallel layout, if None.
        weights: one number per source, none negative; the mean is divided by their sum.  All equal if None.
        family: the model family, where checkpoints do not tell.
        config: the model's configuration, where checkpoints have none.
        include: glob or globs of the first source's weight names; others are left out.
        exclude: glob or globs of weight names to leave out.
        layout: parallel sizes and vocabulary of the target, where it keeps a file per rank.
        force: read sources that are marked as unfinished, too.
        progress: called with (bytes done, bytes in all) from any thread.
        options: others of ``convert``.

    Raises:
        FormatError: a source is damaged.
        MappingError: the sources are not of one model: names, shapes or element types differ, or tensors that cannot
            be averaged are not equal.
        OutputError: the destination exists or cannot be written.
        UsageError: fewer than two sources, or weights that are not one per source.
    """
    shares = _shares(len(sources), weights)
    if to is not None:
        registry.by_name(to)
    origins = [os.fspath(path) for path in sources]
    check_destination(os.fspath(destination), origins, overwrite=bool(options.get("overwrite")))
    stored = [registry.read(path, force=force) for path in sources]
    wanted, given = cast_target(options.get("dtype")), read_config(config)
    rules = None if layout is None else layout.rules
    full = [in_full_precision(join_ranks(checkpoint, rules=rules), wanted, given) for checkpoint in stored]
    opened, given = [one.checkpoint for one in full], full[0].config
    base, tensors, notes = _together(opened, as_patterns(include), as_patterns(exclude), family, given)
    means = _means(tensors, shares, [checkpoint.path for checkpoint in opened])
    mean = base.named(means)
    rule = f"mean of {len(opened)} checkpoints" + ("" if weights is None else f", weighted {_shown(shares)}")
    told = dict.fromkeys(text for one in full for text in (*one.notes, *one.checkpoint.warnings))
    merged = replace(
        mean,
        optimizer=None,
        warnings=[rule, *notes, *told],
    )
    return convert(
        merged,
        destination,
        to=opened[0].format if to is None else to,
        family=family,
        config=given,
        layout=layout,
        keep_layout=to is None and bool(stored[0].ranks),
        progress=progress,
        sources=origins,
        **options,
    )


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """A weight per source.

    Raises:
        UsageError: there are too few sources, or the weights are not possible.
    """
    if count < 2:
        raise UsageError("there is nothing to average", expected="two or more checkpoints", found=count)
    if weights is None:
        return [1.0] * count
    shares = [float(weight) for weight in weights]
    if len(shares) != count:
        raise UsageError("every checkpoint needs a weight", expected=f"{count} weights", found=len(shares))
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not 0 < sum(shares) < math.inf:
        raise UsageError("these weights give no mean", expected="numbers from 0 on, not all 0", found=_shown(shares))
    return shares


def _shown(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:g}" for share in shares)


class _Base:
    """The first source, which the mean takes everything else from.

    Args:
        checkpoint: it.
        hub: its weights under the hub's names, if the sources meet under these and its family is known.
        dialect: its naming, if the sources meet under the hub's names.
    """

    def __init__(self, checkpoint: Checkpoint, hub: Hub | None = None, dialect: str | None = None) -> None:
        self._checkpoint = checkpoint
        self._hub = hub
        self._dialect = dialect

    def named(self, means: Tensors) -> Checkpoint:
        """The first source with ``means`` in place of its weights."""
        prefix, config = self._checkpoint.model_prefix, self._checkpoint.config
        if self._dialect is None:
            kept = {prefix + name: tensor for name, tensor in means.items()}
        elif self._hub is not None:
            prefix, kept = "", models.from_hub(replace(self._hub, tensors=means), self._dialect).tensors
            config = restated(config, self._hub.restated)
        else:
            prefix, kept = "", dialects.rename(means, "hub", self._dialect)[0]
        return replace(self._checkpoint, tensors=kept, model_prefix=prefix, state_prefixes=(), config=config)


def _together(
    opened: Sequence[Checkpoint],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    family: str | None,
    config: dict[str, Any] | None,
) -> tuple[_Base, list[Tensors], list[str]]:
    """The sources' tensors under common names: their own if these are the same, else the hub's.

    Raises:
        MappingError: there are no common names, or tensors differ in shape or type.
    """
    chosen = [_chosen(checkpoint, opened[0], include, exclude) for checkpoint in opened]
    first = chosen[0]
    own = [checkpoint.weights() for checkpoint in chosen]
    if all(_same_shapes(own[0], other) for other in own[1:]):
        return _Base(first), own, []
    dialect = first.dialect or dialects.detect(own[0])
    known = [checkpoint.dialect or dialects.detect(weights) for checkpoint, weights in zip(chosen, own, strict=True)]
    found = _models(chosen, family, config)
    if found is not None and dialect is not None and None not in known:
        hubs = [models.to_hub(checkpoint, model) for checkpoint, model in zip(chosen, found, strict=True)]
        notes = _trim(hubs)
        for hub, checkpoint in zip(hubs[1:], chosen[1:], strict=True):
            _check_same(hubs[0].tensors, hub.tensors, first.path, checkpoint.path)
        return _Base(first, hubs[0], dialect), [hub.tensors for hub in hubs], notes
    if all(map(dialects.is_megatron, known)) and len(set(known)) > 1:
        named = [dialects.to_hub_names(weights)[0] for weights in own]
        for tensors, checkpoint in zip(named[1:], chosen[1:], strict=True):
            _check_same(named[0], tensors, first.path, checkpoint.path)
        return _Base(first, None, dialect), named, ["the model family is unknown: weights meet under Megatron's names"]
    for weights, checkpoint in zip(own[1:], chosen[1:], strict=True):
        _check_same(own[0], weights, first.path, checkpoint.path)
    return _Base(first), own, []


def _chosen(
    checkpoint: Checkpoint, first: Checkpoint, include: tuple[str, ...], exclude: tuple[str, ...]
) -> Checkpoint:
    """The weights that the user wants; globs are of the first source's names, and other names are left alone."""
    if checkpoint is not first and checkpoint.weights().keys() != first.weights().keys():
        return checkpoint
    kept, left_out = choose(checkpoint, include, exclude)
    return replace(kept, ignored={**kept.ignored, **left_out})


def _same_shapes(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in a)


def _models(opened: Sequence[Checkpoint], family: str | None, config: dict[str, Any] | None) -> list[Model] | None:
    """Every source's model, with the configuration of one that has it; None if no family is known.

    Raises:
        MappingError: the sources are of different families.
    """
    found = [models.identify(checkpoint, family=family, config=config) for checkpoint in opened]
    guide = next(((model, one) for model, one in zip(found, opened, strict=True) if model is not None), None)
    if guide is None:
        return None
    complete = [
        model or models.identify(checkpoint, family=guide[0].family, config=guide[1].config)
        for model, checkpoint in zip(found, opened, strict=True)
    ]
    result = [model for model in complete if model is not None]
    for model, checkpoint in zip(result, opened, strict=False):
        if model.family != guide[0].family:
            raise MappingError(
                "is of another model family", path=checkpoint.path, expected=f"{guide[0].family} as {guide[1].path}",
                found=model.family,
            )  # fmt: skip
    return result if len(result) == len(opened) else None


def _trim(hubs: Sequence[Hub]) -> list[str]:
    """Take off rows that only pad the vocabulary where sources have different numbers of them; gives notes."""
    notes = []
    size = min((s for hub in hubs if (s := hub.model.config.vocab_size) is not None), default=None)
    for rule in hubs[0].model.definition.rules:
        rows = {hub.tensors[rule.hub].shape[0] for hub in hubs if rule.hub in hub.tensors}
        if rule.partition != "vocabulary" or len(rows) < 2 or size is None or min(rows) < size:
            continue
        for hub in hubs:
            hub.tensors[rule.hub] = hub.tensors[rule.hub].narrow(0, 0, size)
        notes.append(f"{rule.hub}: rows beyond the vocabulary of {size} tokens are padding and not averaged")
    return notes


def _check_same(a: Tensors, b: Tensors, first: str, second: str) -> None:
    """Raise MappingError unless both have the same names, shapes and types."""
    missing = [name for name in a if name not in b]
    surplus = [name for name in b if name not in a]
    if missing or surplus:
        names = (missing or surplus)[:_SHOWN]
        raise MappingError(
            "the checkpoints are not of one model: their tensors have different names",
            path=second if missing else first,
            expected=", ".join(names) + (" ..." if len(missing or surplus) > _SHOWN else ""),
            found="no such tensors",
            remedy="leave tensors out with --exclude, or say which model it is with --family and --config",
        )
    for name, tensor in a.items():
        other = b[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise MappingError(
                "the checkpoints are not of one model", path=second, tensor=name,
                expected=f"{tensor.dtype.name} {tensor.shape} as in {first}",
                found=f"{other.dtype.name} {other.shape}",
                remedy="convert them to one element type first (--dtype)" if tensor.shape == other.shape else None,
            )  # fmt: skip


def _means(sources: Sequence[Tensors], shares: Sequence[float], paths: Sequence[str]) -> Tensors:
    """The means by name; tensors that are one tensor in every source stay one.

    Raises:
        MappingError: tensors that are not averaged differ.
    """
    made: dict[Any, LazyTensor] = {}
    means: Tensors = {}
    for name in sources[0]:
        children = tuple(source[name] for source in sources)
        if children[0].dtype.name not in _ACCUMULATORS:
            _check_equal(name, children, paths)
            means[name] = children[0]
            continue
        keys = tuple(storage_key(child) for child in children)
        mean = None if None in keys else made.get(keys)
        if mean is None:
            mean = Mean(children, tuple(shares))
            if None not in keys:
                made[keys] = mean
        means[name] = mean
    return means


def _check_equal(name: str, children: Sequence[LazyTensor], paths: Sequence[str]) -> None:
    for child, path in zip(children[1:], paths[1:], strict=True):
        blocks = zip(children[0].chunks(_EQUAL_BYTES), child.chunks(_EQUAL_BYTES), strict=True)
        if not all(a.tobytes() == b.tobytes() for a, b in blocks):
            raise MappingError(
                f"is {child.dtype.name}, which is not averaged, and differs between the checkpoints",
                path=path, tensor=name, expected=f"the elements of {paths[0]}", found="others",
                remedy="leave it out with --exclude",
            )  # fmt: skip


class Mean(LazyTensor):
    """The weighted mean of tensors of one shape and type, rounded once; holds one operand at a time.

    Args:
        children: the operands, of a type in the table above.
        shares: a weight per operand; the sum is divided by theirs.
    """

    __slots__ = ("_accumulator", "_shares", "children")

    def __init__(self, children: tuple[LazyTensor, ...], shares: tuple[float, ...]) -> None:
        self.children = children
        self.dtype: DType = children[0].dtype
        self.shape = children[0].shape
        self._shares = shares
        self._accumulator = np.dtype(_ACCUMULATORS[self.dtype.name])

    def read_box(self, start: Shape, out: Array) -> None:
        if out.size == 0:
            return
        if out.size * self._accumulator.itemsize > SCRATCH_BYTES and out.ndim:
            axis = next(a for a, n in enumerate(out.shape) if n > 1)
            step = max(1, out.shape[axis] * SCRATCH_BYTES // (out.size * self._accumulator.itemsize))
            for at in range(0, out.shape[axis], step):
                where = (slice(None),) * axis + (slice(at, at + step),)
                self._compute((*start[:axis], start[axis] + at, *start[axis + 1 :]), out[where])
            return
        self._compute(start, out)

    def _compute(self, start: Shape, out: Array) -> None:
        total: Any = None
        with scratch(out.size * self.dtype.itemsize) as buffer, np.errstate(all="ignore"):
            raw = buffer.view(self.dtype.raw).reshape(out.shape)
            for child, share in zip(self.children, self._shares, strict=True):
                child.read_box(start, raw)
                numbers = as_numbers(raw, self.dtype).astype(self._accumulator)
                if share != 1.0:
                    numbers *= share
                total = numbers if total is None else np.add(total, numbers, out=total)
            total /= math.fsum(self._shares)
            assert self.dtype.numpy is not None
            out[...] = total.astype(self.dtype.numpy).view(self.dtype.raw)

    def pieces(self) -> Iterator[Stored]:
        for child in self.children:
            yield from child.pieces()

    def _each(self, children: Iterator[LazyTensor]) -> LazyTensor:
        return Mean(tuple(children), self._shares)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return self._each(child.box(start, shape) for child in self.children)

    def _reshape(self, shape: Shape) -> LazyTensor:
        return self._each(child.reshape(shape) for child in self.children)

    def _permute(self, axes: Shape) -> LazyTensor:
        return self._each(child.permute(axes) for child in self.children)
