"""Laying out optimizer state as Megatron's ``Float16OptimizerWithFloat16Params`` and ``FP32Optimizer`` keep it.

Megatron-Core 0.16 loads both forms of the step: torch's Adam looks for it beside the moments, the fused ones of
Transformer Engine and Apex in the parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from anyckpt.checkpoint import OptimizerState, RankShard
from anyckpt.data_classes import dataclass
from anyckpt.models.dialects.rank_names import part_norms
from anyckpt.models.dialects.registration import registered_order
from anyckpt.optimizer.rank_parameters import Parameter, decays, flag, parameters_of
from anyckpt.optimizer.state import MOMENTS, unproved
from anyckpt.optimizer.stored import HALF
from anyckpt.tensor import LazyTensor, from_array

_DEFAULTS = {"lr": "lr", "eps": "adam_eps", "weight_decay": "weight_decay"}


@dataclass(frozen=True, order=True)
class Kind:
    """What tells parameter groups apart; in the order in which Megatron-Core has them."""

    of_expert: bool
    undecayed: bool
    decoupled: bool


class OptimizerWriter:
    """Lays out the state of every rank.

    Args:
        state: by rank.
        shards: every rank's weights.
        arguments: of the training run, for hyperparameters that the state does not have.
        local: names are to be those of Megatron-Core's local layers, whose order differs.
        apart: experts have an optimizer of their own, as with expert parallelism.
    """

    def __init__(
        self,
        state: OptimizerState,
        shards: Iterable[RankShard],
        arguments: Mapping[str, Any],
        *,
        local: bool,
        apart: bool,
    ) -> None:
        self._state = state
        self._apart = apart
        self._arguments = arguments
        self._local = local
        held = state.ranks or {slot: (RankShard(0, 0, 0, 0, own, ""),) for slot, own in state.slots.items()}
        self._slots = {slot: {shard.place: shard.tensors for shard in own} for slot, own in held.items()}
        everything = [parameter for shard in shards for parameter in parameters_of([shard])]
        self._half = any(parameter.weight.dtype.name in HALF for parameter in everything)
        self._separate = any(flag(group, "is_decoupled_lr") for group in state.groups)
        self._kinds = sorted({self._kind(parameter) for parameter in everything})

    def _kind(self, parameter: Parameter) -> Kind:
        """That of a parameter's group; embeddings and experts have their own only where there are such groups."""
        return Kind(self._apart and parameter.of_expert, not parameter.decays, self._separate and parameter.decoupled)

    def rank(self, chunks: Sequence[RankShard]) -> Any:
        """``optimizer`` of one rank's file: a container, or with expert parallelism a list of two.

        Args:
            chunks: the rank's shards in order.

        Raises:
            MappingError: a parameter has no state, or one of another shape.
        """
        parameters: list[Parameter] = []
        slots: dict[Parameter, Mapping[str, LazyTensor]] = {}
        for number, shard in enumerate(chunks):
            tensors = self._spelled(shard.tensors)
            own = {slot: self._spelled(held.get(shard.place, {})) for slot, held in self._slots.items()}
            ordered = {name: tensors[name] for name in registered_order(tensors)}
            for parameter in parameters_of([RankShard(0, 0, 0, 0, ordered, shard.source)]):
                placed = Parameter(number, parameter.name, parameter.weight)
                parameters.append(placed)
                slots[placed] = {slot: held[placed.name] for slot, held in own.items() if placed.name in held}
        experts = sorted({kind.of_expert for kind in self._kinds})
        containers = [
            self._container([kind for kind in self._kinds if kind.of_expert == of_expert], parameters, slots)
            for of_expert in experts
        ]
        return containers[0] if len(containers) == 1 else containers

    def _spelled(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        return part_norms(tensors) if self._local else tensors

    def _container(
        self,
        kinds: Sequence[Kind],
        parameters: Sequence[Parameter],
        slots: Mapping[Parameter, Mapping[str, LazyTensor]],
    ) -> dict[str, Any]:
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        masters: list[list[LazyTensor]] = []
        for kind in kinds:
            own = [parameter for parameter in parameters if self._kind(parameter) == kind]
            first = len(state)
            for parameter in own:
                state[len(state)] = {
                    # Each step is a storage of its own: a loaded one is counted up in place.
                    **(
                        {} if self._state.step is None else {"step": from_array(np.array(self._state.step, np.float32))}
                    ),
                    **{slot: self._slot(slots[parameter], slot, parameter) for slot in MOMENTS},
                }
            groups.append({**self._hyperparameters(kind), "params": list(range(first, len(state)))})
            halves = [parameter for parameter in own if parameter.weight.dtype.name in HALF]
            masters.append([self._slot(slots[parameter], "master", parameter) for parameter in halves])
        adam = {"state": state, "param_groups": groups}
        if not self._half:
            return adam
        scaler = {} if self._state.grad_scaler is None else {"grad_scaler": self._state.grad_scaler}
        return {"optimizer": adam, **scaler, "fp32_from_fp16_params": masters}

    def _slot(self, slots: Mapping[str, LazyTensor], slot: str, parameter: Parameter) -> LazyTensor:
        tensor = slots.get(slot)
        if tensor is None or tensor.shape != parameter.weight.shape:
            raise unproved(
                f"the optimizer's {slot} does not fit its parameter",
                tensor=parameter.name,
                expected=f"a tensor of shape {parameter.weight.shape}",
                found="none" if tensor is None else tensor.shape,
            )
        return tensor

    def _hyperparameters(self, kind: Kind) -> dict[str, Any]:
        """Those of the group that is most like it in the source, else the training run's."""
        alike = [group for group in self._state.groups if decays(group) != kind.undecayed] or [*self._state.groups]
        alike.sort(
            key=lambda group: (
                flag(group, "is_expert_parallel") != kind.of_expert,
                flag(group, "is_decoupled_lr") != kind.decoupled,
            )
        )
        found = dict(alike[0]) if alike else self._from_arguments()
        found["wd_mult"] = 0.0 if kind.undecayed else found.get("wd_mult", 1.0)
        found.setdefault("lr_mult", 1.0)
        found.update(is_expert_parallel=kind.of_expert, is_decoupled_lr=kind.decoupled)
        if self._state.step is not None:
            found["step"] = self._state.step
        return found

    def _from_arguments(self) -> dict[str, Any]:
        found = {key: self._arguments[name] for key, name in _DEFAULTS.items() if name in self._arguments}
        betas = tuple(self._arguments.get(f"adam_beta{number}") for number in (1, 2))
        return found if None in betas else {**found, "betas": betas}
