"""A model's state dict with the adapter still in it, as trainers of models that peft has wrapped save it.

Every adapted module has its own weight as ``base_layer.weight`` beside ``lora_A.default.weight`` and
``lora_B.default.weight``, or as ``weight`` beside ``lora_A.weight`` and ``lora_B.weight`` where it is one of NeMo
Automodel's (``LinearLoRA``); all other tensors are the model's under ``base_model.model.``, or without that prefix
where the trainer took it away.  Nothing of it says the adapter's alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import field

from anyckpt.data_classes import dataclass
from anyckpt.models.adapters import peft_names
from anyckpt.models.adapters.rows import PREFIX
from anyckpt.tensor import LazyTensor

_FACTOR = re.compile(r"(.+)\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)(?:\.[^.]+)*")
_BASE = re.compile(r"(.+)\.base_layer\.[^.]+")
_SAVED = re.compile(r"(.+)\.modules_to_save\.[^.]+\.([^.]+)")
_UNTRAINED = ".original_module."


@dataclass
class Wrapped:
    """A model and the adapter in it, apart.

    Attributes:
        base: the model's tensors by its own names; trained copies of whole modules are in it.
        names: the same names -> the stored ones.
        adapter: the adapter's factors by the model's names.
        trained: names in ``base`` of tensors that were trained as a whole.
        left_out: stored names of untrained copies.
    """

    base: dict[str, LazyTensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    adapter: dict[str, LazyTensor] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def stored(self) -> peft_names.StoredAdapter:
        """The adapter by modules.

        Raises:
            MappingError: there are two adapters.
        """
        return peft_names.by_module(self.adapter)


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether these are the names of a whole model with an adapter in it, and not those of an adapter alone."""
    based: set[str] = set()
    plain: set[str] = set()
    adapted: set[str] = set()
    for name in names:
        factor, base = _FACTOR.fullmatch(name), _BASE.fullmatch(name)
        if factor is not None:
            adapted.add(factor[1])
        elif base is not None:
            based.add(base[1])
        else:
            plain.add(name)
    if based:
        return bool(plain) and adapted <= based
    return bool(adapted) and all(f"{module}.weight" in plain for module in adapted)


def taken_apart(tensors: Mapping[str, LazyTensor]) -> Wrapped:
    """The model and the adapter in it.

    Args:
        tensors: weights by stored name, of which ``is_wrapped`` is true.
    """
    result = Wrapped()
    prefix = next((name[: name.index(PREFIX) + len(PREFIX)] for name in tensors if PREFIX in name), "")
    if not all(name.startswith(prefix) for name in tensors):
        prefix = ""
    for name, tensor in tensors.items():
        plain = name.removeprefix(prefix)
        saved = _SAVED.fullmatch(plain)
        if _FACTOR.fullmatch(plain) or ".trainable_tokens_" in plain:
            result.adapter[PREFIX + plain] = tensor
            continue
        if _UNTRAINED in plain:
            result.left_out.append(name)
            continue
        if saved is not None:
            plain = f"{saved[1]}.{saved[2]}"
            result.trained.append(plain)
        plain = plain.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
        result.base[plain] = tensor
        result.names[plain] = name
    return result
