"""Laying out a checkpoint of the zarr backend as Megatron-Core 0.12 writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.dcp.chunks import Held, HeldBox, stacked_axes
from anyckpt.containers.torch_file import zip_parts
from anyckpt.containers.zarr_array import ZARRAY, boxes, render_metadata
from anyckpt.engine.plan import OutputFile, Plan, TensorData, small_file
from anyckpt.errors import UsageError
from anyckpt.escaping import is_text
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_core.implementation import extra_states, implementation_of, spelled
from anyckpt.formats.megatron_core.location import COMMIT, COMMON
from anyckpt.formats.megatron_core.writer import BACKENDS, common_and_sharded, state_objects, tokenizer_files
from anyckpt.formats.shared.nesting import nested
from anyckpt.indexing import Shape
from anyckpt.models.dialects.registration import with_second_names
from anyckpt.tensor import LazyTensor

_CHUNK_BYTES = 256 << 20  # a loader reads whole chunks to take its slice of them


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """A directory per tensor and object, ``common.pt``, and ``metadata.json``, which marks the whole as finished.

    Raises:
        UsageError: an element type that the zarr backend does not have, a name that is no directory's, or an object
            that cannot be pickled.
    """
    common, sharded, foreign = common_and_sharded(
        checkpoint, megatron_args=options.megatron_args, of_training=options.held is not None
    )
    if options.held is not None:
        common = nested(common, checkpoint.key_paths, checkpoint.original_keys)
    built_of = implementation_of(checkpoint, options.transformer_impl)
    tensors, objects = checkpoint.tensors, sharded
    if options.held is None:
        tensors = spelled(tensors, built_of)
        states = None if checkpoint.extra_states is None else checkpoint.extra_states()
        objects = {**state_objects(extra_states(tensors, built_of), states), **sharded}
    files = [*_files(tensors, objects, common, options.held), *tokenizer_files(checkpoint)]
    note = "Megatron-Core from 0.16 on does not read the zarr backend; megatron-core (torch_dist) is read by all"
    return Plan("megatron-core-zarr", tuple(files), ignored={**checkpoint.ignored, **foreign}, notes=(note,))


def zarr_files(
    tensors: Mapping[str, LazyTensor], objects: Mapping[str, Any], common: Mapping[str, Any], *, prefix: str = ""
) -> list[OutputFile]:
    """The files of a checkpoint of the zarr backend; the arguments are those of ``torch_dist_files``."""
    tensors = with_second_names(tensors)
    objects = {**state_objects(extra_states(tensors, None), None), **objects}
    folder = f"{prefix}/" if prefix else ""
    return [replace(file, path=folder + file.path) for file in _files(tensors, objects, common, None)]


def _files(
    tensors: Mapping[str, LazyTensor], objects: Mapping[str, Any], common: Mapping[str, Any], held: Held | None
) -> list[OutputFile]:
    _check_apart(tensors, objects)
    files = [OutputFile(COMMON, zip_parts(dict(common), archive_name="common", tensor_name=_named("common")))]
    for name, tensor in tensors.items():
        files += _array_files(name, tensor, None if held is None else held[name])
    files += [_object_file(name, value) for name, value in objects.items()]
    return [*files, small_file(COMMIT, json.dumps({**BACKENDS, "sharded_backend": "zarr"}), stage=2)]


def _array_files(name: str, tensor: LazyTensor, held: Sequence[HeldBox] | None) -> Iterator[OutputFile]:
    if tensor.dtype.zarr is None:
        raise UsageError(
            "the zarr backend has no such element type",
            tensor=name,
            found=tensor.dtype.name,
            remedy="write megatron-core (torch_dist), or cast it with --dtype",
        )
    special = not name or "/" in name or "\0" in name or name.startswith(".") or name.endswith(".sync")
    if special or not is_text(name) or len(name.encode()) > 255:
        raise UsageError("cannot be the name of a zarr array's directory", tensor=name)
    chunks = _chunks(name, tensor) if not held or not tensor.size else _largest(held)
    yield small_file(f"{name}/{ZARRAY}", render_metadata(tensor.dtype, tensor.shape, chunks), stage=1)
    if not tensor.size:
        return
    for chunk, start, extent in boxes(tensor.shape, chunks):
        box = tensor.box(start, extent)
        for axis, length in enumerate(chunks):
            if extent[axis] < length:
                box = box.pad(axis, length)
        piece = "" if chunks == tensor.shape else f"chunk {chunk}"
        yield OutputFile(f"{name}/{chunk}", (TensorData(name, box, piece),))


def _chunks(name: str, tensor: LazyTensor) -> Shape:
    """A chunk per layer and expert of stacked tensors, of at most 256 MB where a row allows.

    As even as possible, since every chunk file has a whole chunk's size.
    """
    ones = min(stacked_axes(name), max(0, tensor.ndim - 1))
    chunks = [1] * ones + [max(1, length) for length in tensor.shape[ones:]]
    for axis in range(ones, tensor.ndim):
        row = tensor.dtype.itemsize * math.prod(chunks[axis + 1 :])
        if chunks[axis] * row <= _CHUNK_BYTES:
            break
        step = max(1, _CHUNK_BYTES // row)
        chunks[axis] = -(-chunks[axis] // -(-chunks[axis] // step))
    return tuple(chunks)


def _largest(boxes: Sequence[HeldBox]) -> Shape:
    """Chunks as long as the longest box along each axis: each box is one where they lie on a grid."""
    return tuple(map(max, *(box.shape for box in boxes))) if len(boxes) > 1 else boxes[0].shape


def _object_file(name: str, value: object) -> OutputFile:
    """A sharded object: ``torch.save`` of the object itself, the archive's folder called as the file is."""
    parts = zip_parts(value, archive_name=name.rpartition("/")[2], tensor_name=_named(name))
    return OutputFile(f"{name}.pt", parts)


def _named(name: str) -> Any:
    return lambda path: ".".join([name, *map(str, path)])


def _check_apart(tensors: Mapping[str, LazyTensor], objects: Mapping[str, Any]) -> None:
    for name in objects:
        if name.partition("/")[0] in tensors:
            raise UsageError("an object and a tensor would share a directory", tensor=name.partition("/")[0])
