"""``io.json``: Fiddle's serialization of the calls that build a model and its trainer, as data in and out.

NeMo 2 records what was passed to each constructor and serializes these records with Fiddle.  Loading one in NeMo
imports and calls whatever it names; here the names are only names.

Source: Fiddle 0.3, ``fiddle/_src/experimental/serialization.py`` (version "0.0.1" of the serialization).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UnsafeError, UsageError

CONFIG = "fiddle._src.config"
_METADATA = "BuildableTraverserMetadata"
_VERSION = "0.0.1"
_TEXT_LIMIT = 16 << 20
_NODE_LIMIT = 100_000
_DEPTH_LIMIT = 100
_ATTRIBUTE = re.compile(r"^Attr\(name='(.*)'\)$", re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """A Python object that is named, not called: a dtype, a function, a class, a member of an enumeration."""

    module: str
    name: str

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """A constructor or function with the arguments that were passed to it.

    Attributes:
        function: what is called.
        arguments: by name, in the order in which they were passed.
        node: the class of the record: Fiddle's or NeMo-Run's ``Config``, their ``Partial``, or a NeMo class itself.
    """

    function: Reference
    arguments: dict[str, Any] = field(default_factory=dict)
    node: Reference = Reference(CONFIG, "Config")

    @property
    def is_partial(self) -> bool:
        return self.node.name == "Partial"


@dataclass(eq=False)
class Other:
    """An object of another type that Fiddle can take apart (a set, bytes, a pickle file's name)."""

    type: Reference
    items: list[Any]


# -- reading ---------------------------------------------------------------------------------------------------


def decode(data: bytes, name: str) -> Any:
    """The root of an ``io.json``: ``Call``, ``Reference``, ``Other``, dicts, lists, tuples and JSON's scalars.

    What the file refers to twice is one object in the result.

    Args:
        data: the file's contents.
        name: what to call it in messages.

    Raises:
        FormatError: it is empty, not JSON, or not a Fiddle serialization.
        UnsafeError: it is too large or too deep, or an object contains itself.
    """
    if not data.strip():
        raise FormatError(
            "is empty: NeMo stopped while it wrote the context (it does with transformers 5)",
            path=name,
            remedy="export again with transformers 4, or open the weights directory by itself",
        )
    if len(data) > _TEXT_LIMIT:
        raise UnsafeError("is too large", path=name, expected=f"at most {_TEXT_LIMIT} bytes", found=len(data))
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not valid JSON: {error}", path=name, remedy="copy it again from its origin") from error
    if not isinstance(value, dict) or not isinstance(value.get("objects"), dict) or "root" not in value:
        raise FormatError("is not a Fiddle serialization", path=name, expected="root and objects")
    return _Decoder(value["objects"], name).value(value["root"], 0)


class _Decoder:
    def __init__(self, objects: dict[str, Any], name: str) -> None:
        self._objects = objects
        self._name = name
        self._done: dict[str, Any] = {}
        self._open: set[str] = set()

    def value(self, item: Any, depth: int) -> Any:
        if depth > _DEPTH_LIMIT:
            raise UnsafeError("is nested too deeply", path=self._name, expected=f"at most {_DEPTH_LIMIT} levels")
        if isinstance(item, list):
            return [self.value(part, depth + 1) for part in item]
        if not isinstance(item, dict):
            return item
        kind = item.get("type")
        if kind == "leaf":
            leaf = item.get("value")
            return leaf if not isinstance(leaf, (dict, list)) else self._bad("a leaf holds a container", leaf)
        if kind == "pyref":
            return self._reference(item)
        if kind == "ref":
            return self._referred(item.get("key"), depth)
        return self._object(item, depth)

    def _referred(self, key: Any, depth: int) -> Any:
        if not isinstance(key, str) or key not in self._objects:
            return self._bad("refers to an object that is missing", key)
        if key in self._done:
            return self._done[key]
        if key in self._open:
            raise UnsafeError(f"the object {key!r} contains itself", path=self._name)
        self._open.add(key)
        self._done[key] = self.value(self._objects[key], depth + 1)
        self._open.discard(key)
        return self._done[key]

    def _reference(self, item: Any) -> Reference:
        if isinstance(item, dict) and item.get("type") == "pyref":
            module, name = item.get("module"), item.get("name")
            if isinstance(module, str) and isinstance(name, str):
                return Reference(module, name)
        raise self._error("a Python reference is malformed", item)

    def _object(self, item: dict[str, Any], depth: int) -> Any:
        kind = self._reference(item.get("type"))
        pairs = item.get("items")
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
        ):
            return self._bad("an object's items are malformed", pairs)
        values = [self.value(pair[1], depth + 1) for pair in pairs]
        if kind in (Reference("builtins", "tuple"), Reference("builtins", "list")):
            return tuple(values) if kind.name == "tuple" else values
        metadata = item.get("metadata")
        if kind == Reference("builtins", "dict"):
            keys = self.value(metadata, depth + 1)
            if not isinstance(keys, (tuple, list)) or len(keys) != len(values) or not _are_scalars(keys):
                return self._bad("a dict's keys are malformed", keys)
            return dict(zip(keys, values, strict=True))
        function = self._function(metadata)
        if function is None:
            return Other(kind, values)
        arguments: dict[str, Any] = {}
        for (element, _), value in zip(pairs, values, strict=True):
            found = _ATTRIBUTE.match(element)
            arguments[found[1] if found else element] = value
        return Call(function, arguments, kind)

    def _function(self, metadata: Any) -> Reference | None:
        """What a record calls, which its metadata says."""
        if isinstance(metadata, dict) and metadata.get("type") == "ref":
            key = metadata.get("key")
            metadata = self._objects.get(key) if isinstance(key, str) else None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("type"), dict):
            return None
        if metadata["type"].get("name") != _METADATA or not isinstance(metadata.get("items"), list):
            return None
        for pair in metadata["items"]:
            if isinstance(pair, list) and len(pair) == 2 and pair[0] == "Attr(name='fn_or_cls')":
                return self._reference(pair[1])
        return None

    def _error(self, problem: str, found: Any) -> FormatError:
        return FormatError(problem, path=self._name, found=repr(found)[:100])

    def _bad(self, problem: str, found: Any) -> Any:
        raise self._error(problem, found)


