"""Hugging Face PEFT's adapter folders: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

What is written is what ``PeftModel.save_pretrained`` of peft 0.21 writes and ``PeftModel.from_pretrained`` loads, with
keys of the configuration that peft has had since 0.10.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.formats.shared.hub_folder import other_files, read_json, tokenizer_files, tokenizer_of, training_state
from anyckpt.formats.shared.loose_tensors import weights_only
from anyckpt.formats.shared.weight_files import Beside, read_weight_file
from anyckpt.storage.location import Location

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LARGEST = 1 << 31

_CHANGES = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
)
"""Keys of variants whose update is not ``scale * B @ A`` of a module's weight."""

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Ways to initialise that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it."""

_DEFAULTS: Mapping[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}


def _detect(location: Location) -> bool:
    if not location.is_directory or any(
        name.startswith(("model.", "model-", "pytorch_model")) for name in location.names
    ):
        return False
    return any(name in location.names for name in _WEIGHTS)


def _read(location: Location) -> Checkpoint:
    beside = Beside()
    name = next(name for name in _WEIGHTS if name in location.names)
    tensors, warnings, details = read_weight_file(location, name, beside), beside.warnings, beside.details
    config: dict[str, Any] = {}
    settings = AdapterSettings()
    if CONFIG in location.names:
        config = read_json(location.open(CONFIG))
        settings = settings_from(config, location.join(CONFIG))
    else:
        warnings.append(f"there is no {CONFIG}: the adapter's scale is not known")
    tokenizer, artifacts = other_files(location, CONFIG)
    version = config.get("peft_version")
    return Checkpoint(
        location.path,
        "peft",
        tensors,
        format_version=f"peft {version}" if isinstance(version, str) else None,
        dialect="peft",
        config=config,
        tokenizer=tokenizer_of(tokenizer),
        artifacts=artifacts,
        training=training_state(location, artifacts, warnings),
        warnings=warnings,
        details=details,
        adapter=settings,
        forms=beside.all_forms(),
    )


def settings_from(config: Mapping[str, Any], path: str) -> AdapterSettings:
    """What ``adapter_config.json`` says.

    Of a kind that is not understood, numbers may mean something else (OFT says ``"r": 0`` where it has a size of
    blocks), so what LoRA cannot have is left out there.

    Raises:
        FormatError: a value of LoRA or DoRA is not possible.
    """
    kind = _kind(config)
    low_rank = kind.startswith(("lora", "dora"))

    def number(key: str, default: float | None, *, whole: bool = False) -> Any:
        return checked(config.get(key, default), key, whole)

    def checked(value: Any, key: str, whole: bool) -> Any:
        try:
            return _number(value, key, path, whole)
        except FormatError:
            if low_rank:
                raise
            return None

    def patterns(key: str, *, whole: bool) -> dict[str, Any]:
        value = config.get(key) or {}
        if not isinstance(value, Mapping):
            if not low_rank:
                return {}
            raise FormatError(f"its {key} is not possible", path=path, expected="an object", found=repr(value)[:80])
        return {str(name): checked(own, f"{key}.{name}", whole) for name, own in value.items()}

    targets = config.get("target_modules")
    base = config.get("base_model_name_or_path")
    return AdapterSettings(
        kind=kind,
        rank=number("r", None, whole=True),
        alpha=number("lora_alpha", None),
        rank_stabilized=bool(config.get("use_rslora")),
        ranks=patterns("rank_pattern", whole=True),
        alphas=patterns("alpha_pattern", whole=False),
        dropout=number("lora_dropout", 0.0) or 0.0,
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (str(targets),) if targets else (),
        base=base if isinstance(base, str) and base else None,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        token_indices=_token_indices(config, path),
    )


def _token_indices(config: Mapping[str, Any], path: str) -> dict[str, tuple[int, ...]]:
    """Which rows of which modules are trained; a list is of the embedding, whatever the model calls it."""
    value = config.get("trainable_token_indices") or {}
    listed = {"": value} if isinstance(value, list) else value
    good = isinstance(listed, Mapping) and all(
        isinstance(own, list) and all(type(index) is int for index in own) for own in listed.values()
    )
    if not good:
        raise FormatError(
            "its trainable_token_indices is not possible", path=path, expected="token numbers", found=repr(value)[:80]
        )
    return {str(name): tuple(own) for name, own in listed.items()}


def _kind(config: Mapping[str, Any]) -> str:
    kind = str(config.get("peft_type", "LORA")).lower()
    if kind != "lora":
        return kind
    strange = [key for key in _CHANGES if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        strange.append(f"init_lora_weights {start[:40]}")
    if strange:
        return f"lora with {', '.join(strange)}"
    return "dora" if config.get("use_dora") else "lora"


def _number(value: Any, key: str, path: str, whole: bool) -> Any:
    if value is None:
        return None
    good = type(value) is int or (not whole and type(value) is float and math.isfinite(value))
    if not good or not abs(value) < _LARGEST or (whole and value < 1):
        raise FormatError(
            f"its {key} is not possible",
            path=path,
            expected="a positive whole number" if whole else "a number",
            found=repr(value)[:80],
        )
    return value


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    if checkpoint.adapter is None:
        raise UsageError(
            "is a model, not an adapter", path=checkpoint.path, remedy="convert it to hf; peft is for adapters"
        )
    if not checkpoint.config:
        raise UsageError(
            f"the adapter has no settings, and peft loads none without {CONFIG}",
            path=checkpoint.path,
            remedy="give the base model's configuration with --config and the adapter's --alpha",
        )
    weights, ignored = weights_only(checkpoint)
    notes: list[str] = []
    defaults = _DEFAULTS if checkpoint.config.get("peft_type", "LORA") == "LORA" else {}
    files = [
        OutputFile(_WEIGHTS[0], safetensors_parts(weights, {"format": "pt"})),
        small_file(CONFIG, json.dumps({**defaults, **checkpoint.config}, indent=2, sort_keys=True), stage=2),
    ]
    if checkpoint.tokenizer is not None:
        files += tokenizer_files(checkpoint.tokenizer, notes).values()
    if checkpoint.format == "peft":
        files += [OutputFile(name, (SourceData(source),), 1) for name, source in checkpoint.artifacts.items()]
    return Plan("peft", tuple(files), ignored=ignored, notes=tuple(notes))


FORMAT = Format(
    name="peft",
    title="Hugging Face PEFT adapter",
    detect=_detect,
    read=_read,
    plan=_plan,
    dialect=lambda options: "peft",
    adapters="peft",
    library="peft",
)
