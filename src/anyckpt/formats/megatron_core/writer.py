"""Laying out a Megatron-Core ``torch_dist`` checkpoint as Megatron-Core 0.16 writes it, which later releases read, too.

From 0.19 on, Megatron-Core itself saves no ``common.pt``: what is not sharded is one more object of the checkpoint.  It
is written so where it is asked for by release.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.dcp import dcp_files
from anyckpt.containers.dcp.chunks import Held
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_core.fsdp_dtensor import NAME, OF_OTHER_RANKS, fsdp_dtensor_files, with_arguments
from anyckpt.formats.megatron_core.implementation import (
    Implementation,
    extra_states,
    hub_state_name,
    implementation_of,
    spelled,
)
from anyckpt.formats.shared.megatron_adapters import ADAPTER, call_of
from anyckpt.formats.shared.megatron_arguments import pickled_arguments
from anyckpt.formats.shared.nesting import nested
from anyckpt.formats.shared.tracker import TRACKER
from anyckpt.models.dialects.registration import with_second_names
from anyckpt.pickling import Record
from anyckpt.pickling.torch_objects import NAMESPACE, namespace
from anyckpt.tensor import LazyTensor

BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_ONLY_BACKEND = ("sharded_backend", "sharded_backend_version")
_COMMON_OBJECT = "common_state/shard_0_1"
_COMMON_INSIDE_SINCE = (0, 19)
_SHARDED_OBJECT = re.compile(r"/shard_[\d.]+(_[\d.]+)?$")
_CHECKPOINT_VERSION = 3.0  # since Megatron-LM 3.0 the rows of fused QKV are grouped as they are today
_FOREIGN = "state of another framework, which Megatron-Core has no place for"
_READ_BY_MEGATRON_LM = ("args", "checkpoint_version", "iteration")
_TRAINING = ("args", "opt_param_scheduler", "num_floating_point_operations_so_far")
_OF_EXPERT_RANKS = re.compile(r"rng_state/shard_\d+\.\d+\.\d+_")
_NO_TOKENIZER = "a checkpoint of Megatron-FSDP has no place for it"
_NO_EXPERT_RANKS = "random states of expert ranks, which a distributed checkpoint does not tell apart"


def torch_dist_files(
    tensors: Mapping[str, LazyTensor],
    objects: Mapping[str, Any],
    common: Mapping[str, Any],
    *,
    prefix: str = "",
    ranks: int = 1,
    file_bytes: int | None = None,
    implementation: Implementation | None = None,
    states: Mapping[str, Any] | None = None,
    held: Held | None = None,
    release: tuple[int, int] | None = None,
) -> list[OutputFile]:
    """The files of a ``torch_dist`` checkpoint; ``metadata.json``, which marks it as whole, has stage 2.

    Args:
        tensors: under their stored names, layers stacked.
        objects: sharded objects (``rng_state/shard_0.0_1.1``), without Megatron-Core's list of one.  The
            ``_extra_state`` objects that models with these tensors ask for are added, with None.
        common: what is not sharded.
        prefix: directory inside the output; empty for the output itself.
        ranks: over how many ranks' files the bytes are spread.
        file_bytes: bytes per file, or None for the default.
        implementation: what these models are built of, None if it may be either.
        states: the modules' own states by the hub's name, in place of None.
        held: which boxes of the tensors the processes have that write together; nothing is added to what they have.
        release: of Megatron-Core that will load it; None for what all load.

    Raises:
        UsageError: an object cannot be pickled.
    """
    folder = f"{prefix}/" if prefix else ""
    if held is None:
        tensors = with_second_names(tensors)
        objects = {**state_objects(extra_states(tensors, implementation), states), **objects}
    if release is not None and release >= _COMMON_INSIDE_SINCE:
        objects = {**objects, _COMMON_OBJECT: dict(common)}
        shards = dcp_files(
            tensors, objects, prefix=prefix, ranks=ranks, megatron=True, file_bytes=file_bytes, held=held
        )
        backend = {key: BACKENDS[key] for key in _ONLY_BACKEND}
        return [*shards, small_file(f"{folder}metadata.json", json.dumps(backend), stage=2)]
    shards = dcp_files(tensors, objects, prefix=prefix, ranks=ranks, megatron=True, file_bytes=file_bytes, held=held)
    common_parts = zip_parts(
        dict(common), archive_name="common", tensor_name=lambda path: ".".join(["common", *map(str, path)])
    )
    return [
        OutputFile(f"{folder}common.pt", tuple(common_parts)),
        *shards,
        small_file(f"{folder}metadata.json", json.dumps(BACKENDS), stage=2),
    ]


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """A ``torch_dist`` checkpoint directory with the model's arguments in its common state.

    What was in the source's common state stays there and nothing is added to it; that of another format gets what
    Megatron-LM reads (see ``common_and_sharded``).  Sharded objects stay sharded objects.  ``_extra_state``
    objects and the name of the norm before experts go by what ``implementation_of`` finds.

    Raises:
        UsageError: an object cannot be pickled.
    """
    if options.backend == NAME:
        return _of_megatron_fsdp(with_arguments(checkpoint, options.megatron_version), options)
    common, sharded, foreign = common_and_sharded(
        checkpoint, megatron_args=options.megatron_args, of_training=options.held is not None
    )
    if options.held is not None:
        common = nested(common, checkpoint.key_paths, checkpoint.original_keys)
    if checkpoint.adapter is not None:
        common[ADAPTER] = call_of(checkpoint.adapter, "megatron.bridge.peft")
    built_of = implementation_of(checkpoint, options.transformer_impl)
    files = torch_dist_files(
        spelled(checkpoint.tensors, built_of, options.megatron_version) if options.held is None else checkpoint.tensors,
        sharded,
        common,
        ranks=options.ranks,
        file_bytes=options.max_shard_size,
        implementation=built_of,
        states=None if checkpoint.extra_states is None else checkpoint.extra_states(),
        held=options.held,
        release=options.megatron_version,
    )
    files += tokenizer_files(checkpoint)
    note = f"for Megatron-LM's --load, move it to <root>/release and write 'release' into <root>/{TRACKER}"
    return Plan("megatron-core", tuple(files), ignored={**checkpoint.ignored, **foreign}, notes=(note,))


def _of_megatron_fsdp(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    common, sharded, foreign = common_and_sharded(checkpoint, megatron_args=options.megatron_args)
    ignored = {**checkpoint.ignored, **foreign, **dict.fromkeys(sharded, OF_OTHER_RANKS)}
    ignored |= dict.fromkeys([name for name in common if name not in _READ_BY_MEGATRON_LM], _FOREIGN)
    if checkpoint.tokenizer is not None:
        ignored |= dict.fromkeys(checkpoint.tokenizer.files, _NO_TOKENIZER)
    kept = {name: common[name] for name in _READ_BY_MEGATRON_LM if name in common}
    built_of = implementation_of(checkpoint, options.transformer_impl)
    files = fsdp_dtensor_files(checkpoint, kept, options, implementation=built_of)
    step = f"iter_{checkpoint.training.step or 0:07d}"
    note = f"for --load with --ckpt-format {NAME}, move it to <root>/{step} and write its number into <root>/{TRACKER}"
    return Plan("megatron-core", tuple(files), ignored=ignored, notes=(note,))


def state_objects(keys: Iterable[str], states: Mapping[str, Any] | None) -> dict[str, Any]:
    """The object of each key: the module's own state if there is one, else None."""
    known = states or {}
    return {key: known.get(hub_state_name(key) or "") for key in keys}