def _are_scalars(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, (str, int, float)) for value in values)


# -- as plain data ---------------------------------------------------------------------------------------------


def to_plain(node: Any, name: str) -> Any:
    """As NeMo's ``model.yaml`` spells it: ``{"_target_": ..., **arguments}``; references with ``"_call_": False``.

    Raises:
        UnsafeError: shared objects expand to too much.
    """
    budget = itertools.count(1)

    def plain(value: Any) -> Any:
        if next(budget) > _NODE_LIMIT:
            raise UnsafeError("expands to too many values", path=name, expected=f"at most {_NODE_LIMIT}")
        if isinstance(value, Reference):
            return {"_target_": value.target, "_call_": False}
        if isinstance(value, Call):
            partial = {"_partial_": True} if value.is_partial else {}
            arguments = {key: plain(item) for key, item in value.arguments.items()}
            return {"_target_": value.function.target, **partial, **arguments}
        if isinstance(value, Other):
            return {"_type_": value.type.target, "items": [plain(item) for item in value.items]}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(node)


UNKNOWN = object()
"""What ``from_plain`` gives for a value that ``model.yaml`` does not hold (a member of an enumeration)."""


def from_plain(value: Any) -> Any:
    """What ``to_plain`` came from: ``Call`` and ``Reference`` where there is a ``_target_``."""
    if isinstance(value, dict):
        target = value.get("_target_")
        if not isinstance(target, str):
            return {key: from_plain(item) for key, item in value.items()}
        if value.get("_call_") is False:
            return reference(target)
        if value.get("_call_") is True and len(value) == 2:
            return UNKNOWN
        node = Reference(CONFIG, "Partial" if value.get("_partial_") is True else "Config")
        arguments = {k: from_plain(item) for k, item in value.items() if k not in ("_target_", "_partial_", "_call_")}
        return Call(reference(target), {k: item for k, item in arguments.items() if item is not UNKNOWN}, node)
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return value


def reference(target: str) -> Reference:
    """A dotted name divided into module and name: the name begins at the first class, else is the last part."""
    parts = target.split(".")
    first = next((i for i, part in enumerate(parts) if i and part[:1].isupper()), len(parts) - 1)
    return Reference(".".join(parts[:first]), ".".join(parts[first:]))


# -- writing ---------------------------------------------------------------------------------------------------

Path = str


def encode(root: Any) -> str:
    """``io.json`` of a tree as ``decode`` gives it, as Fiddle's ``dump_json`` writes it.

    Raises:
        UsageError: the tree holds what Fiddle cannot serialize.
    """
    return json.dumps(_Encoder(root).result())


