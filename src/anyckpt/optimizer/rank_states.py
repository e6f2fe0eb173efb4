"""Optimizer state in NeMo 1's files of one rank each, by parameter.

A rank's ``optimizer_states`` holds PyTorch's form (Adam's state by number), or that inside
``MainParamsOptimizerWrapper`` (``megatron_amp_O2``: the fp32 weights group by group), or Apex's
``DistributedFusedAdam``, whose second format has whole tensors by number and whose first is read in
``apex_buckets``.  Parameters are the rank's, in the order of its state dict.

Facts: ``nemo/core/optim/optimizer_with_main_params.py`` of NeMo 1.0 to 2.2, ``_state_dict_v2`` of
``apex/contrib/optimizers/distributed_fused_adam.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from anyckpt.checkpoint import GROUP
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import MappingError
from anyckpt.indexing import Shape
from anyckpt.models.dialects.rank_names import flattened
from anyckpt.optimizer.apex_buckets import has_buckets, shaped, whole_states
from anyckpt.optimizer.group_rules import possible_groups
from anyckpt.optimizer.state import DROP, SLOTS, options
from anyckpt.tensor import Constant, LazyTensor

_TAG, _FLOAT32 = BY_NAME["int32"], BY_NAME["float32"]
_HALF = ("bfloat16", "float16")
_BUFFERS = ("inv_freq", "expert_bias", "local_tokens_per_expert", "_extra_state")


@dataclass
class _Rank:
    """What one rank holds: chunk's number and parameter's stored name -> slot -> tensor."""

    slots: dict[tuple[int, str], dict[str, LazyTensor]] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    groups: list[Mapping[str, Any]] = field(default_factory=list)
    grad_scaler: Any = None


class Chunk(Protocol):
    """What a rank, or one virtual pipeline chunk of it, stores: its number, its state dict, and the file's name."""

    @property
    def number(self) -> int: ...

    @property
    def state(self) -> Mapping[Any, Any]: ...

    @property
    def source(self) -> str: ...


@dataclass(frozen=True)
class RankStates:
    """The optimizer's state of all ranks.

    Attributes:
        slots: slot -> for each chunk, in the order in which they were given, stored name -> tensor; ``GROUP`` is one.
        step: optimizer steps taken, or None.
        groups: hyperparameters of the parameter groups as stored.
        grad_scaler: state of the loss scaler, or None.
    """

    slots: Mapping[str, Sequence[dict[str, LazyTensor]]]
    step: int | None
    groups: tuple[dict[str, Any], ...]
    grad_scaler: Any


def read_rank_states(chunks: Sequence[Chunk], states: Sequence[Any]) -> RankStates:
    """The optimizer's state by parameter and rank.

    Args:
        chunks: every rank's, the chunks of one rank one after another.
        states: ``optimizer_states`` of the file of each chunk.

    Raises:
        FormatError: a state is damaged.
        MappingError: counts or shapes do not prove which parameter a state is of.
    """
    ranks: list[_Rank] = []
    own: dict[str, list[Chunk]] = {}
    state_of: dict[str, Any] = {}
    for chunk, state in zip(chunks, states, strict=True):
        own.setdefault(chunk.source, []).append(chunk)
        state_of[chunk.source] = state
    slots: dict[str, list[dict[str, LazyTensor]]] = {slot: [] for slot in (*SLOTS, GROUP)}
    for source, mine in own.items():
        rank = _read(mine, state_of[source], source)
        ranks.append(rank)
        for chunk in mine:
            for slot, found in slots.items():
                found.append(
                    {n: s[slot] for (number, n), s in rank.slots.items() if number == chunk.number and slot in s}
                )
    steps = sorted({step for rank in ranks for step in rank.steps})
    if len(steps) > 1:
        raise MappingError(
            "parameters have taken different numbers of optimizer steps",
            path=next(iter(own)), found=", ".join(map(str, steps[:5])), remedy=DROP,
        )  # fmt: skip
    return RankStates(slots, steps[0] if steps else None, tuple(map(options, ranks[0].groups)), ranks[0].grad_scaler)


