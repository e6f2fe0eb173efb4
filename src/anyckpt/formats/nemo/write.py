"""Laying out a ``.nemo`` as NeMo 1.7 and later write it: a plain tar, its configuration first, its weights last."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.config.nemo_speech import is_speech
from anyckpt.containers.torch_file import zip_parts
from anyckpt.containers.torch_file.writer import ALIGNMENT, PAGE
from anyckpt.engine.plan import OutputFile, Part, Plan
from anyckpt.errors import FormatError, MappingError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_core.writer import torch_dist_files
from anyckpt.formats.nemo.config import (
    GPT_TARGET,
    NEMO_VERSION,
    adapter_section,
    is_megatron_config,
    missing_artifacts,
    module_name,
    referenced_names,
    uses_megatron_core,
)
from anyckpt.formats.nemo.container import CONFIG, FLAT_WEIGHTS, SHARDED_WEIGHTS
from anyckpt.formats.nemo.tokenizer import has_prefix, write_tokenizer
from anyckpt.formats.shared.archive import ArchiveWriter
from anyckpt.formats.shared.rank_folders import Place, folder_name
from anyckpt.models.dialects.rank_names import part_norms
from anyckpt.models.dialects.registration import with_extra_states, with_second_names
from anyckpt.plain_yaml import dump_yaml
from anyckpt.storage.source import ByteSource

_FLAT_EXTRA = re.compile(r"(^|\.)_extra_state$")
_SHARDED_EXTRA = re.compile(r"^model\..*_extra_state/shard_[\d._]+$")
_NO_PLACE = "a .nemo holds weights only"
_OF_CORE = re.compile(r"(?:model\.)?(?:module\.)?decoder\.layers\.")
_NO_ARTIFACT = "its configuration does not refer to it"


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """One tar archive: ``./model_config.yaml``, artifacts, then ``./model_weights.ckpt`` or ``./model_weights/``.

    A checkpoint with ``ranks`` gets a folder for each, ``./mp_rank_00/model_weights.ckpt``, or
    ``./tp_rank_00_pp_rank_000/model_weights.ckpt`` with a pipeline, as NeMo saves a model without
    ``use_dist_ckpt``.

    Raises:
        UsageError: there is no configuration, or one that NeMo does not know; or NeMo has no files for such ranks.
        FormatError: the configuration refers to a file that the source lacks.
    """
    config = _configuration(checkpoint)
    if is_speech(config) and (options.sharded or checkpoint.ranks):
        raise UsageError(
            "NeMo's speech models have no distributed checkpoint and no files of ranks",
            path=checkpoint.path,
            expected="model_weights.ckpt alone",
            remedy="leave --sharded and the sizes of ranks out",
        )
    ignored: dict[str, str] = {}
    notes: list[str] = []
    members: dict[str, ByteSource] = {}
    if checkpoint.tokenizer is not None:
        config["tokenizer"], members, notes = write_tokenizer(checkpoint.tokenizer, config)
    referenced = referenced_names(config)
    for name, source in checkpoint.artifacts.items():
        if checkpoint.format == "nemo" or has_prefix(name) or name in referenced:
            members[name] = source
        else:
            ignored[name] = _NO_ARTIFACT
    _check_artifacts(config, members, checkpoint.path)
    _complete(config, notes)
    if checkpoint.adapter is not None:
        canonical = any("_unfused_" in name for name in checkpoint.tensors)
        config["peft"] = adapter_section(checkpoint.adapter, canonical)
    states = _rank_states(checkpoint, config, notes) if checkpoint.ranks else {}
    if any(_OF_CORE.match(name) for name in checkpoint.tensors):
        _set_core(config, notes, checkpoint.path)

    archive = _begun(config, members)
    extra = _SHARDED_EXTRA if options.sharded else _FLAT_EXTRA
    objects = {name: checkpoint.objects[name] for name in checkpoint.objects if extra.search(name)}
    ignored.update({name: _NO_PLACE for name in checkpoint.objects if name not in objects})
    if states:
        for folder, state in states.items():
            archive.add_directory(f"./{folder}")
            _add_state(archive, f"./{folder}/{FLAT_WEIGHTS}", state, folder)
    elif options.sharded:
        _add_sharded(archive, checkpoint, objects, options)
    else:
        _add_flat(archive, checkpoint, objects)
    return Plan("nemo", (archive.file(),), ignored=ignored, notes=tuple(notes))


def module_archive(config: dict[str, Any], members: Mapping[str, ByteSource], state: dict[str, Any], path: str) -> Plan:
    """A flat ``.nemo`` of a module's state dict, as ``ModelPT.save_to`` of NeMo 3.0 writes it.

    Args:
        config: the configuration, with ``target`` and ``nemo_version``.
        members: the artifacts by their names in the archive.
        state: lazy tensors and objects by name, as ``Module.state_dict()`` has them.
        path: what to call it in messages.

    Raises:
        FormatError: the configuration refers to a file that is not among the artifacts.
        UsageError: an object that no pickle can hold.
    """
    _check_artifacts(config, members, path)
    archive = _begun(config, members)
    _add_state(archive, f"./{FLAT_WEIGHTS}", state)
    return Plan("nemo", (archive.file(),))


def _begun(config: dict[str, Any], members: Mapping[str, ByteSource]) -> ArchiveWriter:
    """An archive that has its configuration and artifacts, and no weights yet."""
    archive = ArchiveWriter()
    archive.add_directory(".")
    archive.add_bytes(f"./{CONFIG}", dump_yaml(config).encode())
    for name in sorted(members):
        archive.add_source(f"./{name}", members[name])
    return archive


def _configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """A copy of the configuration in NeMo's spelling."""
    if not checkpoint.config:
        raise UsageError(
            "a .nemo needs a model configuration and the source has none",
            path=checkpoint.path,
            remedy="pass one with --config",
        )
    if checkpoint.config_kind not in ("nemo1", None):
        raise UsageError(
            f"a .nemo needs NeMo's model configuration; the source's ({checkpoint.config_kind}) is not translated",
            path=checkpoint.path,
            remedy="pass one with --config, or name the model family with --family",
        )
    return copy.deepcopy(checkpoint.config)


