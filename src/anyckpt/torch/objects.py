"""What is no tensor, between live Python objects and the inert records that checkpoints are written of and read as.

``Frozen`` is an object as it was: its pickle, with tensors beside it, which other ranks can be sent and which is read
back by the inert reader, so that objects of any class can be written.  ``Thawing`` makes live objects of what was
read.  It builds plain data, a few well-known classes, enumerations that the program has imported, and the classes that
it is told; a checkpoint that names anything else is refused by name, and nothing that it names is imported or called.
"""

from __future__ import annotations

import enum
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import xxhash

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import dtype
from anyckpt.errors import AnyckptError, UnsafeError, UsageError
from anyckpt.operations.steps.live import obstacle
from anyckpt.pickling import DictRecord, Global, Record, dumps, load
from anyckpt.pickling.numpy_values import rebuild
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor, Stored
from anyckpt.torch.memory import bytes_of
from anyckpt.views import TorchFiles

_SCALARS = (int, float, str, bool, type(None))
_TENSOR = "anyckpt tensor"


@dataclass(frozen=True)
class Frozen:
    """An object as it was at one moment.

    Attributes:
        data: its pickle, in which tensors are persistent ids.
        tensors: element type, shape and bytes of each.
    """

    data: bytes
    tensors: tuple[tuple[str, tuple[int, ...], bytes], ...] = ()

    def inert(self) -> Any:
        """The object as plain data, inert records and lazy tensors."""
        made = [
            Stored(MemorySource(data), 0, dtype(name), shape) if data else _empty(name, shape)
            for name, shape, data in self.tensors
        ]
        return load(self.data, persistent_load=lambda key: made[key[1]], name="an object of the state")

    def digest(self) -> int:
        """Equal for equal objects, whichever process has them."""
        written = dumps(self.inert(), stand_in=_identity_of)
        return xxhash.xxh3_64_intdigest(written)


def frozen(name: str, value: Any) -> Frozen:
    """An object as it is now.

    Raises:
        UsageError: it cannot be pickled.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(value)
    except AnyckptError as error:
        error.tensor = error.tensor or name
        raise
    except Exception as error:
        raise UsageError(
            "an object of the state cannot be pickled",
            tensor=name,
            found=f"{type(value).__name__}: {error}",
            remedy="leave it out, or keep what it consists of",
        ) from error
    return Frozen(buffer.getvalue(), tuple(pickler.tensors))


class _Pickler(pickle.Pickler):
    """Python's own, with tensors put aside."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=4)
        self.tensors: list[tuple[str, tuple[int, ...], bytes]] = []
        self._numbers: dict[int, tuple[str, int]] = {}
        self._kept: list[Any] = []

    def persistent_id(self, value: Any) -> tuple[str, int] | None:
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self._numbers:
            if hasattr(value, "device_mesh"):
                raise UsageError(
                    f"an object holds a {type(value).__name__} that only dictionaries and lists may hold",
                    remedy="put it into a dictionary of the state",
                )
            problem = obstacle(torch, value)
            if problem is not None:
                raise problem
            self._numbers[id(value)] = (_TENSOR, len(self.tensors))
            self._kept.append(value)
            plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
            data = bytes_of(plain).numpy().tobytes() if plain.numel() else b""
            self.tensors.append((dtype(plain.dtype).name, tuple(plain.shape), data))
        return self._numbers[id(value)]


def _empty(name: str, shape: tuple[int, ...]) -> LazyTensor:
    from anyckpt.tensor import Constant

    return Constant(dtype(name), shape)


def _identity_of(value: Any) -> Any:
    """What stands for a tensor where objects are compared."""
    return (value.dtype.name, value.shape, value.numpy().tobytes()) if isinstance(value, LazyTensor) else value


# -- and back ------------------------------------------------------------------------------------------------


