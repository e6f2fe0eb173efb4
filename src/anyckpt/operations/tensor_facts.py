"""What is told of each tensor of a checkpoint."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import storage_key
from anyckpt.errors import UsageError
from anyckpt.operations.inspection import TensorFacts
from anyckpt.operations.steps.globs import matching
from anyckpt.operations.steps.looking import Looking, Unit
from anyckpt.operations.steps.threads import Advance, Meter, Progress, each_of_tensors
from anyckpt.storage.location import name_below, root_of
from anyckpt.tensor import LazyTensor

if TYPE_CHECKING:
    from anyckpt.operations.steps.statistics import Scan


def facts_of(
    path: str,
    tensors: dict[str, LazyTensor],
    globs: tuple[str, ...],
    stats: bool,
    digest: bool,
    magnitudes: bool,
    progress: Progress | None,
    work: Looking,
) -> list[TensorFacts] | None:
    """What is told of tensors; None if another process tells it."""
    names = matching(tensors, globs) if globs else list(tensors)
    if globs and tensors and not names:
        raise UsageError(
            f"no tensor matches {' or '.join(map(repr, globs))}",
            path=path,
            remedy="list all with --tensors '*'",
        )
    root = root_of(path)
    first: dict[Any, str] = {}
    same = {}
    for name in names:
        key = storage_key(tensors[name])
        if key is not None and first.setdefault(key, name) != name:
            same[name] = first[key]
    if not stats and not digest:
        return [_facts(root, name, tensors[name], None, same.get(name)) for name in names]
    from anyckpt.operations.steps.statistics import Scan, Scanning

    scanning = Scanning(stats, digest, magnitudes)

    def unit(name: str) -> Unit:
        tensor = tensors[name]
        return Unit(name, tensor.nbytes, partial(scanning.told, name, tensor), [tensor])

    known = work.look(lambda: [unit(name) for name in names])
    if work.part is not None:
        return None

    def one(name: str, advance: Advance) -> TensorFacts:
        found = Scan.of_json(known[name]) if name in known else scanning.of(name, tensors[name], advance)
        return _facts(root, name, tensors[name], found, same.get(name))

    meter = Meter(sum(tensors[name].nbytes for name in names), progress)
    return each_of_tensors(one, names, lambda name: [] if name in known else [tensors[name]], meter)


def _facts(root: str, name: str, tensor: LazyTensor, found: Scan | None, same_as: str | None) -> TensorFacts:
    shards, files = _where(root, tensor)
    return TensorFacts(
        name,
        tensor.dtype.name,
        tensor.shape,
        tensor.nbytes,
        shards,
        tuple(files),
        None if found is None else found.sha256,
        None if found is None else found.statistics,
        same_as,
        None if found is None else found.magnitudes,
        tuple(files.values()),
    )


def _where(root: str, tensor: LazyTensor) -> tuple[int, dict[str, int]]:
    """Number of stored pieces, and the files that hold them, each with its bytes of these."""
    files: dict[str, int] = {}
    count = 0
    for piece in tensor.pieces():
        count += 1
        name = name_below(root, piece.source.path or piece.source.name.partition(" » ")[0])
        files[name] = files.get(name, 0) + piece.nbytes
    return count, files


def by_dtype(tensors: dict[str, LazyTensor]) -> tuple[dict[str, int], dict[str, int]]:
    """Of each type, tensors and stored bytes."""
    counts = Counter(tensor.dtype.name for tensor in tensors.values())
    sizes = dict.fromkeys(counts, 0)
    seen: set[Any] = set()
    for tensor in tensors.values():
        key = storage_key(tensor)
        if key is None or key not in seen:
            sizes[tensor.dtype.name] += tensor.nbytes
            seen.add(key)
    return dict(counts), sizes
