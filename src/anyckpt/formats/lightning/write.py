"""Lays out Lightning checkpoints that Lightning 2.x loads and resumes from.

``Trainer.fit(ckpt_path=...)`` wants ``optimizer_states`` and ``lr_schedulers``, but takes them empty; without
``loops`` it starts at step 0 (checked with Lightning 2.6).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, CompositeTensor
from anyckpt.containers.dcp import dcp_files
from anyckpt.containers.torch_file.containers import rebuilt
from anyckpt.containers.torch_file.flatten import unflatten
from anyckpt.containers.torch_file.former import Former
from anyckpt.containers.torch_file.forms import Forms, container_name
from anyckpt.containers.torch_file.roles import is_filled
from anyckpt.containers.torch_file.weights_only import refused
from anyckpt.containers.torch_file.writer import zip_parts
from anyckpt.data_classes import dataclass
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.lightning.keys import HYPER_PARAMETERS, META, STATE_DICT, VERSION
from anyckpt.formats.torch import as_state_dict, assemble
from anyckpt.tensor import LazyTensor

_OLDEST_VERSION = "2.0.0"
"""Written where the source has none: the first whose layout this is, so that newer ones migrate it."""
_SHARDED_OPTIMIZER = re.compile(r"optimizer_(\d+)$")
_NOT_LIGHTNING = "not a part of a Lightning checkpoint"
_BY_NUMBER = "a sharded checkpoint names optimizer states by weight; a file numbers them and does not say how"


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """One ``.ckpt`` file, or with ``options.sharded`` a directory that ``ModelParallelStrategy`` loads.

    A source that is a Lightning checkpoint keeps its hyper-parameters, loops and counters as they are, and its
    training state if the checkpoint still has it.  In a file tensors and containers are of the kinds they were.

    Raises:
        UsageError: an object cannot be pickled.
    """
    made = contents(checkpoint, options)
    notes, ignored = list(made.notes), dict(made.ignored)
    files: tuple[OutputFile, ...]
    if options.sharded:
        files = _directory(checkpoint, checkpoint.weights(), made.root, made.optimizers, options)
    else:
        files = (OutputFile("", zip_parts(made.root)),)
    unsafe = refused(made.root)
    if unsafe:
        notes.append(
            f"it holds objects that torch.load(weights_only=True) refuses: {', '.join(unsafe[:5])}; give Lightning"
            " weights_only=False, as for the source"
        )
    if checkpoint.tokenizer or checkpoint.artifacts:
        notes.append("a Lightning checkpoint has no place for the tokenizer and other files of the source")
    return Plan("lightning", files, ignored=ignored, notes=tuple(notes), formed=made.formed)


@dataclass(frozen=True)
class Contents:
    """What ``torch.load`` of a Lightning checkpoint gives, in lazy tensors and records.

    Attributes:
        root: of the file; of a sharded directory, of its ``meta.pt``.
        optimizers: of a sharded directory, by the name that they have there.
        ignored: what is left out -> why.
        notes: what a user should know.
        formed: as ``Plan.formed``.
    """

    root: dict[str, Any]
    optimizers: Mapping[str, Any]
    ignored: Mapping[str, str]
    notes: tuple[str, ...]
    formed: frozenset[str]


def contents(checkpoint: Checkpoint, options: WriteOptions) -> Contents:
    """What the checkpoint is in Lightning's words.

    Raises:
        UsageError: an object cannot be pickled.
    """
    weights, prefix = checkpoint.weights(), checkpoint.model_prefix
    paths = checkpoint.key_paths
    composite = {name: value for name, value in checkpoint.objects.items() if _is_weight(name, value, prefix, weights)}
    others = {name: value for name, value in checkpoint.objects.items() if name not in composite}
    forms = checkpoint.forms if checkpoint.trainer and isinstance(checkpoint.forms, Forms) else Forms()
    if forms.containers and not prefix:  # weights have their own names, and so has what belongs to them
        others = {_stored_name(name, paths): value for name, value in others.items()}
    whole, _ = assemble(weights, {name.removeprefix(prefix): value for name, value in composite.items()})
    inside = _under(STATE_DICT, whole)
    as_stored = not options.sharded and (STATE_DICT,) in forms.containers and inside.keys() <= paths.keys()
    former = Former({**checkpoint.tensors, **_under(STATE_DICT, weights)}, forms)
    header, optimizers, ignored = _entries(
        replace(checkpoint, objects=others), weights, former, inside if as_stored else {}
    )
    notes, formed = former.notes, former.formed if as_stored else former.formed - {container_name((STATE_DICT,))}
    if options.sharded:
        if is_filled(header.pop("optimizer_states")):
            ignored["optimizer_states"] = _BY_NUMBER
        ignored.update(dict.fromkeys(composite, "a sharded directory has its tensors only, not what joins them"))
    else:
        for name, state in sorted(optimizers.items()):
            numbered = _by_number(state)
            if numbered is None:
                ignored[name] = "its param_groups do not name its parameters"
            else:
                header["optimizer_states"].append(numbered)
        if not as_stored:
            state, more_notes, more_formed = as_state_dict(checkpoint, weights, whole)
            header[STATE_DICT] = rebuilt(state, {**state, **header[STATE_DICT]})
            notes, formed = [*notes, *more_notes], formed | more_formed
    return Contents(header, optimizers, ignored, tuple(notes), frozenset(formed))


def _under(key: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{key}.{name}": value for name, value in entries.items()}


def _stored_name(name: str, paths: Mapping[str, Any]) -> str:
    """The name in the file of what a checkpoint of weights alone has under the name in the state dict."""
    stored = f"{STATE_DICT}.{name}"
    return stored if name not in paths and stored in paths else name


def _is_weight(name: str, value: Any, prefix: str, weights: Mapping[str, LazyTensor]) -> bool:
    """Whether an object is a sparse, quantized or nested tensor among the weights, which have its parts."""
    own = name.removeprefix(prefix)
    return isinstance(value, CompositeTensor) and any(f"{own}.{part}" in weights for part in value.part_tensors())


def _entries(
    checkpoint: Checkpoint,
    weights: Mapping[str, LazyTensor],
    former: Former,
    inside: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Everything but the weights, in Lightning's order; optimizers of a sharded source; what is left out and why.

    Under ``state_dict`` is what stands beside the weights: extra states of modules, which are not tensors; and with
    ``inside``, the weights by their names in the source, the whole state dict as the source has it.
    """
    kept = checkpoint.trainer
    stored = {checkpoint.model_prefix + name for name in weights}
    others, incomplete = assemble(
        {name: tensor for name, tensor in checkpoint.tensors.items() if name not in stored}, checkpoint.objects
    )
    nested: dict[Any, Any] = {}
    if kept:
        paths = checkpoint.key_paths
        every = {**others, **inside}
        values = {name: former.form(name, every[name]) for name in paths if name in every and paths[name]}
        containers = former.containers(paths[name] for name in values)
        nested = unflatten(values, paths, checkpoint.original_keys, containers)
        foreign = [name for name in others if name not in values and name not in kept]
        ignored = {**incomplete, **dict.fromkeys(foreign, _NOT_LIGHTNING)}
    else:
        ignored = {**incomplete, **dict.fromkeys(others, _NOT_LIGHTNING)}
        if checkpoint.config_kind == "nemo1":
            kept = {"hparams_name": "kwargs", HYPER_PARAMETERS: {"cfg": checkpoint.config}}
    found = {name: nested.pop(name) for name in list(nested) if type(name) is str and _SHARDED_OPTIMIZER.match(name)}
    extra = nested.pop(STATE_DICT, None)
    header: dict[str, Any] = {
        "epoch": checkpoint.training.epoch or 0,
        "global_step": checkpoint.training.step or 0,
        VERSION: _OLDEST_VERSION,
        STATE_DICT: extra if isinstance(extra, dict) else {},
        **nested,
    }
    header.update((name, value) for name, value in kept.items() if name not in nested)
    header.setdefault("callbacks", {})
    if not isinstance(header.get("optimizer_states"), list):
        header["optimizer_states"] = []
    header.setdefault("lr_schedulers", [])
    return header, found, ignored


