"""Other spellings under which a family's tensors are stored: renamed, or several of them in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from anyckpt.config.spellings import Variant
from anyckpt.config.starred import filled, starred
from anyckpt.errors import MappingError, UsageError
from anyckpt.indexing import Shape
from anyckpt.tensor import LazyTensor, concatenate, stack

_MOST_PARTS = 100_000
EXPERTS = ("each", "stacked")
"""Forms in which transformers reads experts: a tensor for each, or one for all of a layer."""


def name_in_memory(name: str, variants: tuple[Variant, ...]) -> str:
    """What transformers of today calls a tensor of the family once it is loaded."""
    for variant in variants:
        if variant.in_memory and not variant.stacked:
            match = starred(variant.names[0]).fullmatch(name)
            if match is not None:
                return filled(variant.stored, match.groups())
    return name


def fitting(
    tensors: Mapping[str, LazyTensor], variants: tuple[Variant, ...], shapes: Mapping[str, Shape]
) -> tuple[Variant, ...]:
    """Of variants that have one stored name, the one whose parts have the model's shapes: the first, if none has.

    Args:
        tensors: by stored name.
        variants: the family's.
        shapes: by the family's name, as the model's configuration says.
    """
    alike: dict[str, list[Variant]] = {}
    for variant in variants:
        alike.setdefault(variant.stored, []).append(variant)
    chosen = {
        stored: several[0] if len(several) == 1 else _fitting(tensors, stored, several, shapes)
        for stored, several in alike.items()
    }
    return tuple(variant for variant in variants if chosen[variant.stored] is variant)


def _fitting(
    tensors: Mapping[str, LazyTensor], stored: str, several: list[Variant], shapes: Mapping[str, Shape]
) -> Variant:
    for name, match in ((name, starred(stored).fullmatch(name)) for name in tensors):
        if match is None or tensors[name].ndim < 2:
            continue
        for variant in several:
            shape = tensors[name].shape[1:][:: -1 if variant.transposed else 1]
            first = filled(variant.names[0], (*match.groups(), "0"))
            if shapes.get(first) == (shape[0] // len(variant.names), *shape[1:]):
                return variant
    return several[0]


def family_names(tensors: Mapping[str, LazyTensor], variants: tuple[Variant, ...]) -> dict[str, LazyTensor]:
    """Stored tensors under the names of the family's rules; views.

    Raises:
        MappingError: a stacked tensor cannot be taken apart, or two stored tensors are the same one.
    """
    if not variants:
        return dict(tensors)
    patterns = [(starred(variant.stored), variant) for variant in variants]
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
    stacks: dict[str, tuple[Variant, dict[tuple[int, int], LazyTensor]]] = {}
    for name, tensor in tensors.items():
        found = _written(name, variants)
        if found is None:
            result[name] = tensor
            continue
        key, variant, place = found
        stacks.setdefault(key, (variant, {}))[1][place] = tensor
        result.setdefault(key, tensor)
    for key, (variant, parts) in stacks.items():
        result[key] = _stacked(variant, [parts[place] for place in sorted(parts)])
    return result


def with_experts(variants: tuple[Variant, ...], experts: str | None, family: str) -> tuple[Variant, ...]:
    """A family's variants, of which those are marked as written that give experts the form that a user asks for.

    Args:
        variants: the family's, with those marked that are usual.
        experts: one of ``EXPERTS``, or None for the usual form.
        family: its name, for messages.

    Raises:
        UsageError: transformers has no such form for the family.
    """
    if experts is None:
        return variants
    stacks = [variant for variant in variants if variant.stacked and ".experts." in variant.stored]
    usual = any(variant.written for variant in stacks)
    if not stacks or (usual and experts == "each"):
        raise UsageError(
            f"experts of family {family} have one form",
            expected="no --experts, or stacked" if stacks else "no --experts",
            found=experts,
            remedy="leave --experts out",
        )
    if usual or experts == "each":
        return variants
    chosen = {variant.stored: variant for variant in reversed(stacks)}
    return tuple(replace(v, written=True) if v is chosen.get(v.stored) else v for v in variants)


def stored_name(name: str, variants: tuple[Variant, ...]) -> str:
    """The name under which a tensor of the family is written."""
    found = _written(name, variants)
    return name if found is None else found[0]


def _written(name: str, variants: tuple[Variant, ...]) -> tuple[str, Variant, tuple[int, int]] | None:
    """The name under which it is written if that is another one, and its place there: expert and part of it."""
    for variant in variants:
        if variant.written:
            for part, pattern in enumerate(variant.names):
                match = starred(pattern).fullmatch(name)
                if match is not None:
                    stars = variant.stored.count("*")
                    place = int(match[stars + 1]) if variant.stacked else 0, part
                    return filled(variant.stored, match.groups()[:stars]), variant, place
    return None


def _stacked(variant: Variant, parts: list[LazyTensor]) -> LazyTensor:
    """One tensor of all experts' parts, which come expert by expert."""
    share = len(variant.names)
    if not variant.stacked:
        return parts[0]
    whole = parts
    if share > 1:
        whole = [concatenate(parts[start : start + share], 0) for start in range(0, len(parts), share)]
    return stack([each.transpose() for each in whole] if variant.transposed else whole)


def _parts(name: str, tensor: LazyTensor, variant: Variant, indices: tuple[str, ...]) -> dict[str, LazyTensor]:
    if not variant.stacked:
        return {filled(variant.names[0], indices): tensor}
    share = len(variant.names)
    axis = -1 if variant.transposed else 1
    if tensor.ndim < 2 or tensor.shape[0] > _MOST_PARTS or tensor.shape[axis] % share:
        raise MappingError(
            "is not a stack of the model's experts",
            tensor=name,
            expected=f"an axis of experts, then one that {share} tensors share",
            found=tensor.shape,
        )
    rows = tensor.shape[axis] // share
    parts: dict[str, LazyTensor] = {}
    for number in range(tensor.shape[0]):
        each = tensor[number].transpose() if variant.transposed else tensor[number]
        for part, pattern in enumerate(variant.names):
            parts[filled(pattern, (*indices, str(number)))] = each.narrow(0, part * rows, rows)
    return parts
