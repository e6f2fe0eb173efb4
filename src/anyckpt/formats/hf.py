"""Hugging Face model folders: ``config.json`` beside safetensors files or older ``pytorch_model*.bin``.

File names are those of transformers 5.23 and diffusers 0.42 (``save_pretrained``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.errors import FormatError
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.formats.shared.hub_folder import (
    check_plain_name,
    json_text,
    other_files,
    read_json,
    tokenizer_files,
    tokenizer_of,
    training_state,
)
from anyckpt.formats.shared.hub_weights import DIFFUSERS_STEM, weight_files
from anyckpt.formats.shared.loose_tensors import told_of_parts, weights_only
from anyckpt.formats.shared.rank_safetensors import (
    FILES_OF_NAMES,
    HUB_FOLDER,
    check_last_ranks,
    is_rank_file,
    rank_files,
    read_rank_files,
)
from anyckpt.formats.shared.weight_files import Beside, put_together, read_weight_file, read_weight_files
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

_WEIGHTS = tuple(
    f"{stem}.{kind}{index}"
    for stems, kind in ((("model", DIFFUSERS_STEM), "safetensors"), (("pytorch_model", DIFFUSERS_STEM), "bin"))
    for stem in stems
    for index in ("", ".index.json")
)
"""In the order in which transformers and diffusers prefer them."""

_VARIANT = re.compile(
    rf"(?:model|pytorch_model|{DIFFUSERS_STEM})\.(?!safetensors|bin)(\w+)(?:-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)",
    re.ASCII,
)
"""A second set of the same weights, in another type mostly (``model.fp16.safetensors``)."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_TUNE = re.compile(r"hf_model_(\d{4})_(\d{1,6})\.pt", re.ASCII)
"""Part and epoch of what torchtune's ``FullModelHFCheckpointer`` wrote until 0.4: state dicts without an index."""


_MODELOPT = "hf_quant_config.json"
_BESIDE = re.compile(r"llm_backbone|\d{1,3}_[A-Z]\w*", re.ASCII)
"""Folders that go along as they are: that of NeMo's SpeechLM2 with its language model's configuration, and those of the
modules that sentence-transformers puts behind a model (``1_Pooling``)."""


# -- reading -------------------------------------------------------------------------------------------------


def _detect(location: Location) -> bool:
    names = set(location.names)
    if not names.isdisjoint(_WEIGHTS) or any(_SHARD.fullmatch(name) or _TUNE.fullmatch(name) for name in names):
        return True
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def _read(location: Location) -> Checkpoint:
    beside = Beside()
    tensors, warnings, details = _read_weights(location, beside), beside.warnings, beside.details
    config: dict[str, Any] = {}
    folder = location
    if "config.json" not in location.names and location.is_file(HUB_FOLDER, "config.json"):
        folder = location.at(HUB_FOLDER)
    if "config.json" in folder.names:
        config = read_json(folder.open("config.json"))
    else:
        warnings.append("there is no config.json: the model family is found from names and shapes, if at all")
    ranks = details.get("world_size")
    part = None if ranks is None else check_last_ranks(location.path, tensors, config, ranks, warnings)
    tokenizer_files, artifacts = other_files(folder, "config.json")
    artifacts.pop(FILES_OF_NAMES, None)
    artifacts |= _in_folders(location)
    quantized = _quantization(config, artifacts)
    if quantized is not None:
        from anyckpt.quantization import method_of

        details["quantization"] = method_of(quantized)
    return Checkpoint(
        location.path,
        "hf",
        tensors,
        format_version=_version(config),
        dialect="hf",
        config=config,
        config_kind="hf" if config else None,
        tokenizer=tokenizer_of(tokenizer_files),
        artifacts=artifacts,
        training=training_state(location, artifacts, warnings),
        warnings=warnings,
        details=details,
        quantization=quantized,
        part=part,
        forms=beside.all_forms(),
    )


def _in_folders(location: Location) -> dict[str, ByteSource]:
    """Files of folders that belong to the model."""
    folders = [name for name in location.names if _BESIDE.fullmatch(name) and location.is_folder(name)]
    return {
        f"{folder}/{name}": location.open(folder, name)
        for folder in folders
        for name in location.names_in(folder)
        if location.is_file(folder, name)
    }


def _version(config: Mapping[str, Any]) -> str | None:
    version = config.get("transformers_version")
    return f"transformers {version}" if isinstance(version, str) else None


