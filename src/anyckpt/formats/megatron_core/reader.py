"""Reading Megatron-Core ``torch_dist`` checkpoints as written by Megatron-Core 0.8 to 0.20.

Facts: ``dist_checkpointing/serialization.py`` and ``strategies/{torch,common}.py`` of these versions,
``training/checkpointing.py`` of Megatron-LM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from anyckpt.checkpoint import Checkpoint, ParallelLayout, StoredChecksum, Tokenizer, TrainingState
from anyckpt.containers.dcp import DcpContents, read_dcp
from anyckpt.containers.dcp.items import LazyObjects
from anyckpt.containers.torch_file import read_torch
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.engine.names import MANIFEST_NAME, UNFINISHED_NAME
from anyckpt.errors import FormatError
from anyckpt.formats.megatron_core.implementation import hub_state_name
from anyckpt.formats.megatron_core.location import COMMIT, COMMON, check_commit, is_checkpoint
from anyckpt.formats.shared.megatron_adapters import ADAPTER, settings_from
from anyckpt.formats.shared.no_weights import EXTRA_STATE_REASON, some_hold_something
from anyckpt.formats.shared.tracker import iteration_folder
from anyckpt.pickling import Record
from anyckpt.pickling.plain import simplify, to_plain
from anyckpt.storage.folder import Folder
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor

COMMON_ITEM = re.compile(r"^common_state/shard_0_1$")
_EXTRA_STATE = re.compile(r"^(?P<key>.*_extra_state)(/shard_[\d._]+)?$")
_STATE_PREFIX = re.compile(r"^(chained_\d+\.)?optimizer\.")
_RNG_GRID = re.compile(r"^rng_state/shard_\d+\.\d+_(\d+)\.(\d+)$")
_NEMO_KEYS = ("num_layers", "hidden_size", "num_attention_heads")
_OWN_FILES = (COMMIT, COMMON, ".metadata", "integrity.json", MANIFEST_NAME, UNFINISHED_NAME)


def read(location: Location) -> Checkpoint:
    """Open a checkpoint, or the newest iteration of a training root.

    Raises:
        FormatError: it is unfinished, damaged, or of an unknown backend.
    """
    inner = location
    if not is_checkpoint(location):
        inner = iteration_folder(location)
        if not is_checkpoint(inner) and any(name.startswith("mp_rank_") for name in inner.names):
            raise FormatError(
                "is a checkpoint of one directory per rank, not a distributed one",
                path=inner.path,
                expected="metadata.json and .metadata",
                found=", ".join(inner.names[:3]),
            )
    return read_committed(inner.folder(), path=location.path)


def read_committed(folder: Folder, *, path: str) -> Checkpoint:
    """The same, with what its last file says: whether it is there, and of which backend.

    Raises:
        FormatError: see :func:`read_torch_dist`; or it is of an unknown backend.
    """
    warnings = check_commit(folder)
    found = read_torch_dist(folder, path=path, warnings=warnings)
    return replace(found, unloadable=warnings, unfinished=bool(warnings))


def read_torch_dist(folder: Folder, *, path: str, warnings: list[str] | None = None) -> Checkpoint:
    """The checkpoint whose ``.metadata`` is in ``folder``, on disk or in an archive.

    Args:
        folder: where the files are.
        path: what the user opened.
        warnings: what is known to be odd already.

    Raises:
        FormatError: see :func:`~anyckpt.formats.dcp.read_dcp`; or the common state is damaged.
    """
    return megatron_checkpoint(folder, read_dcp(folder), path=path, warnings=warnings)


def megatron_checkpoint(
    folder: Folder, contents: DcpContents, *, path: str, warnings: list[str] | None = None
) -> Checkpoint:
    """The checkpoint whose tensors and sharded objects are ``contents``, of whichever backend.

    Args:
        folder: where the files are.
        contents: tensors and sharded objects.
        path: what the user opened.
        warnings: what is known to be odd already.

    Raises:
        FormatError: the common state is damaged.
    """
    common = read_common(folder, contents)
    args = common.get("args")
    fields = args.fields() if isinstance(args, Record) else args if isinstance(args, dict) else {}
    config, kind = _configuration(fields, common)
    ignored = {found["key"]: EXTRA_STATE_REASON for name in contents.objects if (found := _EXTRA_STATE.match(name))}
    sharded = contents.objects.without({name for name in contents.objects if _EXTRA_STATE.match(name)})
    objects = LazyObjects({**common, **sharded.unread()})
    prefixes = sorted({found[0] for name in contents.tensors if (found := _STATE_PREFIX.match(name))})
    other = [name for name in folder.names() if name not in contents.files and name not in _OWN_FILES]
    artifacts = {name: folder.open(name) for name in other if not name.endswith(".distcp")}
    tokenizer = tokenizer_of(artifacts)
    dialect, prefix = _dialect(contents, tuple(prefixes))
    return Checkpoint(
        path=path,
        format="megatron-core",
        format_version=_version(folder, contents),
        tensors=contents.tensors,
        dialect=dialect,
        model_prefix=prefix,
        state_prefixes=tuple(prefixes),
        objects=objects,
        config=config,
        config_kind=kind,
        tokenizer=tokenizer,
        artifacts={name: source for name, source in artifacts.items() if not name.startswith("tokenizer/")},
        layout=_layout(config, contents),
        training=_training(common, config, contents, bool(prefixes)),
        warnings=[*(warnings or []), *contents.warnings],
        ignored=ignored,
        details={
            **contents.details(),
            "backend": "torch_dist",
            "content_metadata": to_plain(common.get("content_metadata")),
            "checkpoint_version": to_plain(common.get("checkpoint_version")),
        },
        key_paths=contents.paths or {},
        common=tuple(common),
        extra_states=partial(_states, contents.objects) if ignored else None,
        holds_states=partial(_hold_something, contents.objects) if ignored else None,
        checksums=lambda: _checksums(folder, contents),
        adapter=settings_from(call, path) if isinstance(call := to_plain(common.get(ADAPTER)), dict) else None,
    )


def _hold_something(objects: Mapping[str, Any]) -> bool:
    return some_hold_something(objects, filter(_EXTRA_STATE.match, objects))


def _states(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The modules' own states by the hub's name; None says nothing."""
    named = {name: key for key in objects if (name := hub_state_name(key)) is not None}
    return {name: state for name, key in named.items() if (state := objects[key]) is not None}


