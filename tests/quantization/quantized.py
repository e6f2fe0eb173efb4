"""Quantized Hugging Face folders, made with numpy alone from folders in full precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tests.support import file_bytes

from anyckpt.containers.safetensors import read_safetensors, safetensors_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.storage import LocalFile
from anyckpt.tensor import from_array

Arrays = dict[str, np.ndarray[Any, Any]]

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
"""As in DeepSeek-V3's ``config.json``."""

MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
    "quant_method": "mxfp4",
}  # fmt: skip
"""As in GPT-OSS's."""


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Arrays) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    parts = safetensors_parts({name: from_array(array) for name, array in tensors.items()}, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(file_bytes(OutputFile("model.safetensors", parts)))
    return folder


def quantized(source: Path, folder: Path, facts: Mapping[str, Any], each: Callable[[str, Any], Arrays]) -> Path:
    """The folder with every tensor replaced by what ``each`` makes of its name and float32 values.

    A tensor for which ``each`` gives nothing stays as it is.
    """
    tensors: Arrays = {}
    for name, tensor in read_safetensors(LocalFile(source / "model.safetensors"))[0].items():
        array = tensor.numpy()
        tensors |= each(name, array.astype(np.float32)) or {name: array}
    config = json.loads((source / "config.json").read_text())
    write_folder(folder, {**config, "quantization_config": facts}, tensors)
    for file in source.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    return folder


def fp8_blocks(
    weight: np.ndarray[Any, Any], block: int = 128, peak: float = 0.0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes, and a scale for each square; the last squares cut short.  Squares are taken to reach at least ``peak``."""
    rows, columns = (-(-n // block) for n in weight.shape)
    scales = np.empty((rows, columns), np.float32)
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            where = np.s_[row * block : (row + 1) * block, column * block : (column + 1) * block]
            scales[row, column] = max(float(np.abs(weight[where]).max()), peak, 1e-12) / 448
            codes[where] = np.clip(weight[where] / scales[row, column], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales


def as_fp8(block: int = 128) -> Callable[[str, Any], Arrays]:
    """DeepSeek's files: all projections but the router, whose name ends otherwise."""

    def each(name: str, weight: np.ndarray[Any, Any]) -> Arrays:
        if weight.ndim != 2 or not name.endswith(("_proj.weight", "_mqa.weight")):
            return {}
        codes, scales = fp8_blocks(weight, block)
        return {name: codes, f"{name}_scale_inv": scales}

    return each


def mxfp4(name: str, weight: np.ndarray[Any, Any]) -> Arrays:
    """GPT-OSS's files from (experts, in, out): blocks of 32 along the inputs, of the transposed weight."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {}
    grouped = np.ascontiguousarray(weight.transpose(0, 2, 1)).reshape(weight.shape[0], weight.shape[2], -1, 32)
    peak = np.abs(grouped).max(axis=-1)
    exponents = np.clip(np.floor(np.log2(np.maximum(peak, 2.0**-100))) - 2, -127, 127)
    ratio = grouped / 2.0 ** exponents[..., np.newaxis]
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.abs(np.abs(ratio)[..., np.newaxis] - values).argmin(axis=-1).astype(np.uint8)
    codes |= np.signbit(ratio).astype(np.uint8) << 3
    return {
        f"{name}_blocks": codes[..., 0::2] | codes[..., 1::2] << 4,
        f"{name}_scales": (exponents + 127).astype(np.uint8),
    }
