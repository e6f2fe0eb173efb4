"""Nested objects as a flat table of names, and back.

A name is the path of dictionary keys, list indices and record fields, joined by dots.  Two paths can give one name
(``{"a.b": x, "a": {"b": y}}``); the second is then called ``a.b#2``.  A bare tensor is called ``tensor``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from typing import Any

from anyckpt.checkpoint import CompositeTensor
from anyckpt.containers.torch_file import modules
from anyckpt.containers.torch_file.containers import rebuilt
from anyckpt.containers.torch_file.values import DistributedTensor, MetaTensor, SparseTensor, Storage, spelled
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.pickling import Record
from anyckpt.pickling.plain import record_parts
from anyckpt.tensor import LazyTensor

Path = tuple[str | int, ...]

_LEAVES = (LazyTensor, Storage, DistributedTensor, MetaTensor, CompositeTensor)
_CONTAINERS = (dict, list, tuple, Record)
_DEEPEST = 500
_REPEATS = 64


@dataclass
class Flat:
    """A nested object as tables.

    Attributes:
        tensors: every tensor by name, in stored order; the parts of a sparse, quantized or nested tensor by its name
            and theirs (``w.indices``), a storage saved by itself as one axis, of a ``DTensor`` the local part.
        objects: everything else: the largest parts that hold no tensor, and tensors of several parts whole.
        paths: name of each tensor (but not the parts of one) and each object -> keys and indices that lead to it; keys
            that are not strings are spelled as such.
        original_keys: path of a dictionary item whose key is not a string -> the key.
        renamed: names that had to be told apart.
        unpacked: dotted names of the classes whose instances hold tensors, and are shown as dictionaries.
        distributed: by name, what each local part of a ``DTensor`` is a part of.
        modules: path of each module that was pickled whole -> its class, and those of the modules in it.
        beside: paths of what a pickled module holds besides what its ``state_dict()`` gives.
        optimizers: paths of the states of optimizers, with tensors or without.
        containers: path -> what holds tensors there.
        leaves: name of a tensor -> the storage or ``DTensor`` of which it is the elements.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    original_keys: dict[Path, Any] = field(default_factory=dict)
    renamed: list[str] = field(default_factory=list)
    unpacked: list[str] = field(default_factory=list)
    distributed: dict[str, DistributedTensor] = field(default_factory=dict)
    modules: dict[Path, list[str]] = field(default_factory=dict)
    beside: set[Path] = field(default_factory=set)
    optimizers: list[Path] = field(default_factory=list)
    containers: dict[Path, Any] = field(default_factory=dict)
    leaves: dict[str, Any] = field(default_factory=dict)

    def _name(self, path: Path) -> str:
        plain = ".".join(map(str, path)) or "tensor"
        name, number = plain, 1
        while name in self.paths or name in self.tensors:
            number += 1
            name = f"{plain}#{number}"
        if number > 1:
            self.renamed.append(name)
        self.paths[name] = path
        return name

    def _add(self, path: Path, leaf: Any) -> None:
        name = self._name(path)
        if isinstance(leaf, CompositeTensor):
            self.objects[name] = leaf
            for part, tensor in leaf.part_tensors().items():
                inner = self._name((*path, part))
                del self.paths[inner]
                self.tensors[inner] = tensor
        elif isinstance(leaf, MetaTensor):
            self.objects[name] = leaf
        elif isinstance(leaf, Storage):
            self.tensors[name] = leaf.tensor()
            self.leaves[name] = leaf
        elif isinstance(leaf, DistributedTensor):
            self.tensors[name] = leaf.local
            self.distributed[name] = leaf
            self.leaves[name] = leaf
        else:
            self.tensors[name] = leaf


def flatten(root: Any, name: str) -> Flat:
    """The tables of a nested object.

    Args:
        root: as ``read_torch`` gives it.
        name: the file's, for messages.

    Raises:
        FormatError: tensors are nested more than 500 levels deep.
        UnsafeError: shared containers repeat the tensors endlessly.
    """
    flat = Flat()
    if isinstance(root, _LEAVES):
        flat._add((), root)
        return flat
    holders, distinct = _holders(root, name)
    if _is_optimizer(root):
        flat.optimizers.append(())
    if id(root) not in holders:
        if not isinstance(root, dict):
            flat.objects["object"], flat.paths["object"] = root, ()
        else:
            for key, value in _children(root, (), flat, name):
                flat.objects[flat._name((key,))] = value
                if _is_optimizer(value):
                    flat.optimizers.append((key,))
        return flat
    path: list[str | int] = []
    active = [id(root)]
    flat.containers[()] = root
    todo: list[Iterator[tuple[str | int, Any]]] = [_children(root, (), flat, name)]
    while todo:
        step = next(todo[-1], None)
        if step is None:
            todo.pop()
            active.pop()
            if path:
                path.pop()
            continue
        key, child = step
        here = (*path, key)
        if _is_optimizer(child):
            flat.optimizers.append(here)
        if isinstance(child, _LEAVES):
            flat._add(here, child)
            if len(flat.tensors) > 1000 + _REPEATS * distinct:
                raise UnsafeError("shared containers repeat a few tensors endlessly", path=name)
        elif id(child) not in holders:
            if here not in flat.beside:
                flat.objects[flat._name(here)] = child
        elif id(child) not in active:
            if len(path) >= _DEEPEST:
                raise FormatError("tensors are nested too deep", path=name, expected=f"at most {_DEEPEST} levels")
            path.append(key)
            active.append(id(child))
            flat.containers[here] = child
            todo.append(_children(child, here, flat, name))
    return flat


