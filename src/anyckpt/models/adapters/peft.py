"""Names of Hugging Face PEFT's adapters, and the hub's updates: both follow from the family's own rules.

A saved adapter has ``base_model.model.<module>.lora_A.weight`` (rank, in) and ``lora_B.weight`` (out, rank), an
embedding ``lora_embedding_A`` (rank, rows) and ``lora_embedding_B`` (width, rank); a live model's state dict has the
adapter's name in between (``lora_A.default.weight``).  Source: peft 0.21, ``tuners/lora`` and ``utils/save_and_load``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError, UsageError
from anyckpt.models.adapters.adapter import (
    Adapter,
    Layers,
    LowRank,
    Target,
    by_weight,
    check_factors,
    check_update,
    some,
)
from anyckpt.models.adapters.parameters import expert_updates, parameters
from anyckpt.models.rules import Halves, Instance, Operation, Transposed
from anyckpt.models.variants import family_names, name_in_memory
from anyckpt.tensor import Constant, LazyTensor

PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<what>lora_[AB])(?:\.(?P<live>[^.]+))?\.(?P<kind>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.(?P<live_embedding>[^.]+))?"
    r"|lora_magnitude_vector(?:\.(?P<live_magnitude>[^.]+)(?:\.weight)?)?)"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<live>[^.]+)\.(?P<kind>weight|bias)")
_OF_BASE = re.compile(r"\.base_layer(\.(?:weight|bias))$")
_COPY = re.compile(r".+\.original_module\..+")
_TEXT = "language_model."
"""What the text part of a model that also sees has in its names."""


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are a PEFT adapter's names."""
    return any(name.startswith(PREFIX) and _FACTOR.fullmatch(name) for name in names)


@dataclass
class _Module:
    """What an adapter stores for one module, with the stored names."""

    down: tuple[str, LazyTensor] | None = None
    up: tuple[str, LazyTensor] | None = None
    magnitude: tuple[str, LazyTensor] | None = None
    bias: tuple[str, LazyTensor] | None = None
    is_embedding: bool = False
    names: list[str] = field(default_factory=list)


def from_peft(tensors: Mapping[str, LazyTensor], scale: Callable[[str, int], float], layers: Layers) -> Adapter:
    """The updates that a PEFT adapter is.

    Args:
        tensors: by stored name.
        scale: of a module's update, from the module's name and the rank.
        layers: the weights of the base model.

    Raises:
        MappingError: a name is no rule's, a factor is missing, or shapes are of another model.
    """
    found, saved = _by_module(tensors)
    places = _places(layers)
    updates: dict[Target, LowRank] = {}
    for module, own in found.items():
        name = own.names[0]
        experts = None if module in places else _of_experts(module, own, layers, places, scale)
        if experts is not None:
            updates.update(experts)
            continue
        item, number = _place(module, places, layers, name)
        update = _update(module, own, scale)
        operation = item.rule.operation.on_rows()
        if operation is None or (len(item.sources) > 1 and not operation.parts):
            raise MappingError(
                f"no rule of family {layers.model.family} says how an adapter of this weight is laid out in Megatron",
                tensor=name, found=item.hub,
            )  # fmt: skip
        shapes = operation.source_shapes(item.shape, item.config)
        _check_rows(update, shapes[number], item, layers, own)
        own_rows = operation if len(item.sources) == 1 else operation.of_part(number)
        update = _rearranged(update, partial(_to_hub, own_rows, item))
        target = Target(item.hub, operation.parts[number] if len(item.sources) > 1 else "")
        if target in updates:
            raise MappingError("adapts a weight that another tensor adapts", tensor=name,
                               found=updates[target].names[0])  # fmt: skip
        updates[target] = update
    adapter = Adapter(updates)
    adapter.replaced.update(_replaced(saved, layers, tensors))
    for target, update in updates.items():
        check_update(target, update, layers)
    return adapter


def _by_module(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, _Module], dict[str, str]]:
    """Factors by the family's module name, and whole tensors: the family's name -> the stored one.

    Raises:
        MappingError: a name is there twice, or there are two adapters.
    """
    modules: dict[str, _Module] = {}
    saved: dict[str, str] = {}
    adapters: dict[str, str] = {}
    for name, tensor in tensors.items():
        plain = _OF_BASE.sub(r"\1", name.removeprefix(PREFIX))
        whole, factor = _SAVED.fullmatch(plain), _FACTOR.fullmatch(plain)
        if _COPY.fullmatch(plain):
            continue
        if whole is not None:
            adapters.setdefault(whole["live"], name)
            saved[f"{whole['module']}.{whole['kind']}"] = name
            continue
        if factor is None:
            if plain in saved:
                raise MappingError("two stored tensors are the same one of the adapter", tensor=name)
            saved[plain] = name
            continue
        live = factor["live"] or factor["live_embedding"] or factor["live_magnitude"]
        if live:
            adapters.setdefault(live, name)
        own = modules.setdefault(factor["module"], _Module())
        slot = _slot(factor)
        if getattr(own, slot) is not None:
            raise MappingError("two stored tensors are the same one of the adapter", tensor=name,
                               found=getattr(own, slot)[0])  # fmt: skip
        setattr(own, slot, (name, tensor))
        own.is_embedding = own.is_embedding or factor["embedding"] is not None
        own.names.append(name)
    if len(adapters) > 1:
        raise MappingError(
            "holds more than one adapter", tensor=list(adapters.values())[1], expected="one",
            found=", ".join(list(adapters)[:5]), remedy="leave the others out with --exclude",
        )  # fmt: skip
    return modules, saved


