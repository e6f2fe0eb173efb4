"""Values between files and a training process: lazy tensors as torch's, and objects of any class as inert records."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from anyckpt.containers.torch_file.values import FormedTensor
from anyckpt.errors import AnyckptError, UsageError, few
from anyckpt.operations.steps.live import Live
from anyckpt.pickling import DictRecord, load
from anyckpt.pickling.torch_objects import ordered_dict, size
from anyckpt.tensor import LazyTensor
from anyckpt.torch.settings import Settings, plain
from anyckpt.views import TorchFiles

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_DEEPEST = 100


def in_memory(value: Any, name: str, files: TorchFiles, path: str, *, copy: bool | None = None) -> Any:
    """What was read, with tensors of torch for lazy ones, in the same containers.

    Args:
        value: plain data, lazy tensors and records.
        name: what to call it in messages.
        files: the files that are mapped.
        path: where it comes from, for messages.
        copy: tensors have memory of their own (True), or are the file where that is possible (None).

    Raises:
        FormatError: bytes are missing from a file.
        UsageError: an object that only executing a pickle would make.
    """
    if isinstance(value, FormedTensor):
        value = value.tensor
    if isinstance(value, LazyTensor):
        try:
            return files.tensor(value, copy=copy)
        except AnyckptError as error:
            error.path, error.tensor = error.path or path, error.tensor or name
            raise
    if isinstance(value, dict):
        made = {key: in_memory(item, f"{name}.{key}", files, path, copy=copy) for key, item in value.items()}
        return _with_versions(made, value)
    if type(value) in (list, tuple, set, frozenset):
        items = [in_memory(item, f"{name}.{index}", files, path, copy=copy) for index, item in enumerate(value)]
        return type(value)(items)
    if isinstance(value, _PLAIN):
        return value
    raise UsageError(
        f"{name.lstrip('.')} is an object that only executing a pickle would make",
        path=path,
        expected="tensors and plain data",
        found=repr(value)[:80],
        remedy="load the file with torch.load(weights_only=False) if you trust who wrote it",
    )


def _with_versions(made: dict[Any, Any], stored: Any) -> dict[Any, Any]:
    """A state dict says of its modules of which versions they are, which torch's loading hooks ask for."""
    versions = (
        stored.state.get("_metadata") if isinstance(stored, DictRecord) and isinstance(stored.state, dict) else None
    )
    if not isinstance(versions, dict):
        return made
    result = OrderedDict(made)
    result._metadata = versions  # type: ignore[attr-defined]
    return result


class Stored:
    """Makes of any value what our pickles hold: objects of other classes by their own pickling, as ``torch.save`` does.

    Nothing that a file says is executed for it: these are objects of this process, asked how they are pickled.
    """

    def __init__(self) -> None:
        self._live = Live()

    def value(self, value: Any, name: str = "", depth: int = 0) -> Any:
        """Lazy tensors for tensors, records for objects, plain data as it is.

        Args:
            value: what is to be saved.
            name: what to call it in messages.
            depth: how deep it lies.

        Raises:
            UsageError: a tensor without elements in memory, an object that cannot be pickled, or endless containers.
        """
        if depth > _DEEPEST:
            raise UsageError("containers are nested too deep, or hold themselves", expected=f"{_DEEPEST} levels")
        if isinstance(value, (torch.Tensor, np.ndarray, LazyTensor)):
            return self._tensor(value, name)
        if isinstance(value, Settings):
            value = plain(value)  # which plain torch loads without this package
        if type(value) in (dict, OrderedDict):
            items = {key: self.value(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
            if type(value) is dict:
                return items
            versions = getattr(value, "_metadata", None)
            return ordered_dict(items, metadata=None if versions is None else self.value(versions, name, depth + 1))
        if type(value) in (list, tuple):
            return type(value)(self.value(item, f"{name}.{index}", depth + 1) for index, item in enumerate(value))
        if type(value) in _PLAIN:
            return value
        if isinstance(value, torch.Size):
            return size(value)
        return self._object(value, name)

    def _tensor(self, value: Any, name: str) -> Any:
        try:
            if isinstance(value, np.ndarray):
                return self._object(value, name)
            return self._live.tensor(value)
        except AnyckptError as error:
            error.tensor = error.tensor or name.lstrip(".")
            raise

    def _object(self, value: Any, name: str) -> Any:
        tensors: list[Any] = []

        class Pickler(pickle.Pickler):
            def persistent_id(self, inner: Any) -> Any:
                if not isinstance(inner, torch.Tensor):
                    return None
                tensors.append(inner)
                return len(tensors) - 1

        buffer = io.BytesIO()
        try:
            Pickler(buffer, protocol=2).dump(value)
        except Exception as error:  # whatever an object's own pickling raises
            raise UsageError(
                f"{name.lstrip('.')} cannot be pickled: {str(error)[:120]}",
                found=type(value).__name__,
                remedy="keep it out of what is saved",
            ) from error
        return load(buffer.getvalue(), persistent_load=lambda index: self._tensor(tensors[index], name), name=name)


def warned(ignored: Mapping[str, str], path: str) -> str:
    """A sentence about what is left out."""
    return f"{path}: left out: {few((f'{name} ({reason})' for name, reason in ignored.items()), 5)}"
