"""Rules of a module: the weight and the bias of a linear layer or of a norm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from anyckpt.models.language.rule_operations import IDENTITY, Operation
from anyckpt.models.language.rules import Condition, Rule, always


def linear(
    source: str | tuple[str, ...],
    hub: str,
    shape: tuple[str, ...],
    operation: Operation = IDENTITY,
    when: Condition = always,
    bias: Condition | None = None,
    of_bias: Operation | None = None,
) -> tuple[Rule, Rule]:
    """A linear layer.

    Args:
        source: pattern of the family's module, or several in the operation's order.
        hub: pattern of the hub's.
        shape: of the weight; the bias has the first length.
        operation: how weight and bias become the hub's.
        when: whether the layer exists.
        bias: whether its bias exists; as the layer if None.
        of_bias: how the bias becomes the hub's, if not as the weight.
    """
    modules = (source,) if isinstance(source, str) else source
    return (
        Rule(tuple(f"{name}.weight" for name in modules), f"{hub}.weight", shape, operation, when),
        Rule(tuple(f"{name}.bias" for name in modules), f"{hub}.bias", shape[:1], of_bias or operation, bias or when),
    )


def norm(source: str, hub: str, when: Condition = always) -> tuple[Rule, Rule]:
    """A norm with a bias; of the hub's names what is before ``weight`` and ``bias``."""
    weight, bias = (Rule((f"{source}.{part}",), f"{hub}{part}", ("hidden",), when=when) for part in ("weight", "bias"))
    return weight, bias


def alone(*rules: Rule | Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules of what no framework of ours divides between ranks, for none has such modules."""
    given = (rule for each in rules for rule in ([each] if isinstance(each, Rule) else each))
    return tuple(replace(rule, partition="alone") for rule in given)
