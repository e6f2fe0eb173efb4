"""The format ``torch``: a file of ``torch.save`` as a checkpoint, and a checkpoint as such a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import Checkpoint, CompositeTensor
from anyckpt.containers.torch_file import stored_checksums
from anyckpt.containers.torch_file.bare import is_bare, read_bare
from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.flatten import Flat, Path, flatten, unflatten, with_parts
from anyckpt.containers.torch_file.former import Former
from anyckpt.containers.torch_file.forms import Forms, attached, forms_of, waste
from anyckpt.containers.torch_file.legacy_stream import is_stream
from anyckpt.containers.torch_file.legacy_tar import is_tape
from anyckpt.containers.torch_file.parts import part_of
from anyckpt.containers.torch_file.reader import read_torch
from anyckpt.containers.torch_file.roles import Roles, roles, training_state
from anyckpt.containers.torch_file.script import readable
from anyckpt.containers.torch_file.torch7 import is_torch7, refusal
from anyckpt.containers.torch_file.values import MetaTensor
from anyckpt.containers.torch_file.weights_only import refused
from anyckpt.containers.torch_file.writer import dotted, zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import few
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.pickling import DictRecord, torch_objects
from anyckpt.storage.location import Location
from anyckpt.storage.zip import read_zip
from anyckpt.tensor import LazyTensor


def detect(location: Location) -> bool:
    """Whether a file is one of ``torch.save``, of any generation, or a bare pickle, by its contents."""
    if location.is_directory:
        return False
    if location.head.startswith(b"PK\x03\x04"):
        return any(name.endswith("/data.pkl") for name in read_zip(location.open()))
    head = location.head
    return is_stream(head) or is_tape(head) or is_torch7(head) or is_bare(head, location.suffix)


def read(location: Location) -> Checkpoint:
    """Open a torch file.

    Raises:
        FormatError: see ``read_torch`` and ``read_bare``; it is a file of Torch7.
    """
    head = location.head
    if is_torch7(head):
        raise refusal(head, location.path)
    is_alone = is_bare(head, location.suffix) and not is_stream(head)
    contents = read_bare(location.open()) if is_alone else read_torch(location.open())
    return torch_checkpoint(location.path, contents, flatten(contents.root, location.path))


def torch_checkpoint(path: str, contents: TorchContents, flat: Flat) -> Checkpoint:
    """What any torch file is as a checkpoint: a state dict, by itself or with other things beside it."""
    told = roles(flat)
    return Checkpoint(
        path=path,
        format=FORMAT.name,
        format_version=contents.generation if contents.version is None else f"{contents.generation} {contents.version}",
        tensors=flat.tensors,
        model_prefix=told.prefix,
        state_prefixes=told.states,
        objects=flat.objects,
        training=training_state(contents.root, flat),
        warnings=[*contents.warnings, *_kind(contents, flat, told), *_oddities(contents, flat)],
        details=torch_details(contents),
        key_paths=flat.paths,
        original_keys=flat.original_keys,
        checksums=lambda: stored_checksums(contents),
        part=part_of(path, contents.root, flat),
        attached=attached(flat, _weights(flat, told)),
        forms=forms_of(contents, flat),
    )


def _weights(flat: Flat, told: Roles) -> Iterator[str]:
    """Full names of the weights."""
    return (n for n in flat.tensors if n.startswith(told.prefix) and not n.startswith(told.states or ("\0",)))


def torch_details(contents: TorchContents) -> dict[str, Any]:
    """What ``inspect`` shows of a torch file."""
    details: dict[str, Any] = {
        "generation": contents.generation,
        "version": contents.version,
        "root_folder": contents.folder,
        "byteorder": contents.byteorder,
        "storages": len(contents.storages),
        "storage_bytes": sum(storage.nbytes for storage in contents.storages.values()),
    }
    return details


def _kind(contents: TorchContents, flat: Flat, told: Roles) -> list[str]:
    """What the file is, where it is no plain set of weights."""
    found = []
    if not flat.tensors:
        found.append("holds no tensors")
    elif flat.optimizers and all(name.startswith(told.states or ("\0",)) for name in flat.tensors):
        found.append("holds the state of an optimizer and no weights")
    is_program = contents.generation == "torchscript"
    kind, left = ("TorchScript", "program is") if is_program else ("pickled", "settings and hooks are")
    for path, classes in flat.modules.items():
        names = list(dict.fromkeys(map(readable, classes)))
        inside = f" with modules of class {few(names[1:], 5)}" if len(names) > 1 else ""
        found.append(
            f"{'.'.join(map(str, path)) or 'the file'} is a {kind} module of class {names[0]}{inside}: its"
            f" tensors are named as its state_dict() names them, and its {left} left out"
        )
    for name in told.averaged:
        found.append(f"{name} is an averaged copy of the weights and is taken for training state")
    return found


def _oddities(contents: TorchContents, flat: Flat) -> list[str]:
    """What a user should know."""
    found = []
    for name in flat.renamed:
        found.append(f"two paths give one dotted name; the second is called {name!r}")
    for kind in flat.unpacked[:5]:
        found.append(f"objects of class {kind} hold tensors; they are shown under their attributes' names")
    shown: dict[str, dict[Any, int]] = {}
    for tensor, facts in contents.facts.values():
        shown.setdefault(facts.storage, {})[facts.offset, facts.strides, tensor.shape] = tensor.nbytes
    unseen = waste(shown, contents.storages)
    if unseen:
        found.append(
            f"stores {unseen:,} bytes that no tensor shows (slices of larger tensors); converting it to torch leaves"
            " them out"
        )
    for name, leaf in flat.objects.items():
        if isinstance(leaf, MetaTensor):
            found.append(f"tensor {name!r} is of the meta device and has no elements")
    return found


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """One file: nested as the source was if it tells and its names are unchanged, else a flat state dict.

    Raises:
        UsageError: an object cannot be pickled.
    """
    root, ignored, notes, formed = as_object(checkpoint)
    unsafe = refused(root)
    if unsafe:
        notes.append(f"torch.load(weights_only=True) refuses objects in this file: {', '.join(unsafe[:5])}")
    if checkpoint.config or checkpoint.tokenizer or checkpoint.artifacts:
        notes.append("a torch file has no place for the configuration, the tokenizer and other files of the source")
    parts = zip_parts(root, tensor_name=stored_names(checkpoint))
    return Plan(FORMAT.name, (OutputFile("", parts),), ignored=ignored, notes=tuple(notes), formed=formed)


def stored_names(checkpoint: Checkpoint) -> Callable[[tuple[Any, ...]], str]:
    """Gives the name of the tensor at a path: the checkpoint's own, which dots in keys do not make ambiguous."""
    keys = checkpoint.original_keys
    names = {
        tuple(keys.get(path[: depth + 1], step) for depth, step in enumerate(path)): name
        for name, path in checkpoint.key_paths.items()
    }
    return lambda path: names.get(path) or dotted(path)