def common_and_sharded(
    checkpoint: Checkpoint, *, megatron_args: bool = True, of_training: bool = False
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """What goes into the common state, the sharded objects by key, and the names that have no place, with the reason.

    ``dist_checkpointing.load`` hands all of the common state to its caller, so that a source that has a common state
    keeps what it has.  From any other come the three that Megatron-LM's ``load_checkpoint`` reads: ``args``,
    ``checkpoint_version`` (without it the rows of QKV are reordered) and ``iteration``.

    Args:
        checkpoint: to be written.
        megatron_args: write these three; without them the common state is that of a bare model.
        of_training: it is a training job's own state, whose ranks are those that will load it.
    """
    stated = None if checkpoint.common is None else set(checkpoint.common)
    common_names = {*_TRAINING, *(stated or ())}
    ranks = set() if of_training else {name for name in checkpoint.objects if _OF_EXPERT_RANKS.match(name)}
    taken = [name for name in checkpoint.objects if name not in ranks]
    sharded = {name: checkpoint.objects[name] for name in taken if _SHARDED_OBJECT.search(name)}
    common = {name: checkpoint.objects[name] for name in taken if name in common_names and name not in sharded}
    foreign = {name: _FOREIGN for name in taken if name not in sharded and name not in common_names}
    foreign.update(dict.fromkeys(ranks, _NO_EXPERT_RANKS))
    config = dict(checkpoint.config) if _has_arguments(checkpoint) else {}
    if config and checkpoint.training.consumed_samples is not None:
        config.setdefault("consumed_train_samples", checkpoint.training.consumed_samples)
    described = bool(config) or "args" in common
    wanted = stated if stated is not None and ("args" in stated or not config) else set(_READ_BY_MEGATRON_LM)
    version = checkpoint.details.get("checkpoint_version") if stated is not None else None
    values = {
        "args": _arguments(common.get("args"), config),
        "checkpoint_version": common.get("checkpoint_version", version or _CHECKPOINT_VERSION),
        "iteration": common.get("iteration", checkpoint.training.step or 0),
    }
    for name in _READ_BY_MEGATRON_LM:
        common.pop(name, None)
        if megatron_args and name in wanted and (name != "args" or described):
            common[name] = values[name]
    return common, sharded, foreign


def tokenizer_files(checkpoint: Checkpoint) -> list[OutputFile]:
    """The tokenizer's files under ``tokenizer/``, where Megatron-Bridge puts them."""
    files = {} if checkpoint.tokenizer is None else checkpoint.tokenizer.files
    return [OutputFile(f"tokenizer/{name}", (SourceData(source),)) for name, source in files.items()]


def _has_arguments(checkpoint: Checkpoint) -> bool:
    return checkpoint.config_kind == "megatron-args"


def _arguments(stored: Any, config: Mapping[str, Any]) -> Any:
    """The ``args`` of the common state: the stored ones with what the configuration changes or adds."""
    if stored is not None and not (isinstance(stored, Record) and stored.type == NAMESPACE):
        return stored
    return namespace(pickled_arguments(stored, config))
