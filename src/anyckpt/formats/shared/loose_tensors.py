"""A checkpoint as nothing but tensors by name, for files that hold no more."""

from __future__ import annotations

from anyckpt.checkpoint import Checkpoint, CompositeTensor
from anyckpt.errors import UsageError, few
from anyckpt.tensor import LazyTensor


def weights_only(checkpoint: Checkpoint) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The weights under their own names, and why everything else is left out.

    Of a tensor of several parts (quantized, sparse) the parts are there, and with them what tells how they belong
    together.

    Raises:
        UsageError: tensors alone cannot say that.
    """
    reason = "training state, which this format has no place for"
    prefixes = checkpoint.state_prefixes or ("\0",)
    ignored = {
        name: reason
        for name in checkpoint.tensors
        if name.startswith(prefixes) or not name.startswith(checkpoint.model_prefix)
    }
    weights = checkpoint.weights()
    companions = companions_of(checkpoint)
    for name, found in companions.items():
        for part, tensor in found.items():
            if f"{name}.{part}" in weights:
                raise UsageError(
                    f"has the name that the {part} of another tensor would have",
                    path=checkpoint.path,
                    tensor=f"{name}.{part}",
                    remedy="convert to torch or dcp",
                )
            weights[f"{name}.{part}"] = tensor
    ignored.update(
        (name, "not a tensor, and this format keeps tensors only")
        for name in checkpoint.objects
        if name.removeprefix(checkpoint.model_prefix) not in companions
    )
    return weights, ignored


def companions_of(checkpoint: Checkpoint) -> dict[str, dict[str, LazyTensor]]:
    """Weight of several parts -> what it needs besides the parts that are there, by name.

    Raises:
        UsageError: tensors alone cannot say that, or some of its parts were left out.
    """
    weights, prefix = checkpoint.weights(), checkpoint.model_prefix
    found: dict[str, dict[str, LazyTensor]] = {}
    for stored, value in checkpoint.objects.items():
        name = stored.removeprefix(prefix)
        if not isinstance(value, CompositeTensor) or not stored.startswith(prefix):
            continue
        there = [f"{name}.{part}" in weights for part in value.part_tensors()]
        if not any(there):
            continue
        try:
            if not all(there):
                raise UsageError("is a tensor of several parts, of which some are left out", remedy="leave out all")
            found[name] = value.companions()
        except UsageError as error:
            error.path, error.tensor = checkpoint.path, name
            raise
    return found


def told_of_parts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The note on weights that are written in parts."""
    names = list(companions_of(checkpoint))
    if not names:
        return ()
    return (
        f"{few(names, 3)}: tensors of several parts (quantized, sparse, nested) are written as their"
        " parts, with scale, zero_point, axis and shape as tensors beside them; software has to put them together",
    )


def without_configuration(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The note of a format that holds weights and no configuration, if the source has one."""
    if not checkpoint.config:
        return ()
    return ("the output has no place for the model's configuration: to convert it again, give the source's --config",)
