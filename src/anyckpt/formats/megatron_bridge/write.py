"""Laying out a training root as Megatron-Bridge saves it: ``iter_0000010/`` and two trackers."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.config.hub_names import EMBEDDING
from anyckpt.config.megatron_bridge import Facts, described, run_config_of
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_bridge.location import LATEST, RUN_CONFIG, TRAIN_STATE
from anyckpt.formats.megatron_core.fsdp_dtensor import NAME as FSDP
from anyckpt.formats.megatron_core.fsdp_dtensor import OF_OTHER_RANKS, fsdp_dtensor_files
from anyckpt.formats.megatron_core.implementation import implementation_of, spelled
from anyckpt.formats.megatron_core.writer import common_and_sharded, tokenizer_files, torch_dist_files
from anyckpt.formats.shared.megatron_adapters import call_of
from anyckpt.formats.shared.tracker import TRACKER
from anyckpt.models.dialects.spellings import text_prefix
from anyckpt.plain_yaml import dump_yaml
from anyckpt.tensor import from_array

_ADAPTERS = "megatron.bridge.peft"
_TORCH_DIST = "torch_dist"
_OTHERS = ("encoder.layers.", "conv1.")
"""What names of BERT, of T5, or of a vision transformer begin with."""

_COUNTS = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""``content_metadata`` of a checkpoint without optimizer; a load fails where there is none."""
_NO_PLACE = "a Megatron-Bridge checkpoint has no place for it"


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """``iter_*/`` with a ``torch_dist`` payload, ``run_config.yaml``, ``train_state.pt`` and ``tokenizer/``; trackers.

    A source that is a Megatron-Bridge checkpoint keeps its configuration and its other files.

    Raises:
        MappingError: Megatron-Bridge has no such models.
        UsageError: there is no configuration in Megatron's words, or an object that cannot be pickled.
    """
    if checkpoint.config_kind != "megatron-args" or not checkpoint.config:
        raise UsageError(
            "a Megatron-Bridge checkpoint needs the model's configuration and the source has none that is translated",
            path=checkpoint.path,
            found=f"a configuration of kind {checkpoint.config_kind}" if checkpoint.config else "no configuration",
            remedy="pass one with --config, or name the model family with --family",
        )
    ours = checkpoint.format == "megatron-bridge"
    step = checkpoint.training.step or 0
    folder = f"iter_{step:07d}"
    common, sharded, foreign = common_and_sharded(checkpoint)
    if "args" not in checkpoint.objects:
        common.pop("args", None)  # Megatron-Bridge takes these for a Megatron-LM checkpoint's
    common.update(iteration=step)
    common.setdefault("content_metadata", dict(_METADATA))
    prefix = text_prefix(checkpoint.tensors) or ""
    embedding = checkpoint.tensors.get(prefix + EMBEDDING)
    facts = Facts(
        dtype=None if embedding is None else embedding.dtype.name,
        has_optimizer=any("optimizer." in name for name in checkpoint.tensors),
        has_rng=any(name.startswith("rng_state/") for name in sharded),
    )
    known = checkpoint.details.get("run_config") if ours else None
    if isinstance(known, dict):
        run_config = described(known, facts)
    else:
        _check_decoder(checkpoint)
        rows = None if embedding is None else embedding.shape[0]
        run_config = run_config_of(checkpoint.config, rows, facts, options.megatron_version)
    if checkpoint.adapter is not None:
        run_config = _with_adapter(run_config, checkpoint.adapter)
    state = _train_state(checkpoint, step)
    built_of = implementation_of(checkpoint, options.transformer_impl)
    kind = options.backend or _TORCH_DIST
    if kind == FSDP:
        kept = {name: common[name] for name in ("iteration", "checkpoint_version")}
        files = fsdp_dtensor_files(checkpoint, kept, options, prefix=folder, implementation=built_of)
        others = [name for name in common if name in checkpoint.objects and name not in kept]
        foreign |= {**dict.fromkeys(sharded, OF_OTHER_RANKS), **dict.fromkeys(others, _NO_PLACE)}
    else:
        files = torch_dist_files(
            spelled(checkpoint.tensors, built_of, options.megatron_version),
            sharded,
            common,
            prefix=folder,
            ranks=options.ranks,
            file_bytes=options.max_shard_size,
            implementation=built_of,
            states=None if checkpoint.extra_states is None else checkpoint.extra_states(),
            release=options.megatron_version,
        )
    run_config = {**run_config, "checkpoint": {**run_config["checkpoint"], "ckpt_format": kind}}
    files += [OutputFile(f"{folder}/{file.path}", file.parts, file.stage) for file in tokenizer_files(checkpoint)]
    if ours:
        files += [OutputFile(f"{folder}/{name}", (SourceData(s),)) for name, s in checkpoint.artifacts.items()]
    files += [
        small_file(f"{folder}/{RUN_CONFIG}", dump_yaml(run_config, sort_keys=True), stage=1),
        _state_file(f"{folder}/{TRAIN_STATE}", state, stage=1),
        _state_file(LATEST, state, stage=2),
        small_file(TRACKER, str(step), stage=2),
    ]
    ignored = {**checkpoint.ignored, **foreign}
    if not ours:
        ignored.update(dict.fromkeys(checkpoint.artifacts, _NO_PLACE))
    notes = (
        ()
        if isinstance(known, dict)
        else (
            f"{RUN_CONFIG} describes the model by {run_config['model']['_target_'].rpartition('.')[2]}; "
            "training settings are the trainer's to give",
        )
    )
    return Plan("megatron-bridge", tuple(files), ignored=ignored, notes=notes)


