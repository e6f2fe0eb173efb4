"""Other spellings under which a family's tensors are stored: renamed, or several of them in one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, stack

_MOST_PARTS = 100_000


@dataclass(frozen=True)
class Variant:
    """One stored spelling.

    A ``*`` is an index and is the same on both sides.  If the family's names have one star more, which must be the
    last, it counts the leading axis of the stored tensor (experts); several names then share the next axis evenly.

    Attributes:
        stored: pattern of the stored name.
        names: patterns of the family's names, as its rules have them.
        written: it is how the family is stored: what is written, and what messages name.
    """

    stored: str
    names: tuple[str, ...]
    written: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the stored tensor has a leading axis that the family's have not."""
        return self.names[0].count("*") > self.stored.count("*")


def family_names(tensors: Mapping[str, LazyTensor], variants: tuple[Variant, ...]) -> dict[str, LazyTensor]:
    """Stored tensors under the names of the family's rules; views.

    Raises:
        MappingError: a stacked tensor cannot be taken apart, or two stored tensors are the same one.
    """
    if not variants:
        return dict(tensors)
    patterns = [(_compiled(variant.stored), variant) for variant in variants]
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        for pattern, variant in patterns:
            match = pattern.fullmatch(name)
            if match is not None:
                parts = _parts(name, tensor, variant, match.groups())
                break
        else:
            parts = {name: tensor}
        for key, part in parts.items():
            if key in found:
                raise MappingError("two stored tensors are the same one of the model", tensor=name, found=key)
            found[key] = part
    return found


def stored_names(tensors: Mapping[str, LazyTensor], variants: tuple[Variant, ...]) -> dict[str, LazyTensor]:
    """The family's tensors as they are written: stacked where a variant says so, in the first part's place."""
    result: dict[str, LazyTensor] = {}
    stacks: dict[str, list[LazyTensor]] = {}
    for name, tensor in tensors.items():
        key = stored_name(name, variants)
        if key == name:
            result[name] = tensor
        else:
            stacks.setdefault(key, []).append(tensor)
            result.setdefault(key, tensor)
    for key, parts in stacks.items():
        result[key] = stack(parts)
    return result


def stored_name(name: str, variants: tuple[Variant, ...]) -> str:
    """The name under which a tensor of the family is written."""
    for variant in variants:
        if variant.written:
            match = _compiled(variant.names[0]).fullmatch(name)
            if match is not None:
                return _fill(variant.stored, match.groups()[: variant.stored.count("*")])
    return name


def _parts(name: str, tensor: LazyTensor, variant: Variant, indices: tuple[str, ...]) -> dict[str, LazyTensor]:
    if not variant.stacked:
        return {_fill(variant.names[0], indices): tensor}
    share = len(variant.names)
    if tensor.ndim < 2 or tensor.shape[0] > _MOST_PARTS or tensor.shape[1] % share:
        raise MappingError(
            "is not a stack of the model's experts", tensor=name,
            expected=f"an axis of experts, then one that {share} tensors share", found=tensor.shape,
        )  # fmt: skip
    rows = tensor.shape[1] // share
    return {
        _fill(pattern, (*indices, str(number))): tensor[number].narrow(0, part * rows, rows)
        for number in range(tensor.shape[0])
        for part, pattern in enumerate(variant.names)
    }


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))


def _fill(pattern: str, indices: tuple[str, ...]) -> str:
    pieces = pattern.split("*")
    return pieces[0] + "".join(index + piece for index, piece in zip(indices, pieces[1:], strict=True))
