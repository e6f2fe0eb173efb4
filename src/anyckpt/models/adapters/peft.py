"""Hugging Face PEFT's adapters as the hub's updates: which follow from the family's own rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.models.adapters.adapter import Adapter, LowRank, Target, all_equal, put
from anyckpt.models.adapters.layers import Layers, check_update
from anyckpt.models.adapters.parameters import expert_updates
from anyckpt.models.adapters.peft_names import StoredModule, by_module, rows_of, update_of
from anyckpt.models.adapters.rows import Places, places_of, rearranged, to_hub
from anyckpt.models.hub import head_and_embedding
from anyckpt.models.language.rule_operations import Halves
from anyckpt.models.language.rules import Instance
from anyckpt.models.language.variants import family_names
from anyckpt.tensor import Constant, LazyTensor

_TEXT = "language_model."
"""What the text part of a model that also sees has in its names."""


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
        put(updates, target, update)
    adapter = Adapter(updates)
    adapter.replaced.update(_replaced(stored.saved, layers, tensors))
    for module, name in stored.tokens.items():
        item, number = _place(module, places, layers, name)
        adapter.rows.setdefault(item.hub, {})[number] = rows_of(module, name, tensors[name], token_indices or {})
    for target, update in updates.items():
        check_update(target, update, layers)
    return adapter


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
        expected=f"a module such as {', '.join(list(places)[1:3])}",
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
        if item.rule.of_vocabulary and value.shape == (model.config.vocab_size, *shape[1:]) and value.shape < shape:
            value = value.pad(0, shape[0])  # rows that only pad the vocabulary
        if value.shape != shape:
            raise MappingError(
                "the adapter replaces a weight by one of another shape",
                tensor=stored,
                expected=shape,
                found=value.shape,
                remedy="let the base's vocabulary grow first, with --vocab-size and --new-rows mean, if the adapter "
                "was trained with more tokens",
            )
        result.setdefault(item.hub, {})[number] = value
    return result