def _check_decoder(checkpoint: Checkpoint) -> None:
    """Raise MappingError if it is another model than a decoder: no class of Megatron-Bridge's describes it."""
    other = next((name for name in checkpoint.weights() if name.startswith(_OTHERS)), None)
    if other is not None:
        raise MappingError(
            "Megatron-Bridge has decoders of language models alone",
            path=checkpoint.path,
            tensor=other,
            remedy="convert to megatron-core or megatron-lm",
        )


def _with_adapter(run_config: dict[str, Any], settings: AdapterSettings) -> dict[str, Any]:
    """With what makes Megatron-Bridge build the adapter, and load its base from where the settings say."""
    saved = run_config.get("checkpoint") or {}
    if settings.base is not None:
        saved = {**saved, "pretrained_checkpoint": settings.base}
    return {**run_config, "checkpoint": saved, "peft": call_of(settings, _ADAPTERS)}


def _state_file(path: str, state: dict[str, Any], stage: int) -> OutputFile:
    name = path.rpartition("/")[2].removesuffix(".pt")
    parts = zip_parts(state, archive_name="train_state", tensor_name=lambda keys: ".".join([name, *map(str, keys)]))
    return OutputFile(path, parts, stage)


def _train_state(checkpoint: Checkpoint, step: int) -> dict[str, Any]:
    """``TrainState.state_dict()``: tensors without axes."""
    known = checkpoint.details.get("train_state") if checkpoint.format == "megatron-bridge" else None
    counts: dict[str, int] = {**dict.fromkeys(_COUNTS, 0), **(known if isinstance(known, dict) else {})}
    counts.update(step=step, consumed_train_samples=checkpoint.training.consumed_samples or 0)
    operations = checkpoint.objects.get("num_floating_point_operations_so_far", 0)
    flops = float(operations) if type(operations) in (int, float) else 0.0
    return {
        **{name: from_array(np.array(counts[name], np.int64)) for name in _COUNTS},
        "floating_point_operations_so_far": from_array(np.array(flops, np.float32)),
        **{name: from_array(np.array(False)) for name in ("do_train", "do_valid", "do_test")},
    }
