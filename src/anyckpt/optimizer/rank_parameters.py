"""Which parameter group, and which place in it, Megatron's optimizers give to a parameter.

Optimizers know parameters by number: groups one after another, in each the parameters in the order in which modules
register them, chunk after chunk.  Which group a parameter is in follows from its name and shape, and is checked
against the counts in the file.

Facts: ``_get_param_groups`` in ``megatron/core/optimizer/__init__.py`` of 0.4 to 0.16 (the order of groups differs,
so they are told apart by what they say of themselves), ``megatron/model/module.py`` and ``optimizer/__init__.py``
before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import RankShard
from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.data_classes import dataclass
from anyckpt.optimizer.state import unproved
from anyckpt.tensor import LazyTensor

_BUFFERS = (".expert_bias", ".local_tokens_per_expert")
_DECOUPLED = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank.

    Attributes:
        chunk: which of the rank's shards.
        name: the hub's.
        weight: the parameter itself.
    """

    chunk: int
    name: str
    weight: LazyTensor

    @property
    def decays(self) -> bool:
        """Biases and what has one axis are not decayed."""
        return self.weight.ndim > 1 and not self.name.endswith(".bias")

    @property
    def of_expert(self) -> bool:
        return ".experts." in self.name

    @property
    def decoupled(self) -> bool:
        """It may have a learning rate of its own (``--decoupled-lr``)."""
        return self.name in _DECOUPLED


def parameters_of(shards: Sequence[RankShard]) -> list[Parameter]:
    """The parameters of a rank in the order of ``named_parameters()``, which is that of the file; without buffers."""
    return [
        Parameter(number, name, tensor)
        for number, shard in enumerate(shards)
        for name, tensor in shard.tensors.items()
        if not name.endswith(_BUFFERS) and f"lm_head.{name}" not in shard.tensors  # T5Model has its output layer twice
    ]


def deal_out(parameters: Sequence[Parameter], groups: Sequence[Mapping[Any, Any]], path: str) -> list[list[Parameter]]:
    """The parameters of each group.

    Args:
        parameters: of one rank.
        groups: parameter groups of all of the rank's optimizers, one after another.
        path: the rank's file, for messages.

    Raises:
        MappingError: a parameter fits no group, or a group has another number of parameters than fit it.
    """
    dealt: list[list[Parameter]] = [[] for _ in groups]
    separate = any(flag(group, "is_decoupled_lr") for group in groups)
    apart = any(flag(group, "is_expert_parallel") for group in groups)
    for parameter in parameters:
        fitting = [number for number, group in enumerate(groups) if _fits(parameter, group, separate, apart)]
        if not fitting:
            raise unproved(
                "the optimizer has no group for a parameter",
                path=path,
                tensor=parameter.name,
                expected=f"a group with weight decay {'on' if parameter.decays else 'off'}",
                found=f"{len(groups)} groups",
            )
        dealt[fitting[0]].append(parameter)
    for number, (group, fit) in enumerate(zip(groups, dealt, strict=True)):
        stated = group.get("params")
        if isinstance(stated, (list, tuple)) and len(stated) != len(fit):
            raise unproved(
                f"parameter group {number} of the optimizer does not fit the model",
                path=path,
                expected=f"{len(fit)} parameters, by their names and shapes",
                found=len(stated),
            )
    return dealt


def _fits(parameter: Parameter, group: Mapping[Any, Any], separate: bool, apart: bool) -> bool:
    """Whether a parameter is in a group; without expert parallelism experts are with the dense layers."""
    return (
        decays(group) == parameter.decays
        and (not apart or flag(group, "is_expert_parallel") == parameter.of_expert)
        and (not separate or flag(group, "is_decoupled_lr") == parameter.decoupled)
    )


def flag(group: Mapping[Any, Any], key: str) -> bool:
    """Whether a group says that something is so; values of other types than numbers say nothing."""
    value = group.get(key)
    return isinstance(value, (bool, int, float)) and value != 0


def decays(group: Mapping[Any, Any]) -> bool:
    """Whether a group's parameters are decayed: by its multiplier (NeMo says ``pre_wd_mult``), else by its rate."""
    factor = next((group[key] for key in ("wd_mult", "pre_wd_mult", "weight_decay") if key in group), 1.0)
    return factor != 0.0
