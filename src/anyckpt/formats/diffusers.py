"""Pipelines of diffusers: a folder of folders, each a model or a part without weights, and ``model_index.json``.

Facts: diffusers 0.42 (``DiffusionPipeline.save_pretrained``, ``ModelMixin.save_pretrained``).  The index names each
part's library and class; a part that a pipeline has not is ``[null, null]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.errors import AnyckptError, FormatError, UsageError
from anyckpt.formats import hf
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.formats.shared.hub_folder import check_plain_name, json_text, read_json
from anyckpt.formats.shared.hub_weights import DIFFUSERS_STEM, weight_files
from anyckpt.formats.shared.loose_tensors import told_of_parts, weights_only
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

_INDEX = "model_index.json"
_CONFIG = "config.json"
_STEMS = {"transformers": "model"}
"""How a library calls its weight files, where it is not diffusers' way."""

_DTYPES = ("dtype", "torch_dtype")


def _detect(location: Location) -> bool:
    return _INDEX in location.names


def _read(location: Location) -> Checkpoint:
    index = read_json(location.open(_INDEX))
    libraries = _libraries(index, location.join(_INDEX))
    tensors: dict[str, LazyTensor] = {}
    artifacts: dict[str, ByteSource] = {}
    warnings: list[str] = []
    for name in location.names:
        if location.is_file(name) and not name.startswith("."):
            artifacts[name] = location.open(name)
    parts: dict[str, str] = {}
    for name, (library, kind) in libraries.items():
        if name not in location.names:
            raise FormatError(
                "a part of the pipeline is missing",
                path=location.join(name),
                expected=f"the folder of {library}'s {kind}, which {_INDEX} names",
                remedy="copy the folder from the pipeline's origin",
            )
        there = location.at(name)
        if hf.FORMAT.detect(there):
            opened = _opened(there)
            tensors.update((f"{name}.{own}", tensor) for own, tensor in opened.tensors.items())
            warnings += [f"{name}: {text}" for text in opened.warnings]
            if opened.quantization is not None:
                warnings.append(f"{name} is quantized: its codes stay as they are")
            artifacts.update(_beside(name, opened, there))
            parts[name] = f"{library}.{kind}"
        else:
            artifacts.update((f"{name}/{file}", there.open(file)) for file in there.names if there.is_file(file))
    known = {*libraries, *artifacts}
    spare = [name for name in location.names if name not in known and not name.startswith(".")]
    if spare:
        warnings.append(f"folders that {_INDEX} does not name are not read: {', '.join(spare[:5])}")
    version = index.get("_diffusers_version")
    return Checkpoint(
        location.path,
        FORMAT.name,
        tensors,
        format_version=f"diffusers {version}" if isinstance(version, str) else None,
        artifacts=artifacts,
        warnings=warnings,
        details={"pipeline": str(index.get("_class_name")), "parts": parts},
    )


def _libraries(index: Mapping[str, Any], path: str) -> dict[str, tuple[str, str]]:
    """Library and class of every part that there is, by its name."""
    found: dict[str, tuple[str, str]] = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value):
            check_plain_name(name, path)
            found[name] = (value[0], value[1])
    return found


def _opened(location: Location) -> Checkpoint:
    try:
        return hf.FORMAT.read(location)
    except AnyckptError as error:
        error.path = error.path or location.path
        raise


def _beside(name: str, opened: Checkpoint, location: Location) -> dict[str, ByteSource]:
    """A model's configuration and all else that lies beside its weights."""
    files = {f"{name}/{file}": source for file, source in opened.artifacts.items()}
    if opened.tokenizer is not None:
        files |= {f"{name}/{file}": source for file, source in opened.tokenizer.files.items()}
    if opened.config:
        files[f"{name}/{_CONFIG}"] = location.open(_CONFIG)
    return files


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    if _INDEX not in checkpoint.artifacts:
        raise UsageError(
            "a pipeline of diffusers is only written of one",
            path=checkpoint.path,
            expected=f"a folder with {_INDEX}",
            found=checkpoint.format,
            remedy="write the model by itself, with --to hf",
        )
    libraries = _libraries(read_json(checkpoint.artifacts[_INDEX]), checkpoint.artifacts[_INDEX].name)
    weights, left_out = weights_only(checkpoint)
    ignored = dict(left_out)
    of_part: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in weights.items():
        part, _, own = name.partition(".")
        if part not in libraries:
            raise UsageError(
                "is of no part of the pipeline",
                path=checkpoint.path,
                tensor=name,
                expected=f"a name that begins with one of {', '.join(libraries)}",
            )
        of_part.setdefault(part, {})[own] = tensor
    files: list[OutputFile] = []
    for part, tensors in of_part.items():
        stem = _STEMS.get(libraries[part][0], DIFFUSERS_STEM)
        files += weight_files(tensors, options.max_shard_size, {"format": "pt"}, stem=stem, folder=f"{part}/")
    for name, source in checkpoint.artifacts.items():
        part, _, file = name.rpartition("/")
        check_plain_name(file, checkpoint.path)
        if file == _CONFIG and part in of_part:
            kind = _other_type(source, of_part[part])
            files.append(_configuration(name, source, kind))
            if kind is not None:
                ignored[name] = f"written anew with {kind}, the type that its weights have now"
        elif name != _INDEX:
            files.append(OutputFile(name, (SourceData(source),), 1))
    files.append(OutputFile(_INDEX, (SourceData(checkpoint.artifacts[_INDEX]),), 2))
    return Plan(FORMAT.name, tuple(files), ignored=ignored, notes=tuple(told_of_parts(checkpoint)))


def _other_type(source: ByteSource, tensors: Mapping[str, LazyTensor]) -> str | None:
    """The type of a model's weights if its configuration says another one."""
    config = read_json(source)
    kinds = {tensor.dtype.name for tensor in tensors.values() if tensor.dtype.is_floating}
    said = {config[key] for key in _DTYPES if isinstance(config.get(key), str)}
    return kinds.pop() if len(kinds) == 1 and said - kinds else None


def _configuration(name: str, source: ByteSource, kind: str | None) -> OutputFile:
    """A model's configuration, as it is if ``kind`` is None."""
    if kind is None:
        return OutputFile(name, (SourceData(source),), 1)
    config = read_json(source)
    return small_file(name, json_text({key: kind if key in _DTYPES else value for key, value in config.items()}))


FORMAT = Format(
    name="diffusers",
    title="diffusers pipeline",
    detect=_detect,
    read=_read,
    plan=_plan,
    library="diffusers",
)
