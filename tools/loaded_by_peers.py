"""What the libraries themselves load from a checkpoint, for ``peer_suites_plugin`` to compare with what anyckpt reads.

Each function gives element type, shape and bytes of every tensor by the name that anyckpt has for it; of a tensor of
several parts (quantized, sparse) it gives the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Loaded = dict[str, tuple[str, tuple[int, ...], bytes]]


def by_torch(path: str) -> Loaded:
    """A file of ``torch.save``."""
    import torch

    return _plain(_flattened(torch.load(path, map_location="cpu", weights_only=False)))


def by_torch_distributed(path: str) -> Loaded:
    """A distributed checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return _plain(_flattened(state))


def by_safetensors(path: str) -> Loaded:
    """A safetensors file."""
    import safetensors

    with open(path, "rb") as file:
        found = safetensors.deserialize(file.read())
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def by_peft(path: str) -> Loaded:
    """A folder of ``PeftModel.save_pretrained``."""
    from peft.utils.save_and_load import load_peft_weights

    return _plain(iter(load_peft_weights(path, device="cpu").items()))


def _flattened(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield from _parts(value, path or "tensor")  # anyckpt's name for a file that is a tensor and nothing else
    elif isinstance(value, (dict, list, tuple)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flattened(child, f"{path}.{key}" if path else str(key))


def _parts(tensor: Any, name: str) -> Iterator[tuple[str, Any]]:
    import torch

    if tensor.is_quantized:
        yield f"{name}.int_repr", tensor.int_repr()
    elif tensor.layout == torch.sparse_coo:
        yield f"{name}.indices", tensor._indices()
        yield f"{name}.values", tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield f"{name}.compressed_indices", tensor.crow_indices()
        yield f"{name}.plain_indices", tensor.col_indices()
        yield f"{name}.values", tensor.values()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield f"{name}.compressed_indices", tensor.ccol_indices()
        yield f"{name}.plain_indices", tensor.row_indices()
        yield f"{name}.values", tensor.values()
    else:
        yield name, tensor


def _plain(tensors: Iterator[tuple[str, Any]]) -> Loaded:
    """Element type, shape and bytes of each dense tensor."""
    import torch

    found: Loaded = {}
    for name, tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            continue
        if tensor.is_nested or tensor.is_meta:
            continue
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
        found[name] = (str(dense.dtype).removeprefix("torch."), tuple(dense.shape), data)
    return found
