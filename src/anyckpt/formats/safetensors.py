"""The format ``safetensors``: one loose file of tensors."""

from __future__ import annotations

from anyckpt.checkpoint import Checkpoint, CompositeTensor
from anyckpt.containers.safetensors import HEADER_LIMIT, read_safetensors, safetensors_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import UsageError
from anyckpt.formats.registry import Format, WriteOptions, without_configuration
from anyckpt.storage.place import Location
from anyckpt.tensor import LazyTensor


def _detect(location: Location) -> bool:
    if location.is_directory:
        return False
    if location.head.startswith(b"PK\x03\x04"):
        return False  # a file of torch.save under a wrong name
    return location.suffix == ".safetensors" or (
        location.head[8:].lstrip(b" \t\r\n")[:1] == b"{" and int.from_bytes(location.head[:8], "little") <= HEADER_LIMIT
    )


def _read(location: Location) -> Checkpoint:
    from anyckpt.formats.rank_safetensors import part_of

    tensors, metadata = read_safetensors(location.open())
    details = {} if metadata is None else {"metadata": metadata}
    part = part_of(location.path, tensors, metadata or {})
    return Checkpoint(location.path, "safetensors", tensors, details=details, part=part)


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    weights, ignored = weights_only(checkpoint)
    metadata = checkpoint.details.get("metadata") if checkpoint.format == "safetensors" else {"format": "pt"}
    parts = safetensors_parts(weights, metadata)
    notes = (*without_configuration(checkpoint), *told_of_parts(checkpoint))
    return Plan("safetensors", (OutputFile("", parts),), ignored=ignored, notes=notes)


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
                    path=checkpoint.path, tensor=f"{name}.{part}", remedy="convert to torch or dcp",
                )  # fmt: skip
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
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more}: tensors of several parts (quantized, sparse, nested) are written as their"
        " parts, with scale, zero_point, axis and shape as tensors beside them; software has to put them together",
    )


FORMAT = Format(
    name="safetensors",
    title="safetensors file",
    detect=_detect,
    read=_read,
    plan=_plan,
)
