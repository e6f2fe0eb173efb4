"""Reading the state of Megatron's optimizers by parameter.

Three containers hold it: ``Float16OptimizerWithFloat16Params`` (masters by group, Adam's state by number),
``FP32Optimizer`` (no masters), and the distributed optimizer (flat buffers in ``distrib_optim.pt``).  With expert
parallelism there is one optimizer for experts and one for the rest, and a list in place of one container.  The
distributed optimizer writes each of them once: the one for dense layers is None in the files of other expert ranks.

Facts: ``state_dict`` of these classes in ``megatron/core/optimizer/{optimizer,distrib_optimizer}.py`` of 0.7 to
0.16, and their forms before, which differ in key names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import OptimizerState, ParallelLayout, RankShard
from anyckpt.config import of_ranks
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import MappingError
from anyckpt.optimizer.buffers import place, place_in_buckets, rules
from anyckpt.optimizer.data_parallel_shards import join_shards
from anyckpt.optimizer.flat_state import FlatBuffer, flat_buffers
from anyckpt.optimizer.rank_parameters import Parameter, deal_out, flag, parameters_of
from anyckpt.optimizer.state import MASTER, MOMENTS, SLOTS, same_step, unproved
from anyckpt.optimizer.stored import HALF, fitting, inner, masters, masters_of_group
from anyckpt.tensor import LazyTensor

_FLOAT32 = BY_NAME["float32"]

Found = dict[Parameter, dict[str, LazyTensor]]


@dataclass(frozen=True)
class RankState:
    """A rank's model, and what its files hold of the optimizer.

    Attributes:
        shards: the rank's chunks, tensors in the order of the file and as they are stored there.
        optimizer: ``optimizer`` of the model's file.
        distributed: what ``distrib_optim.pt`` holds, or None.
        path: the model's file.
        parts: ``optimizer`` of each data-parallel rank's ``optim.pt``, where there are such files.
    """

    shards: tuple[RankShard, ...]
    optimizer: Any
    distributed: Any
    path: str
    parts: tuple[Any, ...] = ()


def read_optimizer(ranks: Sequence[RankState], arguments: Mapping[str, Any], layout: ParallelLayout) -> OptimizerState:
    """The optimizer's state by parameter and rank.

    Args:
        ranks: every rank, in the order of the checkpoint's.
        arguments: of the training run, as plain data.
        layout: of the files.

    Raises:
        MappingError: counts or shapes do not prove which parameter a state is of.
    """
    slots: dict[str, list[RankShard]] = {slot: [] for slot in SLOTS}
    steps: list[Any] = []
    for rank in _completed(ranks, arguments, layout):
        reader = _RankReader(rank, arguments, layout)
        found = reader.read()
        steps += reader.steps
        for number, shard in enumerate(rank.shards):
            for slot in SLOTS:
                tensors = {p.name: state[slot] for p, state in found.items() if p.chunk == number}
                slots[slot].append(replace(shard, tensors=tensors))
    step = same_step(steps, ranks[0].path)
    containers = [found for own in ranks[0].parts or (ranks[0].optimizer,) for found in _containers(own)]
    groups: list[dict[str, Any]] = []
    for container in containers:
        own_groups = [_options(group) for group in _groups(container, ranks[0].path)]
        groups += [group for group in own_groups if not ranks[0].parts or group not in groups]
    return OptimizerState(
        ranks={slot: tuple(shards) for slot, shards in slots.items()},
        step=step,
        groups=tuple(groups),
        grad_scaler=next((c["grad_scaler"] for c in containers if "grad_scaler" in c), None),
    )


def _options(group: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in group.items() if key != "params"}


class _RankReader:
    def __init__(self, rank: RankState, arguments: Mapping[str, Any], layout: ParallelLayout) -> None:
        self.rank = rank
        self.arguments = arguments
        self.layout = layout
        self.steps: list[Any] = []

    def read(self) -> Found:
        """Each parameter's slots, in the order of the file."""
        if self.rank.parts:
            joined = join_shards(parameters_of(self.rank.shards), self.rank.parts, self.arguments, self.rank.path)
            for part in self.rank.parts:
                self.steps += _steps(_groups(part, self.rank.path))
            return joined
        containers = _containers(self.rank.optimizer)
        groups = [_groups(container, self.rank.path) for container in containers]
        parameters = parameters_of(self.rank.shards)
        dealt = iter(deal_out(parameters, [group for one in groups for group in one], self.rank.path))
        buffers = _buffers(self.rank.distributed, len(containers)) if self.rank.distributed is not None else None
        found: Found = {}
        for number, (container, own) in enumerate(zip(containers, groups, strict=True)):
            mine = [next(dealt) for _ in own]
            if buffers is not None:
                self.steps += _steps(own)
                found.update(self._from_buffers(buffers[number], mine))
            else:
                found.update(self._by_number(container, own, mine))
        return {parameter: found[parameter] for parameter in parameters}

    def _bad(self, problem: str, **facts: Any) -> MappingError:
        return unproved(problem, path=self.rank.path, **facts)

    # -- masters by group, Adam's state by number --------------------------------------------------------------

    def _by_number(
        self, container: Mapping[Any, Any], groups: Sequence[Mapping[Any, Any]], dealt: Sequence[list[Parameter]]
    ) -> Iterator[tuple[Parameter, dict[str, LazyTensor]]]:
        state = _inner(container).get("state")
        if not isinstance(state, dict):
            raise self._bad(
                "the optimizer's state is not in the model's file",
                expected="distrib_optim.pt"
                if self.arguments.get("use_distributed_optimizer")
                else "a dictionary 'state'",
                found=", ".join(map(str, list(_inner(container))[:5])),
            )
        of_groups = masters(container)
        self.steps += _steps(groups)
        for number, (group, parameters) in enumerate(zip(groups, dealt, strict=True)):
            indices = group.get("params")
            if not isinstance(indices, (list, tuple)):
                raise self._bad(f"parameter group {number} of the optimizer lists no parameters")
            halves = [parameter for parameter in parameters if parameter.weight.dtype.name in HALF]
            own = dict(zip(halves, masters_of_group(of_groups, number, len(halves), self.rank.path), strict=False))
            for index, parameter in zip(indices, parameters, strict=True):
                one = state.get(index) if type(index) is int else None
                if not isinstance(one, dict):
                    raise self._bad(
                        "the optimizer has no state for a parameter", tensor=parameter.name, found=f"number {index}"
                    )
                self.steps.append(one.get("step"))
                slots = {slot: one.get(slot) for slot in MOMENTS}
                slots[MASTER] = own.get(parameter, one.get("master_param", parameter.weight))
                yield parameter, self._checked(parameter, slots)

    def _checked(self, parameter: Parameter, slots: Mapping[str, Any]) -> dict[str, LazyTensor]:
        found = fitting({slot: slots[slot] for slot in SLOTS}, parameter.weight.shape, parameter.name, self.rank.path)
        master = found[MASTER]
        if master.dtype != _FLOAT32:
            raise self._bad(
                "the optimizer has no float32 weights",
                tensor=parameter.name,
                expected="float32",
                found=master.dtype.name,
            )
        return found

    # -- flat buffers ------------------------------------------------------------------------------------------

    def _from_buffers(
        self, state: Any, dealt: Sequence[list[Parameter]]
    ) -> Iterator[tuple[Parameter, dict[str, LazyTensor]]]:
        """Parameters of one optimizer.

        Buffers are numbered by chunk, and in a chunk by the first parameter of each element type.
        """
        if state is None:
            raise self._bad(
                "no rank's distrib_optim.pt has the state of one of the optimizers",
                expected="the file of the first data-parallel rank of dense layers, and of experts",
            )
        here = {parameter for group in dealt for parameter in group}
        stored = flat_buffers(state, self.rank.path)
        of_gradients = any(buffer.of_gradients for buffer in stored)
        in_fp32 = of_gradients and bool(self.arguments.get("accumulate_allreduce_grads_in_fp32"))
        expected: dict[tuple[int, str], list[Parameter]] = {}
        for parameter in parameters_of(self.rank.shards):
            if parameter in here:
                kind = _FLOAT32.name if in_fp32 else parameter.weight.dtype.name
                expected.setdefault((parameter.chunk, kind), []).append(parameter)
        types = [(kind, len(parameters)) for (_, kind), parameters in expected.items()]
        if [kind for kind, _ in types] != [buffer.kind for buffer in stored]:
            raise self._bad(
                "the buffers of the distributed optimizer do not fit the model's parameters",
                expected=", ".join(f"{kind} for {count} parameters" for kind, count in types) or "none",
                found=", ".join(buffer.kind for buffer in stored) or "none",
            )
        for ((chunk, _), parameters), buffer in zip(expected.items(), stored, strict=True):
            yield from self._from_buffer(buffer, chunk, parameters)

    def _from_buffer(
        self, buffer: FlatBuffer, chunk: int, parameters: Sequence[Parameter]
    ) -> Iterator[tuple[Parameter, dict[str, LazyTensor]]]:
        if buffer.coalesced:
            shard = self.rank.shards[chunk]
            tied = of_ranks.sizes(self.arguments, "megatron-args")["share_embeddings_and_output_weights"]
            candidates = rules(
                self.arguments,
                first_chunk=shard.pipeline_rank == 0 and shard.virtual_rank == 0,
                shared=tied and self.layout.pipeline_parallel > 1,
            )
            starts = place(parameters, sum(buffer.sizes), candidates, self.rank.path)
            places = {parameter: (0, start) for parameter, start in starts.items()}
        else:
            places = place_in_buckets(parameters, buffer.sizes, buffer.unpadded, self._replicas(), self.rank.path)
        for parameter, (bucket, start) in places.items():
            size, shape = parameter.weight.size, parameter.weight.shape
            slots = {slot: own[bucket].narrow(0, start, size).reshape(shape) for slot, own in buffer.slots.items()}
            yield parameter, self._checked(parameter, slots)

    def _replicas(self) -> list[int]:
        """Data-parallel ranks that may have shared a buffer: those of dense layers, and of experts."""
        data, context = (self.arguments.get(f"{kind}_size") for kind in ("data_parallel", "context_parallel"))
        if type(data) is not int or data < 1:
            return []
        dense = data * (context if type(context) is int and context > 0 else 1)
        return sorted({dense, max(1, dense // self.layout.expert_parallel)})


def _completed(ranks: Sequence[RankState], arguments: Mapping[str, Any], layout: ParallelLayout) -> Iterator[RankState]:
    """The ranks, with the flat buffers that another rank's file has for them.

    The file of a rank has the state of those optimizers only of whose data-parallel ranks it is the first.
    """
    ways = arguments.get("expert_tensor_parallel_size")
    ways = ways if type(ways) is int and 0 < ways <= of_ranks.MOST_RANKS else layout.tensor_parallel
    period = math.gcd(layout.tensor_parallel, ways * layout.expert_parallel)  # see Parallelism.expert_share
    held: dict[tuple[Any, ...], Any] = {}

    def keys(rank: RankState) -> list[tuple[Any, ...]]:
        """Of each optimizer, what tells which state it has."""
        shard = rank.shards[0]
        dense = ("dense", shard.pipeline_rank, shard.tensor_rank)
        share = (shard.tensor_rank - shard.expert_rank * ways) % period
        experts = ("experts", shard.pipeline_rank, shard.expert_rank, share)
        apart = [_of_experts(container, rank.path) for container in _containers(rank.optimizer)]
        return [(*(experts if own else dense), number) for number, own in enumerate(apart)]

    for rank in ranks:
        if isinstance(rank.distributed, list):
            for key, state in zip(keys(rank), rank.distributed, strict=False):
                if state is not None:
                    held.setdefault(key, state)
    for rank in ranks:
        if isinstance(rank.distributed, list) and None in rank.distributed:
            own = [
                held.get(key) if state is None else state
                for key, state in zip(keys(rank), rank.distributed, strict=False)
            ]
            rank = replace(rank, distributed=own)
        yield rank


def _of_experts(container: Mapping[Any, Any], path: str) -> bool:
    return any(flag(group, "is_expert_parallel") for group in _groups(container, path))


def _containers(optimizer: Any) -> list[Mapping[Any, Any]]:
    """The optimizers' states: one, or a list of them."""
    found = optimizer if isinstance(optimizer, list) else [optimizer]
    return [one if isinstance(one, dict) else {} for one in found]


def _inner(container: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state of the optimizer that Megatron's own wraps."""
    wrapped = inner(container)
    return wrapped if isinstance(wrapped, dict) else {}


def _steps(groups: Iterable[Mapping[Any, Any]]) -> list[Any]:
    return [group.get("step") for group in groups]


def _groups(container: Mapping[Any, Any], path: str) -> list[Mapping[Any, Any]]:
    groups = _inner(container).get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise unproved(
            "the optimizer's state has no parameter groups",
            path=path,
            expected="a list 'param_groups'",
            found=", ".join(map(str, list(container)[:5])) or "nothing",
        )
    return groups


def _buffers(distributed: Any, count: int) -> list[Any]:
    """What the distributed optimizer keeps for each of the rank's optimizers."""
    found = distributed if isinstance(distributed, list) else [distributed]
    return [*found, *([None] * (count - len(found)))]
