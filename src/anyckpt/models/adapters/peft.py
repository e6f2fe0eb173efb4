"""Names of Hugging Face PEFT's adapters, and the hub's updates: both follow from the family's own rules.

A saved adapter has ``base_model.model.<module>.lora_A.weight`` (rank, in) and ``lora_B.weight`` (out, rank), an
embedding ``lora_embedding_A`` (rank, rows) and ``lora_embedding_B`` (width, rank); a live model's state dict has the
adapter's name in between (``lora_A.default.weight``).  Source: peft 0.21, ``tuners/lora`` and ``utils/save_and_load``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError, UsageError
from anyckpt.models.adapters.adapter import (
    Adapter,
    Layers,
    LowRank,
    Rows,
    Target,
    all_equal,
    check_factors,
    check_update,
    some,
)
from anyckpt.models.adapters.parameters import expert_updates
from anyckpt.models.adapters.rows import PREFIX, Places, places_of, rearranged, to_hub
from anyckpt.models.hub import head_and_embedding
from anyckpt.models.language.rule_operations import Halves
from anyckpt.models.language.rules import Instance
from anyckpt.models.language.variants import family_names
from anyckpt.tensor import Constant, LazyTensor

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<what>lora_[AB])(?:\.(?P<live>[^.]+))?\.(?P<kind>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.(?P<live_embedding>[^.]+))?"
    r"|lora_magnitude_vector(?:\.(?P<live_magnitude>[^.]+)(?:\.weight)?)?)"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<live>[^.]+))?\.(?P<kind>weight|bias)")
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<live>[^.]+))?")
_OF_BASE = re.compile(r"\.base_layer(\.(?:weight|bias))$")
_COPY = re.compile(r".+\.(?:original_module|trainable_tokens_original)\..+")
_TEXT = "language_model."
"""What the text part of a model that also sees has in its names."""


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are a PEFT adapter's names."""
    return any(name.startswith(PREFIX) and (_FACTOR.fullmatch(name) or _TOKENS.fullmatch(name)) for name in names)


@dataclass
class StoredModule:
    """What an adapter stores for one module, with the stored names."""

    down: tuple[str, LazyTensor] | None = None
    up: tuple[str, LazyTensor] | None = None
    magnitude: tuple[str, LazyTensor] | None = None
    bias: tuple[str, LazyTensor] | None = None
    is_embedding: bool = False
    names: list[str] = field(default_factory=list)


@dataclass
class StoredAdapter:
    """What an adapter stores.

    Attributes:
        modules: its factors by the module's name.
        saved: whole tensors: the base model's name -> the stored one.
        tokens: trained rows: the module's name -> the stored one.
    """

    modules: dict[str, StoredModule] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


def from_peft(
    tensors: Mapping[str, LazyTensor],
    scale: Callable[[str, int], float],
    layers: Layers,
    token_indices: Mapping[str, tuple[int, ...]] | None = None,
) -> Adapter:
    """The updates that a PEFT adapter is.

    Args:
        tensors: by stored name.
        scale: of a module's update, from the module's name and the rank.
        layers: the weights of the base model.
        token_indices: which rows the settings say are trained, by pattern of module names.

    Raises:
        MappingError: a name is no rule's, a factor is missing, or shapes are of another model.
    """
    stored = by_module(tensors)
    found = stored.modules
    places = places_of(layers)
    updates: dict[Target, LowRank] = {}
    for module, own in found.items():
        name = own.names[0]
        experts = None if module in places else _of_experts(module, own, layers, places, scale)
        if experts is not None:
            updates.update(experts)
            continue
        item, number = _place(module, places, layers, name)
        update = update_of(module, own, scale)
        operation = item.rule.operation.on_rows()
        if operation is None or (len(item.sources) > 1 and not operation.parts):
            raise MappingError(
                f"no rule of family {layers.model.family} says how an adapter of this weight is laid out in Megatron",
                tensor=name,
                found=item.hub,
            )
        shapes = operation.source_shapes(item.shape, item.config)
        _check_rows(update, shapes[number], item, layers, own)
        own_rows = operation if len(item.sources) == 1 else operation.of_part(number)
        update = rearranged(update, partial(to_hub, own_rows, item))
        target = Target(item.hub, operation.parts[number] if len(item.sources) > 1 else "")
        if target in updates:
            raise MappingError(
                "adapts a weight that another tensor adapts", tensor=name, found=updates[target].names[0]
            )
        updates[target] = update
    adapter = Adapter(updates)
    adapter.replaced.update(_replaced(stored.saved, layers, tensors))
    for module, name in stored.tokens.items():
        item, number = _place(module, places, layers, name)
        adapter.rows.setdefault(item.hub, {})[number] = rows_of(module, name, tensors[name], token_indices or {})
    for target, update in updates.items():
        check_update(target, update, layers)
    return adapter


