"""Weight files of a folder, each by itself: safetensors, or torch files that hold a state dict.

What reads torch files is imported where there are some: most folders have safetensors only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any

from anyckpt.containers.safetensors import read_safetensors, safetensors_steps
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.formats.shared.rank_safetensors import part_of
from anyckpt.storage.heads import read_each
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

if TYPE_CHECKING:
    from anyckpt.containers.torch_file.forms import Forms


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
        if not self.forms:
            return None
        from anyckpt.containers.torch_file.forms import joined

        return joined(self.forms)


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
    steps = safetensors_steps
    if names[0].endswith((".bin", ".pt")):
        from anyckpt.containers.torch_file.reader import torch_steps

        steps = torch_steps
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
    from anyckpt.formats.shared.torch_weights import state_dict

    found = state_dict(source)
    beside.warnings.extend(found.warnings)
    beside.forms[name] = found.forms
    return found.tensors
