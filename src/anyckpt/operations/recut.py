"""Cutting a whole model for ranks, with its optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from anyckpt.checkpoint import Checkpoint, OptimizerState, ParallelLayout
from anyckpt.layout import Geometry, Parallelism, cut
from anyckpt.layout.division import Padding
from anyckpt.layout.from_megatron_args import args_from_parallelism, expert_spelling_from_args
from anyckpt.operations.open import geometry_of

_EMBEDDING = "embedding.word_embeddings.weight"


def cut_for_ranks(
    checkpoint: Checkpoint,
    parallelism: Parallelism,
    *,
    rules: Mapping[str, str] | None = None,
    padding: Padding = "zeros",
) -> Checkpoint:
    """The checkpoint with the ranks' shards beside its tensors, ready for a format that keeps a file per rank.

    Args:
        checkpoint: global tensors under the hub's names, and Megatron's arguments as configuration.
        parallelism: the layout wanted.
        rules: pattern -> partition kind, for names that the built-in table does not have.
        padding: what fills new padding rows of the vocabulary; padding of optimizer state is zero.

    Raises:
        MappingError: a name that no rule covers, or a tensor that cannot be divided.
        UsageError: the layout is impossible for the model.
    """
    geometry = _target_geometry(checkpoint, parallelism)
    spelling = expert_spelling_from_args(checkpoint.config)
    shards = cut(checkpoint.tensors, parallelism, geometry, rules=rules, padding=padding, spelling=spelling)
    optimizer = checkpoint.optimizer
    return replace(
        checkpoint,
        ranks=tuple(shards),
        layout=ParallelLayout(
            parallelism.tensor_parallel,
            parallelism.pipeline_parallel,
            parallelism.virtual_pipeline,
            parallelism.expert_parallel,
        ),
        config={**checkpoint.config, **args_from_parallelism(parallelism)},
        optimizer=None if optimizer is None else partial(_cut_optimizer, checkpoint, parallelism, geometry, rules),
    )


def _cut_optimizer(
    checkpoint: Checkpoint, parallelism: Parallelism, geometry: Geometry, rules: Mapping[str, str] | None
) -> OptimizerState:
    assert checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    spelling = expert_spelling_from_args(checkpoint.config)
    ranks = {
        slot: tuple(cut(tensors, parallelism, geometry, rules=rules, spelling=spelling))
        for slot, tensors in state.slots.items()
    }
    return replace(state, ranks=ranks, slots={})


def _target_geometry(checkpoint: Checkpoint, parallelism: Parallelism) -> Geometry:
    """The model's, with as many rows of vocabulary as Megatron computes for that many tensor-parallel ranks.

    Rows stay as they are for the same number of ranks, and where the true vocabulary is unknown and they divide.
    """
    geometry = geometry_of(checkpoint)
    embedding = checkpoint.tensors.get(_EMBEDDING)
    rows = None if embedding is None else embedding.shape[0]
    true = checkpoint.config.get("vocab_size")
    known = type(true) is int and rows is not None and 0 < true <= rows
    same = checkpoint.layout.tensor_parallel == parallelism.tensor_parallel
    if rows is None or (same and geometry.padded_vocab_size):
        return geometry
    if known:
        return replace(geometry, vocab_size=true, padded_vocab_size=None)
    return replace(geometry, padded_vocab_size=None if rows % parallelism.tensor_parallel else rows)
