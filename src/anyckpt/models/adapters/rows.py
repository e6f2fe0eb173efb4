"""What peft's reader and writer share: an update's rows through a rule's operation, and the modules of a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from anyckpt.models.adapters.adapter import LowRank
from anyckpt.models.adapters.layers import Layers
from anyckpt.models.language.rule_operations import Operation
from anyckpt.models.language.rules import Instance
from anyckpt.tensor import LazyTensor

PREFIX = "base_model.model."
"""What peft's classes put before every name."""


def rearranged(update: LowRank, change: Callable[[LazyTensor], LazyTensor]) -> LowRank:
    """With everything that has the weight's rows changed."""
    return replace(
        update,
        up=change(update.up),
        magnitude=None if update.magnitude is None else change(update.magnitude),
        bias=None if update.bias is None else change(update.bias),
    )


def to_hub(operation: Operation, item: Instance, tensor: LazyTensor) -> LazyTensor:
    """Rows of the family's one tensor as those of the hub."""
    return operation.to_hub([tensor], item.config)


def from_hub(operation: Operation, item: Instance, number: int, tensor: LazyTensor) -> LazyTensor:
    """Rows of the hub as those of one of the family's tensors."""
    return operation.from_hub(tensor, item.config)[number]


Places = dict[str, tuple[Instance, int]]


def places_of(layers: Layers) -> Places:
    """The family's module name -> the rule of its weight, and which of the rule's sources it is."""
    return {
        source.removesuffix(".weight"): (item, number)
        for item in layers.instances.values()
        for number, source in enumerate(item.sources)
        if source.endswith(".weight")
    }
