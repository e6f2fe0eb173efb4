"""Laying out a NeMo 2 directory as NeMo 2.5.3 writes it."""

from __future__ import annotations

import json
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.errors import UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_core.writer import torch_dist_files
from anyckpt.formats.megatron_core_zarr.writer import zarr_files
from anyckpt.formats.nemo2 import template
from anyckpt.formats.nemo2.fiddle import encode
from anyckpt.formats.nemo2.location import CONTEXT, IO_JSON, MODEL_YAML, WEIGHTS
from anyckpt.formats.nemo2.read import ADAPTER_METADATA, query_groups
from anyckpt.formats.nemo2.tokenizer import write_tokenizer
from anyckpt.formats.shared.megatron_adapters import CANONICAL_ROWS, call_of, is_canonical
from anyckpt.optimizer.original_groups import ORIGINAL_GROUPS
from anyckpt.plain_yaml import dump_yaml
from anyckpt.storage.source import ByteSource

_ADAPTERS = "nemo.collections.llm.peft"
_GPT_MODULE = "nemo.collections.llm.gpt.model."
_DEPRECATED = "zarr is read by Megatron-Core until 0.15 only, and deprecated in NeMo 2: torch_dist is read by all"
_OPTIMIZER = "optimizer"
_OF_OPTIMIZER = (_OPTIMIZER, "content_metadata", ORIGINAL_GROUPS)
_NO_PLACE = "a NeMo 2 checkpoint has no place for it"


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """``context/io.json``, ``context/model.yaml``, the tokenizer's files, and ``weights/``.

    Raises:
        UsageError: there is no NeMo 2 configuration.
    """
    config = _configuration(checkpoint)
    notes: list[str] = []
    files: dict[str, ByteSource] = {}
    if checkpoint.format == "nemo2":
        files.update(checkpoint.artifacts)
    if checkpoint.tokenizer is not None:
        config["tokenizer"], tokenizer_files = _tokenizer(checkpoint, config)
        files.update(tokenizer_files)
    else:
        config.pop("tokenizer", None)
        notes.append("there is no tokenizer: NeMo 2 takes the vocabulary's size from the configuration")
    if checkpoint.adapter is not None:
        config["model_transform"] = call_of(checkpoint.adapter, _ADAPTERS)
        if is_canonical(checkpoint.adapter.targets) and query_groups(config) > 1:
            notes.append(CANONICAL_ROWS)
        if checkpoint.adapter.base is None:
            notes.append(f"{WEIGHTS}/{ADAPTER_METADATA} names no base model: NeMo asks for its path there")
    calls = _calls(checkpoint, config, notes)
    context = [
        small_file(f"{CONTEXT}/{IO_JSON}", encode(template.as_calls(calls))),
        small_file(f"{CONTEXT}/{MODEL_YAML}", _model_yaml(config)),
        *(OutputFile(f"{CONTEXT}/{name}", (SourceData(source),), 1) for name, source in files.items()),
    ]
    common_names = checkpoint.common if checkpoint.format == "nemo2" else None
    known = [name for name in common_names or () if name in checkpoint.objects]
    if checkpoint.format != "nemo2" and _OPTIMIZER in checkpoint.objects:
        common = _with_optimizer(checkpoint, notes)
        known = [*_OF_OPTIMIZER]
    else:
        common = {name: checkpoint.objects[name] for name in known} or template.common_state()
    objects = {name: checkpoint.objects[name] for name in checkpoint.objects if name not in known and "/shard_" in name}
    ignored = {name: _NO_PLACE for name in checkpoint.objects if name not in known and name not in objects}
    if checkpoint.format != "nemo2":
        ignored |= dict.fromkeys(checkpoint.artifacts, _NO_PLACE)
    if options.backend == "zarr":
        weights = zarr_files(checkpoint.tensors, objects, common, prefix=WEIGHTS)
        notes.append(_DEPRECATED)
    else:
        weights = torch_dist_files(
            checkpoint.tensors,
            objects,
            common,
            prefix=WEIGHTS,
            ranks=options.ranks,
            file_bytes=options.max_shard_size,
        )
    if checkpoint.adapter is not None:
        base = json.dumps({"model_ckpt_path": checkpoint.adapter.base or ""})
        weights.append(small_file(f"{WEIGHTS}/{ADAPTER_METADATA}", base, stage=1))
    return Plan("nemo2", (*context, *weights), ignored=ignored, notes=tuple(notes))


def _with_optimizer(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any]:
    """The common state of a trainer that goes on: NeMo keeps a list of Megatron-Core's optimizers, one for a model."""
    step, samples = checkpoint.training.step, checkpoint.training.consumed_samples
    said = {name: checkpoint.objects[name] for name in _OF_OPTIMIZER if name in checkpoint.objects}
    if samples is not None:
        notes.append(f"the run had consumed {samples} samples: NeMo asks its data module, whose class only NeMo knows")
    return {
        **template.common_state(step or 0),
        **said,
        _OPTIMIZER: [checkpoint.objects[_OPTIMIZER]],
        "optimizer_states": {},
    }


