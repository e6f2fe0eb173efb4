"""State keyed by the parameters' numbers, as PyTorch's optimizers and so Lightning's ``.ckpt`` files keep it.

Numbers count through the groups; in a group parameters have the model's order, which is that of the state dict.  No
file but those of PyTorch 2.6 on says which parameters a group has, so that it is concluded from counts and shapes: one
group is all parameters; of several, weight decay applies to some by a rule of the trainer's.  A frozen parameter has no
number.  NeMo 1 with ``megatron_amp_O2`` wraps the optimizer and lists its fp32 masters group by group
(``fp32_from_fp16_params``), its EMA callback wraps it in ``opt``.  Apex's ``DistributedFusedAdam`` has masters as a
slot ``param``, or everything in buckets.

Facts: ``torch/optim/optimizer.py`` 1.0 to 2.13; ``MainParamsOptimizerWrapper`` of NeMo 1.0 to 2.2;
``apex/contrib/optimizers/distributed_fused_adam.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.data_classes import dataclass
from anyckpt.indexing import Shape
from anyckpt.optimizer.apex_buckets import shaped, whole_states
from anyckpt.optimizer.group_rules import possible_groups
from anyckpt.optimizer.groups import assigned, decays
from anyckpt.optimizer.model_space import module_shapes
from anyckpt.optimizer.parameters import aligned, trained
from anyckpt.optimizer.state import MASTER, SLOTS, STEP, checked, left_out, options, same_step, sorted_out, unproved
from anyckpt.tensor import LazyTensor

_ENTRY = re.compile(
    r"optimizer_states\.(?P<number>\d{1,4})\.(?:optimizer\.|opt\.)?state\.(?P<index>\d{1,9})\.(?P<slot>[^.]+)"
)
_MASTER = re.compile(
    r"optimizer_states\.(?P<number>\d{1,4})\.fp32_from_fp16_params\.(?P<group>\d{1,6})\.(?P<index>\d{1,9})"
)
_GATHERED = re.compile(r"optimizer_states\.(?P<number>\d{1,4})\.(?:optimizer\.|opt\.)?gathered_states\.\d{1,6}")
_STEPS = re.compile(r"optimizer_states\.(?P<number>\d{1,4})\.(?:optimizer\.|opt\.)?state\.step")
_GROUPS = re.compile(r"optimizer_states\.(?P<number>\d{1,4})\.(?:optimizer\.|opt\.)?param_groups")
_SCALER = re.compile(r"optimizer_states\.\d+\.(?:grad_scaler|optimizer\.grad_scaler)")
_WITHIN = re.compile(r"optimizer_states\.\d+\.(?:optimizer\.|opt\.)?state\.\d+\..+")
_UNDERSTOOD = (_ENTRY, _MASTER, _GATHERED, _STEPS, _GROUPS, _SCALER)
_OUTER = re.compile(r"optimizer_states(?:\.\d+(?:\.optimizer|\.opt)?(?:\.state(?:\.\d+)?)?)?")
_FACTOR = re.compile(r"(?:^|_)(?:row|col)(?:_|$)")  # of Adafactor's second moment, which has not the weight's shape
_HALF = ("float16", "bfloat16")
_PARAM = "param"


@dataclass
class _Optimizer:
    """One optimizer as stored."""

    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    masters: dict[int, dict[int, LazyTensor]] = field(default_factory=dict)
    groups: list[Mapping[str, Any]] = field(default_factory=list)
    step: Any = None
    flat: bool = False

    def indices(self, number: int) -> list[Any]:
        """Numbers of a group's parameters."""
        found = self.groups[number].get("params")
        return found if isinstance(found, list) and all(type(index) is int for index in found) else []

    def stated_names(self, number: int) -> list[str] | None:
        """Names of a group's parameters, None where the file has none, or not one for each."""
        found = self.groups[number].get("param_names")
        if not isinstance(found, list) or len(found) != len(self.indices(number)):
            return None
        return found if all(isinstance(name, str) for name in found) else None

    def shape(self, index: Any, *, sure: bool = False) -> Shape | None:
        """Shape of a parameter by its state, None if it has none that tells.

        Args:
            index: its number.
            sure: by masters and Adam's moments alone, which have the parameter's shape; else by any one shape.
        """
        own = self.states.get(index, {})
        shapes = {slot: value.shape for slot, value in own.items() if slot != STEP and isinstance(value, LazyTensor)}
        known = [shapes[slot] for slot in (*SLOTS, _PARAM) if slot in shapes and not _is_factored(own)]
        likely = {shape for slot, shape in shapes.items() if shape and not _FACTOR.search(slot)}
        if known or sure:
            return known[0] if known else None
        return likely.pop() if len(likely) == 1 else None


def _is_factored(own: Mapping[str, Any]) -> bool:
    return any(map(_FACTOR.search, own))


