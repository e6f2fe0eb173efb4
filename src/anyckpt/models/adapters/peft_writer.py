"""Writing adapters as PEFT saves them: names of transformers' modules and parameters, and the settings they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, UsageError
from anyckpt.models.adapters.adapter import Adapter, LowRank, by_weight
from anyckpt.models.adapters.layers import Layers, check_update
from anyckpt.models.adapters.parameters import parameters
from anyckpt.models.adapters.rows import PREFIX, from_hub, places_of, rearranged
from anyckpt.models.language.rule_operations import Transposed
from anyckpt.models.language.rules import Instance
from anyckpt.models.language.variants import name_in_memory
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class Written:
    """A PEFT adapter to be written.

    Attributes:
        tensors: under the names that PEFT saves.
        settings: keys of ``adapter_config.json`` that follow from the tensors.
    """

    tensors: dict[str, LazyTensor]
    settings: dict[str, Any]


def to_peft(adapter: Adapter, layers: Layers) -> Written:
    """The adapter as PEFT saves it.  Fused updates are split: ``lora_A`` is repeated, which is exact.

    Raises:
        MappingError: an update is of a weight that the model does not have, or of another shape.
        UsageError: the family has one module where the adapter has parts.
    """
    tensors: dict[str, LazyTensor] = {}
    scales: dict[str, tuple[int, float]] = {}
    transposed: set[bool] = set()
    for target, update in adapter.updates.items():
        check_update(target, update, layers)
    grouped = by_weight(adapter)
    apart = {weight.partition(".experts.")[0] for weight, parts in grouped.items() if "" not in parts}
    whole = {
        weight: _rows_of_family(layers.instances[weight], parts[""])
        for weight, parts in grouped.items()
        if ".experts." in weight and weight.partition(".experts.")[0] not in apart
    }
    of_experts: dict[str, tuple[int, float]] = {}
    for found in parameters(whole, layers):
        named = {"lora_A.weight": found.down, "lora_B.weight": found.up}
        tensors.update({f"{PREFIX}{found.wrapper}.{tail}": tensor for tail, tensor in named.items()})
        of_experts[found.name] = (found.rank, found.scale)
        transposed.add(False)
        for weight in found.weights:
            del grouped[weight]
    for weight, parts in grouped.items():
        item = layers.instances[weight]
        for source, update in _of_sources(item, parts).items():
            module = _in_memory(source, layers).removesuffix(".weight")
            tensors.update(_named(module, update, weight.startswith("embedding.")))
            scales[module] = (update.rank, update.scale)
            transposed.add(isinstance(item.rule.operation, Transposed))
    for hub, values in adapter.replaced.items():
        sources = layers.instances[hub].sources
        for number, value in values.items():
            tensors[PREFIX + _in_memory(sources[number], layers)] = value
    settings = {
        "target_modules": _target_modules(list(scales), layers),
        "target_parameters": sorted({_of_module(name) for name in of_experts}) or None,
        "fan_in_fan_out": transposed == {True},
        "use_dora": any(update.magnitude is not None for update in adapter.updates.values()),
        "lora_bias": any(update.bias is not None for update in adapter.updates.values()),
        **ranks_and_alphas({**scales, **of_experts}),
    }
    return Written(tensors, settings)


def _of_module(parameter: str) -> str:
    """A parameter's name from its module's parent on: ``mlp.experts.gate_up_proj``."""
    return ".".join(parameter.split(".")[-3:])


def _rows_of_family(item: Instance, update: LowRank) -> LowRank:
    """An update of a whole weight with rows as the family's tensors have them, one after the other."""
    operation = item.rule.operation.on_rows()
    if operation is None or len(item.sources) != 1:
        return update
    return rearranged(update, partial(from_hub, operation, item, 0))


def _in_memory(source: str, layers: Layers) -> str:
    """What transformers of today calls a tensor in the class that the model is."""
    known = layers.model.definition.hugging_face
    name = name_in_memory(source, known.variants)
    return name.removeprefix(known.prefix) if known.headless(layers.model.config) else name


def _of_sources(item: Instance, parts: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Updates of the family's own tensors."""
    operation = item.rule.operation.on_rows()
    names = (next(iter(parts.values())).names or (item.hub,))[0]
    if operation is None or not item.sources or (len(item.sources) > 1 and not operation.parts):
        raise MappingError(
            "no rule says how an adapter of this weight is laid out in Hugging Face's model",
            tensor=names,
            found=item.hub,
        )
    if len(item.sources) == 1:
        if "" not in parts:
            raise UsageError(
                f"the family has one module where the adapter has {', '.join(parts)}",
                tensor=names,
                expected=f"one update of {item.sources[0]}",
                remedy="choose --adapter-form fused, which adds the ranks",
            )
        return {item.sources[0]: rearranged(parts[""], partial(from_hub, operation, item, 0))}
    result: dict[str, LowRank] = {}
    for part, update in parts.items():
        if part:
            number = operation.parts.index(part)
            own_rows = operation.of_part(number)
            result[item.sources[number]] = rearranged(update, partial(from_hub, own_rows, item, 0))
            continue
        for number, source in enumerate(item.sources):
            result[source] = rearranged(update, partial(from_hub, operation, item, number))
    return result


def _named(module: str, update: LowRank, is_embedding: bool) -> dict[str, LazyTensor]:
    stem = PREFIX + module
    if is_embedding:
        return {
            f"{stem}.lora_embedding_A": update.up.transpose(),
            f"{stem}.lora_embedding_B": update.down.transpose(),
        }
    named = {f"{stem}.lora_A.weight": update.down, f"{stem}.lora_B.weight": update.up}
    if update.bias is not None:
        named[f"{stem}.lora_B.bias"] = update.bias
    if update.magnitude is not None:
        named[f"{stem}.lora_magnitude_vector"] = update.magnitude
    return named


def _target_modules(adapted: list[str], layers: Layers) -> list[str]:
    """Last parts of the names where all modules so called are adapted, whole names otherwise."""
    everything = Counter(_last(module) for module, (item, _) in places_of(layers).items() if len(item.shape) == 2)
    counts = Counter(_last(module) for module in adapted)
    whole = {last for last, count in counts.items() if count == everything[last]}
    return sorted({_last(module) if _last(module) in whole else module for module in adapted})


def ranks_and_alphas(scales: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """``r`` and ``lora_alpha`` of most modules, and the exceptions."""
    if not scales:
        return {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}}
    alphas = {module: (rank, plain(scale * rank)) for module, (rank, scale) in scales.items()}
    rank, alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: own for module, (own, _) in alphas.items() if own != rank},
        "alpha_pattern": {module: own for module, (_, own) in alphas.items() if own != alpha},
    }


def plain(number: float) -> int | float:
    """A whole number as an integer, also where it was divided and multiplied again."""
    nearest = round(number)
    return nearest if abs(number - nearest) <= 1e-12 * max(1.0, abs(number)) else number


def _last(module: str) -> str:
    return module.rpartition(".")[2]