def check_pairs(tensors: Mapping[str, LazyTensor], *, blocks: bool = False) -> list[str]:
    """Check what needs no base model: that every module has both factors, of one rank.

    Args:
        tensors: by stored name.
        blocks: a second factor may be blocks of a block-diagonal matrix, one over the other, as peft's BD-LoRA has
            it; nothing but the adapter's settings tells whether it is.

    Returns:
        Modules of which it must be.

    Raises:
        MappingError: they do not.
    """
    diagonal: list[str] = []
    for module, own in by_module(tensors).modules.items():
        down, up = _factors(own)
        ranks = (down.shape[:1], up.shape[1:2])
        if blocks and down.ndim == up.ndim == 2 and ranks[0] > ranks[1] > (0,) and down.shape[0] % up.shape[1] == 0:
            diagonal.append(module)
            continue
        if ranks[0] != ranks[1]:  # a convolution's have more axes
            raise MappingError(
                "the two factors of an update are of different ranks",
                tensor=own.names[0],
                expected="(rank, ...) and (out, rank, ...)",
                found=f"{down.shape} and {up.shape}",
                remedy="copy the whole adapter",
            )
    return diagonal


def by_module(tensors: Mapping[str, LazyTensor]) -> StoredAdapter:
    """What an adapter stores, by the base model's names of modules and tensors.

    peft 0.21 stores a module of ``modules_to_save`` that is an embedding or the output layer up to three times: by its
    own name and as ``modules_to_save``, which are the trained tensor, and as ``original_module``, which is not.

    Raises:
        MappingError: a name is there twice, or there are two adapters.
    """
    result = StoredAdapter()
    modules, saved = result.modules, result.saved
    adapters: dict[str, str] = {}

    def save(plain: str, name: str) -> None:
        other = saved.setdefault(plain, name)
        if other != name and not all_equal([tensors[other], tensors[name]]):
            raise MappingError(
                "two stored tensors are the same one of the adapter, and they differ",
                tensor=name,
                found=other,
                remedy="leave one of them out with --exclude",
            )

    for name, tensor in tensors.items():
        plain = _OF_BASE.sub(r"\1", name.removeprefix(PREFIX))
        whole, factor, tokens = _SAVED.fullmatch(plain), _FACTOR.fullmatch(plain), _TOKENS.fullmatch(plain)
        if _COPY.fullmatch(plain):
            continue
        if tokens is not None:
            if tokens["live"]:
                adapters.setdefault(tokens["live"], name)
            result.tokens[tokens["module"]] = name
            continue
        if whole is not None:
            if whole["live"]:
                adapters.setdefault(whole["live"], name)
            save(f"{whole['module']}.{whole['kind']}", name)
            continue
        if factor is None:
            save(plain, name)
            continue
        live = factor["live"] or factor["live_embedding"] or factor["live_magnitude"]
        if live:
            adapters.setdefault(live, name)
        own = modules.setdefault(factor["module"], StoredModule())
        slot = _slot(factor)
        if getattr(own, slot) is not None:
            _check_single(adapters)
            raise MappingError(
                "two stored tensors are the same one of the adapter", tensor=name, found=getattr(own, slot)[0]
            )
        setattr(own, slot, (name, tensor))
        own.is_embedding = own.is_embedding or factor["embedding"] is not None
        own.names.append(name)
    _check_single(adapters)
    return result


def _check_single(adapters: Mapping[str, str]) -> None:
    """Raise MappingError if names of adapters (-> a stored name) are several."""
    if len(adapters) > 1:
        raise MappingError(
            "holds more than one adapter",
            tensor=list(adapters.values())[1],
            expected="one",
            found=", ".join(list(adapters)[:5]),
            remedy="leave the others out with --exclude",
        )


def rows_of(module: str, name: str, values: LazyTensor, indices: Mapping[str, tuple[int, ...]]) -> Rows:
    """The rows of a module that an adapter trains.

    Args:
        module: its name.
        name: the stored name of the rows.
        values: these.
        indices: which rows, by pattern of module names, as the settings say.

    Raises:
        UsageError: the settings do not say it.
    """
    for pattern, own in indices.items():
        if pattern in ("", module) or module.endswith(f".{pattern}"):
            return Rows(own, values, name)
    raise UsageError(
        "the adapter does not say which tokens these rows are of",
        tensor=name,
        expected="trainable_token_indices in adapter_config.json",
        remedy="copy the whole adapter",
    )


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
    module: str, own: StoredModule, layers: Layers, places: Places, scale: Callable[[str, int], float]
) -> dict[Target, LowRank] | None:
    """Every expert's update if the module is one of experts in one parameter, None otherwise."""
    if own.up is None or own.down is None or any(name in places for name in _spellings(module, layers)):
        return None
    found = expert_updates(module, own.down[1], own.up[1], layers, lambda name: _spellings(name, layers), own.names[0])
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
            raise MappingError(
                "no rule says how an adapter of this parameter is laid out in Megatron",
                tensor=own.names[0],
                found=expert.item.hub,
            )
        update = LowRank(expert.down, expert.up, factor, names=tuple(own.names))
        if len(expert.item.sources) == 1:
            update = rearranged(update, partial(to_hub, operation, expert.item))
        result[Target(expert.item.hub)] = update
    return result


