"""State keyed by the parameters' names, as PyTorch's distributed checkpoints keep it.

``optim.state.layers.0.weight.exp_avg`` (torchtitan, Automodel; the first part is up to the trainer) and
``optimizer_0.state...`` (Lightning's ``ModelParallelStrategy``), with ``param_groups`` either as a list whose groups
list names, or by name (``optim.param_groups.layers.0.weight.lr``; Megatron-FSDP says ``param_to_group_meta``).
Parameters in fp32 are their own masters.

Facts: ``get_optimizer_state_dict`` of ``torch/distributed/checkpoint/state_dict.py``, torch 2.4 to 2.13;
``model_parallel.py`` of Lightning 2.4 to 2.6; Megatron-FSDP of core 0.16 (``master_param``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.optimizer.state import MASTER, Slots, checked, options, same_step, unproved
from anyckpt.tensor import LazyTensor

_ENTRY = re.compile(r"(?P<root>optim|optimizer|optimizers|optimizer_states|optimizer_\d+)\.state\.(?P<rest>.+)")
_GROUP = re.compile(r"[a-z_]+(?:_\d+)?\.param_groups\.(?P<number>\d+)\.(?P<key>[^.]+)")
_GROUP_BY_NAME = re.compile(r"[a-z_]+(?:_\d+)?\.(?:param_groups|param_to_group_meta)\.(?P<name>.*\D.*)\.(?P<key>[^.]+)")
_MASTERS = ("master_param", "fp32_param", "master_weight", "param")
_WRAPPERS = ("module.module.", "module.")
_STEP = "step"


def has_named(checkpoint: Checkpoint) -> bool:
    """There is such state."""
    return any(_ENTRY.match(name) for name in checkpoint.tensors)


def read_named(checkpoint: Checkpoint) -> OptimizerState:
    """The state, by the names of ``checkpoint.weights()``.

    Raises:
        FormatError: bytes of a step are missing.
        MappingError: a name is of no weight, a tensor not of its weight's shape, or several optimizers train one.
    """
    weights = checkpoint.weights()
    entries: dict[str, dict[str, LazyTensor]] = {}
    root_of: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        found = _ENTRY.fullmatch(name)
        if found is None:
            continue
        parameter, _, slot = found["rest"].rpartition(".")
        entries.setdefault(parameter, {})[slot] = tensor
        if root_of.setdefault(parameter, found["root"]) != found["root"]:
            raise unproved("is trained by several optimizers", path=checkpoint.path, tensor=parameter)
    weight_of = _spelling(entries, weights, checkpoint.path)
    slots: Slots = {}
    for parameter, own in entries.items():
        for slot, tensor in own.items():
            if slot != _STEP:
                slots.setdefault(MASTER if slot in _MASTERS else slot, {})[weight_of(parameter)] = tensor
    has_state = set(map(weight_of, entries))
    order = [name for name in weights if name in has_state]
    slots = {slot: {name: own[name] for name in order if name in own} for slot, own in slots.items()}
    groups, group_of = _groups(checkpoint, weight_of)
    steps = [own.get(_STEP) for own in entries.values()]
    state = OptimizerState(
        slots=slots,
        step=same_step([*steps, *_group_steps(checkpoint)], checkpoint.path),
        groups=groups,
        group_of=group_of if all(name in group_of for name in order) else {},
    )
    return checked(state, weights, checkpoint.path)


def _spelling(names: Iterable[str], weights: Mapping[str, LazyTensor], path: str) -> Callable[[str], str]:
    """From the optimizer's names to the weights'.

    One of both may be behind a wrapper that the other knows nothing of: the one that the trainer saved the model in, or
    those of Megatron-FSDP, whose optimizer says ``module.module.``.

    Raises:
        MappingError: no prefix fits, or several do.
    """
    known = list(names)
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) and name[len(wrapper) :] in weights for name in known):
            return lambda name: name.removeprefix(wrapper)
    first = known[0]
    candidates = [name[: -len(first)] for name in weights if name == first or name.endswith(f".{first}")]
    fitting = [prefix for prefix in candidates if all(prefix + name in weights for name in known)]
    if len(fitting) == 1 or "" in fitting:
        prefix = "" if "" in fitting else fitting[0]
        return lambda name: prefix + name
    lost = next((name for name in known if name not in weights), first)
    raise unproved(
        "the optimizer's names are not the weights'",
        path=path, tensor=lost, expected="names of weights, with one prefix for all",
        found=f"{len(fitting)} prefixes",
    )  # fmt: skip


def _groups(
    checkpoint: Checkpoint, weight_of: Callable[[str], str]
) -> tuple[tuple[dict[str, Any], ...], dict[str, int]]:
    """Hyperparameters of the groups, and the group of each parameter; groups by name are put together by content."""
    numbered: dict[tuple[str, int], dict[str, Any]] = {}
    by_name: dict[str, dict[str, Any]] = {}
    for name in [*checkpoint.objects, *checkpoint.tensors]:
        value: Any = None
        found = _GROUP.fullmatch(name)
        other = None if found is not None else _GROUP_BY_NAME.fullmatch(name)
        if found is None and other is None:
            continue
        value = checkpoint.objects[name] if name in checkpoint.objects else _scalar(checkpoint.tensors[name])
        if found is not None:
            numbered.setdefault((name.partition(".")[0], int(found["number"][:9])), {})[found["key"]] = value
        elif other is not None:
            by_name.setdefault(other["name"], {})[other["key"]] = value
    groups: list[dict[str, Any]] = []
    group_of: dict[str, int] = {}
    for key in sorted(numbered):
        names = numbered[key].get("params")
        group_of.update((weight_of(str(name)), len(groups)) for name in (names if isinstance(names, list) else []))
        groups.append(options(numbered[key]))
    for name, group in by_name.items():
        if options(group) not in groups:
            groups.append(options(group))
        group_of[weight_of(name)] = groups.index(options(group))
    return tuple(groups), group_of


def _group_steps(checkpoint: Checkpoint) -> list[Any]:
    names = [name for name in checkpoint.objects if name.endswith(".step") and ".param_groups." in name]
    return [checkpoint.objects[name] for name in names]


def _scalar(tensor: LazyTensor) -> Any:
    """A hyperparameter that was stored as a tensor of one element."""
    if tensor.size != 1 or tensor.dtype.numpy is None:
        return None
    return tensor.numpy().reshape(-1)[0].item()