def _is_optimizer(value: Any) -> bool:
    """Whether a value is ``torch.optim.Optimizer.state_dict()`` or an optimizer pickled whole."""
    fields = value.fields() if isinstance(value, Record) else value
    groups = fields.get("param_groups") if isinstance(fields, dict) else None
    if not isinstance(groups, (list, tuple)) or not groups:
        return False
    return all(isinstance(group, dict) and ("params" in group or "lr" in group) for group in groups)


def _children(container: Any, path: Path, flat: Flat, file: str) -> Iterator[tuple[str | int, Any]]:
    """What a container holds, with the last element of its path; notes keys and classes that the path does not tell."""
    if isinstance(container, (list, tuple)):
        yield from enumerate(container)
    elif modules.module_fields(container) is not None:
        flat.modules[path] = modules.classes(container)
        for entry in modules.state_dict(container, file):
            if not entry.persistent:
                flat.beside.add((*path, entry.name))
            yield entry.name, entry.value
    elif isinstance(container, Record):
        if container.path not in flat.unpacked:
            flat.unpacked.append(container.path)
        for key, value in record_parts(container):
            yield spelled(key), value
    else:
        used: set[str] = set()
        for key, value in container.items():
            name = key
            if type(key) is not str:
                name, number = spelled(key), 1
                while name in container or name in used:
                    number += 1
                    name = f"{spelled(key)}#{number}"
                used.add(name)
                where: Path = (*path, name)
                flat.original_keys[where] = key
            yield name, value


def _holders(root: Any, file: str) -> tuple[set[int], int]:
    """Identities of the containers that hold a tensor at any depth, and how many tensors there are."""
    parents: dict[int, list[int]] = {id(root): []}
    found: list[int] = []
    tensors: set[int] = set()
    todo = [root] if isinstance(root, _CONTAINERS) else []
    while todo:
        container = todo.pop()
        for _, child in _children(container, (), Flat(), file):
            if isinstance(child, _LEAVES):
                found.append(id(container))
                tensors.add(id(child))
            elif isinstance(child, _CONTAINERS):
                if id(child) not in parents:
                    parents[id(child)] = []
                    todo.append(child)
                parents[id(child)].append(id(container))
    holders: set[int] = set()
    while found:
        holder = found.pop()
        if holder not in holders:
            holders.add(holder)
            found.extend(parents[holder])
    return holders, len(tensors)


class _Node:
    """A container under construction."""

    __slots__ = ("children", "indexed", "path", "result")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.children: dict[Any, Any] = {}
        self.indexed = True
        self.result: Any = None


def unflatten(
    values: Mapping[str, Any],
    paths: Mapping[str, Path],
    original_keys: Mapping[Path, Any],
    containers: Mapping[Path, Any] | None = None,
) -> Any:
    """The nested object that has each value at its path: dictionaries, and lists where all keys are indices.

    Indices that are missing, because a tensor was left out, are closed up.

    Args:
        values: what to put together, by name.
        paths: name -> path, for every name in ``values``.
        original_keys: path -> key, where the key is not the path's last element.
        containers: path -> what was there, of whose kind the new container is to be; what was one object in several
            places is one again.

    Raises:
        FormatError: two paths contradict each other.
    """
    root = _Node(())
    nodes = [root]
    for name, value in values.items():
        path, node = paths[name], root
        if not path:
            return value
        for depth, step in enumerate(path, 1):
            key = original_keys.get(path[:depth], step)
            node.indexed = node.indexed and type(step) is int
            if depth == len(path):
                if key in node.children:
                    raise FormatError(f"the path of {name!r} leads to another value too")
                node.children[key] = value
                continue
            child = node.children.setdefault(key, _Node(path[:depth]))
            if not isinstance(child, _Node):
                raise FormatError(f"the path of {name!r} leads through another value")
            if not child.children:
                nodes.append(child)
            node = child
    once: dict[int, list[tuple[dict[Any, int], Any]]] = {}
    for node in reversed(nodes):
        built = {key: v.result if isinstance(v, _Node) else v for key, v in node.children.items()}
        original = (containers or {}).get(node.path)
        if original is None or modules.module_fields(original) is not None:
            node.result = [built[index] for index in sorted(built)] if node.indexed and built else built
            continue
        made = once.setdefault(id(original), [])
        parts = {key: id(part) for key, part in built.items()}
        node.result = next((result for known, result in made if known == parts), None)
        if node.result is None:
            node.result = rebuilt(original, built)
            made.append((parts, node.result))
    return root.result


def with_parts(value: Any, parts: Mapping[str, LazyTensor]) -> Any:
    """The same with other tensors for its parts."""
    return replace(value, parts=dict(parts)) if isinstance(value, SparseTensor) else replace(value, **parts)