def _configuration(arguments: Any, common: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Megatron-LM's arguments; else what NeMo 1's trainer keeps as Lightning's hyper-parameters, and their kind."""
    config = to_plain(arguments)
    if isinstance(config, dict) and config:
        return config, "megatron-args"
    found = to_plain(simplify(common.get("hyper_parameters")))
    inner = found.get("cfg", found) if isinstance(found, dict) else None
    if isinstance(inner, dict) and all(type(inner.get(key)) is int for key in _NEMO_KEYS):
        return inner, "nemo1"
    return {}, None


def read_common(folder: Folder, contents: DcpContents) -> dict[str, Any]:
    """What is not sharded: ``common.pt`` up to 0.18, an item of the index afterwards; empty if there is neither.

    The item is taken out of ``contents.objects``.

    Raises:
        FormatError: it is damaged, or not a dictionary.
    """
    if COMMON in folder.names():
        source = folder.open(COMMON)
        root, name = read_torch(source).root, source.name
    else:
        item = next((name for name in contents.objects if COMMON_ITEM.match(name)), None)
        if item is None:
            return {}
        root, name = contents.objects[item], f"{folder.name} » {item}"
        contents.objects = contents.objects.without({item})
    if not isinstance(root, dict):
        raise FormatError("is not a dictionary", path=name, found=type(root).__name__)
    return {key if isinstance(key, str) else repr(key): value for key, value in root.items()}


def _checksums(folder: Folder, contents: DcpContents) -> Iterator[StoredChecksum]:
    if COMMON in folder.names():
        yield from stored_checksums(read_torch(folder.open(COMMON)))
    yield from contents.checksums()


def _version(folder: Folder, contents: DcpContents) -> str:
    """Which Megatron-Core wrote it, as far as the files tell."""
    if contents.metadata_class.startswith("megatron."):
        return "torch_dist, Megatron-Core 0.13 to 0.15"
    if contents.has_mcore_data:
        return "torch_dist, Megatron-Core 0.12 or older"
    if COMMON not in folder.names():
        return "torch_dist, Megatron-Core 0.19 or newer"
    return "torch_dist, Megatron-Core 0.16 to 0.18"


def _dialect(contents: DcpContents, state_prefixes: tuple[str, ...]) -> tuple[str, str]:
    """Naming of the weights and what precedes each: NeMo's trainers save the module that holds the model."""
    weights = [name for name in contents.tensors if not name.startswith(state_prefixes or ("\0",))]
    for prefix in ("module.", "model."):
        if weights and all(name.startswith(prefix) for name in weights):
            return "nemo2" if prefix == "module." else "nemo-sharded", ""
    return "megatron-core", ""


def _layout(config: Mapping[str, Any], contents: DcpContents) -> ParallelLayout:
    """From the arguments; else from the grid of random states; else from how the projections are cut."""

    def number(key: str) -> int | None:
        value = config.get(key)
        return value if type(value) is int and value > 0 else None

    tensor, pipeline = 1, 1
    grid = next((found for name in contents.objects if (found := _RNG_GRID.match(name))), None)
    if grid is not None:
        pipeline, tensor = int(grid[1]), int(grid[2])
    else:
        for name, value in contents.tensors.items():
            if name.endswith("self_attention.linear_proj.weight") and not _STATE_PREFIX.match(name):
                tensor = _cuts(value)
    return ParallelLayout(
        number("tensor_model_parallel_size") or tensor,
        number("pipeline_model_parallel_size") or pipeline,
        number("virtual_pipeline_model_parallel_size") or 1,
        number("expert_model_parallel_size") or 1,
    )


def _cuts(tensor: LazyTensor) -> int:
    """Into how many parts the last axis is divided."""
    starts = getattr(tensor, "starts", None)
    return 1 if starts is None else len(set(starts[:, -1].tolist()))


def _training(
    common: Mapping[str, Any], config: Mapping[str, Any], contents: DcpContents, optimizer: bool
) -> TrainingState:
    def whole(*values: Any) -> int | None:
        return next((value for value in values if type(value) is int), None)

    return TrainingState(
        step=whole(common.get("iteration"), common.get("global_step"), config.get("iteration")),
        consumed_samples=whole(config.get("consumed_train_samples")),
        epoch=whole(common.get("epoch")),
        has_optimizer=optimizer or any(_STATE_PREFIX.match(name) for name in contents.objects),
        has_scheduler="opt_param_scheduler" in common or "lr_schedulers" in common,
        has_rng=any(name.startswith("rng_state") for name in contents.objects),
    )


def tokenizer_of(artifacts: Mapping[str, Any]) -> Tokenizer | None:
    """The files of ``tokenizer/``, which Megatron-Bridge writes and ``plan`` here too."""
    files = {name.removeprefix("tokenizer/"): source for name, source in artifacts.items() if "tokenizer/" in name[:10]}
    if not files:
        return None
    model = next((name for name in sorted(files) if name.endswith(".model")), None)
    hub = "tokenizer.json" in files or "tokenizer_config.json" in files
    return Tokenizer("huggingface" if hub or model is None else "sentencepiece", files, None if hub else model)