def has_numbered(checkpoint: Checkpoint) -> bool:
    """There is such state; of an optimizer that keeps none (SGD without momentum) there are its groups."""
    if any(_ENTRY.fullmatch(name) or _GATHERED.fullmatch(name) for name in checkpoint.tensors):
        return True
    return any(_GROUPS.fullmatch(name) for name in _objects(checkpoint))


def read_numbered(checkpoint: Checkpoint) -> OptimizerState:
    """The state, by the names of ``checkpoint.weights()``.

    Raises:
        FormatError: bytes of a step are missing.
        MappingError: shapes do not prove which parameter a state is of.
    """
    weights = checkpoint.weights()
    left = trained(weights)
    order = tuple(left)
    entries: dict[str, dict[str, Any]] = {}
    masters: dict[str, LazyTensor] = {}
    groups: list[dict[str, Any]] = []
    group_of: dict[str, int] = {}
    steps: list[Any] = []
    optimizers = _optimizers(checkpoint)
    for number, optimizer in sorted(optimizers.items()):
        names = _names(optimizer, left, f"optimizer {number}", checkpoint.path)
        steps.append(optimizer.step)
        for group, own in enumerate(names):
            for name, index in zip(own, optimizer.indices(group), strict=True):
                stored = _whole(optimizer, index, left[name])
                entries[name] = {MASTER if slot == _PARAM else slot: value for slot, value in stored.items()}
                group_of[name] = len(groups)
                del left[name]
            steps.append(optimizer.groups[group].get(STEP))
            for name, tensor in _masters(optimizer, group, own, weights, checkpoint.path).items():
                masters[name] = tensor
            groups.append(options(optimizer.groups[group]))
    slots, others, own_steps = sorted_out({name: entries[name] for name in weights if name in entries}, weights)
    if masters:
        slots[MASTER] = {name: masters[name] for name in weights if name in masters}
    state = OptimizerState(
        slots=slots,
        others=others,
        step=None if STEP in others else same_step([*own_steps, *steps], checkpoint.path),
        groups=tuple(groups),
        group_of={name: group_of[name] for name in weights if name in group_of},
        order=order,
        warnings=(*_joined(len(optimizers)), *left_out(_others(checkpoint))),
        grad_scaler=next((checkpoint.objects[name] for name in checkpoint.objects if _SCALER.fullmatch(name)), None),
    )
    return checked(state, weights, checkpoint.path)


def _optimizers(checkpoint: Checkpoint) -> dict[int, _Optimizer]:
    found = _from_buckets(checkpoint)
    objects = _objects(checkpoint)
    for name in (*checkpoint.tensors, *objects):
        if _WITHIN.fullmatch(name) and not _ENTRY.fullmatch(name):
            raise unproved("is state within a parameter's state, which has no place elsewhere", tensor=name)
    for name, tensor in checkpoint.tensors.items():
        entry, master = _ENTRY.fullmatch(name), _MASTER.fullmatch(name)
        if entry is not None:
            own = found.setdefault(int(entry["number"]), _Optimizer())
            own.states.setdefault(int(entry["index"]), {})[entry["slot"]] = tensor
        elif master is not None:
            own = found.setdefault(int(master["number"]), _Optimizer())
            own.masters.setdefault(int(master["group"]), {})[int(master["index"])] = tensor
    for name in objects:
        listed, counted, entry = _GROUPS.fullmatch(name), _STEPS.fullmatch(name), _ENTRY.fullmatch(name)
        if entry is not None:
            own = found.setdefault(int(entry["number"]), _Optimizer())
            own.states.setdefault(int(entry["index"]), {})[entry["slot"]] = objects[name]
        if counted is not None and int(counted["number"]) in found:
            found[int(counted["number"])].step = objects[name]
        if listed is None:
            continue
        groups = objects[name]
        found.setdefault(int(listed["number"]), _Optimizer())
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise unproved("the optimizer's parameter groups are not a list of groups", path=checkpoint.path)
        found[int(listed["number"])].groups = groups
    for number, optimizer in found.items():
        indices = [index for group in range(len(optimizer.groups)) for index in optimizer.indices(group)]
        lost = [index for index in optimizer.states if index not in set(indices)]
        if lost or len(set(indices)) < len(indices):
            raise unproved(
                f"the parameter groups of optimizer {number} do not list each of its parameters once",
                path=checkpoint.path,
                expected=f"{len(optimizer.states)} parameters",
                found=f"{len(indices)} listed, {len(lost)} not",
            )
    return found