def _slot(factor: re.Match[str]) -> str:
    letter = (factor["what"] or factor["embedding"] or "")[-1:]
    if not letter:
        return "magnitude"
    if factor["kind"] == "bias":
        if letter == "A":
            raise MappingError("is a bias of LoRA's first factor, which PEFT does not have", tensor=factor[0])
        return "bias"
    return "down" if letter == "A" else "up"


def _of_experts(
    module: str, own: _Module, layers: Layers, places: _Places, scale: Callable[[str, int], float]
) -> dict[Target, LowRank] | None:
    """Every expert's update if the module is one of experts in one parameter, None otherwise."""
    if own.up is None or own.down is None or any(name in places for name in _spellings(module, layers)):
        return None
    found = expert_updates(
        module, own.down[1], own.up[1], layers, lambda name: _spellings(name, layers), own.names[0]
    )  # fmt: skip
    if found is None:
        return None
    parameter, rank, each = found
    if own.magnitude is not None or own.bias is not None:
        raise MappingError("peft has no DoRA and no bias for parameters", tensor=own.names[0])
    factor = scale(parameter, rank)
    result: dict[Target, LowRank] = {}
    for expert in each:
        operation = expert.item.rule.operation.on_rows()
        if operation is None or (len(expert.item.sources) > 1 and not isinstance(operation, Halves)):
            raise MappingError("no rule says how an adapter of this parameter is laid out in Megatron",
                               tensor=own.names[0], found=expert.item.hub)  # fmt: skip
        update = LowRank(expert.down, expert.up, factor, names=tuple(own.names))
        if len(expert.item.sources) == 1:
            update = _rearranged(update, partial(_to_hub, operation, expert.item))
        result[Target(expert.item.hub)] = update
    return result


def _update(module: str, own: _Module, scale: Callable[[str, int], float]) -> LowRank:
    for slot, tail in (("down", "lora_A"), ("up", "lora_B")):
        if getattr(own, slot) is None:
            raise MappingError(f"the adapter of this module has no {tail}", tensor=own.names[0],
                               remedy="copy the whole adapter")  # fmt: skip
    assert own.down is not None and own.up is not None
    down, up = own.down[1], own.up[1]
    magnitude = None if own.magnitude is None else own.magnitude[1]
    bias = None if own.bias is None else own.bias[1]
    check_factors(LowRank(down, up, 1.0), own.names[0])
    factor = scale(module, down.shape[0])
    if own.is_embedding:  # its weight is (rows, width): the update is the transpose of a linear layer's
        if magnitude is not None:
            raise MappingError("DoRA on an embedding is not supported", tensor=own.names[0])
        down, up = up.transpose(), down.transpose()
    if magnitude is not None and magnitude.ndim == 2 and 1 in magnitude.shape:
        magnitude = magnitude.reshape((magnitude.size,))
    return LowRank(down, up, factor, magnitude, bias, tuple(own.names))


def _rearranged(update: LowRank, change: Callable[[LazyTensor], LazyTensor]) -> LowRank:
    """With everything that has the weight's rows changed."""
    return replace(
        update,
        up=change(update.up),
        magnitude=None if update.magnitude is None else change(update.magnitude),
        bias=None if update.bias is None else change(update.bias),
    )


def _to_hub(operation: Operation, item: Instance, tensor: LazyTensor) -> LazyTensor:
    return operation.to_hub([tensor], item.config)


def _from_hub(operation: Operation, item: Instance, number: int, tensor: LazyTensor) -> LazyTensor:
    return operation.from_hub(tensor, item.config)[number]


def _check_rows(update: LowRank, shape: tuple[int, ...], item: Instance, layers: Layers, own: _Module) -> None:
    """The update has the rows that a rule's operation takes apart."""
    rows = update.up.shape[0]
    padded = item.rule.partition == "vocabulary" and (layers.model.config.vocab_size or 0) <= rows <= shape[0]
    if len(shape) != 2 or (rows != shape[0] and not padded):
        assert own.up is not None and own.down is not None
        raise MappingError(
            "the adapter is of another base model", tensor=(own.down if own.is_embedding else own.up)[0],
            expected=f"{shape[0]} rows by the model's configuration", found=f"{rows} rows",
            remedy="give the base model that it was trained on, or its configuration with --config",
        )  # fmt: skip


