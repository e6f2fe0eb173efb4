"""Optimizers' state and other tensors of training state of two checkpoints, under names that make them meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field, replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, LastingError, MappingError
from anyckpt.operations.steps.common_names import CommonNames
from anyckpt.operations.steps.compare_objects import compare_objects
from anyckpt.operations.steps.configurations import Setting
from anyckpt.operations.steps.recorded_renaming import Renaming
from anyckpt.optimizer.read import holds_optimizer, with_optimizer
from anyckpt.optimizer.state import MASTER, options, parameters_of, renamed, with_masters
from anyckpt.tensor import LazyTensor

Tensors = dict[str, LazyTensor]
Pair = tuple[Checkpoint, Checkpoint]
States = tuple[OptimizerState, OptimizerState]


@dataclass
class StateTensors:
    """What two checkpoints keep in tensors besides weights, and what optimizers say besides tensors.

    Attributes:
        a: the first's tensors by common name.
        b: the second's.
        different: what differs and is no tensor, or what only one of the two has.
        not_compared: what could not be compared, and why.
        by_parameter: the optimizer's state is told by parameter, or by its lack; otherwise it is as it is stored.
        complete: nothing of optimizers was left uncompared.
    """

    a: Tensors = field(default_factory=dict)
    b: Tensors = field(default_factory=dict)
    different: list[Setting] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    by_parameter: bool = True
    complete: bool = True


def state_tensors(a: Checkpoint, b: Checkpoint, names: CommonNames) -> StateTensors:
    """The training state of both.

    That of optimizers meets by parameter, under the weights' common names, whatever form it is kept in; where it cannot
    be shown which parameter it is of, as it is stored if both are of one format and layout.  Where one optimizer alone
    has copies of the weights in fp32, the other's weights are compared with them.

    Args:
        a: a checkpoint; ranks are joined.
        b: another.
        names: under which their weights meet.
    """
    states = [_state_of(checkpoint) for checkpoint in (a, b)]
    first, second = states
    others = [_besides_weights(checkpoint) for checkpoint in (a, b)]
    if isinstance(first, OptimizerState) and isinstance(second, OptimizerState):
        try:
            found = _by_parameter((a, b), (first, second), names)
        except MappingError as error:
            found = _as_stored(a, b, _reason(error))
    elif first is not None and second is not None:
        found = _as_stored(a, b, "; ".join(dict.fromkeys(state for state in states if isinstance(state, str))))
    else:
        found = StateTensors()
        if first is not None or second is not None:
            found.different.append(Setting("optimizer", _described(first), _described(second)))
    if found.by_parameter:
        others = [_without(own, state) for own, state in zip(others, states, strict=True)]
    elif not found.complete:
        others = [{name: tensor for name, tensor in own.items() if not holds_optimizer(name)} for own in others]
    return replace(found, a={**found.a, **others[0]}, b={**found.b, **others[1]})


def _state_of(checkpoint: Checkpoint) -> OptimizerState | str | None:
    """The state by parameter; None if there is none, and why it cannot be told if it cannot."""
    found = with_optimizer(checkpoint)
    if found.optimizer is None:
        return "is of a kind that is not understood" if checkpoint.training.has_optimizer else None
    try:
        state = found.optimizer()
    except LastingError as error:
        return _reason(error)
    return state if parameters_of(state) else None


def _reason(error: AnyckptError) -> str:
    """The problem without its file and what a conversion could do about it."""
    return str(AnyckptError(error.problem, tensor=error.tensor, expected=error.expected, found=error.found))


def _described(state: OptimizerState | str | None) -> str | None:
    if state is None or isinstance(state, str):
        return None if state is None else "state of an optimizer"
    return f"{', '.join((*state.slots, *state.others))} of {len(parameters_of(state))} parameters"


def _besides_weights(checkpoint: Checkpoint) -> Tensors:
    weights = {checkpoint.model_prefix + name for name in checkpoint.weights()}
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in weights}


def _without(tensors: Tensors, state: OptimizerState | str | None) -> Tensors:
    """The tensors of which a state by parameter has no piece; without one, those that are not an optimizer's."""
    if not tensors or state is None:
        return tensors
    if isinstance(state, str):
        return {name: tensor for name, tensor in tensors.items() if not holds_optimizer(name)}
    known = [tensor for own in (*state.slots.values(), *state.others.values()) for tensor in own.values()]
    used = {place for tensor in known if isinstance(tensor, LazyTensor) for place in _places(tensor)}
    return {name: tensor for name, tensor in tensors.items() if not _is_step(name) and used.isdisjoint(_places(tensor))}


def _is_step(name: str) -> bool:
    return holds_optimizer(name) and name.endswith(".step")


def _places(tensor: LazyTensor) -> Iterator[Any]:
    return ((piece.source.place(), piece.offset) for piece in tensor.pieces())


def _as_stored(a: Checkpoint, b: Checkpoint, reason: str) -> StateTensors:
    alike = a.format == b.format and a.layout == b.layout
    how = "it is compared as it is stored" if alike else "it is not compared"
    told = [f"by parameter, the optimizer's state: {reason}; {how}"]
    return StateTensors(not_compared=told, by_parameter=False, complete=alike)


