"""Gives tensors that are written the forms that they had: kinds, strides, the storages that they share.

What cannot be given back is named in notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import storage_key
from anyckpt.containers.torch_file.flatten import Path
from anyckpt.containers.torch_file.forms import Forms, container_name, differ, waste
from anyckpt.containers.torch_file.values import FormedTensor, QuantizedTensor, Storage, usual
from anyckpt.data_classes import dataclass
from anyckpt.errors import few
from anyckpt.tensor import LazyTensor, Stored

_SHOWN = 5


class Former:
    """Gives tensors the forms that they had.

    Args:
        tensors: by name, those to write, as they were read or computed from what was.
        forms: of the file.
        prefix: what the file's names begin with before these.

    Attributes:
        notes: what cannot be given back, after all were asked for.
        formed: descriptions' names of what was given back, or is told in notes.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], forms: Forms, prefix: str = "") -> None:
        self._forms = forms
        self._prefix = prefix
        self._made: dict[int, tuple[LazyTensor, FormedTensor]] = {}
        self._changed: dict[str, list[str]] = {}
        self._formed_names: set[str] = set()
        full = {prefix + name: tensor for name, tensor in tensors.items()}
        read = {name: tensor for name, tensor in full.items() if self._is_as_read(name, tensor)}
        self._places = dict(_places(read, forms))
        self._parted = _in_views_of_storages(read, forms)
        self._as_read = read.keys()
        self._sharing = _sharing(full, forms)

    def _is_as_read(self, name: str, tensor: LazyTensor) -> bool:
        return name in self._forms.tensors and self._forms.tensors[name][0] is tensor

    def form(self, name: str, value: Any) -> Any:
        """What to write for a value: itself if it has no form of its own."""
        name = self._prefix + name
        self._formed_names.add(name)
        if name in self._forms.leaves:
            tensor, leaf = self._forms.leaves[name]
            if value is tensor:
                return leaf
            self._note(f"a {'storage' if isinstance(leaf, Storage) else 'DTensor'} becomes a plain tensor", name)
        if isinstance(value, QuantizedTensor):
            said = self._forms.tensors.get(f"{name}.int_repr")
            if said is not None and differ(value.shape, said[1].strides, usual(value.shape)):
                self._note("the strides of a quantized tensor become those of C order", name)
        if not isinstance(value, LazyTensor) or name not in self._forms.tensors:
            return value
        known = self._made.get(id(value))
        if known is None:
            known = self._made[id(value)] = (value, self._formed(name, value))
        return known[1]

    def _formed(self, name: str, tensor: LazyTensor) -> FormedTensor:
        facts = self._forms.tensors[name][1]
        if facts.conjugate or facts.negative:
            self._note("a lazy conjugate or negative is resolved", name)
        if not facts.location.startswith(("cpu", "meta")):
            self._note(f"is written as the CPU's, not that of {facts.location[:20]}", name)
        if facts.storage in self._parted:
            self._note("shares its storage through a view of it, which the copy does not keep", name)
        placed = self._places.get(name)
        if placed is not None:
            return FormedTensor(tensor, placed[0], placed[1], facts.strides, facts)
        held, strides = _alone(tensor, facts.strides)
        why = "most of its storage is shown by no tensor" if name in self._as_read else "its elements are computed"
        if facts.storage and differ(tensor.shape, facts.strides, strides):
            self._note(f"its strides change, for {why}", name)
        if name in self._sharing and name not in self._as_read:
            self._note(f"shares its storage no longer, for {why}", name)
        return FormedTensor(tensor, held, 0, strides, facts)

    def _note(self, text: str, name: str) -> None:
        self._changed.setdefault(text, []).append(name)

    def containers(self, paths: Iterable[Path], base: Path = ()) -> dict[Path, Any]:
        """The containers from ``base`` on, by their path in it, which the caller makes again around values at paths."""
        held = {path[:depth] for path in paths for depth in range(len(base), len(path))}
        below = {path: value for path, value in self._forms.containers.items() if path[: len(base)] == base}
        self._formed_names.update(container_name(path) for path in below if path in held)
        return {path[len(base) :]: value for path, value in below.items()}

    @property
    def formed(self) -> frozenset[str]:
        return frozenset(self._formed_names)

    @property
    def notes(self) -> list[str]:
        return [_note(text, names) for text, names in self._changed.items()]


