"""PyTorch distributed checkpoints (DCP): a directory of ``.distcp`` files and a ``.metadata``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerForm, TrainingState
from anyckpt.containers.dcp.reader import METADATA, DcpContents, read_dcp
from anyckpt.containers.dcp.writer import dcp_files
from anyckpt.engine.plan import Plan
from anyckpt.errors import FormatError
from anyckpt.formats.registry import Format, WriteOptions, deferred, without_configuration
from anyckpt.formats.shared import nesting
from anyckpt.formats.shared.tracker import TRACKER, iteration_folder
from anyckpt.pickling import Record
from anyckpt.pickling.plain import to_plain
from anyckpt.pickling.torch_objects import NAMESPACE
from anyckpt.storage.location import Location

__all__ = ["FORMAT", "DcpContents", "dcp_files", "read_dcp"]

_OTHERS = ("metadata.json", "meta.pt")
"""What makes a directory with a ``.metadata`` a Megatron-Core or a Lightning checkpoint."""

_FSDP = "of Megatron-FSDP (fsdp_dtensor)"
_STEPS = ("iteration", "global_step", "step")


def detect(location: Location) -> bool:
    """A directory with ``.metadata`` (or one per rank, or shards of an unfinished save) that is nobody else's.

    Raises:
        FormatError: it is one of the shards, which only their index makes sense of.
    """
    if not location.is_directory and location.suffix == ".distcp":
        raise FormatError(
            "is one shard of a distributed checkpoint",
            path=location.path,
            remedy=f"open the directory that holds it, {location.parent}",
        )
    if not location.is_directory or any(name in location.names for name in _OTHERS):
        return False
    return _is_index(location) or _tracked(location) is not None


def _is_index(location: Location) -> bool:
    return METADATA in location.names or any(
        name.startswith("__") and name.endswith((".distcp", METADATA)) for name in location.names
    )


def _tracked(location: Location) -> Location | None:
    """The iteration that Megatron-FSDP's training root points to, None if it is no such root."""
    if TRACKER not in location.names:
        return None
    try:
        inner = iteration_folder(location)
    except FormatError:
        return None
    others = any(name in inner.names for name in (*_OTHERS, "common.pt"))
    return inner if _is_index(inner) and not others else None


def read(location: Location) -> Checkpoint:
    """Open a distributed checkpoint under its own names, or the newest of a training root of Megatron-FSDP.

    Megatron-LM saves Megatron-FSDP's models (``fsdp_dtensor``) so, with its arguments; their names are Megatron-Core's,
    layers and experts numbered over all ranks, and gated projections in halves (``linear_fc1.weight_w``, ``weight_v``).

    Raises:
        FormatError: see :func:`read_dcp`.
    """
    inner = location if _is_index(location) else _tracked(location) or location
    contents = read_dcp(inner.folder())
    paths = contents.paths or {}
    roots = {name: str(path[0]) for name, path in paths.items() if len(path) > 1}
    model_prefix, state_prefixes = nesting.prefixes(contents.tensors, paths)
    args = contents.objects.get("args")  # Megatron FSDP saves Megatron's arguments so
    config = to_plain(args.fields()) if isinstance(args, Record) and args.type == NAMESPACE else {}
    return Checkpoint(
        path=location.path,
        format=FORMAT.name,
        format_version=" ".join(filter(None, (contents.version, _FSDP if _is_megatron_fsdp(config) else ""))) or None,
        tensors=contents.tensors,
        model_prefix=model_prefix,
        state_prefixes=state_prefixes,
        objects=contents.objects,
        config=config,
        config_kind="megatron-args" if config else None,
        training=TrainingState(
            step=next((found for name in _STEPS if (found := _whole(contents, name)) is not None), None),
            epoch=_whole(contents, "epoch"),
            has_optimizer=bool(state_prefixes),
            has_scheduler=any(root in nesting.SCHEDULERS for root in roots.values()),
            has_rng=any(root.startswith("rng") for root in (*roots.values(), *contents.objects)),
        ),
        warnings=contents.warnings,
        details=contents.details(),
        key_paths=contents.paths or {},
        checksums=contents.checksums,
    )


def _is_megatron_fsdp(config: Mapping[str, Any]) -> bool:
    return config.get("ckpt_format") == "fsdp_dtensor" or config.get("use_megatron_fsdp") is True


def _whole(contents: DcpContents, name: str) -> int | None:
    """The whole number that was saved as the object ``name``, if any."""
    value = contents.objects.get(name)
    return value if type(value) is int else None


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
    return Plan(FORMAT.name, tuple(files), notes=notes)


FORMAT = Format(
    name="dcp",
    title="PyTorch distributed checkpoint",
    detect=detect,
    read=read,
    plan=plan,
    optimizer=OptimizerForm("named", deferred("anyckpt.optimizer.write_named", "write_named")),
)
