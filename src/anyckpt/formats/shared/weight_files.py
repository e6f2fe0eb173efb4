"""Weight files of a folder, each by itself: safetensors, or torch files that hold a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyckpt.containers.safetensors import read_safetensors, safetensors_steps
from anyckpt.containers.torch_file import parts, read_torch
from anyckpt.containers.torch_file.flatten import flatten
from anyckpt.containers.torch_file.forms import Forms, forms_of, joined
from anyckpt.containers.torch_file.reader import torch_steps
from anyckpt.errors import FormatError
from anyckpt.formats.shared.rank_safetensors import part_of
from anyckpt.storage.heads import read_each
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor


@dataclass
class Beside:
    """What weight files say besides weights.

    Attributes:
        warnings: anything odd that a user should know.
        details: facts for ``inspect``.
        forms: of each torch file.
    """

    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    forms: dict[str, Forms] = field(default_factory=dict)

    def all_forms(self) -> Forms | None:
        """The forms of all files, None if none is a torch file."""
        return joined(self.forms) if self.forms else None


def put_together(
    location: Location, names: Iterable[str], files: Iterable[Mapping[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    """The tensors of several files, each of which is in one only.

    Raises:
        FormatError: one is in two.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, found in zip(names, files, strict=True):
        for key, tensor in found.items():
            if key in tensors:
                raise FormatError("is in two weight files", path=location.join(name), tensor=key)
            tensors[key] = tensor
    return tensors


def read_weight_file(location: Location, name: str, beside: Beside) -> dict[str, LazyTensor]:
    """The tensors of one safetensors or ``.bin`` file of a folder.

    Raises:
        FormatError: it is damaged, or holds no state dict.
    """
    return read_weight_files(location, [name], beside)[0]


def read_weight_files(location: Location, names: list[str], beside: Beside) -> list[dict[str, LazyTensor]]:
    """The tensors of several files of one kind, whose headers are read together.

    Raises:
        FormatError: one is damaged, or holds no state dict.
    """
    steps = torch_steps if names[0].endswith((".bin", ".pt")) else safetensors_steps
    left = iter(names)
    return read_each(lambda source: _tensors(source, next(left), beside), map(location.open, names), steps)


def _tensors(source: ByteSource, name: str, beside: Beside) -> dict[str, LazyTensor]:
    if not name.endswith((".bin", ".pt")):
        tensors, metadata = read_safetensors(source)
        part = part_of(source.name, tensors, metadata or {})
        if part is not None:
            raise FormatError(part.what, path=source.name, remedy=part.remedy)
        if metadata:
            beside.details.setdefault("metadata", {}).update(metadata)
        return tensors
    contents = read_torch(source)
    beside.warnings.extend(contents.warnings)
    if not isinstance(contents.root, Mapping):
        raise FormatError(
            "does not hold a state dict",
            path=source.name,
            expected="a dict of tensors",
            found=type(contents.root).__name__,
        )
    flat = flatten(contents.root, source.name)
    part = parts.part_of(source.name, contents.root, flat)
    if part is not None:
        raise FormatError(part.what, path=source.name, remedy=part.remedy)
    strange = [key for key, value in contents.root.items() if not isinstance(value, LazyTensor)]
    if strange:
        beside.warnings.append(
            f"{source.name}: entries that are not tensors are left out: {', '.join(map(str, strange[:5]))}"
        )
    beside.forms[name] = forms_of(contents, flat)
    return {str(key): value for key, value in contents.root.items() if isinstance(value, LazyTensor)}