def _configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model as ``model.yaml`` spells it: ``_target_``, ``config`` and what else was there."""
    config = dict(checkpoint.config)
    inner = config.get("config")
    if not isinstance(config.get("_target_"), str) or not isinstance(inner, dict) or "_target_" not in inner:
        raise UsageError(
            "a NeMo 2 checkpoint needs a model configuration and the source has none that can be translated",
            path=checkpoint.path,
            expected="the class of the model and of its configuration",
            found=f"a configuration of kind {checkpoint.config_kind}" if config else "no configuration",
            remedy="pass one with --config, or name the model family with --family",
        )
    return config


def _tokenizer(checkpoint: Checkpoint, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, ByteSource]]:
    """The tokenizer's call and files; a call of the source that names these files stays as it was."""
    assert checkpoint.tokenizer is not None
    call, files = write_tokenizer(checkpoint.tokenizer)
    before = config.get("tokenizer")
    if isinstance(before, dict) and before.get("_target_") == call["_target_"]:
        named = ("model_path", "pretrained_model_name")
        return {**before, **{key: call[key] for key in named if key in call}}, files
    return call, files


def _calls(checkpoint: Checkpoint, config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The calls of ``io.json``: the source's trainer if it has one, else that of NeMo's converter."""
    inner = config["config"]
    dtype = inner.get("params_dtype")
    target = dtype.get("_target_") if isinstance(dtype, dict) else None
    context = template.trainer_context(str(target or "torch.float32").rpartition(".")[2])
    stored = checkpoint.details.get("context") if checkpoint.format == "nemo2" else None
    model: dict[str, Any] = {"_target_": config["_target_"], "config": {}, **context["model"]}
    if isinstance(stored, dict) and isinstance(stored.get("model"), dict):
        foreign = [key for key, value in stored.items() if _has_other(value)]
        if foreign:
            notes.append(f"of the source's context, {', '.join(foreign)} holds what only NeMo can serialize: not kept")
        context = {key: context.get(key) if key in foreign else value for key, value in stored.items()}
        model = dict(stored["model"]) if "model" not in foreign else model
    explicit = model["config"] if isinstance(model.get("config"), dict) else {}
    model["_target_"] = config["_target_"]
    model["config"] = _explicit(inner, explicit)
    if checkpoint.adapter is not None:
        model["model_transform"] = config["model_transform"]
    before = model.pop("tokenizer", None)
    if "tokenizer" in config:
        model["tokenizer"] = _explicit_tokenizer(config["tokenizer"], before)
    return {**context, "model": model}


def _explicit(config: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The arguments to pass: those that were passed before, and those that are not what the class does anyway.

    Nobody has left anything to the class in what is not the whole ``model.yaml`` of NeMo 2: all of it is passed.
    """
    defaults = _defaults(config)
    whole = bool(defaults) and defaults.keys() <= config.keys()
    kept = {key: config[key] for key in before if key in config}
    changed = {
        key: value
        for key, value in config.items()
        if key not in kept and (not (before or whole) or key not in defaults or defaults[key] != value)
    }
    return {"_target_": config["_target_"], **kept, **changed}


def _explicit_tokenizer(call: dict[str, Any], before: object) -> dict[str, Any]:
    """As ``_explicit``; a tokenizer's arguments are few, and NeMo passes sentencepiece's four always."""
    if isinstance(before, dict) and before.get("_target_") == call["_target_"]:
        return {key: call.get(key, value) for key, value in before.items()}
    defaults = template.section("tokenizer").get(call["_target_"], {})
    always = ("model_path", "special_tokens", "legacy", "chat_template") if "model_path" in call else ()
    return {key: value for key, value in call.items() if key in always or key not in defaults or defaults[key] != value}


def _has_other(value: object) -> bool:
    """Whether calls have arguments that are neither calls nor plain data (sets, pickled objects)."""
    if isinstance(value, dict):
        return "_type_" in value or any(_has_other(item) for item in value.values())
    return isinstance(value, list) and any(_has_other(item) for item in value)


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    return template.section("config") if str(config["_target_"]).startswith(_GPT_MODULE) else {}


def _model_yaml(config: dict[str, Any]) -> str:
    """What is passed, and the defaults of what is not."""
    optimizer = template.section("context")["model"]["optim"]
    result = {
        **template.section("model"),
        "optim": {**template.section("optim"), **optimizer},
        **config,
        "config": {**_defaults(config["config"]), **config["config"]},
    }
    tokenizer = config.get("tokenizer")
    if isinstance(tokenizer, dict):
        result["tokenizer"] = {**template.section("tokenizer").get(tokenizer["_target_"], {}), **tokenizer}
    return dump_yaml(result, sort_keys=True, ascii_only=True)
