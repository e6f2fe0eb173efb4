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
from dataclasses import field
from typing import Any, Protocol

from anyckpt.checkpoint import GROUP
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import BY_NAME
from anyckpt.indexing import Shape
from anyckpt.models.dialects.rank_names import flattened
from anyckpt.optimizer import stored
from anyckpt.optimizer.apex_buckets import has_buckets, shaped, whole_states
from anyckpt.optimizer.group_rules import possible_groups
from anyckpt.optimizer.state import MASTER, MOMENTS, SLOTS, options, same_step, unproved
from anyckpt.tensor import Constant, LazyTensor

_TAG, _FLOAT32 = BY_NAME["int32"], BY_NAME["float32"]
_BUFFERS = ("inv_freq", "expert_bias", "local_tokens_per_expert", "_extra_state")


@dataclass
class _Rank:
    """What one rank holds: chunk's number and parameter's stored name -> slot -> tensor."""

    slots: dict[tuple[int, str], dict[str, LazyTensor]] = field(default_factory=dict)
    steps: list[Any] = field(default_factory=list)
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
    step = same_step((step for rank in ranks for step in rank.steps), next(iter(own)))
    return RankStates(slots, step, tuple(map(options, ranks[0].groups)), ranks[0].grad_scaler)


def _read(chunks: Sequence[Chunk], states: Any, source: str) -> _Rank:
    container = _only(states, source)
    masters, adam = stored.masters(container), stored.inner(container)
    flat = has_buckets(adam)
    if flat:
        adam = whole_states(adam, source)
    groups = adam.get("param_groups") if isinstance(adam, dict) else None
    state = adam.get("state") if isinstance(adam, dict) else None
    if not isinstance(state, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        shown = adam if isinstance(adam, dict) else container
        raise unproved(
            "the optimizer's state is of a layout that is not understood",
            path=source,
            expected="'state' by number and 'param_groups', or Apex's buckets",
            found=", ".join(str(key) for key in list(shown)[:5]) or "nothing",
        )
    parameters = _parameters(chunks, source)
    rank = _Rank(groups=groups, grad_scaler=container.get("grad_scaler"))
    dealt = _dealt(parameters, groups, state, source)
    rank.steps += [state.get("step"), *(group.get("step") for group in groups)]
    for number, (group, mine) in enumerate(zip(groups, dealt, strict=True)):
        halves = [key for key in mine if parameters[key].dtype.name in stored.HALF]
        own_masters = dict(zip(halves, stored.masters_of_group(masters, number, len(halves), source), strict=False))
        for index, key in zip(group["params"], mine, strict=True):
            one = state.get(index) if type(index) is int else None
            if not isinstance(one, dict):
                raise unproved(
                    "the optimizer has no state for a parameter",
                    path=source,
                    tensor=key[1],
                    found=f"number {index}",
                )
            rank.steps.append(one.get("step"))
            weight = parameters[key]
            if flat:
                one = shaped(one, weight)
            master = own_masters.get(key, one.get("param"))
            slots = {
                MASTER: weight.cast(_FLOAT32) if master is None else master,
                **{slot: one.get(slot) for slot in MOMENTS},
            }
            rank.slots[key] = {
                **stored.fitting(slots, weight.shape, key[1], source),
                GROUP: Constant(_TAG, weight.shape, number.to_bytes(4, "little")),
            }
    rank.slots = {key: rank.slots[key] for key in parameters if key in rank.slots}
    return rank


def _only(states: Any, source: str) -> Mapping[Any, Any]:
    """The one optimizer; inside NeMo's EMA wrapper if there is one."""
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        raise unproved(
            "the file has not one optimizer",
            path=source,
            expected="one in optimizer_states",
            found=f"{len(states)} optimizers" if isinstance(states, list) else type(states).__name__,
        )
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
            raise unproved(f"parameter group {number} lists no parameters", path=source)
        entries.append([_shape(state.get(index)) if type(index) is int else None for index in indices])
    ways = possible_groups(shapes, groups, entries)
    if len(ways) != 1:
        counts = " + ".join(str(len(own)) for own in entries)
        raise unproved(
            "the optimizer's parameter groups do not fit the rank's parameters"
            if not ways
            else "the optimizer's parameter groups fit the rank's parameters in several ways",
            path=source,
            expected=f"state of {len(shapes)} parameters, by a rule for weight decay",
            found=f"{counts} entries in {len(groups)} groups"
            + (f", {len(ways)} ways" if ways else ", or of other shapes"),
        )
    keys = dict(zip(shapes, parameters, strict=True))
    return [[keys[name] for name in own] for own in ways[0]]


def _shape(one: Any) -> Shape | None:
    moment = one.get("exp_avg") if isinstance(one, dict) else None
    return moment.shape if isinstance(moment, LazyTensor) else None