def _by_parameter(checkpoints: Pair, states: States, names: CommonNames) -> StateTensors:
    """
    Raises:
        MappingError: it has no common names.
    """
    result = StateTensors()
    if any(MASTER in state.slots for state in states):
        states = _both(with_masters(state, c.weights()) for state, c in zip(states, checkpoints, strict=True))
    slots, others = _renamed(checkpoints, states, names)
    for slot in dict.fromkeys((*slots[0], *slots[1])):
        found = [own.get(slot) for own in slots]
        if None in found:
            said = [None if own is None else f"of {len(own)} parameters" for own in found]
            result.different.append(Setting(f"optimizer.{slot}", said[0], said[1]))
            continue
        for own, into in zip(found, (result.a, result.b), strict=True):
            into |= {f"optimizer.{slot}.{name}": names.trimmed(name, tensor) for name, tensor in (own or {}).items()}
    result.different += compare_objects(others[0], others[1], tensors=True)
    steps = [state.step for state in states]
    if steps[0] != steps[1]:
        result.different.append(Setting("optimizer.step", *(None if step is None else str(step) for step in steps)))
    _compare_groups(states, result)
    scalers = [{} if state.grad_scaler is None else {"optimizer.grad_scaler": state.grad_scaler} for state in states]
    result.different += compare_objects(scalers[0], scalers[1], tensors=True)
    return result


def _both(states: Iterable[OptimizerState]) -> States:
    first, second = states
    return first, second


def _renamed(
    checkpoints: Pair, states: States, names: CommonNames
) -> tuple[list[Mapping[str, Tensors]], list[dict[str, Any]]]:
    """The slots of both under common names, and what has not the weights' shapes by the name of slot and weight.

    Raises:
        MappingError: there are no common names.
    """
    weights = [checkpoint.weights() for checkpoint in checkpoints]
    alike = {n: t.shape for n, t in weights[0].items()} == {n: t.shape for n, t in weights[1].items()}
    error = MappingError("the weights of the one have other names than those of the other")
    if names.renamings is not None:
        try:
            return _under(states, names.renamings)
        except MappingError as found:
            error = found
    if not alike:
        raise error
    return [state.slots for state in states], [_of_other_shapes(state, {}) for state in states]


def _under(
    states: States, renamings: tuple[Renaming, Renaming]
) -> tuple[list[Mapping[str, Tensors]], list[dict[str, Any]]]:
    if any(renaming.computes for renaming in renamings):
        raise MappingError("weights are computed on the way to common names, and moments do not go with them")
    slots: list[Mapping[str, Tensors]] = []
    others = []
    for state, renaming in zip(states, renamings, strict=True):
        slots.append(renamed(replace(state, others={}, group_of={}), renaming).slots)
        common = {next(iter(old)): new for new, old in renaming.sources.items() if len(old) == 1}
        others.append(_of_other_shapes(state, common))
    return slots, others


def _of_other_shapes(state: OptimizerState, common: Mapping[str, str]) -> dict[str, Any]:
    return {
        f"optimizer.{slot}.{common.get(name, name)}": value
        for slot, own in state.others.items()
        for name, value in own.items()
    }


def _compare_groups(states: States, result: StateTensors) -> None:
    """Hyperparameters that both have a word for; of different numbers of groups, those that all groups have alike."""
    groups = [[_effective(options(group)) for group in state.groups] for state in states]
    if not groups[0] or not groups[1]:
        return
    if len(groups[0]) != len(groups[1]):
        shared = [_alike(own) for own in groups]
        left = sorted(key for key in {*groups[0][0]} & {*groups[1][0]} if key not in shared[0] or key not in shared[1])
        if left:
            counts = f"{len(groups[0])} parameter groups and {len(groups[1])}"
            result.not_compared.append(f"of the optimizers' {counts}, what groups have of their own: {', '.join(left)}")
        groups = [[own] for own in shared]
    for number, (one, other) in enumerate(zip(*groups, strict=True)):
        for key in one.keys() & other.keys():
            pair = [_plain(group[key]) for group in (one, other)]
            if pair[0] is not pair[1] and not (_is_number(pair[0]) and pair[0] == pair[1]):
                name = f"optimizer.groups.{number}.{key}"
                result.different += compare_objects({name: pair[0]}, {name: pair[1]}, tensors=True)


def _effective(group: dict[str, Any]) -> dict[str, Any]:
    """With the decay that is applied: Megatron's groups of parameters that do not decay say so by a factor of zero."""
    return {**group, "weight_decay": 0.0} if group.get("wd_mult") == 0 and "weight_decay" in group else group


def _alike(groups: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = ({key: _plain(value) for key, value in group.items()} for group in groups)
    return {
        key: value
        for key, value in first.items()
        if all(not [*compare_objects({key: value}, {key: other.get(key)}, tensors=True)] for other in others)
    }


def _plain(value: Any) -> Any:
    """Frameworks keep pairs as tuples or lists."""
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
