"""Laying out a distributed checkpoint of PyTorch."""

from __future__ import annotations

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.dcp.writer import dcp_files
from anyckpt.engine.plan import Plan
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.shared.loose_tensors import without_configuration


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """Names are kept; a nested state keeps its nesting if the source recorded it.

    Raises:
        UsageError: an object cannot be pickled.
    """
    files = dcp_files(
        checkpoint.tensors,
        checkpoint.objects,
        ranks=options.ranks,
        paths=dict(checkpoint.key_paths) or None,
        file_bytes=options.max_shard_size,
        held=options.held,
    )
    notes = () if "args" in checkpoint.objects else without_configuration(checkpoint)
    return Plan("dcp", tuple(files), notes=notes)
