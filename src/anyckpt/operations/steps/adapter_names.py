"""Names under which the updates of two adapters meet, whatever framework, layout and container they are of."""

from __future__ import annotations

from dataclasses import replace

from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.errors import LastingError
from anyckpt.models.adapters import Adapter, Layers, read_adapter, separated, settings_of, spelling_of
from anyckpt.models.adapters.loose import SPELLINGS, as_peft
from anyckpt.models.adapters.peft_names import by_module
from anyckpt.operations.steps.adapters import base_model
from anyckpt.operations.steps.common_names import CommonNames
from anyckpt.tensor import LazyTensor

_FACTORS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}


def adapter_names(a: Checkpoint, b: Checkpoint) -> CommonNames | None:
    """The tensors of two adapters under common names; None if one is none, or is not understood.

    Two that name the family's modules meet under these, two that name Megatron's under the hub's names, and one of each
    under the hub's names too if the base model of either is known; then updates of fused weights are those of their
    parts.  Factors are compared as they are stored: what they are multiplied by is the settings'.
    """
    spelled = [spelling_of(checkpoint) for checkpoint in (a, b)]
    if None in spelled:
        return None
    try:
        if "megatron" not in spelled:
            return CommonNames(_by_module(a), _by_module(b), "weights")
        layers = _layers(a) or _layers(b)
        if layers is None and spelled[0] != spelled[1]:
            return None
        found = [_updates(checkpoint, layers) for checkpoint in (a, b)]
        if layers is not None and any(target.part for adapter in found for target in adapter.updates):
            found = [separated(adapter, layers) for adapter in found]
    except LastingError as error:
        return CommonNames(a.weights(), b.weights(), "weights", (f"compared under stored names: {error}",))
    return CommonNames(_named(found[0]), _named(found[1]), "hub")


def _by_module(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Tensors by the module's name, without peft's prefix and the name of a live adapter."""
    tensors = checkpoint.weights()
    if spelling_of(checkpoint) in SPELLINGS:
        tensors = {**as_peft(tensors), **{name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}}
    stored = by_module(tensors)
    result = {}
    for module, own in stored.modules.items():
        for field, tail in _FACTORS.items():
            value = getattr(own, field)
            if value is not None:
                embeds = own.is_embedding and field in ("down", "up")
                result[f"{module}.{tail.replace('lora_', 'lora_embedding_') if embeds else tail}"] = value[1]
    result |= {name: tensors[stored_name] for name, stored_name in stored.saved.items()}
    return {**result, **{f"{module}.trained_rows": tensors[name] for module, name in stored.tokens.items()}}


def _layers(checkpoint: Checkpoint) -> Layers | None:
    model = base_model(checkpoint, None, None)[0]
    return None if model is None else Layers(model)


def _updates(checkpoint: Checkpoint, layers: Layers | None) -> Adapter:
    """The updates as they are stored: what the settings say of ranks and scales is no matter for names."""
    stated = settings_of(checkpoint) or AdapterSettings()
    return read_adapter(checkpoint, replace(stated, rank=None, alpha=1.0, ranks={}, alphas={}), layers)


def _named(adapter: Adapter) -> dict[str, LazyTensor]:
    result: dict[str, LazyTensor] = {}
    for target, update in adapter.updates.items():
        stem = target.weight.removesuffix(".weight") + (f".{target.part}" if target.part else "")
        for field, tail in _FACTORS.items():
            value = getattr(update, field)
            if value is not None:
                result[f"{stem}.{tail}"] = value
    for name, values in adapter.replaced.items():
        result |= {f"{name}[{number}]" if len(values) > 1 else name: value for number, value in values.items()}
    return result
