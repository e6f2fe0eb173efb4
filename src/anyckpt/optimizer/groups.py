"""Which parameter is in which group, where a checkpoint lists groups without names.

Weight matrices decay; biases and tensors of one axis do not.  Megatron's groups say of themselves whether they do
(``wd_mult``; ``pre_wd_mult`` in NeMo), whether they are of experts (``is_expert_parallel``), which are groups of their
own only with expert parallelism, and whether of embedding and output layer (``is_decoupled_lr``).  Other groups say
it by their ``weight_decay``.  Their order changed between releases.

Facts: ``_get_param_groups`` of ``megatron/core/optimizer/__init__.py``, core 0.5 to 0.16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.indexing import Shape
from anyckpt.optimizer.state import unproved

_EDGES = (EMBEDDING, HEAD)


class Kind(NamedTuple):
    """What groups are told apart by."""

    decays: bool
    expert: bool
    edge: bool

    def __str__(self) -> str:
        text = f"of {'experts' if self.expert else 'dense layers'} {'with' if self.decays else 'without'} weight decay"
        return f"{text} and with a learning rate of its own" if self.edge else text


def decays(name: str, shape: Shape) -> bool:
    """Weight decay applies to a parameter of one module (not to several stacked layers)."""
    return len(shape) > 1 and not name.endswith(".bias")


def is_edge(name: str) -> bool:
    """A parameter is the embedding or the output layer."""
    return name.endswith(_EDGES)


def effective(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters for a trainer that knows no ``wd_mult``: weight decay is what Megatron would apply."""
    multiplier = group.get("wd_mult", group.get("pre_wd_mult", 1.0))
    return {**group, "weight_decay": 0.0} if multiplier == 0 and "weight_decay" in group else dict(group)


def group_decays(group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Weight decay applies to a group: it says so, or nothing distinguishes it from the others in this."""
    multiplier = next((group[key] for key in ("wd_mult", "pre_wd_mult") if key in group), None)
    if multiplier is not None:
        return bool(multiplier != 0)
    return group.get("weight_decay") != 0 or all(other.get("weight_decay") == 0 for other in groups)


def assigned(shapes: Mapping[str, Shape], groups: Sequence[Mapping[str, Any]], path: str | None) -> dict[str, int]:
    """The index of each parameter's group.

    Args:
        shapes: of the parameters as one module has them, by name.
        groups: hyperparameters of each group; all optimizers of a chain together.
        path: file, for messages.

    Raises:
        MappingError: a parameter could be in several groups, or in none.
    """
    kinds = [
        Kind(group_decays(group, groups), bool(group.get("is_expert_parallel")), bool(group.get("is_decoupled_lr")))
        for group in groups
    ]
    experts, edges = any(kind.expert for kind in kinds), any(kind.edge for kind in kinds)
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        kind = Kind(decays(name, shape), experts and ".experts." in name, edges and is_edge(name))
        fitting = [number for number, own in enumerate(kinds) if own == kind]
        if not fitting:  # one group for all: nothing is exempt from weight decay, or decay is off
            fitting = [number for number, own in enumerate(kinds) if own[1:] == kind[1:]]
        if len(fitting) != 1:
            raise unproved(
                "nothing tells which of the optimizer's parameter groups it is in",
                path=path,
                tensor=name,
                expected=f"one group {kind}",
                found=f"{len(fitting)} of {len(groups)} groups",
            )
        found[name] = fitting[0]
    return found