def _sharing(tensors: Mapping[str, LazyTensor], forms: Forms) -> frozenset[str]:
    """Names of tensors whose storage is that of others too, which are not the same view of it."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name in forms.tensors and forms.tensors[name][1].storage:
            read, facts = forms.tensors[name]
            groups.setdefault((facts.storage, read.dtype.name), {})[name] = storage_key(tensor) or name
    return frozenset(name for group in groups.values() if len({*group.values()}) > 1 for name in group)


def _note(text: str, names: Sequence[str]) -> str:
    return f"{few(names, _SHOWN)}: {text}"


@dataclass(frozen=True)
class _View:
    """A tensor as a view of its storage.

    Attributes:
        name: the tensor's.
        first: element of the storage that is its first one.
        end: one more than its last one.
        count: elements of the storage that it shows.
    """

    name: str
    first: int
    end: int
    count: int


def _places(tensors: Mapping[str, LazyTensor], forms: Forms) -> Iterator[tuple[str, tuple[LazyTensor, int]]]:
    """What to store of each tensor's storage, and where in it the tensor begins; nothing for those best alone."""
    groups: dict[tuple[str, str], list[_View]] = {}
    shown: dict[str, dict[Any, int]] = {}
    for name, tensor in tensors.items():
        facts = forms.tensors[name][1]
        if type(tensor).__name__ == "Mapped" or not isinstance(tensor, Stored) or facts.storage not in forms.storages:
            continue
        pairs = [(n, stride) for n, stride in zip(tensor.shape, facts.strides, strict=True) if n > 1 and stride]
        count = 1
        for n, _ in pairs:
            count *= n
        end = facts.offset + 1 + sum((n - 1) * stride for n, stride in pairs) if tensor.size else facts.offset
        view = _View(name, facts.offset, end, count if tensor.size else 0)
        groups.setdefault((facts.storage, tensor.dtype.name), []).append(view)
        seen = shown.setdefault(facts.storage, {})
        seen[facts.offset, facts.strides, tensor.shape] = view.count * tensor.dtype.itemsize
    whole = not waste(shown, {key: forms.storages[key] for key in shown})
    bare = {leaf.key for _, leaf in forms.leaves.values() if isinstance(leaf, Storage)}
    for (key, _), views in groups.items():
        storage, kind = forms.storages[key], tensors[views[0].name].dtype
        if storage.source is None:
            continue
        total = storage.nbytes // kind.itemsize
        for first, end, members in [(0, total, views)] if whole or key in bare else _clusters(views):
            used = sum({(view.first, view.end): view.count for view in members}.values())
            if end <= first or (not (whole or key in bare) and 2 * used < end - first):
                continue
            held = Stored(storage.little_endian(kind), first * kind.itemsize, kind, (end - first,))
            yield from ((view.name, (held, view.first - first)) for view in members)


def _in_views_of_storages(tensors: Mapping[str, LazyTensor], forms: Forms) -> frozenset[str]:
    """Keys of storages that are views of others (torch's old streams have such) and of bytes that others show too."""
    spans: dict[str, tuple[str, int, int]] = {}
    for name, tensor in tensors.items():
        key = forms.tensors[name][1].storage
        if isinstance(tensor, Stored) and key and key not in spans:
            where, start = tensor.source.place()
            spans[key] = (str(where), start, start + tensor.source.size)
    found: set[str] = set()
    if spans.keys() <= forms.storages.keys():
        return frozenset()
    before = ("", 0, "")
    for key, (where, start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if where == before[0] and start < before[1]:
            found |= {key, before[2]} - forms.storages.keys()
        before = max(before, (where, end, key)) if where == before[0] else (where, end, key)
    return frozenset(found)


def _clusters(views: Sequence[_View]) -> Iterator[tuple[int, int, list[_View]]]:
    """Views that overlap, together."""
    members: list[_View] = []
    end = 0
    for view in sorted(views, key=lambda each: (each.first, each.end)):
        if members and view.first >= end:
            yield members[0].first, end, members
            members = []
        end = max(end, view.end) if members else view.end
        members.append(view)
    if members:
        yield members[0].first, end, members


def _alone(tensor: LazyTensor, strides: Sequence[int]) -> tuple[LazyTensor, tuple[int, ...]]:
    """What to store of a tensor by itself, and strides: axes in the order that they have, repeated ones stored once."""
    if not tensor.size or len(strides) != tensor.ndim:
        return tensor, usual(tensor.shape)
    repeated = [n > 1 and stride == 0 for n, stride in zip(tensor.shape, strides, strict=True)]
    lengths = tuple(1 if again else n for n, again in zip(tensor.shape, repeated, strict=True))
    order = sorted(range(tensor.ndim), key=lambda axis: (-strides[axis] if lengths[axis] > 1 else 0, axis))
    held = tensor.box((0,) * tensor.ndim, lengths) if any(repeated) else tensor
    steps = dict(zip(order, usual(tuple(lengths[axis] for axis in order)), strict=True))
    found = tuple(
        0 if again else strides[axis] if tensor.shape[axis] == 1 else steps[axis] for axis, again in enumerate(repeated)
    )
    return (held if order == sorted(order) else held.permute(order)), found
