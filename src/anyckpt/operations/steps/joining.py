"""Opening a checkpoint as one whole model, however many ranks its files are of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from anyckpt.checkpoint import GROUP, Checkpoint, OptimizerState
from anyckpt.config import of_ranks
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.layout import Geometry, Parallelism, from_config, join
from anyckpt.layout.from_run import is_local, parallelism_from_args
from anyckpt.layout.partition import Partition
from anyckpt.models import partitions, with_class_defaults
from anyckpt.operations.steps.extra_states import joined_states
from anyckpt.optimizer.state import tagged


def open_checkpoint(path: str | os.PathLike[str], *, force: bool = False) -> Checkpoint:
    """Whatever is at ``path``, with the global tensors under the hub's names if its files are of ranks.

    Args:
        path: a file or directory.
        force: open a checkpoint that NeMo marked as unfinished, too.

    Raises:
        FormatError: it is not a checkpoint, or a damaged one.
        MappingError: ranks, layers or experts are missing, or the files contradict the layout.
    """
    return _joined(registry.read(path, force=force))


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise MappingError if it is one part of a model, which must not pass for the model."""
    if checkpoint.part is not None:
        raise MappingError(checkpoint.part.what, path=checkpoint.path, remedy=checkpoint.part.remedy)


def join_ranks(
    checkpoint: Checkpoint,
    *,
    rules: Mapping[str, str] | None = None,
    family: str | None = None,
    verify_replicas: bool | None = None,
) -> Checkpoint:
    """The checkpoint with global tensors in place of the ranks'; itself if its files are not of ranks.

    The layout that the files have stays in ``layout``; the vocabulary keeps its padding rows.  The optimizer's state
    is in ``optimizer``, joined when that is called, and no longer among the tensors.

    Args:
        checkpoint: as read.
        rules: pattern -> partition kind, for names that the built-in table does not have.
        family: the model family, where the checkpoint does not tell; its rules may say how a tensor is divided.
        verify_replicas: read copies that should be equal and compare them: all, none, or (None) the small ones.

    Raises:
        MappingError: it is a part of a model; ranks, layers or experts are missing, or the files contradict the layout.
        UsageError: the layout is impossible for the model, or no configuration describes it.
    """
    check_whole(checkpoint)
    return _joined(checkpoint, rules, family, verify_replicas)


def _joined(
    checkpoint: Checkpoint,
    rules: Mapping[str, str] | None = None,
    family: str | None = None,
    verify_replicas: bool | None = None,
) -> Checkpoint:
    if not checkpoint.ranks:
        return checkpoint
    divided = partitions(checkpoint, family=family)
    joined = join(
        checkpoint.ranks,
        parallelism_of(checkpoint),
        geometry_of(checkpoint),
        rules=rules,
        family=divided,
        verify_replicas=verify_replicas,
        complete=checkpoint.adapter is None,
    )
    return checkpoint.with_weights(
        joined.tensors,
        dialect="hub",
        warnings=[*checkpoint.warnings, *joined.warnings],
        ignored={**checkpoint.ignored, **joined.ignored},
        ranks=(),
        extra_states=partial(_join_states, checkpoint)
        if any(shard.extra_states for shard in checkpoint.ranks)
        else None,
        optimizer=None if checkpoint.optimizer is None else partial(_join_optimizer, checkpoint, rules, divided),
    )


def _join_states(checkpoint: Checkpoint) -> dict[str, Any]:
    return joined_states(checkpoint.ranks, parallelism_of(checkpoint), geometry_of(checkpoint))


def _join_optimizer(
    checkpoint: Checkpoint, rules: Mapping[str, str] | None, divided: Mapping[str, str | Partition]
) -> OptimizerState:
    """The optimizer's state by global parameter, each slot joined as the weights are."""
    assert checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    parallelism, geometry = parallelism_of(checkpoint), geometry_of(checkpoint)
    joined = {
        slot: join(ranks, parallelism, geometry, rules=rules, family=divided) for slot, ranks in state.ranks.items()
    }
    slots = {slot: found.tensors for slot, found in joined.items()}
    groups = slots.pop(GROUP, {})
    told = {name: tagged(tensor) for name, tensor in groups.items()}
    warnings = [f"the optimizer's {slot}: {text}" for slot, found in joined.items() for text in found.warnings]
    return replace(state, slots=slots, ranks={}, group_of=told or state.group_of, warnings=(*state.warnings, *warnings))


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """What partition rules need to know of a checkpoint's model.

    Raises:
        MappingError: its configuration is not possible.
        UsageError: its configuration is of a kind that describes no ranks.
    """
    if checkpoint.config_kind not in (None, *of_ranks.KINDS):
        raise UsageError(
            "no layout of ranks is known for this kind of configuration",
            path=checkpoint.path,
            expected="Megatron arguments or NeMo's configuration",
            found=checkpoint.config_kind,
        )
    words = run_words(checkpoint)
    sizes = of_ranks.sizes(with_class_defaults(words), checkpoint.config_kind)
    return from_config.geometry_of(sizes, down_parallel=is_local(words))


def parallelism_of(checkpoint: Checkpoint) -> Parallelism:
    """How a checkpoint's files are spread over ranks.

    Raises:
        MappingError: its configuration is not possible.
    """
    return parallelism_from_args(run_words(checkpoint), checkpoint.layout)


def run_words(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """How a checkpoint's run was divided and its layers built, in the words of Megatron-LM's arguments."""
    kind = checkpoint.config_kind
    return of_ranks.run_words(checkpoint.config, kind if kind in of_ranks.KINDS else None)