def _objects(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is stored of optimizers besides tensors, entry by entry: a part without any tensor is one object."""
    found: dict[str, Any] = {}
    todo = [(name, checkpoint.objects[name]) for name in checkpoint.objects if name.split(".")[0] == "optimizer_states"]
    while todo:
        name, value = todo.pop(0)
        if _OUTER.fullmatch(name) and isinstance(value, (dict, list)):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            todo = [*((f"{name}.{key}", child) for key, child in inner), *todo]
        else:
            found[name] = value
    return found


def _joined(count: int) -> tuple[str, ...]:
    return (f"{count} optimizers become one with the parameter groups of all",) if count > 1 else ()


def _others(checkpoint: Checkpoint) -> list[str]:
    """Stored names of optimizers that are no state of a parameter, nor groups."""
    names = [name for name in checkpoint.tensors if name.startswith("optimizer_states.")]
    return [name for name in (*names, *_objects(checkpoint)) if not any(known.fullmatch(name) for known in _UNDERSTOOD)]


def _whole(optimizer: _Optimizer, index: Any, weight: LazyTensor) -> dict[str, Any]:
    """A parameter's state; that of Apex's buckets in the parameter's shape, and its weight of two halves."""
    stored = optimizer.states.get(index, {})
    return shaped(stored, weight) if optimizer.flat else stored


def _from_buckets(checkpoint: Checkpoint) -> dict[int, _Optimizer]:
    """Optimizers of which the file has every rank's state as bytes."""
    gathered: dict[int, list[LazyTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        found = _GATHERED.fullmatch(name)
        if found is not None:
            gathered.setdefault(int(found["number"]), []).append(tensor)
    optimizers: dict[int, _Optimizer] = {}
    for number, ranks in gathered.items():
        whole = whole_states({"gathered_states": ranks}, checkpoint.path)
        states = {index: own for index, own in whole["state"].items() if type(index) is int}
        groups = whole["param_groups"]
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise unproved("the optimizer's parameter groups are not a list of groups", path=checkpoint.path)
        optimizers[number] = _Optimizer(states, groups=groups, step=whole["state"]["step"], flat=True)
    return optimizers


def _names(optimizer: _Optimizer, left: Mapping[str, LazyTensor], what: str, path: str) -> list[list[str]]:
    """The parameters of each group, in its order: by the names that PyTorch 2.6 keeps, if it was given any."""
    stated = [optimizer.stated_names(number) for number in range(len(optimizer.groups))]
    told = [name for names in stated for name in names or []]
    if told and None not in stated and len(set(told)) == len(told) and all(name in left for name in told):
        return [names or [] for names in stated]
    numbers = [optimizer.indices(number) for number in range(len(optimizer.groups))]
    all_there = sum(map(len, numbers)) == len(left)  # then their order tells, whatever the state's shapes are
    shapes = [[optimizer.shape(index, sure=all_there) for index in own] for own in numbers]
    filled = [number for number, own in enumerate(shapes) if own]
    names: list[list[str]] = [[] for _ in shapes]
    if len(filled) == 1 and not optimizer.flat:
        names[filled[0]] = aligned(shapes[filled[0]], left, f"{what} of one parameter group", path)
        return names
    if all("wd_mult" in group or "pre_wd_mult" in group for group in optimizer.groups):  # Megatron's, in NeMo
        group_of = assigned(module_shapes(left), optimizer.groups, path)
        for number in filled:
            own = {name: tensor for name, tensor in left.items() if group_of[name] == number}
            names[number] = aligned(shapes[number], own, f"parameter group {number} of {what}", path)
        return names
    ways = possible_groups({name: tensor.shape for name, tensor in left.items()}, optimizer.groups, shapes)
    if len(ways) == 1:
        return ways[0]
    if ways or optimizer.flat:
        raise unproved(
            f"the parameter groups of {what} do not fit the model in one way",
            path=path,
            expected=f"{len(left)} parameters, by a rule for weight decay",
            found=" + ".join(str(len(own)) for own in shapes) + f" entries, {len(ways)} ways",
        )
    kinds = {number: _kind(shapes[number]) for number in filled}
    if sorted(map(str, kinds.values())) != ["False", "True"]:
        raise unproved(
            f"nothing tells which parameters are in which group of {what}",
            path=path,
            expected="one group, or one of matrices and one of biases and norms",
            found="groups of " + ", ".join(str(len(shapes[number])) for number in filled) + " parameters",
        )
    for number, kind in kinds.items():
        candidates = {name: tensor for name, tensor in left.items() if decays(name, tensor.shape) == kind}
        names[number] = aligned(shapes[number], candidates, f"parameter group {number} of {what}", path)
    return names


def _kind(shapes: Sequence[Shape | None]) -> bool | None:
    """Whether a group is of matrices, of anything else, or of both (None)."""
    found = {len(shape) > 1 for shape in shapes if shape is not None}
    return found.pop() if len(found) == 1 else None


def _masters(
    optimizer: _Optimizer, group: int, names: Sequence[str], weights: Mapping[str, LazyTensor], path: str
) -> dict[str, LazyTensor]:
    """The fp32 copies of a group's 16-bit parameters; none where the optimizer is not wrapped."""
    if not optimizer.masters:
        return {}
    own = optimizer.masters.get(group, {})
    halves = [name for name in names if weights[name].dtype.name in _HALF]
    if sorted(own) != list(range(len(halves))):
        raise unproved(
            f"parameter group {group} has not one master weight for each 16-bit parameter",
            path=path,
            expected=len(halves),
            found=len(own),
        )
    return {name: own[index] for index, name in enumerate(halves)}
