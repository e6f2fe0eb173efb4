"""Whether a format keeps its contract: detect, read and plan, on good files and on damaged ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.execute import execute
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.plan import Computed, Literal, Plan, SourceData, describe
from anyckpt.errors import AnyckptError
from anyckpt.formats import registry
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.operations.steps.account import unaccounted
from anyckpt.storage.location import look_at
from anyckpt.tensor import LazyTensor, from_array
from anyckpt.testing.observing import elements_read, facts, files_under, left_open, observed_reads, require

_MOST_FILES = 10
_FEW_BYTES = 64
"""Of each tensor's elements that a reader may see while it looks for the end of a header."""


def sample_checkpoint() -> Checkpoint:
    """Weights of many shapes and of types that most formats have, one of them large enough to show what is read."""
    generator = np.random.default_rng(7)
    shapes = {"layer.weight": (48, 32), "layer.bias": (48,), "scale": (1,), "deep": (2, 3, 1, 5), "table": (1024, 300)}
    tensors: dict[str, LazyTensor] = {
        name: from_array(generator.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()
    }
    tensors["steps"] = from_array(np.arange(7, dtype=np.int64))
    tensors["half"] = from_array(generator.standard_normal(9).astype(np.float16))
    return Checkpoint("sample", "sample", tensors)


def check_format(format: Format, folder: str | os.PathLike[str], checkpoint: Checkpoint | None = None) -> None:
    """Everything that is asked of a format that can be written: every check of this module, one after another.

    Args:
        format: the format; registered, as ``anyckpt.formats()`` shows it.
        folder: an empty directory to write into.
        checkpoint: what to write: under the names that the format wants, with the configuration that it wants;
            ``sample_checkpoint()`` if None.

    Raises:
        AssertionError: the contract is broken.
    """
    place = Path(folder)
    require(registry.by_name(format.name) is format, f"{format.name} is not registered: install its package")
    require(format.name and format.name == format.name.strip().lower(), f"{format.name!r} is no name to type")
    written = check_plan(format, sample_checkpoint() if checkpoint is None else checkpoint, place / "written")
    require(registry.detect(look_at(written)) is format, f"another format takes what {format.name} writes for its own")
    check_reading(format, written)
    check_processes(format, written)
    check_damage(format, written, place / "damaged")


def check_plan(
    format: Format, checkpoint: Checkpoint, output: str | os.PathLike[str], options: WriteOptions | None = None
) -> str:
    """That a plan says truly what it writes, and that what is written is what was given.

    The same plan comes of the same checkpoint; all lengths are true; threads do not matter; every weight is there or
    left out with a reason; what is read back has the weights' bits.

    Args:
        format: the format.
        checkpoint: what to write.
        output: where; there must be nothing.
        options: as a user asks.

    Returns:
        The path written.

    Raises:
        AssertionError: the contract is broken.
    """
    require(format.plan is not None, f"{format.name} cannot be written")
    assert format.plan is not None
    wanted = WriteOptions() if options is None else options
    plan, again = format.plan(checkpoint, wanted), format.plan(checkpoint, wanted)
    require(plan.format == format.name, f"the plan is called {plan.format!r}, not {format.name!r}")
    require(describe(plan) == describe(again), "two plans of one checkpoint differ")
    require(_contents(plan) == _contents(again), "two plans of one checkpoint give other bytes")
    for file in plan.files:
        parts = file.path.split("/")
        require(not os.path.isabs(file.path) and ".." not in parts, f"{file.path} leads out of the output")
        require(file.stage in (0, 1, 2), f"{file.path} is of stage {file.stage}; there are 0, 1 and 2")
    lost = {name for name in unaccounted([checkpoint], plan) if name not in plan.ignored}
    require(not lost, f"{sorted(lost)[:3]} are neither written nor told as ignored")
    path = os.fspath(output)
    execute(plan, path, workers=3)
    for file in plan.files:
        size = os.path.getsize(os.path.join(path, file.path) if file.path else path)
        require(size == file.nbytes, f"{file.path or path} has {size} bytes, and {file.nbytes} were planned")
    alone = f"{path}.alone"
    execute(again, alone, workers=1)
    for one, other in zip(files_under(path), files_under(alone), strict=True):
        same = Path(one).read_bytes() == Path(other).read_bytes() or ".anyckpt-manifest" in one
        require(same, f"{one} depends on the number of threads")
    _remove(alone)
    found, given = (_named(read) for read in (format.read(look_at(path)), checkpoint))
    for name, told in facts(given).items():
        if name in found:
            require(facts({name: found[name]})[name] == told, f"{name} is read back as something else")
        else:
            left = {name, checkpoint.model_prefix + name} & {*plan.ignored, *(part.name for part in plan.tensors())}
            require(left, f"{name} is not read back, and not told as ignored")
    return path


def check_reading(format: Format, path: str | os.PathLike[str]) -> None:
    """That a good checkpoint is detected, and read as descriptions: no elements, the same each way, nothing left open.

    Args:
        format: the format.
        path: a checkpoint of it, which other software wrote.

    Raises:
        AssertionError: the contract is broken.
    """
    where = os.fspath(path)
    before = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files_under(where)]
    location = look_at(where)
    require(format.detect(location), f"{format.name} does not recognise {where}")
    with observed_reads() as reads:
        checkpoint = format.read(location)
    require(checkpoint.format == format.name, f"what is read is called {checkpoint.format!r}")
    require(checkpoint.path == where, f"what is read has the path {checkpoint.path!r}, not {where!r}")
    tensors = _tensors(checkpoint)
    require(tensors, f"no tensors are read from {where}")
    spent = elements_read(reads, tensors.values())
    total = sum(tensor.nbytes for tensor in tensors.values())
    allowed = max(_FEW_BYTES * len(tensors), total // 20)
    require(spent <= allowed, f"opening reads {spent} of {total} bytes of elements; it should read none")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    again = _tensors(format.read(look_at(where)))
    require(list(again) == list(tensors), "reading twice gives other names or another order")
    obstacle = fingerprint(Plan(format.name, ()), [where]).obstacle
    for name, tensor in tensors.items():
        for piece in tensor.pieces():
            piece.check()
            obstacle = obstacle or (None if piece.source.identity() is not None else name)
    require(obstacle is None, f"{obstacle} has no identity, so that no interrupted run of it can be continued")
    after = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files_under(where)]
    require(before == after, f"reading {where} changes it")
    del checkpoint, tensors, tensor, again, piece
    require(not left_open(where), f"{left_open(where)} stay open")


