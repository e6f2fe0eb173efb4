"""What is done with the neutral form of optimizer state: renaming it with the weights, and checking it against them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from anyckpt.checkpoint import OptimizerState
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError, few
from anyckpt.indexing import Shape
from anyckpt.tensor import Constant, LazyTensor, from_array

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
SLOTS = (MASTER, *MOMENTS)
STEP = "step"
DROP = "leave it out with --optimizer drop"

Slots = dict[str, dict[str, LazyTensor]]
Rename = Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]]
"""What brings the weights under other names or into another layout: gets tensors by name, gives tensors by name."""

_TAG = dtype("int32")
_FLOAT32 = dtype("float32")


def renamed(state: OptimizerState, rename: Rename, *, master: Rename | None = None) -> OptimizerState:
    """The same state under other names.

    Args:
        state: of a whole model.
        rename: what was done to the weights.
        master: what to do to the master weights where that differs: arithmetic, or the filling of padding rows.

    Raises:
        MappingError: the rule does not fit: parameters without state, or of other shapes than the weights; or it
            changes weights that have state of other shapes.
    """
    slots: Slots = {}
    _check_kept(state, rename)
    for slot, tensors in state.slots.items():
        function = master if slot == MASTER and master is not None else rename
        slots[slot] = _applied(function, tensors, slot)
    shapes = {name: tensor.shape for tensors in state.slots.values() for name, tensor in tensors.items()}
    tags = {name: tag(shapes[name], number) for name, number in state.group_of.items() if name in shapes}
    moved = _applied(rename, tags, "parameter groups") if len(tags) == len(shapes) else {}
    return replace(state, slots=slots, group_of={name: tagged(tensor) for name, tensor in moved.items()})


def with_masters(state: OptimizerState, weights: Mapping[str, LazyTensor]) -> OptimizerState:
    """With a master for every parameter: the weight itself, in fp32, where the optimizer keeps no copy.

    Raises:
        MappingError: state of a parameter that is not among the weights.
    """
    own = state.slots.get(MASTER, {})
    names = parameters_of(state)
    masters: dict[str, LazyTensor] = {}
    for name in names:
        if name not in own and name not in weights:
            raise unproved("has optimizer state but no weight", tensor=name)
        masters[name] = own[name] if name in own else weights[name].cast(_FLOAT32)
    return replace(state, slots={MASTER: masters, **{slot: t for slot, t in state.slots.items() if slot != MASTER}})


def checked(state: OptimizerState, weights: Mapping[str, LazyTensor], path: str | None) -> OptimizerState:
    """The state, if every slot has the shape of its weight, and both of Adam's moments are of the same parameters.

    Raises:
        MappingError: it has not.
    """
    moments = {slot: state.slots[slot] for slot in MOMENTS if slot in state.slots}
    counts = {slot: len(tensors) for slot, tensors in moments.items()}
    alone = {name for tensors in moments.values() for name in tensors} - _with_other_state(state)
    for name in parameters_of(state):
        if name not in weights:
            raise unproved("has optimizer state, but is no weight of the model", path=path, tensor=name)
    for slot, tensors in state.slots.items():
        for name, tensor in tensors.items():
            if name not in weights:
                raise unproved(f"has the optimizer's {slot}, but is no weight of the model", path=path, tensor=name)
            if tensor.shape != weights[name].shape:
                raise unproved(
                    f"the optimizer's {slot} does not fit its parameter",
                    path=path,
                    tensor=name,
                    expected=weights[name].shape,
                    found=tensor.shape,
                )
    for slot in moments:
        lacking = alone - state.slots.get(slot, {}).keys()
        if lacking:
            raise unproved(
                f"the optimizer's {slot} is missing for some parameters",
                path=path,
                tensor=min(lacking),
                expected=f"{len(alone)} tensors",
                found=", ".join(f"{count} of {slot}" for slot, count in counts.items()),
            )
    return state


def parameters_of(state: OptimizerState) -> dict[str, None]:
    """Names of the weights that the optimizer has state of, or has in a group."""
    held = (*state.slots.values(), *state.others.values(), state.group_of)
    return dict.fromkeys(name for names in held for name in names)


def own_state(state: OptimizerState, name: str) -> dict[str, Any]:
    """A parameter's state by slot, without its master; the common step as torch keeps it, a float32 of its own."""
    slots = {slot: own for slot, own in (*state.slots.items(), *state.others.items()) if slot != MASTER}
    own = {slot: values[name] for slot, values in slots.items() if name in values}
    if own and state.step is not None:  # each a storage of its own: a loaded one is counted up in place
        own = {STEP: from_array(np.array(state.step, np.float32)), **own}
    return own


def left_out(names: Iterable[str]) -> tuple[str, ...]:
    """The word on what an optimizer keeps besides its parameters' state, such as an average of the weights."""
    known = list(names)
    if not known:
        return ()
    return (f"{few(known, 3)} of the optimizer is left out: only parameters' state and groups travel",)


