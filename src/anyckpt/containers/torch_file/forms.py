"""What a torch file says besides elements and plain data, kept so that the same objects are written again.

Tensors that share a storage share it in the copy, with their offsets and strides; parameters, gradients asked for,
attributes and subclasses are written back, and so are tuples, subclasses of dictionaries and objects that hold tensors.
What is not is named in notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anyckpt.checkpoint import ObjectForms
from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.flatten import Flat, Path
from anyckpt.containers.torch_file.modules import module_fields
from anyckpt.containers.torch_file.values import FormedTensor, QuantizedTensor, Storage, TensorFacts
from anyckpt.pickling import DictRecord, Record
from anyckpt.pickling.torch_objects import ORDERED_DICT, ordered_dict
from anyckpt.tensor import LazyTensor, Stored

CONTAINER = " (container)"
"""What the name of a container ends with in descriptions."""
ROOT = "the file"
"""What its outermost container is called there."""
WASTE = 1024
"""Bytes of storages that no tensor shows, from which on they are left out if they are a tenth of all, too."""

_SHOWN = 5


@dataclass(frozen=True)
class Forms(ObjectForms):
    """The forms of a torch file's objects.

    Attributes:
        containers: path -> the container there, for all that hold tensors.
        leaves: name -> the tensor as it was read, and the storage or ``DTensor`` of which it is the elements.
        tensors: name -> the tensor as it was read, and what the file says of it.
        storages: by key.
    """

    containers: Mapping[Path, Any] = field(default_factory=dict)
    leaves: Mapping[str, tuple[LazyTensor, Any]] = field(default_factory=dict)
    tensors: Mapping[str, tuple[LazyTensor, TensorFacts]] = field(default_factory=dict)
    storages: Mapping[str, Storage] = field(default_factory=dict)

    def described(self) -> dict[str, str]:
        """As the base says."""
        words = {
            name: ", ".join(f"{kind} {detail}".rstrip() for kind, detail in said)
            for name, said in self.particulars().items()
        }
        for path, container in self.containers.items():
            kind = _kind(container)
            if kind is not None:
                words[container_name(path)] = kind
        return words

    def particulars(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """As the base says."""
        found: dict[str, tuple[tuple[str, str], ...]] = {}
        first: dict[tuple[str, str], str] = {}
        for name, (tensor, facts) in self.tensors.items():
            said = [("Parameter", "")] if facts.parameter else []
            said += [(facts.subclass, "")] if facts.subclass else []
            said += [("requires_grad", "")] if facts.requires_grad else []
            if tensor.size and facts.strides and _differ(tensor.shape, facts.strides, _usual(tensor.shape)):
                said.append(("strides", str(facts.strides)))
            said += [("attribute", key) for key in facts.attributes]
            if facts.storage:
                holder = first.setdefault((facts.storage, tensor.dtype.name), name)
                said += [("shared storage", f"with {holder}")] if holder != name else []
            if said:
                found[name] = tuple(said)
        for name, (_, leaf) in self.leaves.items():
            found[name] = (("bare storage" if isinstance(leaf, Storage) else "DTensor", ""),)
        for path, container in self.containers.items():
            kind = _kind(container)
            if isinstance(container, DictRecord) and container.type == ORDERED_DICT:
                kind = "versions of modules" if _has_versions(container) else None
            if kind is not None and module_fields(container) is None:  # of a module the reader tells what is left out
                found[container_name(path)] = ((kind, ""),)
        return found

    def holds(self, container: str, tensors: Iterable[str]) -> bool:
        """As the base says."""
        holder = container.removesuffix(CONTAINER)
        return holder == ROOT or any(name.startswith(f"{holder}.") for name in tensors)


def container_name(path: Path) -> str:
    """What a container is called in descriptions."""
    return f"{'.'.join(map(str, path)) or ROOT}{CONTAINER}"


def _has_versions(state_dict: DictRecord) -> bool:
    """Whether a state dict says of its modules what torch does not take to be so when nothing is said.

    Modules are of version 1 unless their class says otherwise.  Batch norms are of version 2, which is to say that they
    count batches; torch 2.13 looks at it only where the counter is missing.
    """
    fields = state_dict.state
    versions = fields.get("_metadata") if isinstance(fields, dict) else None
    if not isinstance(versions, dict):
        return False
    odd = (module for module, said in versions.items() if said != {"version": 1})
    return any(f"{module}.num_batches_tracked".lstrip(".") not in state_dict for module in odd)


def attached(flat: Flat, weights: Iterable[str]) -> frozenset[str]:
    """Names of objects that are parts of what holds weights.

    These lie beside weights in a tuple, in an object that is no module, or in a state dict under the name of a module
    that has weights there: torch's quantized modules put their types so.

    Args:
        flat: what was read.
        weights: full names.
    """
    found = [path for name in weights if (path := _of_whole(name, flat))]
    held = {path[:depth] for path in found for depth in range(len(path))}
    whole = {path for path in held if _is_whole(flat, path)}
    modules = {
        (path[:depth], module) for path in found for depth in range(len(path)) for module in _module(path[depth])
    }
    paths = ((name, flat.paths.get(name, ())) for name in flat.objects)
    return frozenset(
        name
        for name, path in paths
        if any(path[:depth] in whole for depth in range(len(path)))
        or any((path[:-1], module) in modules for module in _module(path[-1] if path else 0))
    )


def _of_whole(name: str, flat: Flat) -> Path:
    """Where a tensor is; a part of a tensor of several is where the whole is."""
    return flat.paths.get(name) or flat.paths.get(name.rpartition(".")[0], ())


def _module(key: str | int) -> tuple[str, ...]:
    """The outermost module that a key of a state dict names; nothing for a key that names none."""
    module, dot, _ = str(key).partition(".")
    return (module,) if dot else ()


def _is_whole(flat: Flat, path: Path) -> bool:
    """Whether the container there makes no sense without some of its parts."""
    return isinstance(flat.containers.get(path), (tuple, Record)) and path not in flat.modules


def forms_of(contents: TorchContents, flat: Flat) -> Forms:
    """The forms of what was read."""
    said = {name: contents.facts.get(id(tensor)) for name, tensor in flat.tensors.items()}
    return Forms(
        flat.containers,
        {name: (flat.tensors[name], leaf) for name, leaf in flat.leaves.items()},
        {name: facts for name, facts in said.items() if facts is not None},
        {storage.key: storage for storage in contents.storages.values()},
    )


def joined(files: Mapping[str, Forms]) -> Forms:
    """The forms of a state dict in several files, by file name, each of which has tensors of its own."""
    if len(files) == 1:
        return next(iter(files.values()))
    leaves: dict[str, tuple[LazyTensor, Any]] = {}
    tensors: dict[str, tuple[LazyTensor, TensorFacts]] = {}
    storages: dict[str, Storage] = {}
    for file, forms in files.items():
        leaves.update(forms.leaves)
        for name, (tensor, facts) in forms.tensors.items():
            tensors[name] = tensor, replace(facts, storage=f"{file}/{facts.storage}" if facts.storage else "")
        for key, storage in forms.storages.items():
            storages[f"{file}/{key}"] = replace(storage, key=f"{file}/{key}")
    return Forms({(): ordered_dict({})}, leaves, tensors, storages)


def _kind(container: Any) -> str | None:
    if isinstance(container, (Record, DictRecord)):
        return container.path if isinstance(container, Record) else container.type.path
    return None if isinstance(container, (dict, list)) else type(container).__name__


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
            if said is not None and _differ(value.shape, said[1].strides, _usual(value.shape)):
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
        if facts.storage and _differ(tensor.shape, facts.strides, strides):
            self._note("its strides change, for most of its storage is shown by no tensor", name)
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


def _note(text: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}: {text}"


def waste(shown: Mapping[str, Mapping[Any, int]], storages: Mapping[str, Storage]) -> int:
    """Bytes of storages that no tensor shows, if they are worth leaving out, else 0.

    Args:
        shown: key of a storage -> view of it -> its bytes.
        storages: by key.
    """
    held = sum(storage.nbytes for storage in storages.values())
    found = sum(max(0, storages[key].nbytes - sum(views.values())) for key, views in shown.items() if key in storages)
    return found if found >= WASTE and found > held // 10 else 0


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
        return tensor, _usual(tensor.shape)
    repeated = [n > 1 and stride == 0 for n, stride in zip(tensor.shape, strides, strict=True)]
    lengths = tuple(1 if again else n for n, again in zip(tensor.shape, repeated, strict=True))
    order = sorted(range(tensor.ndim), key=lambda axis: (-strides[axis] if lengths[axis] > 1 else 0, axis))
    held = tensor.box((0,) * tensor.ndim, lengths) if any(repeated) else tensor
    steps = dict(zip(order, _usual(tuple(lengths[axis] for axis in order)), strict=True))
    found = tuple(
        0 if again else strides[axis] if tensor.shape[axis] == 1 else steps[axis] for axis, again in enumerate(repeated)
    )
    return (held if order == sorted(order) else held.permute(order)), found


def _usual(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of C order, as torch has them: an axis of length zero counts as one."""
    steps = [1]
    for n in reversed(shape[1:]):
        steps.append(steps[-1] * max(n, 1))
    return tuple(reversed(steps)) if shape else ()


def _differ(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether strides differ along an axis that has several elements."""
    return len(a) == len(b) and any(n > 1 and s != t for n, s, t in zip(shape, a, b, strict=True))