def as_object(checkpoint: Checkpoint) -> tuple[Any, dict[str, str], list[str], frozenset[str]]:
    """What to save for a checkpoint, what it leaves out with the reason, notes, and ``Plan.formed``."""
    paths = _paths(checkpoint)
    keys = checkpoint.original_keys
    whole, left = assemble(checkpoint.tensors, checkpoint.objects)
    tensors = [name for name in whole if name in checkpoint.tensors or isinstance(whole[name], CompositeTensor)]
    found = _common_prefix(tensors, paths)
    if found is not None:
        prefix, base = found
        forms = checkpoint.forms if isinstance(checkpoint.forms, Forms) else Forms()
        former = Former(checkpoint.tensors, forms, prefix)
        stored = (name[len(prefix) :] for name in paths if name.startswith(prefix))
        values = {name: former.form(name, whole[name]) for name in stored if name in whole}
        left.update({name: "has no place in the nested file" for name in whole if name not in values})
        inner = {name: paths[prefix + name][len(base) :] for name in values}
        notes = former.notes
        if any(base[:depth] in keys or type(base[depth - 1]) is int for depth in range(1, len(base) + 1)):
            notes.append(f"the weights are written without {prefix!r}, which all of their names begin with")
        containers = former.containers((paths[prefix + name] for name in values), base)
        return unflatten(values, inner, _below(keys, base), containers), left, notes, former.formed
    left.update(dict.fromkeys(set(whole).difference(tensors), "a state dict holds tensors only"))
    return torch_objects.ordered_dict({name: whole[name] for name in tensors}), left, [], frozenset()


