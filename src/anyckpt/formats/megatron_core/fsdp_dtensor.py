"""Laying out what Megatron-FSDP saves, ``fsdp_dtensor``: a distributed checkpoint of PyTorch of one nested state.

``model`` holds the module's own names behind ``module.``, layers and experts numbered over all ranks, and the halves of
gated projections apart (``linear_fc1.weight_w``, ``weight_v``), so that a rank's part of both is found at any
tensor-parallel size.  What modules keep beside their weights is not in it.

Facts: ``transformer/fsdp_dtensor_checkpoint.py``, ``distributed/fsdp/mcore_fsdp_adapter.py`` and
``training/checkpointing.py`` of Megatron-Core 0.19.2; ``training/checkpointing.py`` of Megatron-Bridge 0.6.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.dcp import dcp_files
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_core.implementation import Implementation
from anyckpt.layout.from_run import expert_spelling_from_args
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.mamba_sections import has_mixers
from anyckpt.models.dialects.rank_names import part_norms
from anyckpt.tensor import LazyTensor

NAME = "fsdp_dtensor"
ARGUMENTS = {"ckpt_format": NAME, "use_megatron_fsdp": True}
"""Megatron-LM's arguments of a run that loads it."""

OF_OTHER_RANKS = "state of the ranks of another run, which Megatron-FSDP's do not take"

_MODEL = "model"
_WRAPPER = "module."
_HALVES = re.compile(
    r".*\.mlp\.(?:linear_fc1\.(?:weight|bias)|shared_experts\.linear_fc1\.(?:weight|bias)"
    r"|experts\.linear_fc1\.(?:weight|bias)\d+|experts\.local_experts\.\d+\.linear_fc1\.(?:weight|bias))"
)
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)")


def with_arguments(checkpoint: Checkpoint, release: tuple[int, int] | None) -> Checkpoint:
    """A checkpoint whose arguments are those of a run of Megatron-FSDP.

    Raises:
        UsageError: another form of it is asked for, of which there is none.
    """
    if release is not None:
        raise UsageError(f"{NAME} is the same for all releases", remedy="leave --megatron-version or --backend out")
    if checkpoint.config_kind != "megatron-args" or not checkpoint.config:
        return checkpoint
    return replace(checkpoint, config={**checkpoint.config, **ARGUMENTS})


def fsdp_dtensor_files(
    checkpoint: Checkpoint,
    common: Mapping[str, Any],
    options: WriteOptions,
    *,
    prefix: str = "",
    implementation: Implementation | None = None,
) -> list[OutputFile]:
    """The files of a checkpoint of Megatron-FSDP.

    Args:
        checkpoint: weights under the names of a distributed checkpoint of Megatron-Core, and the model's arguments.
        common: what is saved beside the model: ``args``, ``iteration`` and ``checkpoint_version``.
        options: what the user asked for.
        prefix: directory inside the output; empty for the output itself.
        implementation: what the model that will load it is built of; Transformer Engine's layers if None.

    Raises:
        MappingError: a layer that is not known in this form.
        UsageError: an optimizer's state is to be written, or an object cannot be pickled.
    """
    state = next((name for name in checkpoint.tensors if name.startswith(tuple(checkpoint.state_prefixes))), None)
    if checkpoint.state_prefixes and state is not None:
        raise UsageError(
            f"an optimizer's state is not written as {NAME}",
            path=checkpoint.path,
            tensor=state,
            remedy="leave --optimizer keep out",
        )
    named = module_names(checkpoint.tensors, checkpoint.config, implementation)
    tensors = {f"{_MODEL}.{_WRAPPER}{name}": tensor for name, tensor in named.items()}
    paths: dict[str, tuple[str | int, ...]] = {
        f"{_MODEL}.{_WRAPPER}{name}": (_MODEL, _WRAPPER + name) for name in named
    }
    return dcp_files(
        tensors, dict(common), prefix=prefix, ranks=options.ranks, paths=paths, file_bytes=options.max_shard_size
    )


def module_names(
    stored: Mapping[str, LazyTensor], arguments: Mapping[str, Any], implementation: Implementation | None
) -> dict[str, LazyTensor]:
    """Tensors under the names of Megatron-FSDP's state of a model, from those of a distributed checkpoint.

    Raises:
        MappingError: a layer that is not known in this form.
    """
    hub, _ = spellings.to_hub_names(stored, in_blocks=False)
    if has_mixers(hub):
        raise MappingError(
            f"Mamba's layers are not known as {NAME}",
            expected="attention and MLPs",
            remedy="leave --backend out",
        )
    local = implementation == "local"
    sequential = local or expert_spelling_from_args(arguments) == "sequential"
    named: dict[str, LazyTensor] = {}
    for name, tensor in (part_norms(hub) if local else hub).items():
        expert = _EXPERT.fullmatch(name) if sequential else None
        if expert is not None:
            name = f"{expert[1]}.local_experts.{expert[4]}.{expert[2]}.{expert[3]}"
        if arguments.get("swiglu") and _HALVES.fullmatch(name):
            half = tensor.shape[0] // 2
            named[f"{name}_w"], named[f"{name}_v"] = tensor.narrow(0, 0, half), tensor.narrow(0, half, half)
        else:
            named[name] = tensor
    return named
