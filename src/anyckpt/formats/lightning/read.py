"""Opens Lightning checkpoints; hyper-parameters, loops and callbacks are data, whatever classes they name."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import chain
from typing import Any

from anyckpt.checkpoint import Checkpoint, TrainingState
from anyckpt.config.nemo_speech import is_speech
from anyckpt.containers.dcp import read_dcp
from anyckpt.containers.torch_file import read_torch
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.containers.torch_file.flatten import flatten
from anyckpt.containers.torch_file.forms import forms_of
from anyckpt.containers.torch_file.roles import is_filled
from anyckpt.errors import FormatError, UnfinishedError
from anyckpt.formats.lightning.keys import HYPER_PARAMETERS, META, STATE_DICT, TRAINING_STATE, VERSION
from anyckpt.formats.torch import torch_checkpoint
from anyckpt.pickling.plain import simplify, to_plain
from anyckpt.storage.location import Location

_CONSUMED = re.compile(r"consumed_samples=(\d+)(\.\d+)?")
_MEGATRON_KEYS = ("num_layers", "hidden_size", "num_attention_heads")


def read(location: Location) -> Checkpoint:
    """Open a Lightning checkpoint.

    Raises:
        FormatError: it is truncated or damaged, or a directory without one of its two halves.
    """
    checkpoint = _read_directory(location) if location.is_directory else _read_file(location)
    if checkpoint.format != "lightning":
        return checkpoint
    consumed = _CONSUMED.search(location.name)
    samples = None if consumed is None else int(consumed[1][:18])
    return replace(checkpoint, training=replace(checkpoint.training, consumed_samples=samples))


def _read_file(location: Location) -> Checkpoint:
    contents = read_torch(location.open())
    flat = flatten(contents.root, location.path)
    checkpoint = torch_checkpoint(location.path, contents, flat)
    if not isinstance(contents.root, dict) or VERSION not in contents.root:
        return checkpoint  # the key is not at the top: a torch file that holds a Lightning checkpoint somewhere
    if not isinstance(contents.root.get(STATE_DICT), dict):
        raise FormatError("is a Lightning checkpoint without weights", path=location.path, expected=STATE_DICT)
    return _as_lightning(checkpoint, contents.root, flat.objects)


def _read_directory(location: Location) -> Checkpoint:
    if ".metadata" not in location.names:
        raise UnfinishedError(
            "has meta.pt but no .metadata: the save was not finished",
            path=location.path,
            remedy="use the checkpoint before it",
        )
    meta = read_torch(location.open(META))
    if not isinstance(meta.root, dict):
        raise FormatError("is not a dictionary", path=location.join(META), remedy="copy the checkpoint again")
    flat = flatten(meta.root, location.join(META))
    weights = read_dcp(location.folder())
    others = dict(flat.objects)
    weights.objects.update(flat.objects)
    checkpoint = Checkpoint(
        path=location.path,
        format="lightning",
        tensors={**weights.tensors, **flat.tensors},
        objects=weights.objects,
        warnings=[*meta.warnings, *weights.warnings],
        details=weights.details(),
        key_paths={**(weights.paths or {}), **flat.paths},
        original_keys=flat.original_keys,
        checksums=lambda: chain(stored_checksums(meta), weights.checksums()),
        forms=forms_of(meta, flat),
    )
    optimizers = {name.split(".", 1)[0] for name in weights.tensors if name.startswith("optimizer_")}
    checkpoint = _as_lightning(checkpoint, meta.root, others)
    training = replace(checkpoint.training, has_optimizer=bool(optimizers))
    states = (*checkpoint.state_prefixes, *(f"{name}." for name in sorted(optimizers)))
    return replace(checkpoint, training=training, state_prefixes=states)


def _as_lightning(checkpoint: Checkpoint, root: dict[Any, Any], objects: dict[str, Any]) -> Checkpoint:
    """The checkpoint with what Lightning's own entries say."""
    paths = checkpoint.key_paths
    kept = {name: value for name, value in objects.items() if len(paths[name]) == 1 and name not in TRAINING_STATE}
    config, kind = _configuration(root.get(HYPER_PARAMETERS))
    version = root.get(VERSION)
    return replace(
        checkpoint,
        format="lightning",
        format_version=version if isinstance(version, str) else None,
        model_prefix=f"{STATE_DICT}.",
        state_prefixes=TRAINING_STATE,
        config=config,
        config_kind=kind,
        training=TrainingState(
            step=_count(root.get("global_step")),
            epoch=_count(root.get("epoch")),
            has_optimizer=is_filled(root.get("optimizer_states")),
            has_scheduler=is_filled(root.get("lr_schedulers")),
        ),
        trainer=kept,
        written_back=frozenset(kept),
    )


def _configuration(hyper_parameters: Any) -> tuple[dict[str, Any], str | None]:
    """The model's configuration: what NeMo puts under ``cfg``, or all hyper-parameters."""
    plain = to_plain(simplify(hyper_parameters))
    if not isinstance(plain, dict):
        return {}, None
    config = plain["cfg"] if isinstance(plain.get("cfg"), dict) else plain
    is_megatron = all(type(config.get(key)) is int for key in _MEGATRON_KEYS)
    return config, "nemo1" if is_megatron or is_speech(config) else None


def _count(value: Any) -> int | None:
    return value if type(value) is int else None
