"""Copying live tensors into the memory from which another process writes them.

What is in the host's memory is copied as memory is.  What is on a CUDA device goes over a stream of its own, all at
once, into pages that the device knows (page-locked); the caller waits for that stream and no other.  This part has been
tried without a device only, with a stand-in for its calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from anyckpt.engine.copied import Piece, read
from anyckpt.storage.shared_memory import SharedMemory
from anyckpt.torch.whole import LiveSource

_cuda: Any = torch.cuda


def copy(pieces: Sequence[Piece]) -> None:
    """Copy pieces, from hosts and devices; when it returns, all are there."""
    on_device = [piece for piece in pieces if _is_whole_on_device(piece)]
    streams = _begun(on_device)
    read([piece for piece in pieces if not _is_whole_on_device(piece)])
    for stream in streams:
        stream.synchronize()


def _is_whole_on_device(piece: Piece) -> bool:
    source, start, memory = piece
    return (
        isinstance(source, LiveSource)
        and source.tensor.device.type == "cuda"
        and start == 0
        and len(memory) == source.size
    )


def _begun(pieces: Sequence[Piece]) -> list[Any]:
    """The streams in which copies from devices have begun."""
    streams: dict[Any, Any] = {}
    for source, _, memory in pieces:
        assert isinstance(source, LiveSource)
        tensor = source.tensor
        device = tensor.device
        if device not in streams:
            streams[device] = _cuda.Stream(device)
            streams[device].wait_stream(_cuda.current_stream(device))  # what computes the state comes first
        with _cuda.stream(streams[device]):
            out = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
            out.copy_(tensor, non_blocking=True)
    return list(streams.values())


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
