"""Writing tensors that are in memory, or lazy ones, as a checkpoint of any format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import Checkpoint, TrainingState
from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.flatten import flatten
from anyckpt.errors import UsageError
from anyckpt.formats.torch import torch_checkpoint
from anyckpt.operations.convert import Conversion, converted
from anyckpt.operations.keywords import SaveWords, taking
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.destination import told_by_name
from anyckpt.operations.steps.live import Live
from anyckpt.tensor import LazyTensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

_WHERE = "tensors in memory"


@taking(SaveWords)
def save(
    tensors: Mapping[str, Any],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    optimizer: str | None = None,
    **others: Unpack[SaveWords],
) -> Conversion:
    """Write a state dict as a checkpoint: the bytes that converting a ``torch.save`` of it would give, without that.

    Where tensors are all that is given, by name, all of them are weights; of nested state, as of a file of torch, what
    lies in an optimizer or beside the model is training state.  Elements are read where they are while files are
    written, and must not change meanwhile: nothing is copied but arrays with negative strides or foreign byte order,
    each by itself, and blocks of what is on an accelerator.  As nothing tells whether memory is what it was, an
    interrupted run is not continued; run it again.

    Args:
        tensors: arrays of numpy (or of whatever has ``__array__``), tensors of torch, and lazy tensors, by name; or
            nested as ``torch.save`` is given them: ``{"model": ..., "optimizer": ..., "step": 3}``.
        destination: what to write; it appears only when it is whole.
        to: name of the target format, such as ``safetensors`` or ``hf``; if None, what the end of the destination's
            name tells.
        config: the model's configuration, as a file, the folder of a model that has it, or a dictionary.
        family: the model family, where the configuration does not tell.
        dtype: ``bf16``, ``fp16`` or ``fp32``: cast floating-point weights while they are written.
        include: glob or globs of weight names; others are left out.
        optimizer: ``keep`` or ``drop`` what is no weight; kept if None, as far as the target can hold it.

    Raises:
        FormatError: a file that a lazy tensor refers to is damaged.
        MappingError: names, shapes or configuration do not fit the model family, or the model is incomplete.
        OutputError: the destination exists or cannot be written.
        UsageError: what is given is no mapping, a tensor of it has no elements in memory, or an option is not possible.
    """
    if not isinstance(tensors, Mapping):
        raise UsageError(
            "there is no mapping of tensors to save",
            expected="a dictionary of tensors by name",
            found=f"a {type(tensors).__name__}",
            remedy="give the state_dict() of a module",
        )
    checkpoint = tensors if isinstance(tensors, Checkpoint) else _in_memory(tensors)
    if optimizer is None:
        bare = len(checkpoint.weights()) == len(checkpoint.tensors) and not checkpoint.objects
        optimizer = "drop" if bare and checkpoint.optimizer is None else "keep"
    files = None if checkpoint is tensors else _files(checkpoint)
    told = told_by_name(destination) if to is None else {"to": to}
    return converted(checkpoint, destination, ConvertOptions(**told, optimizer=optimizer, **others), sources=files)


def _in_memory(tensors: Mapping[str, Any]) -> Checkpoint:
    """What a file of ``torch.save`` of the same would be; but of tensors alone, by name, all are weights."""
    root = Live().tree(tensors)
    checkpoint = torch_checkpoint(_WHERE, TorchContents(root, "memory"), flatten(root, _WHERE))
    if not all(isinstance(value, LazyTensor) for value in root.values()):
        return checkpoint
    return replace(checkpoint, model_prefix="", state_prefixes=(), training=TrainingState())


def _files(checkpoint: Checkpoint) -> list[str]:
    """The files that its tensors refer to."""
    paths = {piece.source.path for tensor in checkpoint.tensors.values() for piece in tensor.pieces()}
    return sorted(path for path in paths if path is not None)
