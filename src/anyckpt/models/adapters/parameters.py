"""PEFT's adapters of experts that transformers 5 holds in one parameter each (``target_parameters``).

A layer's experts are a module with parameters such as ``gate_up_proj``, (experts, out, in).  peft 0.19 and later wraps
the module once for each adapted parameter, and does not store which is which: their shapes tell.  ``lora_A`` is
(experts * rank, in), expert by expert; ``lora_B`` (out, rank * experts), rank by rank.  Source: ``ParamWrapper`` of
peft 0.21, ``tuners/lora/layer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from anyckpt.config.spellings import Variant
from anyckpt.config.starred import filled, starred
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.models.adapters.adapter import LowRank
from anyckpt.models.adapters.layers import Layers
from anyckpt.models.language.rules import Instance
from anyckpt.tensor import LazyTensor, concatenate, stack

_WRAPPED = re.compile(r"(?P<module>.+?)(?:\.base_layer)*")


@dataclass(frozen=True)
class ExpertUpdate:
    """One expert's share of an adapter.

    Attributes:
        item: the rule of the expert's weight.
        down: (rank, in).
        up: (out, rank), rows as the family's tensors one after the other.
    """

    item: Instance
    down: LazyTensor
    up: LazyTensor


def expert_updates(
    module: str, down: LazyTensor, up: LazyTensor, layers: Layers, spellings: Callable[[str], list[str]], name: str
) -> tuple[str, int, list[ExpertUpdate]] | None:
    """The parameter that a wrapper adapts, its rank, and every expert's update; None if it is no such module.

    Args:
        module: stored name of the wrapper.
        down: ``lora_A``.
        up: ``lora_B``.
        layers: the base model's weights.
        spellings: a module's name as the family may have it.
        name: stored name of a tensor, for messages.

    Raises:
        MappingError: shapes fit no parameter of the module, or more than one.
    """
    match = _WRAPPED.fullmatch(module)
    assert match is not None
    experts = layers.model.config.num_moe_experts or 0
    known = {
        stored: items
        for spelled in spellings(match["module"])
        for stored, items in _parameters(spelled, layers, experts)
    }
    if not known:
        return None
    fitting = [(stored, items) for stored, items in known.items() if _fits(items[0], down, up)]
    if len(fitting) != 1 or down.shape[0] % experts or up.shape[1] != down.shape[0]:
        raise MappingError(
            "fits no parameter of the experts" if not fitting else "fits more than one parameter of the experts",
            tensor=name,
            expected=", ".join(f"{stored} {items[0].shape}" for stored, items in known.items()),
            found=f"{down.shape} and {up.shape}",
        )
    stored, items = fitting[0]
    rank = down.shape[0] // experts
    downs = down.reshape((experts, rank, down.shape[1]))
    ups = up.reshape((up.shape[0], rank, experts))
    return (
        stored,
        rank,
        [
            ExpertUpdate(item, downs[number], ups.narrow(2, number, 1).reshape((up.shape[0], rank)))
            for number, item in enumerate(items)
        ],
    )


def _fits(item: Instance, down: LazyTensor, up: LazyTensor) -> bool:
    return down.ndim == 2 == up.ndim and (up.shape[0], down.shape[1]) == item.shape


def _parameters(module: str, layers: Layers, experts: int) -> Iterator[tuple[str, list[Instance]]]:
    """Stored names of a module's parameters, and the rules of every expert's weight in them."""
    by_sources = layers.by_sources
    for variant in layers.model.definition.hugging_face.variants:
        indices = _indices(variant, module)
        if indices is None:
            continue
        found = [by_sources.get(_names(variant, (*indices, str(number)))) for number in range(experts)]
        items = [item for item in found if item is not None and len(item.shape) == 2]
        if items and len(items) == experts:
            yield f"{module}.{variant.stored.rpartition('.')[2]}", items


def _indices(variant: Variant, module: str) -> tuple[str, ...] | None:
    if not variant.stacked:
        return None
    match = starred(variant.stored.rpartition(".")[0]).fullmatch(module)
    return None if match is None else match.groups()


def _names(variant: Variant, indices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filled(name, indices) for name in variant.names)


@dataclass(frozen=True)
class Parameter:
    """The updates of all experts of a layer, as peft stores them for one parameter.

    Attributes:
        name: of the parameter, as transformers of today calls it.
        wrapper: name of the module that peft makes for it.
        weights: hub names of the weights.
        down: ``lora_A``.
        up: ``lora_B``.
        rank: of one expert's update.
        scale: of all of them.
    """

    name: str
    wrapper: str
    weights: tuple[str, ...]
    down: LazyTensor
    up: LazyTensor
    rank: int
    scale: float


def parameters(updates: Mapping[str, LowRank], layers: Layers) -> list[Parameter]:
    """Updates of whole experts' weights as those of parameters, where transformers holds experts in such.

    A layer of which not everything can be told so is left out.

    Args:
        updates: by hub name; rows of ``up`` as the family has them.
        layers: the base model's weights.
    """
    experts = layers.model.config.num_moe_experts or 0
    modules = dict.fromkeys(
        match[1]
        for weight in updates
        for source in layers.instances[weight].sources[:1]
        if (match := re.match(r"(.+\.experts)\.\d+\.", source)) is not None
    )
    found: list[Parameter] = []
    for module in modules:
        live = {
            name: items for spelled in _live(module, layers) for name, items in _parameters(spelled, layers, experts)
        }
        whole: list[tuple[str, list[LowRank], list[Instance]]] = []
        for name, items in live.items():
            own = [updates[item.hub] for item in items if item.hub in updates]
            if len(own) == experts and len({(u.rank, u.scale, u.up.dtype, u.down.dtype) for u in own}) == 1:
                whole.append((name, own, items))
        told = {item.hub for _, _, items in whole for item in items}
        if any(weight not in told for weight in updates if weight.startswith(next(iter(_stem(live)), "\0"))):
            continue
        for number, (name, own, items) in enumerate(whole):
            inside = ".base_layer" * (len(whole) - 1 - number)
            up = stack([update.up for update in own], 2)
            found.append(
                Parameter(
                    name,
                    name.rpartition(".")[0] + inside,
                    tuple(item.hub for item in items),
                    concatenate([update.down for update in own], 0),
                    up.reshape((up.shape[0], up.shape[1] * experts)),
                    own[0].rank,
                    own[0].scale,
                )
            )
    return found


def _stem(live: Mapping[str, list[Instance]]) -> set[str]:
    """What the hub's names of the experts' weights begin with."""
    return {items[0].hub.partition(".experts.")[0] + ".experts." for items in live.values()}


def _live(module: str, layers: Layers) -> list[str]:
    """What transformers of today calls a module of experts, from the family's name of it."""
    known = layers.model.definition.hugging_face.variants
    named = (variant for variant in known if variant.stacked and ".experts." in variant.stored)
    result: dict[str, None] = {}
    for variant in named:
        match = starred(variant.names[0].rpartition(".experts.")[0] + ".experts").fullmatch(module)
        if match is not None:
            result[filled(variant.stored.rpartition(".")[0], match.groups())] = None
    return list(result)[-1:]
