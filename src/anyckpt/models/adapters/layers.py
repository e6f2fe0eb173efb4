"""The weights of a model as adapters see them, and whether an update fits one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from anyckpt.config.model import ModelConfig
from anyckpt.errors import MappingError
from anyckpt.models.adapters.adapter import LowRank, Target, check_factors, check_vectors
from anyckpt.models.hub import Model
from anyckpt.models.language.delta_operations import GATED_QKV
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV, Operation
from anyckpt.models.language.rules import Instance

_QKV = re.compile(r".*\.self_attention\.linear_qkv\.weight")
_SPLIT: tuple[tuple[re.Pattern[str], Operation, Callable[[ModelConfig], bool]], ...] = (
    (_QKV, GATED_QKV, lambda config: config.attention_output_gate),
    (_QKV, INTERLEAVED_QKV, lambda config: not config.attention_output_gate),
    (re.compile(r".*\.linear_fc1\.weight\d*"), GATE_UP, lambda config: config.gated_linear_unit),
)
"""Which weights have parts that Megatron-Bridge's ``CanonicalLoRA`` adapts one by one, and how rows go together."""


class Layers:
    """The weights of a model, for adapters.

    Args:
        model: the model that adapters belong to.

    Attributes:
        instances: the rules of its tensors, by hub name.
        by_sources: the same by the family's own names.
        outer: first parts of the family's names, each with its dot.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.instances: dict[str, Instance] = {item.hub: item for item in model.definition.expected(model.config)}
        names = (source for item in self.instances.values() for source in item.sources)
        self.by_sources = {item.sources: item for item in self.instances.values() if item.sources}
        self.outer = tuple(dict.fromkeys(name[: name.index(".") + 1] for name in names if "." in name))

    def instance(self, weight: str, name: str) -> Instance:
        """The rule of a weight that an adapter's tensor ``name`` is for.

        Raises:
            MappingError: the model has no such weight.
        """
        if weight not in self.instances:
            raise MappingError(
                f"the model ({self.model.family}, {self.model.config.num_layers} layers) has no weight for it",
                tensor=name,
                expected=f"a weight such as {next(iter(self.matrices()))}",
                found=weight,
                remedy="give the base model's own configuration with --config",
            )
        return self.instances[weight]

    def matrices(self) -> Iterable[str]:
        """Hub names of the matrices."""
        return (name for name, item in self.instances.items() if len(item.shape) == 2)

    def split(self, weight: str, parts: Iterable[str] = ()) -> tuple[Operation, ModelConfig] | None:
        """How the rows of a weight's parts go together, and the layer's configuration; None if it has no parts.

        Args:
            weight: hub name.
            parts: those that there are: they tell which way it is where the family has another one than Megatron.
        """
        item = self.instances[weight]
        known = split_by_name(weight, item.config)
        if known is not None and set(parts) <= set(known.parts):
            return known, item.config
        own = item.rule.operation.rows_together()
        return (own, item.config) if own is not None and own.parts and set(parts) <= set(own.parts) else None


def split_by_name(weight: str, config: ModelConfig) -> Operation | None:
    """How Megatron lays the parts of a weight's rows together, None if it has none."""
    for pattern, operation, applies in _SPLIT:
        if pattern.fullmatch(weight) and applies(config):
            return operation
    return None


def check_update(target: Target, update: LowRank, layers: Layers) -> None:
    """Check that an update fits its weight.

    Raises:
        MappingError: the model has no such weight or part, or of another shape.
    """
    name = (update.names or (str(target),))[-1]
    item = layers.instance(target.weight, name)
    shape = item.shape
    if target.part:
        split = layers.split(target.weight, [target.part])
        if split is None:
            raise MappingError(f"the model's weight has no part {target.part!r}", tensor=name, found=target.weight)
        operation, config = split
        shape = operation.source_shapes(shape, config)[operation.parts.index(target.part)]
    check_factors(update, name)
    rows, columns = update.up.shape[0], update.down.shape[1]
    padded = item.rule.of_vocabulary and (layers.model.config.vocab_size or 0) <= rows <= shape[0]
    if len(shape) != 2 or columns != shape[1] or (rows != shape[0] and not padded):
        raise MappingError(
            "the adapter is of another base model",
            tensor=name,
            expected=f"an update of a weight of shape {shape}",
            found=f"one of shape {(rows, columns)}",
            remedy="give the base model that it was trained on, or its configuration with --config",
        )
    check_vectors(update, name)