def _read(chunks: Sequence[Chunk], states: Any, source: str) -> _Rank:
    container = _only(states, source)
    masters = next((container[key] for key in ("fp32_from_fp16_params", "fp32_from_fp16") if key in container), None)
    inner = next((container[key] for key in ("optimizer", "optimizer_state_dict") if key in container), container)
    flat = has_buckets(inner)
    if flat:
        inner = whole_states(inner, source)
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    state = inner.get("state") if isinstance(inner, dict) else None
    if not isinstance(state, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        shown = inner if isinstance(inner, dict) else container
        raise MappingError(
            "the optimizer's state is of a layout that is not understood",
            path=source, expected="'state' by number and 'param_groups', or Apex's buckets",
            found=", ".join(str(key) for key in list(shown)[:5]) or "nothing", remedy=DROP,
        )  # fmt: skip
    parameters = _parameters(chunks, source)
    rank = _Rank(groups=groups, grad_scaler=container.get("grad_scaler"))
    dealt = _dealt(parameters, groups, state, source)
    for step in (state.get("step"), *(group.get("step") for group in groups)):
        _note(rank.steps, step)
    for number, (group, mine) in enumerate(zip(groups, dealt, strict=True)):
        own_masters = _masters(masters, number, [parameters[key] for key in mine], source)
        for index, key in zip(group["params"], mine, strict=True):
            one = state.get(index) if type(index) is int else None
            if not isinstance(one, dict):
                raise MappingError(
                    "the optimizer has no state for a parameter",
                    path=source, tensor=key[1], found=f"number {index}", remedy=DROP,
                )  # fmt: skip
            _note(rank.steps, one.get("step"))
            weight = parameters[key]
            if flat:
                one = shaped(one, weight)
            master = own_masters.pop(0) if _is_half(weight) and own_masters else one.get("param")
            slots = {
                "master": weight.cast(_FLOAT32) if master is None else master,
                "exp_avg": one.get("exp_avg"),
                "exp_avg_sq": one.get("exp_avg_sq"),
            }
            rank.slots[key] = {
                **_checked(slots, weight, key[1], source),
                GROUP: Constant(_TAG, weight.shape, number.to_bytes(4, "little")),
            }
    rank.slots = {key: rank.slots[key] for key in parameters if key in rank.slots}
    return rank


def _only(states: Any, source: str) -> Mapping[Any, Any]:
    """The one optimizer; inside NeMo's EMA wrapper if there is one."""
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        raise MappingError(
            "the file has not one optimizer", path=source, expected="one in optimizer_states",
            found=f"{len(states)} optimizers" if isinstance(states, list) else type(states).__name__, remedy=DROP,
        )  # fmt: skip
    found = states[0]
    inner = found.get("opt")
    return inner if "ema" in found and isinstance(inner, dict) else found


def _parameters(chunks: Sequence[Chunk], source: str) -> dict[tuple[int, str], LazyTensor]:
    """The rank's parameters by chunk and stored name, in the order of its modules."""
    return {
        (chunk.number, name): value
        for chunk in chunks
        for name, value in flattened(chunk.state, source).items()
        if isinstance(value, LazyTensor) and value.dtype.is_floating and not name.endswith(_BUFFERS)
    }


def _dealt(
    parameters: Mapping[tuple[int, str], LazyTensor],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    source: str,
) -> list[list[tuple[int, str]]]:
    """The parameters of each group."""
    shapes = {f"{number}/{name}": weight.shape for (number, name), weight in parameters.items()}
    entries: list[list[Shape | None]] = []
    for number, group in enumerate(groups):
        indices = group.get("params")
        if not isinstance(indices, list):
            raise MappingError(f"parameter group {number} lists no parameters", path=source, remedy=DROP)
        entries.append([_shape(state.get(index)) if type(index) is int else None for index in indices])
    ways = possible_groups(shapes, groups, entries)
    if len(ways) != 1:
        counts = " + ".join(str(len(own)) for own in entries)
        raise MappingError(
            "the optimizer's parameter groups do not fit the rank's parameters"
            if not ways
            else "the optimizer's parameter groups fit the rank's parameters in several ways",
            path=source, expected=f"state of {len(shapes)} parameters, by a rule for weight decay",
            found=f"{counts} entries in {len(groups)} groups"
            + (f", {len(ways)} ways" if ways else ", or of other shapes"),
            remedy=DROP,
        )  # fmt: skip
    keys = dict(zip(shapes, parameters, strict=True))
    return [[keys[name] for name in own] for own in ways[0]]


def _shape(one: Any) -> Shape | None:
    moment = one.get("exp_avg") if isinstance(one, dict) else None
    return moment.shape if isinstance(moment, LazyTensor) else None


def _masters(masters: Any, number: int, weights: Sequence[LazyTensor], source: str) -> list[Any]:
    """The fp32 copies of a group's 16-bit parameters, in order; none where there is no wrapper."""
    if masters is None:
        return []
    halves = sum(map(_is_half, weights))
    own = masters[number] if isinstance(masters, list) and number < len(masters) else None
    if not isinstance(own, list) or len(own) != halves:
        raise MappingError(
            f"the fp32 weights of parameter group {number} do not fit the model",
            path=source, expected=f"{halves}, one for each parameter of 16 bits",
            found=len(own) if isinstance(own, list) else "none", remedy=DROP,
        )  # fmt: skip
    return [*own]


def _is_half(weight: LazyTensor) -> bool:
    return weight.dtype.name in _HALF


def _checked(slots: Mapping[str, Any], weight: LazyTensor, name: str, source: str) -> dict[str, LazyTensor]:
    for slot, tensor in slots.items():
        if not isinstance(tensor, LazyTensor) or tensor.shape != weight.shape or not tensor.dtype.is_floating:
            raise MappingError(
                f"the optimizer's {slot} does not fit its parameter",
                path=source, tensor=name, expected=f"a tensor of shape {weight.shape}",
                found=tensor.shape if isinstance(tensor, LazyTensor) else type(tensor).__name__, remedy=DROP,
            )  # fmt: skip
    return dict(slots)


def _note(steps: set[int], step: Any) -> None:
    if isinstance(step, LazyTensor):
        step = float(step.reshape((1,)).numpy()[0]) if step.size == 1 and step.dtype.numpy is not None else None
    if type(step) in (int, float) and step == step and abs(step) < 1 << 53:
        steps.add(int(step))