def _by_number(state: Any) -> dict[str, Any] | None:
    """The optimizer state with parameters numbered in the order of its groups, as in a file; None if it cannot be."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    slots = state.get("state", {}) if isinstance(state, dict) else None
    if not isinstance(groups, list) or not isinstance(slots, dict) or not all(map(_names_parameters, groups)):
        return None
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) != len(names) or not all(name in numbers for name in slots):
        return None
    renumbered = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
    return {"state": {numbers[name]: slot for name, slot in slots.items()}, "param_groups": renumbered}


def _names_parameters(group: Any) -> bool:
    names = group.get("params") if isinstance(group, dict) else None
    return isinstance(names, list) and all(type(name) is str for name in names)


def _directory(
    checkpoint: Checkpoint,
    weights: Mapping[str, LazyTensor],
    header: dict[str, Any],
    optimizers: Mapping[str, Any],
    options: WriteOptions,
) -> tuple[OutputFile, ...]:
    """A distributed checkpoint of weights and optimizers, and ``meta.pt``, which marks the whole as complete."""
    extra = header.pop(STATE_DICT)
    prefixes = tuple(f"{name}." for name in optimizers) or ("\0",)
    tensors = {f"{STATE_DICT}.{name}": tensor for name, tensor in weights.items()}
    tensors.update((name, tensor) for name, tensor in checkpoint.tensors.items() if name.startswith(prefixes))
    objects = {name: checkpoint.objects[name] for name in checkpoint.objects if name.startswith(prefixes)}
    objects.update((f"{STATE_DICT}.{name}", value) for name, value in extra.items())
    known = checkpoint.key_paths
    paths = {
        **{name: known[name] for name in (*tensors, *objects) if name in known},
        **{f"{STATE_DICT}.{name}": (STATE_DICT, name) for name in (*weights, *extra)},
    }
    shards = dcp_files(tensors, objects, ranks=options.ranks, paths=paths, file_bytes=options.max_shard_size)
    return (*shards, OutputFile(META, zip_parts(header, archive_name="meta"), stage=2))