def sorted_out(
    entries: Mapping[str, Mapping[str, Any]], weights: Mapping[str, LazyTensor]
) -> tuple[Slots, dict[str, dict[str, Any]], list[Any]]:
    """The slots of weights' shapes, the other ones, and the step of each parameter where it is the same for all.

    Args:
        entries: weight's name -> slot -> tensor or object, in the weights' order.
        weights: by name.
    """
    held: dict[str, dict[str, Any]] = {}
    for name, own in entries.items():
        for slot, value in own.items():
            held.setdefault(slot, {})[name] = value
    slots: Slots = {}
    others: dict[str, dict[str, Any]] = {}
    steps: list[Any] = []
    for slot, values in held.items():
        if slot == STEP and len({whole_number(value) for value in values.values()} - {None}) <= 1:
            steps += values.values()
        elif slot in SLOTS or all(
            isinstance(value, LazyTensor) and (name not in weights or value.shape == weights[name].shape)
            for name, value in values.items()
        ):
            strange = next((name for name, value in values.items() if not isinstance(value, LazyTensor)), None)
            if strange is not None:
                raise unproved(f"the optimizer's {slot} is no tensor", tensor=strange)
            slots[slot] = values
        else:
            others[slot] = values
    return slots, others, steps


def _with_other_state(state: OptimizerState) -> set[str]:
    """Parameters with state that Adam has not: Adafactor keeps one of two forms for each, of which one is Adam's."""
    slots = [own for slot, own in state.slots.items() if slot not in SLOTS]
    own = [values for slot, values in state.others.items() if slot != STEP]
    return {name for values in (*slots, *own) for name in values}


def _check_kept(state: OptimizerState, rename: Rename) -> None:
    """Raise MappingError for state that has not the weight's shape, of a weight that does not stay as it is."""
    names = list(dict.fromkeys(name for own in state.others.values() for name in own))
    if not names:
        return
    shapes = {name: tensor.shape for own in state.slots.values() for name, tensor in own.items()}
    marks = {name: tag(shape, number) for number, (name, shape) in enumerate(shapes.items())}
    moved = _applied(rename, marks, "state")
    for name in names:
        slot = next(slot for slot, own in state.others.items() if name in own)
        kept = name in shapes and name in moved and moved[name].shape == shapes[name]
        if not kept or (moved[name].size and tagged(moved[name]) != tagged(marks[name])):
            raise unproved(
                f"the optimizer's {slot} has not the weight's shape, and nothing tells what becomes of it under another"
                " name",
                tensor=name,
                expected="a weight that keeps its name and shape",
            )


def same_step(steps: Iterable[Any], path: str | None) -> int | None:
    """The step that all say that say one.

    Args:
        steps: numbers, tensors of one element, or what is neither and says nothing.
        path: file, for messages.

    Raises:
        FormatError: bytes are missing from a file.
        MappingError: they differ.
    """
    found = {number for step in steps if (number := whole_number(step)) is not None}
    if len(found) > 1:
        listed = ", ".join(map(str, sorted(found)[:5]))
        raise unproved("parameters have taken different numbers of optimizer steps", path=path, found=listed)
    return next(iter(found), None)


def options(group: Mapping[Any, Any]) -> dict[str, Any]:
    """A parameter group's hyperparameters, without its parameters (and their names, as PyTorch 2.6 keeps) and steps."""
    return {str(key): value for key, value in group.items() if key not in ("params", "param_names", "step")}


def unproved(problem: str, **facts: Any) -> MappingError:
    """The error for state that cannot be shown to belong to the parameters."""
    return MappingError(problem, remedy=DROP, **facts)


def _applied(rename: Rename, tensors: Mapping[str, LazyTensor], what: str) -> dict[str, LazyTensor]:
    try:
        return dict(rename(dict(tensors)))
    except MappingError as error:
        problem = f"the optimizer's {what} does not fit the model: {error.problem}"
        raise error.told_as(MappingError, problem, remedy=DROP) from None


def tag(shape: Shape, number: int) -> LazyTensor:
    """A tensor of one number, to see where a rule takes a parameter of this shape."""
    return Constant(_TAG, shape, number.to_bytes(4, "little"))


def tagged(tensor: LazyTensor) -> int:
    """The number in a tensor's first element."""
    value = np.empty((1,) * tensor.ndim, dtype=tensor.dtype.raw)
    tensor.read_box((0,) * tensor.ndim, value)
    return int(value.reshape(-1)[0])


def whole_number(value: Any) -> int | None:
    """A number, or a tensor of one, as an integer; None of what is neither, or too large to be exact."""
    if isinstance(value, LazyTensor):
        numeric = value.size == 1 and value.dtype.kind in ("float", "integer") and value.dtype.numpy is not None
        value = value.numpy().reshape(-1)[0].item() if numeric else None
    if type(value) not in (int, float) or value != value or abs(value) >= 1 << 53:
        return None
    return int(value)