def _quantization(config: Mapping[str, Any], artifacts: Mapping[str, ByteSource]) -> Mapping[str, Any] | None:
    """What ``config.json`` says of it, MLX under a key of its own, or the file that a quantizing library writes."""
    stated = config.get("quantization_config")
    own = config.get("quantization")
    if isinstance(own, Mapping) and "group_size" in own:
        return {"quant_method": "mlx", **own}
    if stated is not None:
        return stated if isinstance(stated, Mapping) else {}
    for name, facts_of in _FACTS_BESIDE.items():
        if name in artifacts:
            return facts_of(read_json(artifacts[name]))
    return None


def _of_modelopt(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    facts = document.get("quantization")
    if not isinstance(facts, Mapping) or facts.get("quant_algo") is None:
        return None
    return {"quant_method": "modelopt", **facts, "ignore": facts.get("exclude_modules")}


_FACTS_BESIDE: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any] | None]] = {
    _MODELOPT: _of_modelopt,
    "quantize_config.json": lambda document: {"quant_method": "gptq", **document},
    "quant_config.json": lambda document: {"quant_method": "awq", **document},
}
"""Files of NVIDIA ModelOpt, AutoGPTQ and AutoAWQ, which older releases write in place of a configuration's key."""


def _read_weights(location: Location, beside: Beside) -> dict[str, LazyTensor]:
    location = _without_variants(location, beside)
    names = set(location.names)
    chosen = next((name for name in _WEIGHTS if name in names), None)
    if chosen is not None and chosen.endswith(".index.json"):
        return _read_indexed(location, chosen, beside)
    if chosen is not None:
        return read_weight_file(location, chosen, beside)
    shards = [name for name in location.names if _SHARD.fullmatch(name)]
    if shards and all(map(is_rank_file, shards)):
        return read_rank_files(location, shards, beside.details)
    if shards:
        return _read_shards(location, shards, beside)
    tuned = [match for name in location.names if (match := _TUNE.fullmatch(name))]
    if tuned:
        return _read_tuned(location, tuned, beside)
    loose = [name for name in location.names if name.endswith(".safetensors")]
    if len(loose) > 1:
        raise FormatError(
            "holds several weight files but no index that says which belong together",
            path=location.path,
            expected="model.safetensors or model.safetensors.index.json",
            found=", ".join(loose[:5]),
            remedy="open one of the files, or copy the index too",
        )
    return read_weight_file(location, loose[0], beside)


def _without_variants(location: Location, beside: Beside) -> Location:
    """The folder as it is without second sets of weights, where there is a first one."""
    variants = [name for name in location.names if _VARIANT.fullmatch(name)]
    others = tuple(name for name in location.names if name not in variants)
    if not variants or not any(name.endswith((".safetensors", ".bin")) for name in others):
        return location
    beside.warnings.append(f"weights of another variant are not read: {', '.join(variants[:5])}")
    return replace(location, names=others)


def _read_indexed(location: Location, index_name: str, beside: Beside) -> dict[str, LazyTensor]:
    path = location.join(index_name)
    index = read_json(location.open(index_name))
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise FormatError(
            "has no weight_map from tensor names to files", path=path, remedy="copy it again from its origin"
        )
    files = sorted(set(where.values()))
    for file in files:
        check_plain_name(file, path)
    missing = [file for file in files if file not in location.names]
    if missing:
        raise FormatError(
            f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:5])}",
            path=location.path,
            remedy="copy the missing files from the model's origin",
        )
    tensors: dict[str, LazyTensor] = {}
    for file, found in zip(files, read_weight_files(location, files, beside), strict=True):
        for name in found:
            if where.get(name) != file:
                raise FormatError(
                    "the index and the weight files disagree",
                    path=location.join(file),
                    tensor=name,
                    expected=f"it in {where[name]}" if name in where else "a tensor that the index lists",
                    remedy="copy index and weight files again, from one revision of the model",
                )
        tensors.update(found)
    absent = sorted(where.keys() - tensors.keys())
    if absent:
        raise FormatError(
            f"{len(absent)} tensors of the index are not in the weight files: {', '.join(absent[:5])}",
            path=location.join(where[absent[0]]),
            tensor=absent[0],
            remedy="copy index and weight files again, from one revision of the model",
        )
    suffix = files[0].rpartition(".")[2]
    spare = [n for n in location.names if _SHARD.fullmatch(n) and n.endswith(suffix) and n not in files]
    if spare:
        beside.warnings.append(f"weight files that the index does not name are ignored: {', '.join(spare[:5])}")
    return tensors


