"""Weights in files of a bounded size, with an index if there are several.

The names, the index and the rule by which weights are spread over shards are those of transformers 5.23, diffusers 0.42
and huggingface_hub 2.4 (``save_pretrained`` and ``split_state_dict_into_shards_factory``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.plan import OutputFile, small_file
from anyckpt.errors import UsageError
from anyckpt.formats.shared.hub_folder import json_text
from anyckpt.tensor import LazyTensor

DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes of weights per file unless the user says otherwise; decimal, as transformers counts ``5GB``."""

DIFFUSERS_STEM = "diffusion_pytorch_model"
"""How the weight files of diffusers' own models begin."""


def weight_files(
    tensors: Mapping[str, LazyTensor],
    limit: int | None,
    metadata: Mapping[str, str],
    *,
    stem: str = "model",
    folder: str = "",
    count_parameters: bool = False,
) -> list[OutputFile]:
    """Safetensors files and, if there are several, their index.

    Args:
        tensors: by the names that they have in the files.
        limit: bytes of weights per file; None for the default.
        metadata: of every file.
        stem: how the files' names begin.
        folder: where they lie in the output, with a slash at its end; "" for its top.
        count_parameters: the index says how many there are, as that of transformers does.

    Raises:
        UsageError: the limit is not positive.
    """
    if limit is not None and limit <= 0:
        raise UsageError("the shard size must be positive", found=limit)
    shards = split_by_size(tensors, limit or DEFAULT_SHARD_SIZE)
    if len(shards) <= 1:
        return [OutputFile(f"{folder}{stem}.safetensors", safetensors_parts(tensors, metadata))]
    files: list[OutputFile] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(OutputFile(folder + name, safetensors_parts(shard, metadata)))
        weight_map.update(dict.fromkeys(shard, name))
    totals: dict[str, Any] = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    if count_parameters:
        totals["total_parameters"] = sum(tensor.size for tensor in tensors.values())
    index = {"metadata": totals, "weight_map": weight_map}
    files.append(small_file(f"{folder}{stem}.safetensors.index.json", json_text(index)))
    return files


def split_by_size(tensors: Mapping[str, LazyTensor], limit: int) -> list[dict[str, LazyTensor]]:
    """Greedily in the given order; a tensor above the limit gets a file of its own."""
    shards: list[dict[str, LazyTensor]] = []
    current: dict[str, LazyTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > limit:
            shards.append({name: tensor})
            continue
        if size + tensor.nbytes > limit:
            shards.append(current)
            current, size = {}, 0
        current[name] = tensor
        size += tensor.nbytes
    if current:
        shards.append(current)
    return shards