def check_processes(format: Format, path: str | os.PathLike[str]) -> None:
    """That another process, with other hashes, makes the same plan of the same files: hosts divide a plan's work.

    Args:
        format: the format; registered.
        path: a checkpoint of it, of which it makes the plan.

    Raises:
        AssertionError: the plans differ.
    """
    where = os.path.abspath(path)
    code = f"from anyckpt.testing.formats import plan_digest; print(plan_digest({format.name!r}, {where!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"no plan of {where} in a process of its own: {done.stderr[-300:]}")
    require(done.stdout.strip() == plan_digest(format.name, where), f"another process makes another plan of {where}")


def plan_digest(name: str, path: str) -> str:
    """What identifies the plan that a format makes of a checkpoint of its own."""
    format = registry.by_name(name)
    assert format.plan is not None
    checkpoint = format.read(look_at(path))
    plan = format.plan(checkpoint, WriteOptions(layout=checkpoint.layout if checkpoint.ranks else None))
    known = fingerprint(plan, [path])
    require(known.obstacle is None, f"{known.obstacle} has no identity")
    return json.dumps([known.value, describe(plan)], sort_keys=True)


def check_damage(format: Format, path: str | os.PathLike[str], scratch: str | os.PathLike[str]) -> None:
    """That damaged files are read as far as they go or refused by an ``AnyckptError`` that names a file or tensor.

    Each file is cut short, emptied, removed and overwritten in places.  A file cut short inside a tensor must be
    noticed before its elements are handed out.

    Args:
        format: the format.
        path: a good checkpoint of it, of few and small files.
        scratch: a directory to write into; need not exist.

    Raises:
        AssertionError: another error than ``AnyckptError`` comes of it, one that names nothing, or none where elements
            are missing.
    """
    where = os.fspath(path)
    needed = _last_bytes(_tensors(format.read(look_at(where))))
    _remove(os.fspath(scratch))
    copy = Path(scratch) / os.path.basename(where)
    copy.parent.mkdir(parents=True)
    if os.path.isdir(where):
        shutil.copytree(where, copy, symlinks=True)
    else:
        shutil.copy(where, copy)
    files = [file for file in files_under(where) if ".anyckpt-manifest" not in file]
    for file in files[:: -(-len(files) // _MOST_FILES)]:
        target = copy / os.path.relpath(file, where) if os.path.isdir(where) else copy
        whole = target.read_bytes()
        for what, data in _damaged(whole):
            if data is None:
                target.unlink()
            else:
                target.write_bytes(data)
            error = _tried(format, copy, f"{os.path.relpath(file, os.path.dirname(where))}, {what}")
            short = data is not None and len(data) < needed.get(os.path.realpath(file), 0)
            require(error or not short, f"{file}, {what}: bytes of tensors are missing, and nothing says so")
        target.write_bytes(whole)
    _remove(os.fspath(scratch))


def _tried(format: Format, path: Path, what: str) -> bool:
    """Whether reading everything is refused."""
    try:
        location = look_at(path)
        if not format.detect(location):
            return True
        for tensor in _tensors(format.read(location)).values():
            for _ in tensor.chunks(1 << 16):
                pass
    except AnyckptError as error:
        named = error.path is not None or error.tensor is not None
        require(named, f"{what}: the error names neither file nor tensor: {error}")
        require("\n" not in str(error), f"{what}: the error is of several lines")
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} in place of an AnyckptError: {error}") from error
    return False


def _damaged(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file."""
    yield "removed", None
    for length in sorted({0, 1, len(data) // 3, len(data) - 1} - {len(data)}):
        yield f"cut to {length} bytes", data[:length]
    for filling in (b"\0", b"\xff", b"{"):
        yield f"begins with {filling!r}", filling * min(64, len(data)) + data[64:]
    chance = random.Random(len(data))
    ends = min(len(data), 4096)
    for at in [chance.randrange(ends) for _ in range(12)] + [len(data) - 1 - chance.randrange(ends) for _ in range(12)]:
        value = chance.choice([0, 1, 0x7F, 0x80, 0xFF, data[at] ^ (1 << chance.randrange(8))])
        yield f"byte {at} is {value}", data[:at] + bytes([value]) + data[at + 1 :]


def _last_bytes(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """How many bytes each file needs for the elements that lie in it."""
    needed: dict[str, int] = {}
    for tensor in tensors.values():
        for piece in tensor.pieces():
            path, start = piece.source.locate()
            if path is not None and piece.size:
                path = os.path.realpath(path)
                needed[path] = max(needed.get(path, 0), start + piece.offset + piece.stored_bytes())
    return needed


def _tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every tensor; those of ranks by rank and name."""
    ranked = {
        f"rank {shard.tensor_rank} {shard.pipeline_rank} {shard.virtual_rank} {shard.expert_rank}: {name}": tensor
        for shard in checkpoint.ranks
        for name, tensor in shard.tensors.items()
    }
    return {**checkpoint.tensors, **ranked}


def _named(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Weights by the names that the model gives them; of ranks each one's."""
    return _tensors(checkpoint) if checkpoint.ranks else checkpoint.weights()


def _check_tensor(name: str, tensor: LazyTensor) -> None:
    """That a tensor is the same however it is read."""
    whole = tensor.numpy()
    require(whole.shape == tensor.shape, f"{name} is read as {whole.shape}, and its shape is {tensor.shape}")
    flat = whole.reshape(-1).view(tensor.dtype.raw)
    runs = [chunk.view(tensor.dtype.raw).copy() for chunk in tensor.chunks(max(tensor.dtype.itemsize, 1000))]
    joined = np.concatenate(runs) if runs else flat[:0]
    require(np.array_equal(joined, flat), f"{name} is another if it is read in runs")
    if not tensor.size or not tensor.ndim:
        return
    start = tuple(n // 3 for n in tensor.shape)
    shape = tuple(max(1, (n - b) // 2) for n, b in zip(tensor.shape, start, strict=True))
    box = whole[tuple(slice(b, b + n) for b, n in zip(start, shape, strict=True))]
    found = tensor.box(start, shape).numpy()
    require(np.array_equal(found.view(tensor.dtype.raw), box.view(tensor.dtype.raw)), f"{name} is another in a slice")


def _contents(plan: Plan) -> list[bytes | tuple[str, tuple[int, ...], str]]:
    """What a plan's parts are, without elements."""
    found: list[bytes | tuple[str, tuple[int, ...], str]] = []
    for file in plan.files:
        for part in file.parts:
            if isinstance(part, Literal):
                found.append(part.data)
            elif isinstance(part, SourceData):
                found.append(part.source.read(0, part.source.size))
            elif not isinstance(part, Computed):
                found.append((part.name, part.tensor.shape, part.tensor.dtype.name))
    return found


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)
        Path(os.path.dirname(path), f".{os.path.basename(path)}.anyckpt-manifest.json").unlink(missing_ok=True)
