"""A torch file of a folder's weights, which holds a state dict and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from anyckpt.containers.torch_file import parts, read_torch
from anyckpt.containers.torch_file.flatten import flatten
from anyckpt.containers.torch_file.forms import Forms, forms_of
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class StateDict:
    """What such a file holds.

    Attributes:
        tensors: by name.
        forms: what it says of the objects that tensors were.
        warnings: anything odd that a user should know.
    """

    tensors: dict[str, LazyTensor]
    forms: Forms
    warnings: list[str]


def state_dict(source: ByteSource) -> StateDict:
    """The tensors of a torch file.

    Raises:
        FormatError: it is damaged, or holds no state dict, or one rank's part of one.
    """
    contents = read_torch(source)
    warnings = list(contents.warnings)
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
        warnings.append(f"{source.name}: entries that are not tensors are left out: {', '.join(map(str, strange[:5]))}")
    tensors = {str(key): value for key, value in contents.root.items() if isinstance(value, LazyTensor)}
    return StateDict(tensors, forms_of(contents, flat), warnings)
