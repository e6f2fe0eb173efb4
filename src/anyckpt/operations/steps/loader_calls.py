"""Every pickle of a checkpoint looked at for what it asks whoever loads it to call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from anyckpt import pickling
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import LastingError
from anyckpt.pickling.calls import Calls, recording
from anyckpt.pickling.plain import view
from anyckpt.storage.place import LOCAL
from anyckpt.storage.source import ByteSource, MemorySource
from anyckpt.tensor import LazyTensor

_EXTRA_STATE = "_extra_state"
_LARGEST_STATE = 64 << 20
_LARGEST_PICKLE = 256 << 20
_MOST_LEVELS = 8
_MOST_PICKLES = 1000
_MOST_FILES = 1000
_NUMPY = b"\x93NUMPY"
_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")


def asked_of_loaders(checkpoint: Checkpoint, *, states: bool = False) -> Calls:
    """What the pickles in a checkpoint's files call, with those that nothing else had to read until now.

    These are objects that are read when asked for, files beside the weights (``training_args.bin``,
    ``optimizer.pt``, arrays of numpy objects), and pickles within pickles.

    Args:
        checkpoint: opened; its ``calls`` are added to.
        states: look into modules' own states (``_extra_state``) too, which Transformer Engine unpickles from tensors of
            bytes, and into whatever else consists of the bytes of a pickle.
    """
    calls = checkpoint.calls
    with recording(calls):
        for name in list(checkpoint.objects):
            try:
                value = checkpoint.objects[name]
            except LastingError as error:
                calls.unread[name] = str(error)
            else:
                if states:
                    _look_into(name, value, calls)
        for name, source in _other_files(checkpoint):
            _look_at_file(name, source, calls)
        if states:
            for name, state in _states(checkpoint):
                _look_into(name, state, calls)
        _look_at_nested(calls)
    return calls


def _other_files(checkpoint: Checkpoint) -> Iterator[tuple[str, ByteSource]]:
    """Files of the checkpoint that no pickle was read from yet: its artifacts, and whatever else lies in its folder."""
    read = {os.path.abspath(name) for name in checkpoint.calls.read}
    for name, source in checkpoint.artifacts.items():
        if source.path is None or source.name != source.path or os.path.abspath(source.path) not in read:
            yield name, source
            read.add(os.path.abspath(source.name))
    count = 0
    place, path = checkpoint.place, checkpoint.path
    for name in _names_below(path) if place is LOCAL else place.folder(path).names() if place.is_folder(path) else ():
        file = place.join(path, name)
        if not name.endswith(_PICKLED) or os.path.abspath(file) in read or not place.is_file(file):
            continue
        count += 1
        if count > _MOST_FILES:
            checkpoint.calls.unread[file] = f"more than {_MOST_FILES:,} files lie beside the weights"
            return
        yield name, place.open(file)


def _names_below(path: str) -> Iterator[str]:
    """Every file of a directory, however deep; linked directories are not looked into."""
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            yield os.path.relpath(os.path.join(folder, name), path)


def _states(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(_EXTRA_STATE) or (tensor.dtype.itemsize == 1 and len(tensor.shape) == 1):
            yield name, tensor
    for shard in checkpoint.ranks:
        yield from shard.extra_states.items()


def _look_into(name: str, state: Any, calls: Calls) -> None:
    """Note the bytes of a pickle, if that is what it is; of what is no module's state, only if they end like one."""
    data = view(state)
    if isinstance(data, LazyTensor):
        if data.dtype.itemsize != 1 or data.nbytes > _LARGEST_STATE:
            return
        try:
            if len(data.shape) == 1 and not _begins_a_pickle(data[:4].numpy().tobytes()):
                return
            data = data.numpy().tobytes()
        except LastingError as error:
            calls.unread[name] = str(error)
            return
    if not isinstance(data, (bytes, bytearray)) or not _begins_a_pickle(bytes(data[:512])):
        return
    if name.endswith(_EXTRA_STATE) or data[-1:] == b"." or data[:2] == b"PK":
        calls.keep(bytes(data), name)


def _look_at_nested(calls: Calls) -> None:
    for _ in range(_MOST_LEVELS):
        found, calls.nested = calls.nested, []
        for where, data in found:
            _look_at(f"{where} » a pickle within", MemorySource(data, where), calls)
        if not calls.nested:
            return
    calls.unread.setdefault(calls.nested[0][0], f"pickles lie within pickles {_MOST_LEVELS} levels deep")


def _look_at_file(name: str, source: ByteSource, calls: Calls) -> None:
    try:
        head = source.read(0, min(512, source.size))
    except LastingError as error:
        calls.unread[name] = str(error)
        return
    if head.startswith(_NUMPY):
        if b"|O" in head:
            _look_at_array(name, source, calls)
    elif name.endswith(_PICKLED) or (not name.endswith(".zip") and _begins_a_pickle(head)):
        _look_at(name, source, calls)


def _look_at_array(name: str, source: ByteSource, calls: Calls) -> None:
    """A ``.npy`` file of objects: a pickle behind the header, whose length follows the version."""
    head = source.read(0, min(12, source.size))
    wide = head[6:7] != b"\x01"
    start = (12 if wide else 10) + int.from_bytes(head[8 : 12 if wide else 10], "little")
    try:
        pickling.load_prefix(source, start, persistent_load=_nothing, name=source.name)
    except LastingError as error:
        calls.unread[name] = str(error)


def _look_at(name: str, source: ByteSource, calls: Calls) -> None:
    try:
        head = source.read(0, min(512, source.size))
        if head.startswith(b"PK\x03\x04") or not _is_bare(head):
            from anyckpt.containers.torch_file import read_torch  # few checkpoints have any

            read_torch(source)
        elif source.size <= _LARGEST_PICKLE:
            _look_at_pickles(source)
        else:
            calls.unread[name] = "the pickle is too large to be looked at"
    except LastingError as error:
        calls.unread[name] = error.problem


def _look_at_pickles(source: ByteSource) -> None:
    """A pickle, and those that follow it, as repeated calls of ``pickle.dump`` leave them."""
    at = 0
    for _ in range(_MOST_PICKLES):
        _, at = pickling.load_prefix(source, at, persistent_load=_nothing, name=source.name)
        if at >= source.size or not _begins_a_pickle(source.read(at, min(4, source.size - at))):
            return


def _begins_a_pickle(head: bytes) -> bool:
    return (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or head.startswith(b"PK\x03\x04")


def _is_bare(head: bytes) -> bool:
    """Whether it is a pickle and not torch's stream of several, which begins with a number."""
    from anyckpt.containers.torch_file.legacy_stream import is_stream
    from anyckpt.containers.torch_file.legacy_tar import is_tape

    return not is_stream(head) and not is_tape(head)


def _nothing(identifier: Any) -> None:
    return None
