"""Opening a distributed checkpoint of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint, TrainingState
from anyckpt.containers.dcp.reader import DcpContents, read_dcp
from anyckpt.formats.dcp.location import is_index, tracked
from anyckpt.formats.shared import nesting
from anyckpt.pickling import Record
from anyckpt.pickling.plain import to_plain
from anyckpt.pickling.torch_objects import NAMESPACE
from anyckpt.storage.location import Location

_FSDP = "of Megatron-FSDP (fsdp_dtensor)"
_STEPS = ("iteration", "global_step", "step", "train_state.step")  # the last is torchtitan's


def read(location: Location) -> Checkpoint:
    """Open a distributed checkpoint under its own names, or the newest of a training root of Megatron-FSDP.

    Megatron-LM saves Megatron-FSDP's models (``fsdp_dtensor``) so, with its arguments; their names are Megatron-Core's,
    layers and experts numbered over all ranks, and gated projections in halves (``linear_fc1.weight_w``, ``weight_v``).

    Raises:
        FormatError: see :func:`read_dcp`.
    """
    inner = location if is_index(location) else tracked(location) or location
    contents = read_dcp(inner.folder())
    paths = contents.paths or {}
    roots = {name: str(path[0]) for name, path in paths.items() if len(path) > 1}
    model_prefix, state_prefixes = nesting.prefixes(contents.tensors, paths)
    args = contents.objects.get("args")  # Megatron FSDP saves Megatron's arguments so
    config = to_plain(args.fields()) if isinstance(args, Record) and args.type == NAMESPACE else {}
    return Checkpoint(
        path=location.path,
        format="dcp",
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
