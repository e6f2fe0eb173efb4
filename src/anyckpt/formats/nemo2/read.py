"""Opening a NeMo 2 directory: ``context`` says what the model is, ``weights`` is a Megatron-Core checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import AdapterSettings, Checkpoint, TrainingState
from anyckpt.errors import FormatError, UnfinishedError
from anyckpt.formats.megatron_core_zarr.reader import read_payload
from anyckpt.formats.nemo2.fiddle import decode, to_plain
from anyckpt.formats.nemo2.location import CONTEXT, IO_JSON, MODEL_YAML, WEIGHTS, has_index
from anyckpt.formats.nemo2.tokenizer import read_tokenizer
from anyckpt.formats.shared.hub_folder import read_json
from anyckpt.formats.shared.megatron_adapters import CANONICAL_ROWS, is_canonical, settings_from
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.storage.folder import Folder
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource

ADAPTER_METADATA = "adapter_metadata.json"
_UNFINISHED = "-unfinished"
_YAML_LIMIT = 16 << 20
_JSON_LIMIT = 16 << 20


def read(location: Location) -> Checkpoint:
    """Open a NeMo 2 checkpoint; nothing that ``io.json`` names is imported.

    Raises:
        FormatError: the save was not finished, ``io.json`` is empty or damaged, or the weights are.
        UnsafeError: ``io.json`` or ``model.yaml`` expands without bound.
    """
    _refuse_unfinished(location)
    inside = (WEIGHTS,) if WEIGHTS in location.names else ()
    if not has_index(location, *inside):
        raise FormatError(
            "has no weights",
            path=location.path,
            expected=f"a Megatron-Core checkpoint in {WEIGHTS}/ (metadata.json, .metadata and *.distcp)",
            found=", ".join(location.names[:5]),
            remedy="copy it again from its origin",
        )
    folder = location.folder(*inside)
    weights = read_payload(folder, path=location.path)
    warnings = list(weights.warnings)
    missing: list[str] = []
    context, calls, config = _read_context(location, missing)
    warnings += missing
    tokenizer = read_tokenizer(_model(calls).get("tokenizer", config.get("tokenizer")), context)
    if tokenizer is not None and tokenizer.library == "sentencepiece" and tokenizer.model_file is None:
        warnings.append("the tokenizer's sentencepiece model is not in context/, where the configuration has it")
    used = set() if tokenizer is None else {id(source) for source in tokenizer.files.values()}
    inner = config.get("config")
    return replace(
        weights,
        format="nemo2",
        adapter=_adapter(folder, config, location.join(CONTEXT, IO_JSON), warnings),
        config=config,
        config_kind="nemo2" if isinstance(inner, dict) else None,
        tokenizer=tokenizer,
        artifacts={
            name: source
            for name, source in context.items()
            if name not in (IO_JSON, MODEL_YAML) and id(source) not in used
        },
        training=_training(weights),
        warnings=warnings,
        unloadable=[*weights.unloadable, *missing],
        details={
            **weights.details,
            "model_class": _class(config),
            "config_class": _class(inner),
            "tokenizer_class": _class(config.get("tokenizer")),
            "context": calls,
        },
    )


def _adapter(folder: Folder, config: dict[str, Any], path: str, warnings: list[str]) -> AdapterSettings | None:
    """What the context says of the adapter, if the weights are one: the file with the base's path tells.

    Raises:
        FormatError: that file is not JSON, or a number is not possible.
    """
    if ADAPTER_METADATA not in folder.names():
        return None
    base = read_json(folder.open(ADAPTER_METADATA)).get("model_ckpt_path")
    call = config.get("model_transform")
    named = base if isinstance(base, str) else None
    if not isinstance(call, dict):
        return AdapterSettings(base=named)
    settings = settings_from(call, path, named)
    if is_canonical(settings.targets) and query_groups(config) > 1:
        warnings.append(CANONICAL_ROWS)
    return settings


def query_groups(config: dict[str, Any]) -> int:
    """Query groups of the model, as far as its configuration says; 1 if it does not."""
    inner = config.get("config")
    inner = inner if isinstance(inner, dict) else {}
    found = inner.get("num_query_groups") or inner.get("num_attention_heads")
    return found if type(found) is int else 1


def _refuse_unfinished(location: Location) -> None:
    """NeMo keeps an empty file ``<name>-unfinished`` beside a checkpoint while it saves or deletes it."""
    place = location.place
    for candidate in dict.fromkeys((location.path, place.real(location.path))):
        folder, name = place.split(candidate)
        marker = None if folder is None else place.join(folder, name.removesuffix("-EMA") + _UNFINISHED)
        if marker is not None and place.exists(marker):
            raise UnfinishedError(
                "is unfinished: NeMo was still writing or deleting it",
                path=location.path,
                found=marker,
                remedy="use the checkpoint before it; if you know that it is whole, delete the marker",
            )


def _read_context(
    location: Location, missing: list[str]
) -> tuple[dict[str, ByteSource], dict[str, Any], dict[str, Any]]:
    """Files of the context, all calls in ``io.json`` as plain data, and the configuration; notes what is missing."""
    if CONTEXT not in location.names:
        missing.append("has no context directory: the model's configuration and tokenizer are missing")
        return {}, {}, {}
    folder = location.folder(CONTEXT)
    files = {name: folder.open(name) for name in folder.names()}
    calls: dict[str, Any] = {}
    if IO_JSON in files:
        source = files[IO_JSON]
        plain = to_plain(decode(source.read_all(_JSON_LIMIT), source.name), source.name)
        calls = plain if isinstance(plain, dict) else {}
    else:
        missing.append("has no context/io.json: NeMo cannot load it")
    expanded: dict[str, Any] = {}
    if MODEL_YAML in files:
        source = files[MODEL_YAML]
        expanded = load_yaml_mapping(source.read_all(_YAML_LIMIT), source.name)
    return files, calls, _merged(expanded, _model(calls))


def _model(calls: dict[str, Any]) -> dict[str, Any]:
    """The call at ``<root>.model``; older contexts are of the model alone."""
    model = calls.get("model", calls if "config" in calls else {})
    return model if isinstance(model, dict) else {}


def _training(weights: Checkpoint) -> TrainingState:
    """As Megatron-Core's reader says, and what Lightning and NeMo's data modules keep in the common state."""
    names = [name for name in weights.common or () if name in weights.objects]
    samples = (value.get("consumed_samples") for name in names if isinstance(value := weights.objects[name], dict))
    return replace(
        weights.training,
        consumed_samples=next((count for count in samples if type(count) is int), weights.training.consumed_samples),
        has_scheduler=any(bool(weights.objects[name]) for name in names if name == "lr_schedulers"),
    )


def _merged(expanded: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """``model.yaml``, which has the defaults, with what ``io.json`` says, which has exact values."""
    result = dict(expanded)
    for key, value in explicit.items():
        known = result.get(key)
        same_class = isinstance(known, dict) and isinstance(value, dict) and _class(known) == _class(value)
        is_call = same_class and "_call_" not in value
        result[key] = _merged(known, value) if is_call and isinstance(known, dict) else value
    return result


def _class(call: object) -> str | None:
    target = call.get("_target_") if isinstance(call, dict) else None
    return target if isinstance(target, str) else None
