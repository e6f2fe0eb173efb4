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
from anyckpt.optimizer.state import MASTER, STEP, checked, left_out, options, same_step, sorted_out, unproved
from anyckpt.tensor import LazyTensor

_ENTRY = re.compile(r"(?P<root>optim|optimizer|optimizers|optimizer_states|optimizer_\d+)\.state\.(?P<rest>.+)")
_GROUP = re.compile(r"[a-z_]+(?:_\d+)?\.param_groups\.(?P<number>\d+)\.(?P<key>[^.]+)")
_OF_OPTIMIZER = re.compile(r"(?:optim|optimizers?|optimizer_states|optimizer_\d+)\.")
_GROUPS = re.compile(r"(?:optim|optimizers?|optimizer_\d+)\.param_groups")
_GROUP_BY_NAME = re.compile(r"[a-z_]+(?:_\d+)?\.(?:param_groups|param_to_group_meta)\.(?P<name>.*\D.*)\.(?P<key>[^.]+)")
_MASTERS = ("master_param", "fp32_param", "master_weight", "param")
_WRAPPERS = ("module.module.", "module.")


def has_named(checkpoint: Checkpoint) -> bool:
    """There is such state; of an optimizer that keeps none (SGD without momentum) there are its groups."""
    return any(_ENTRY.match(name) for name in checkpoint.tensors) or any(
        pattern.fullmatch(name) for pattern in (_GROUP, _GROUPS, _GROUP_BY_NAME) for name in checkpoint.objects
    )


def read_named(checkpoint: Checkpoint) -> OptimizerState:
    """The state, by the names of ``checkpoint.weights()``.

    Raises:
        FormatError: bytes of a step are missing.
        MappingError: a name is of no weight, a tensor not of its weight's shape, or several optimizers train one.
    """
    weights = checkpoint.weights()
    entries: dict[str, dict[str, Any]] = {}
    root_of: dict[str, str] = {}
    for name in (*checkpoint.tensors, *checkpoint.objects):
        found = _ENTRY.fullmatch(name)
        if found is None:
            continue
        value = checkpoint.tensors[name] if name in checkpoint.tensors else checkpoint.objects[name]
        parameter, _, slot = found["rest"].rpartition(".")
        if isinstance(value, dict) and not value:  # a parameter without state
            parameter = found["rest"]
            entries.setdefault(parameter, {})
        else:
            entries.setdefault(parameter, {})[slot] = value
        if root_of.setdefault(parameter, found["root"]) != found["root"]:
            raise unproved("is trained by several optimizers", path=checkpoint.path, tensor=parameter)
    weight_of = _spelling([*entries, *_grouped(checkpoint)], weights, checkpoint.path)
    by_weight = {
        weight_of(parameter): {MASTER if slot in _MASTERS else slot: value for slot, value in own.items()}
        for parameter, own in entries.items()
    }
    order = [name for name in weights if name in by_weight]
    slots, others, steps = sorted_out({name: by_weight[name] for name in order}, weights)
    groups, group_of = _groups(checkpoint, weight_of)
    state = OptimizerState(
        slots=slots,
        others=others,
        step=None if STEP in others else same_step([*steps, *_group_steps(checkpoint)], checkpoint.path),
        groups=groups,
        group_of={name: group_of[name] for name in weights if name in group_of}
        if all(name in group_of for name in order)
        else {},
        warnings=left_out(_others(checkpoint)),
    )
    return checked(state, weights, checkpoint.path)


def _spelling(names: Iterable[str], weights: Mapping[str, LazyTensor], path: str) -> Callable[[str], str]:
    """From the optimizer's names to the weights'.

    One of both may be behind a wrapper that the other knows nothing of: the one that the trainer saved the model in, or
    those of Megatron-FSDP, whose optimizer says ``module.module.``.

    Raises:
        MappingError: no prefix fits, or several do.
    """
    known = list(dict.fromkeys(names))
    if not known:
        return lambda name: name
    if all(name.isdecimal() for name in known) and not all(name in weights for name in known):
        raise unproved(
            "the optimizer numbers its parameters, and nothing says which weights these are",
            path=path,
            expected="names of weights",
            found=f"{len(known)} numbers",
        )
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
        path=path,
        tensor=lost,
        expected="names of weights, with one prefix for all",
        found=f"{len(fitting)} prefixes",
    )


def _groups(
    checkpoint: Checkpoint, weight_of: Callable[[str], str]
) -> tuple[tuple[dict[str, Any], ...], dict[str, int]]:
    """Hyperparameters of the groups, and the group of each parameter; groups by name are put together by content."""
    numbered: dict[tuple[str, int], dict[str, Any]] = {}
    by_name: dict[str, dict[str, Any]] = {}
    objects = _group_objects(checkpoint)
    for name in [*objects, *checkpoint.tensors]:
        found = _GROUP.fullmatch(name)
        other = None if found is not None else _GROUP_BY_NAME.fullmatch(name)
        if found is None and other is None:
            continue
        value = objects[name] if name in objects else _scalar(checkpoint.tensors[name])
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


def _others(checkpoint: Checkpoint) -> list[str]:
    """Stored names of optimizers that are no state of a parameter, nor groups."""
    known = (_ENTRY, _GROUP, _GROUPS, _GROUP_BY_NAME)
    names = [name for name in (*checkpoint.tensors, *checkpoint.objects) if _OF_OPTIMIZER.match(name)]
    return [name for name in names if not any(pattern.fullmatch(name) for pattern in known)]


def _group_objects(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is stored of groups besides tensors, key by key: a list of groups without tensors is one object."""
    found: dict[str, Any] = {}
    for name in checkpoint.objects:
        if _GROUPS.fullmatch(name):
            groups = checkpoint.objects[name]
            for number, group in enumerate(groups) if isinstance(groups, list) else ():
                own = group if isinstance(group, dict) else {}
                found.update((f"{name}.{number}.{key}", value) for key, value in own.items())
        elif _GROUP.fullmatch(name) or _GROUP_BY_NAME.fullmatch(name):
            found[name] = checkpoint.objects[name]
    return found


def _grouped(checkpoint: Checkpoint) -> list[str]:
    """The parameters that the groups name."""
    names: list[str] = []
    objects = _group_objects(checkpoint)
    for name in objects:
        found, other = _GROUP.fullmatch(name), _GROUP_BY_NAME.fullmatch(name)
        if found is not None and found["key"] == "params":
            listed = objects[name]
            names += [str(own) for own in listed] if isinstance(listed, list) else []
        elif other is not None:
            names.append(other["name"])
    return names


def _group_steps(checkpoint: Checkpoint) -> list[Any]:
    return [value for name, value in _group_objects(checkpoint).items() if name.endswith(".step")]


def _scalar(tensor: LazyTensor) -> Any:
    """A hyperparameter that was stored as a tensor of one element."""
    if tensor.size != 1 or tensor.dtype.numpy is None:
        return None
    return tensor.numpy().reshape(-1)[0].item()
