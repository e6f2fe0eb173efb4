"""Copying live tensors into the memory from which another process writes them.

What is in the host's memory is copied by torch, in as many threads as it has.  What is on a CUDA device goes over a
stream of its own, all at once, into pages that the device knows (page-locked); the caller waits for that stream and no
other.  This part has been tried without a device only, with a stand-in for its calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from anyckpt.engine.copied import Piece, read
from anyckpt.storage.shared_memory import SharedMemory
from anyckpt.torch.memory import bytes_of
from anyckpt.torch.whole import LiveSource

_cuda: Any = torch.cuda


def copy(pieces: Sequence[Piece]) -> None:
    """Copy pieces, from hosts and devices; when it returns, all are there."""
    streams: dict[torch.device, Any] = {}
    others = []
    for piece in sorted(pieces, key=_is_on_host):  # copies from devices go on while those from hosts are made
        tensor = _whole(piece)
        if tensor is None:
            others.append(piece)
            continue
        device = tensor.device
        if device.type == "cuda" and device not in streams:
            streams[device] = _cuda.Stream(device)
            streams[device].wait_stream(_cuda.current_stream(device))  # what computes the state comes first
        with _cuda.stream(streams[device]) if device in streams else nullcontext():
            out = torch.frombuffer(piece[2], dtype=torch.uint8)
            if tensor.is_contiguous():
                out.copy_(bytes_of(tensor), non_blocking=True)
            else:
                out.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
    read(others)
    for stream in streams.values():
        stream.synchronize()


def _is_on_host(piece: Piece) -> bool:
    return not isinstance(piece[0], LiveSource) or piece[0].tensor.device.type == "cpu"


def _whole(piece: Piece) -> torch.Tensor | None:
    """The tensor that a piece is, if it is all of one, and torch copies it best."""
    source, start, memory = piece
    if not isinstance(source, LiveSource) or start or len(memory) != source.size:
        return None
    tensor = source.tensor
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and tensor.is_contiguous()):
        return tensor
    return None


class PageLockedMemory(SharedMemory):
    """Shared memory that CUDA knows, if it is in use when the memory is reserved; else as ever."""

    def __init__(self) -> None:
        super().__init__()
        self._address = 0

    def reserve(self, nbytes: int) -> memoryview:
        view = super().reserve(nbytes)
        if not self._address and _cuda.is_available() and _cuda.is_initialized():
            address = int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
            # Memory that cannot be locked is slower to copy to, and no reason not to save.
            if int(_cuda.cudart().cudaHostRegister(address, self.nbytes, 0)) == 0:
                self._address = address
        return view

    def free(self) -> None:
        if self._address:
            _cuda.cudart().cudaHostUnregister(self._address)
            self._address = 0
        super().free()