class _Encoder:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._paths: dict[Any, list[Path]] = {}
        self._objects: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._names: dict[Any, str] = {}
        for value, path in _walk(root, "<root>"):
            if _has_identity(value):
                self._paths.setdefault(_identity(value), []).append(path)

    def result(self) -> dict[str, Any]:
        root = self._value(self._root, ["<root>"])
        return {"root": root, "objects": self._objects, "refcounts": self._counts, "version": _VERSION}

    def _value(self, value: Any, paths: list[Path]) -> Any:
        """A value and where it is reached from; the paths of what has an identity are all those in the tree."""
        known = self._names.get(_identity(value)) if _has_identity(value) else None
        if known is not None:
            return self._refer(known)
        if _has_identity(value):
            paths = self._paths[_identity(value)]
        if isinstance(value, Reference):
            return {**_pyref(value), "paths": paths}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"type": "leaf", "value": value, "paths": paths}
        items = [[element, self._value(item, [path + step for path in paths])] for element, step, item in _items(value)]
        if isinstance(value, Call):
            kind, hint = value.node, value.function.name.rpartition(".")[2]
            metadata = self._call_metadata(value)
        elif isinstance(value, dict):
            kind, hint = Reference("builtins", "dict"), "dict"
            metadata = self._plain_tuple(tuple(value))
        elif isinstance(value, (list, tuple)):
            kind, hint = Reference("builtins", type(value).__name__), type(value).__name__
            metadata = None
        else:
            raise UsageError(f"a {type(value).__name__} cannot be part of NeMo's io.json")
        body = {"type": _pyref(kind), "items": items, "metadata": metadata, "paths": paths}
        return self._store(hint, body, _identity(value)) if _has_identity(value) else body

    def _call_metadata(self, call: Call) -> Any:
        function = Reference(CONFIG, _METADATA)
        items = [
            ["Attr(name='fn_or_cls')", _pyref(call.function)],
            ["Attr(name='argument_names')", self._plain_tuple(tuple(call.arguments))],
            ["Attr(name='argument_tags')", self._empty_dict()],
            ["Attr(name='argument_history')", self._empty_dict()],
        ]
        body = {"type": _pyref(function), "items": items, "metadata": _pyref(function)}
        return self._store(_METADATA, body)

    def _plain_tuple(self, values: tuple[Any, ...]) -> Any:
        """A tuple of scalars in metadata, where values have no paths; the empty tuple has no identity."""
        kind = _pyref(Reference("builtins", "tuple"))
        items = [[f"Index(index={index})", value] for index, value in enumerate(values)]
        body = {"type": kind, "items": items, "metadata": None}
        return self._store("tuple", body) if values else body

    def _empty_dict(self) -> Any:
        kind = _pyref(Reference("builtins", "dict"))
        return self._store("dict", {"type": kind, "items": [], "metadata": self._plain_tuple(())})

    def _store(self, hint: str, body: dict[str, Any], identity: Any = None) -> dict[str, Any]:
        words = re.sub(r"(?<=[^_A-Z])(?=[A-Z])", "_", hint).lower()
        name = next(name for i in itertools.count(1) if (name := f"{words}_{i}") not in self._objects)
        self._objects[name] = body
        if identity is not None:
            self._names[identity] = name
        return self._refer(name)

    def _refer(self, name: str) -> dict[str, Any]:
        self._counts[name] = self._counts.get(name, 0) + 1
        return {"type": "ref", "key": name}


def _pyref(value: Reference) -> dict[str, str]:
    return {"type": "pyref", "module": value.module, "name": value.name}


def _has_identity(value: Any) -> bool:
    """Whether Fiddle tells two equal ones apart: not scalars, nor the empty tuple, which Python may share."""
    return isinstance(value, (Reference, Call, dict, list)) or (isinstance(value, tuple) and bool(value))


def _identity(value: Any) -> Any:
    return value if isinstance(value, Reference) else id(value)


def _items(value: Any) -> Iterator[tuple[str, Path, Any]]:
    """Path element, its spelling in a path, and value, of everything directly inside a value."""
    if isinstance(value, Call):
        for name, item in value.arguments.items():
            yield f"Attr(name={name!r})", f".{name}", item
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"Key(key={key!r})", f"[{key!r}]", item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield f"Index(index={index})", f"[{index}]", item


def _walk(root: Any, path: Path) -> Iterator[tuple[Any, Path]]:
    yield root, path
    for _, step, item in _items(root):
        yield from _walk(item, path + step)
