"""What a torch file says besides elements and plain data, so that the same objects can be written again.

That tensors share a storage, their offsets and strides, parameters, gradients asked for, attributes and subclasses, and
of containers tuples, subclasses of dictionaries and objects that hold tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from anyckpt.checkpoint import ObjectForms
from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.flatten import Flat, Path
from anyckpt.containers.torch_file.modules import module_fields
from anyckpt.containers.torch_file.values import Storage, TensorFacts, usual
from anyckpt.data_classes import dataclass
from anyckpt.pickling import DictRecord, Record
from anyckpt.pickling.torch_objects import ORDERED_DICT, ordered_dict
from anyckpt.tensor import LazyTensor

CONTAINER = " (container)"
"""What the name of a container ends with in descriptions."""
ROOT = "the file"
"""What its outermost container is called there."""
WASTE = 1024
"""Bytes of storages that no tensor shows, from which on they are left out if they are a tenth of all, too."""


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
            if tensor.size and facts.strides and differ(tensor.shape, facts.strides, usual(tensor.shape)):
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

    def tuples(self) -> frozenset[Path]:
        """As the base says."""
        return frozenset(path for path, container in self.containers.items() if isinstance(container, tuple))

    def whole(self, path: Path) -> Any:
        """As the base says."""
        container = self.containers.get(path)
        return container if isinstance(container, (tuple, Record)) else None

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


def waste(shown: Mapping[str, Mapping[Any, int]], storages: Mapping[str, Storage]) -> int:
    """Bytes of storages that no tensor shows, if they are worth leaving out, else 0.

    Args:
        shown: key of a storage -> view of it -> its bytes.
        storages: by key.
    """
    held = sum(storage.nbytes for storage in storages.values())
    found = sum(max(0, storages[key].nbytes - sum(views.values())) for key, views in shown.items() if key in storages)
    return found if found >= WASTE and found > held // 10 else 0


def differ(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether strides differ along an axis that has several elements."""
    return len(a) == len(b) and any(n > 1 and s != t for n, s, t in zip(shape, a, b, strict=True))