def _factors(own: StoredModule) -> tuple[LazyTensor, LazyTensor]:
    """A module's first factor and its second, or an error that says which is missing."""
    for slot, tail in (("down", "lora_A"), ("up", "lora_B")):
        if getattr(own, slot) is None:
            raise MappingError(
                f"the adapter of this module has no {tail}", tensor=own.names[0], remedy="copy the whole adapter"
            )
    assert own.down is not None and own.up is not None
    return own.down[1], own.up[1]


def update_of(module: str, own: StoredModule, scale: Callable[[str, int], float]) -> LowRank:
    """A module's update, (out, in); a convolution's is that of its kernel as a matrix of all that an output sees.

    Raises:
        MappingError: a factor is missing, or they do not fit together.
        UsageError: its scale is not known.
    """
    down, up = _factors(own)
    if down.ndim == up.ndim > 2 and down.size and set(up.shape[2:]) == {1}:
        down = down.reshape((down.shape[0], down.size // down.shape[0]))
        up = up.reshape(up.shape[:2])
    magnitude = None if own.magnitude is None else own.magnitude[1]
    bias = None if own.bias is None else own.bias[1]
    check_factors(LowRank(down, up, 1.0), own.names[0])
    factor = scale(module, down.shape[0])
    if own.is_embedding:  # its weight is (rows, width): the update is the transpose of a linear layer's
        if magnitude is not None:
            raise MappingError("DoRA on an embedding is not supported", tensor=own.names[0])
        down, up = up.transpose(), down.transpose()
    if magnitude is not None and magnitude.ndim > 1 and magnitude.size == max(magnitude.shape):
        magnitude = magnitude.reshape((magnitude.size,))
    return LowRank(down, up, factor, magnitude, bias, tuple(own.names))


def _check_rows(update: LowRank, shape: tuple[int, ...], item: Instance, layers: Layers, own: StoredModule) -> None:
    """The update has the rows that a rule's operation takes apart."""
    rows = update.up.shape[0]
    padded = item.rule.of_vocabulary and (layers.model.config.vocab_size or 0) <= rows <= shape[0]
    if len(shape) != 2 or (rows != shape[0] and not padded):
        assert own.up is not None and own.down is not None
        raise MappingError(
            "the adapter is of another base model",
            tensor=(own.down if own.is_embedding else own.up)[0],
            expected=f"{shape[0]} rows by the model's configuration",
            found=f"{rows} rows",
            remedy="give the base model that it was trained on, or its configuration with --config",
        )


def _place(module: str, places: Places, layers: Layers, name: str) -> tuple[Instance, int]:
    if module in places:
        return places[module]
    for spelled in _spellings(module, layers):
        if spelled in places:
            return places[spelled]
    head, embedding = head_and_embedding(layers.model)
    if f"{module}.weight" == head and layers.model.config.share_embeddings_and_output_weights:
        raise MappingError(
            "adapts the output layer, which the model shares with its embedding",
            tensor=name,
            expected=f"a model whose {head} is not tied to {embedding}",
            found=module,
            remedy="leave the tensors out with --exclude, or untie the base model as it was for training",
        )
    raise MappingError(
        f"no rule of family {layers.model.family} has a module that this adapts",
        tensor=name,
        expected=f"a module such as {some(list(places)[1:3])}",
        found=module,
        remedy="give the base model that it was trained on, with --config or --family",
    )


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


def _is_copy(stored: str, saved: Mapping[str, str], tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a whole tensor is stored under another name, too, as a tied output layer of a resized model is."""
    return any(name != stored and all_equal([tensors[stored], tensors[name]]) for name in saved.values())


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
    model = layers.model
    head, _ = head_and_embedding(model)
    result: dict[str, dict[int, LazyTensor]] = {}
    for plain_name, stored in saved.items():
        stem, _, kind = plain_name.rpartition(".")
        known = (f"{spelled}.{kind}" for spelled in _spellings(stem, layers))
        source = next((name for name in known if name in by_source), None)
        if source is None and plain_name == head and _is_copy(stored, saved, tensors):
            continue
        if source is None and stem == head.removesuffix(".weight") and model.config.share_embeddings_and_output_weights:
            raise MappingError(
                "the adapter has an output layer of its own, and the base model's is tied to its embedding",
                tensor=stored,
                expected=f"an untied model of family {model.family}",
                remedy="merge it with peft, whose model is untied by it, or leave the tensor out with --exclude",
            )
        if source is None:
            raise MappingError(
                f"is neither an adapter's factor nor a weight of family {model.family}",
                tensor=stored,
                expected="...lora_A.weight, ...lora_B.weight, or a weight of the base model",
                remedy="leave it out with --exclude",
            )
        item, number = by_source[source]
        shape = item.rule.operation.source_shapes(item.shape, item.config)[number]
        value = tensors[stored]
        if value.shape != shape:
            raise MappingError(
                "the adapter replaces a weight by one of another shape",
                tensor=stored,
                expected=shape,
                found=value.shape,
                remedy="convert the base model to hf and merge there, where the vocabulary gets the "
                "adapter's rows; or resize it as it was resized for training",
            )
        result.setdefault(item.hub, {})[number] = value
    return result
