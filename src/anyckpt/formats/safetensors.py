"""The format ``safetensors``: one loose file of tensors."""

from __future__ import annotations

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.safetensors import HEADER_LIMIT, read_safetensors, safetensors_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.formats.shared.loose_tensors import told_of_parts, weights_only, without_configuration
from anyckpt.storage.location import Location


def _detect(location: Location) -> bool:
    if location.is_directory:
        return False
    if location.head.startswith(b"PK\x03\x04"):
        return False  # a file of torch.save under a wrong name
    return location.suffix == ".safetensors" or (
        location.head[8:].lstrip(b" \t\r\n")[:1] == b"{" and int.from_bytes(location.head[:8], "little") <= HEADER_LIMIT
    )


def _read(location: Location) -> Checkpoint:
    from anyckpt.formats.shared.rank_safetensors import part_of

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


FORMAT = Format(
    name="safetensors",
    title="safetensors file",
    detect=_detect,
    read=_read,
    plan=_plan,
    suffixes=(".safetensors",),
)