def _check_artifacts(config: dict[str, Any], members: Mapping[str, ByteSource], path: str) -> None:
    missing = missing_artifacts(config, members)
    for key, name in missing.items():
        raise FormatError(
            f"the configuration's {key} refers to {name!r}, which is not among the artifacts",
            path=path,
            found=", ".join(members) or "no artifacts",
            remedy="add the file, or set the key to null (anyckpt edit)",
        )


def _complete(config: dict[str, Any], notes: list[str]) -> None:
    """``target`` and ``nemo_version``, which NeMo puts at the end of a configuration that lacks them."""
    if config.get("target") is None:
        if is_megatron_config(config):
            config.pop("target", None)
            config["target"] = GPT_TARGET
        else:
            notes.append("the configuration names no class (target): restore it by calling the model's own class")
    if config.get("nemo_version") is None:
        config.pop("nemo_version", None)
        config["nemo_version"] = NEMO_VERSION


def _set_core(config: dict[str, Any], notes: list[str], path: str) -> None:
    """Say that names are Megatron-Core's, as those of ranks and of distributed checkpoints always are.

    Raises:
        MappingError: Megatron-Core has no such model.
    """
    if not is_megatron_config(config) or uses_megatron_core(config):
        return
    if config.get("position_embedding_type") == "alibi":
        raise MappingError(
            "NeMo 1 has alibi only in its own modules, of which flat .nemo files are written",
            path=path,
            expected="whole tensors",
            found="ranks or a distributed checkpoint",
            remedy="leave --sharded, --tp and --pp out",
        )
    config["mcore_gpt"] = True
    notes.append("names are Megatron-Core's: mcore_gpt is set to true")


def _rank_states(checkpoint: Checkpoint, config: dict[str, Any], notes: list[str]) -> dict[str, dict[str, Any]]:
    """Folder -> state dict of each rank; the configuration is changed to describe the layout.

    Norms have modules of their own if the source's had, or if the configuration does not ask for Transformer Engine.
    """
    layout = checkpoint.layout
    if layout.virtual_pipeline > 1 or layout.expert_parallel > 1:
        raise UsageError(
            "a .nemo has no files for ranks of a virtual pipeline or with different experts",
            path=checkpoint.path,
            expected="virtual pipeline and expert parallel size 1",
            found=f"{layout.virtual_pipeline} and {layout.expert_parallel}",
            remedy="choose --sharded, which any parallel size loads",
        )
    config.update(
        tensor_model_parallel_size=layout.tensor_parallel, pipeline_model_parallel_size=layout.pipeline_parallel
    )
    if config.get("virtual_pipeline_model_parallel_size") is not None:
        config["virtual_pipeline_model_parallel_size"] = None
    _set_core(config, notes, checkpoint.path)
    local = checkpoint.details.get("local_norms", not config.get("transformer_engine"))
    states: dict[str, dict[str, Any]] = {}
    for shard in sorted(checkpoint.ranks, key=lambda shard: (shard.tensor_rank, shard.pipeline_rank)):
        place = Place(shard.tensor_rank, shard.pipeline_rank)
        folder = folder_name(place, layout.pipeline_parallel)
        if folder in states or place.tensor >= layout.tensor_parallel or place.pipeline >= layout.pipeline_parallel:
            raise UsageError("a rank lies outside the layout or is there twice", expected=str(layout), found=folder)
        own = part_norms(shard.tensors) if local else shard.tensors
        states[folder] = {f"{module_name(config)}.{name}": value for name, value in with_extra_states(own)}
    return states


def _add_flat(archive: ArchiveWriter, checkpoint: Checkpoint, objects: Mapping[str, Any]) -> None:
    _add_state(archive, f"./{FLAT_WEIGHTS}", {**with_second_names(checkpoint.tensors), **objects})


def _add_state(archive: ArchiveWriter, name: str, state: dict[str, Any], folder: str = "") -> None:
    """A state dict; tensors are called as they are read, behind the rank's folder."""

    def lay_out(offset: int, aligned: bool) -> Sequence[Part]:
        return zip_parts(
            state,
            archive_name=SHARDED_WEIGHTS,
            file_offset=offset,
            page=PAGE if aligned else ALIGNMENT,
            tensor_name=lambda path: ".".join(map(str, (*([folder] if folder else []), *path))),
        )

    archive.add(name, lay_out)


def _add_sharded(
    archive: ArchiveWriter, checkpoint: Checkpoint, objects: Mapping[str, Any], options: WriteOptions
) -> None:
    files = torch_dist_files(checkpoint.tensors, objects, {}, ranks=options.ranks, file_bytes=options.max_shard_size)
    archive.add_directory(f"./{SHARDED_WEIGHTS}")
    for file in sorted(files, key=lambda file: (file.stage, file.path)):
        _add_file(archive, file)


def _add_file(archive: ArchiveWriter, file: OutputFile) -> None:
    archive.add(f"./{SHARDED_WEIGHTS}/{file.path}", lambda offset, aligned: file.parts)