# -- places --------------------------------------------------------------------------------------------------

_Places = dict[str, tuple[Instance, int]]


def _places(layers: Layers) -> _Places:
    """The family's module name -> the rule of its weight, and which of the rule's sources it is."""
    return {
        source.removesuffix(".weight"): (item, number)
        for item in layers.instances.values()
        for number, source in enumerate(item.sources)
        if source.endswith(".weight")
    }


def _place(module: str, places: _Places, layers: Layers, name: str) -> tuple[Instance, int]:
    if module in places:
        return places[module]
    for spelled in _spellings(module, layers):
        if spelled in places:
            return places[spelled]
    raise MappingError(
        f"no rule of family {layers.model.family} has a module that this adapts",
        tensor=name, expected=f"a module such as {some(list(places)[1:3])}", found=module,
        remedy="give the base model that it was trained on, with --config or --family",
    )  # fmt: skip


def _spellings(module: str, layers: Layers) -> list[str]:
    """A module's name as rules may have it: of a model without a head, of a larger model's part, as transformers spells
    it now.
    """
    plain_names = dict.fromkeys((module, module.replace(_TEXT, "", 1)))
    known = [*plain_names, *(outer + name for name in plain_names for outer in layers.outer)]
    variants = tuple(v for v in layers.model.definition.hugging_face.variants if not v.stacked)
    nothing = Constant(dtype("float32"), ())
    probe = {key: None for name in known for key in family_names({f"{name}.weight": nothing}, variants)}
    return [*known, *(name.removesuffix(".weight") for name in probe)]


def _replaced(
    saved: Mapping[str, str], layers: Layers, tensors: Mapping[str, LazyTensor]
) -> dict[str, dict[int, LazyTensor]]:
    """Whole tensors that take the place of the base model's: hub name -> which of the rule's sources -> tensor.

    Raises:
        MappingError: a name is no rule's, or a shape is another.
    """
    by_source = {
        source: (item, number) for item in layers.instances.values() for number, source in enumerate(item.sources)
    }
    result: dict[str, dict[int, LazyTensor]] = {}
    for plain_name, stored in saved.items():
        stem, _, kind = plain_name.rpartition(".")
        known = (f"{spelled}.{kind}" for spelled in _spellings(stem, layers))
        source = next((name for name in known if name in by_source), None)
        if source is None:
            raise MappingError(
                f"is neither an adapter's factor nor a weight of family {layers.model.family}", tensor=stored,
                expected="...lora_A.weight, ...lora_B.weight, or a weight of the base model",
                remedy="leave it out with --exclude",
            )  # fmt: skip
        item, number = by_source[source]
        shape = item.rule.operation.source_shapes(item.shape, item.config)[number]
        value = tensors[stored]
        if value.shape != shape:
            raise MappingError(
                "the adapter replaces a weight by one of another shape", tensor=stored, expected=shape,
                found=value.shape, remedy="resize the base model's vocabulary as it was resized for training",
            )  # fmt: skip
        result.setdefault(item.hub, {})[number] = value
    return result


# -- writing -------------------------------------------------------------------------------------------------


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
        **_ranks({**scales, **of_experts}),
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
    return _rearranged(update, partial(_from_hub, operation, item, 0))


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
        raise MappingError("no rule says how an adapter of this weight is laid out in Hugging Face's model",
                           tensor=names, found=item.hub)  # fmt: skip
    if len(item.sources) == 1:
        if "" not in parts:
            raise UsageError(
                f"the family has one module where the adapter has {', '.join(parts)}", tensor=names,
                expected=f"one update of {item.sources[0]}", remedy="choose --adapter-form fused, which adds the ranks",
            )  # fmt: skip
        return {item.sources[0]: _rearranged(parts[""], partial(_from_hub, operation, item, 0))}
    result: dict[str, LowRank] = {}
    for part, update in parts.items():
        if part:
            number = operation.parts.index(part)
            own_rows = operation.of_part(number)
            result[item.sources[number]] = _rearranged(update, partial(_from_hub, own_rows, item, 0))
            continue
        for number, source in enumerate(item.sources):
            result[source] = _rearranged(update, partial(_from_hub, operation, item, number))
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
    everything = Counter(_last(module) for module, (item, _) in _places(layers).items() if len(item.shape) == 2)
    counts = Counter(_last(module) for module in adapted)
    whole = {last for last, count in counts.items() if count == everything[last]}
    return sorted({_last(module) if _last(module) in whole else module for module in adapted})


def _ranks(scales: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
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