class Thawing:
    """Makes live objects of what a checkpoint's reader gives.

    Args:
        classes: what may be built besides plain data and the well-known: classes and functions that the caller trusts
            with whatever arguments a file has for them.
    """

    def __init__(self, classes: Iterable[Any] = ()) -> None:
        trusted = {f"{one.__module__}.{one.__qualname__}": one for one in (*_known(), *classes)}
        self._trusted: Mapping[str, Any] = trusted
        self._files = TorchFiles()
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []

    def object(self, value: Any) -> Any:
        """The live object.

        Raises:
            UnsafeError: it is of a class that nobody allowed, or nested too deep.
        """
        try:
            return self._live(value)
        except RecursionError:
            raise UnsafeError("an object is nested too deep", expected="what Python can build") from None

    def _live(self, value: Any) -> Any:
        if isinstance(value, (*_SCALARS, bytes, complex)):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        self._kept.append(value)
        maker = _MAKERS.get(type(value))
        if maker is None:
            made = self._files.tensor(value, copy=True) if isinstance(value, LazyTensor) else value
        else:
            made = maker(self, value)
        self._made[id(value)] = made
        return made

    def _list(self, value: list[Any]) -> list[Any]:
        made: list[Any] = []
        self._made[id(value)] = made
        made.extend(map(self._live, value))
        return made

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        self._made[id(value)] = made
        made.update((self._live(key), self._live(inner)) for key, inner in value.items())
        return made

    def _dict_record(self, value: DictRecord) -> Any:
        made = self._call(value.type)(*map(self._live, value.args))
        self._made[id(value)] = made
        made.update((self._live(key), self._live(inner)) for key, inner in value.items())
        if value.state:
            self._set_state(made, self._live(value.state))
        return made

    def _record(self, value: Record) -> Any:
        plain = rebuild(value)
        if plain is not value:
            return plain
        arguments = tuple(map(self._live, value.args))
        call = self._call(value.type)
        keywords = self._live(value.kwargs) or {}
        made = call.__new__(call, *arguments, **keywords) if value.new else call(*arguments, **keywords)
        self._made[id(value)] = made
        if value.state is not None:
            self._set_state(made, self._live(value.state))
        for item in value.items or ():
            made.append(self._live(item))
        for key, inner in value.pairs or ():
            made[self._live(key)] = self._live(inner)
        return made

    def _global(self, value: Global) -> Any:
        if value.module == "torch" and isinstance(getattr(torch, value.name, None), (torch.dtype, torch.layout)):
            return getattr(torch, value.name)
        return self._call(value)

    def _call(self, name: Any) -> Any:
        path = name.path if isinstance(name, Global) else "?"
        found = self._trusted.get(path)
        if found is None and isinstance(name, Global):
            found = _enumeration(name)
        if found is None:
            raise UnsafeError(
                "an object of the checkpoint is of a class that is not built unasked",
                found=path,
                remedy="give the class in classes= if you trust the checkpoint",
            )
        return found

    def _set_state(self, made: Any, state: Any) -> None:
        if hasattr(made, "__setstate__"):
            made.__setstate__(state)
        elif isinstance(state, tuple) and len(state) == 2:
            for part in state:
                for key, inner in (part or {}).items():
                    setattr(made, key, inner)
        else:
            vars(made).update(state)


_MAKERS: dict[type, Callable[[Thawing, Any], Any]] = {
    list: Thawing._list,
    tuple: lambda thawing, value: tuple(map(thawing.object, value)),
    set: lambda thawing, value: set(map(thawing.object, value)),
    frozenset: lambda thawing, value: frozenset(map(thawing.object, value)),
    dict: Thawing._dict,
    DictRecord: Thawing._dict_record,
    Record: Thawing._record,
    Global: Thawing._global,
}


def _known() -> list[Any]:
    """Classes that do nothing but hold what they are given."""
    import argparse
    import collections
    import datetime
    import pathlib
    import types

    return [
        argparse.Namespace,
        types.SimpleNamespace,
        collections.OrderedDict,
        collections.defaultdict,
        collections.Counter,
        collections.deque,
        datetime.datetime,
        datetime.date,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
        pathlib.PurePosixPath,
        pathlib.PosixPath,
        pathlib.PureWindowsPath,
        torch.device,
        torch.Size,
        *(int, float, str, bool, list, dict, tuple, set),
    ]


def _enumeration(name: Global) -> Any:
    """An enumeration of a module that the program itself has imported."""
    found: Any = sys.modules.get(name.module)
    for part in name.name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, enum.EnumMeta) else None
