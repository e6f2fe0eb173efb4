"""NeMo's settings of post-training quantization: what becomes of each.

Facts: NeMo 1's ``megatron_gpt_ptq.yaml`` (2.0.0) and ``megatron_quantization.yaml`` (2.0.0rc0), NeMo 2's
``QuantizationConfig``, ``ExportConfig`` and ``scripts/llm/ptq.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UsageError
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.storage.location import look_at

_LIMIT = 8 << 20
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")

_USED = {
    "algorithm": "algorithm",
    "awq_block_size": "awq_block_size",
    "sq_alpha": "sq_alpha",
    "enable_kv_cache": "enable_kv_cache",
    "calib_dataset": "calib_dataset",
    "calibration_dataset": "calib_dataset",
    "num_calib_size": "num_calib_size",
    "calibration_dataset_size": "num_calib_size",
    "calibration_batch_size": "calib_batch_size",
    "calibration_seq_len": "calib_sequence_length",
    "decoder_type": "decoder_type",
    "inference_tensor_parallel": "inference_tensor_parallel",
    "inference_tp": "inference_tensor_parallel",
    "inference_pipeline_parallel": "inference_pipeline_parallel",
    "inference_pp": "inference_pipeline_parallel",
    "dtype": "dtype",
    "compress": "compress",
    "export_format": "to",
    "inference.batch_size": "calib_batch_size",
    "inference.max_context_length": "calib_sequence_length",
    "tensor_parallelism_size": "inference_tensor_parallel",
    "pipeline_parallelism_size": "inference_pipeline_parallel",
    "batch_size": "calib_batch_size",
    "seq_len": "calib_sequence_length",
    "tokenizer": "tokenizer",
    "tokenizer_path": "tokenizer",
}
"""A key, with its section where another has it too -> the option that it is here."""

_SAMPLING = "NeMo generates a text with it afterwards, and nothing is generated here"
_PLACE = "the model is read from SRC and written to DST"
_RUNNING = "NeMo runs the model so; here it runs a layer at a time, in one process"
_NO_EFFECT = {
    "inference.*": _SAMPLING,
    "sample_output": _SAMPLING,
    "generate_sample": _SAMPLING,
    "save_path": _PLACE,
    "path": _PLACE,
    "export_path": _PLACE,
    "output_path": _PLACE,
    "nemo_checkpoint": _PLACE,
    "model_file": _PLACE,
    "model_save": _PLACE,
    "model.*": _RUNNING,
    "trainer.*": _RUNNING,
    "exp_manager.*": _RUNNING,
    "tensor_model_parallel_size": _RUNNING,
    "pipeline_model_parallel_size": _RUNNING,
    "calibration_tp": _RUNNING,
    "calibration_pp": _RUNNING,
    "num_layers_in_first_pipeline_stage": _RUNNING,
    "num_layers_in_last_pipeline_stage": _RUNNING,
    "devices": _RUNNING,
    "num_nodes": _RUNNING,
    "legacy_ckpt": _RUNNING,
    "trust_remote_code": "no code of a checkpoint is ever run",
    "quantize_bmm1": "NeMo reads it nowhere",
    "hydra.*": _RUNNING,
    "defaults": _RUNNING,
    "name": "nothing that is written has a name",
}
"""A key, or a section -> why it does nothing here."""

_SECTIONS = ("quantization", "export", "quantization_config", "export_config")


@dataclass(frozen=True)
class PtqSettings:
    """What a file says.

    Attributes:
        options: option -> value.
        unused: key -> why it has no effect.
    """

    options: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


def read_ptq_settings(given: str | os.PathLike[str] | Mapping[str, Any] | None) -> PtqSettings:
    """NeMo's settings of post-training quantization as options.

    Raises:
        FormatError: the file is missing or no YAML.
        UsageError: a key is not known, or two say different things.
    """
    if given is None:
        return PtqSettings()
    if isinstance(given, Mapping):
        path, stated = "the settings", dict(given)
    else:
        location = look_at(given)
        path, stated = location.path, load_yaml_mapping(location.open().read_all(_LIMIT), location.path)
    options: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    unused: dict[str, str] = {}
    for key, value in _keys(stated, ""):
        option, reason = _outcome(key)
        if reason:
            unused[key] = reason
            continue
        if not option:
            raise UsageError(
                f"{path}: {key} is no setting of NeMo's quantization",
                expected="keys of quantization, export, inference, model and trainer",
                remedy="leave it out",
            )
        found = _resolved(value, stated, path)
        if found is None and option != "algorithm":
            continue
        if option in options and options[option] != found:
            raise UsageError(
                f"{path}: {said_by[option]} and {key} say different things",
                found=f"{options[option]!r} and {found!r}"[:120],
                remedy="leave one of them out",
            )
        options[option], said_by[option] = found, key
    return PtqSettings(options, unused)


def _keys(stated: Mapping[str, Any], section: str) -> Iterator[tuple[str, Any]]:
    for key, value in stated.items():
        name = f"{section}.{key}" if section else str(key)
        if isinstance(value, Mapping):
            yield from _keys(value, name)
        else:
            yield name, value


def _outcome(key: str) -> tuple[str, str]:
    """The option that a key is, or why it has no effect; neither if it is not known."""
    section, _, own = key.partition(".")
    plain = own if section in _SECTIONS else key
    if plain in _USED:
        return _USED[plain], ""
    reason = _NO_EFFECT.get(plain, _NO_EFFECT.get(f"{section}.*", "") if own else "")
    return "", reason


def _resolved(value: Any, stated: Mapping[str, Any], path: str) -> Any:
    """A value with what it refers to, as ``${export.dtype}``."""
    for _ in range(8):
        if not isinstance(value, str):
            return value
        found = _REFERENCE.search(value)
        if found is None:
            return value
        other = _at(stated, found[1], path)
        value = other if found[0] == value else value.replace(found[0], str(other))
    raise FormatError("a setting refers to itself", path=path, found=str(value)[:80])


def _at(stated: Mapping[str, Any], key: str, path: str) -> Any:
    value: Any = stated
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise FormatError("a setting refers to one that is not there", path=path, found=f"${{{key}}}")
        value = value[part]
    return value