def _read_shards(location: Location, names: list[str], beside: Beside) -> dict[str, LazyTensor]:
    """Shards whose index was lost: their names say how many there are."""
    parsed = [match for name in names if (match := _SHARD.fullmatch(name))]
    kinds = {(match[1], match[3], match[4]) for match in parsed}
    if len(kinds) > 1:
        raise FormatError(
            "holds several sets of weight files and no index that says which to use",
            path=location.path,
            found=", ".join(f"{stem}-*-of-{count}.{suffix}" for stem, count, suffix in sorted(kinds)),
            remedy="copy the index too, or move one set elsewhere",
        )
    stem, count, suffix = kinds.pop()
    present = {int(match[2]) for match in parsed}
    missing = [number for number in range(1, min(int(count), 100_000) + 1) if number not in present]
    if missing or len(present) != int(count):
        first = f"{stem}-{missing[0] if missing else 0:05d}-of-{count}.{suffix}"
        raise FormatError(
            f"{len(missing)} of {int(count)} weight files are missing, such as {first}, and so is the index",
            path=location.path,
            remedy="copy the missing files from the model's origin",
        )
    beside.warnings.append(
        "there is no index: the weight files are taken to be complete because their names count them"
    )
    return put_together(location, names, read_weight_files(location, names, beside))


def _read_tuned(location: Location, parts: list[re.Match[str]], beside: Beside) -> dict[str, LazyTensor]:
    """torchtune's parts, which neither an index nor their names count."""
    epochs = sorted({int(match[2]) for match in parts})
    if len(epochs) > 1:
        raise FormatError(
            "holds the weights of several epochs",
            path=location.path,
            expected="hf_model_*.pt of one epoch",
            found=f"epochs {', '.join(map(str, epochs[:8]))}",
            remedy=f"move those but hf_model_*_{epochs[-1]}.pt elsewhere",
        )
    present = {int(match[1]) for match in parts}
    missing = [number for number in range(1, max(present)) if number not in present]
    if missing:
        raise FormatError(
            f"{len(missing)} of at least {max(present)} weight files are missing, such as"
            f" hf_model_{missing[0]:04d}_{epochs[0]}.pt",
            path=location.path,
            remedy="copy the missing files here too",
        )
    beside.warnings.append("there is no index: nothing in the weight files says how many there should be")
    unread = [name for name in location.names if re.fullmatch(r"recipe_state\.pt|adapter_\d+\.pt", name)]
    if unread:
        beside.warnings.append(f"torchtune's training state and adapters are not read: {', '.join(unread[:5])}")
    beside.details["epoch"] = epochs[0]
    names = [match[0] for match in parts]
    return put_together(location, names, read_weight_files(location, names, beside))


# -- writing -------------------------------------------------------------------------------------------------


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    weights, ignored = weights_only(checkpoint)
    notes: list[str] = list(told_of_parts(checkpoint))
    metadata = {**(checkpoint.details.get("metadata", {}) if checkpoint.format == "hf" else {}), "format": "pt"}
    if options.sharded:
        files, folder = rank_files(weights, options.max_shard_size), f"{HUB_FOLDER}/"
    else:
        files, folder = weight_files(weights, options.max_shard_size, metadata, count_parameters=True), ""
    extra: dict[str, OutputFile] = {}
    if checkpoint.config:
        extra["config.json"] = small_file("config.json", json_text(checkpoint.config), stage=2)
    else:
        notes.append("there is no configuration to write: add a config.json before transformers can load this folder")
    if checkpoint.tokenizer is not None:
        extra.update(tokenizer_files(checkpoint.tokenizer, notes))
    for name, source in checkpoint.artifacts.items():
        for part in name.split("/"):
            check_plain_name(part, checkpoint.path)
        if name in _FACTS_BESIDE and checkpoint.quantization is None:
            continue  # of weights that have been dequantized
        extra.setdefault(name, OutputFile(name, (SourceData(source),), 1))
    generation = _generation_config(checkpoint.config)
    if generation is not None:
        extra.setdefault("generation_config.json", small_file("generation_config.json", json_text(generation)))
    taken = {file.path for file in files}
    kept = tuple(replace(file, path=folder + name) for name, file in extra.items() if folder + name not in taken)
    return Plan("hf", (*files, *kept), ignored=ignored, notes=tuple(notes))


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What transformers derives from a model configuration when it saves a model that can generate."""
    listed = config.get("architectures")
    first = str(listed[0]) if isinstance(listed, list) and listed else ""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    tokens = {key: config[key] for key in keys if config.get(key) is not None}
    if not tokens or not first.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return None
    return {"_from_model_config": True, **tokens}


FORMAT = Format(
    name="hf",
    title="Hugging Face folder",
    detect=_detect,
    read=_read,
    plan=_plan,
    dialect=lambda options: "hf",
    config_kind="hf",
    sharded=True,
    quantizes=("compressed-tensors", "modelopt", "fp8", "mxfp4"),
    library="transformers",
)