def as_state_dict(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], whole: Mapping[str, Any]
) -> tuple[DictRecord, list[str], frozenset[str]]:
    """One state dict of weights, of the forms that they had if their names still tell; notes, and ``Plan.formed``.

    Args:
        checkpoint: with what its source says of them.
        tensors: the weights by their own names.
        whole: these, and the parts of a tensor of several parts put together.
    """
    paths = _paths(checkpoint)
    found = _common_prefix(list(whole), paths) if isinstance(checkpoint.forms, Forms) else None
    if found is None or not isinstance(checkpoint.forms, Forms):
        return torch_objects.ordered_dict(whole), [], frozenset()
    prefix, base = found
    former = Former(tensors, checkpoint.forms, prefix)
    result = torch_objects.ordered_dict({name: former.form(name, value) for name, value in whole.items()})
    places = [paths[prefix + name] for name in whole]
    original = former.containers((), base).get(())
    if isinstance(original, DictRecord) and original.type == result.type and {*map(len, places)} == {len(base) + 1}:
        former.containers(places, base)
        result.state = original.state
    return result, former.notes, former.formed


def _paths(checkpoint: Checkpoint) -> Mapping[str, Path]:
    """Where the source had its tensors and objects; in the state dicts of a folder, where their names say."""
    if not checkpoint.key_paths and isinstance(checkpoint.forms, Forms):
        return {name: (name,) for name in (*checkpoint.forms.tensors, *checkpoint.forms.leaves)}
    return checkpoint.key_paths


def _common_prefix(names: Sequence[str], paths: Mapping[str, Path]) -> tuple[str, Path] | None:
    """What all the names lack at their beginning to be names of ``paths``, and the path that it is; None if unclear."""
    if not names:
        return ("", ()) if paths else None
    ends = [(name[: -len(names[0])], path) for name, path in paths.items() if name.endswith(names[0])]
    for prefix, path in sorted(ends, key=lambda entry: len(entry[0])):
        bases = (path[:depth] for depth in range(len(path) + 1))
        base = next((base for base in bases if "".join(f"{step}." for step in base) == prefix), None)
        if base is not None and all(
            prefix + name in paths and paths[prefix + name][: len(base)] == base for name in names
        ):
            return prefix, base
    return None


def _below(table: Mapping[Path, Any], base: Path) -> dict[Path, Any]:
    """The entries of a table by path below a container, by their path in it."""
    return {path[len(base) :]: value for path, value in table.items() if path[: len(base)] == base}


def assemble(tensors: Mapping[str, LazyTensor], objects: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and objects in one table, the parts of a tensor of several parts put together again.

    Gives the table, and the parts that are left out because others of the same tensor are missing.
    """
    whole: dict[str, Any] = {}
    parts: set[str] = set()
    left: dict[str, str] = {}
    for name, value in objects.items():
        if not isinstance(value, CompositeTensor):
            whole[name] = value
            continue
        stored = {part: f"{name}.{part}" for part in value.part_tensors()}
        parts.update(stored.values())
        if all(part in tensors for part in stored.values()):
            whole[name] = with_parts(value, {part: tensors[stored_name] for part, stored_name in stored.items()})
        else:
            left.update({part: "the rest of its tensor is left out" for part in stored.values() if part in tensors})
    return {**whole, **{name: tensor for name, tensor in tensors.items() if name not in parts}}, left


FORMAT = Format(
    name="torch",
    title="torch.save file",
    detect=detect,
    read=read,
    plan=plan,
    suffixes=(".pt", ".pth"),
)
