"""Cutting a whole model for ranks, with its optimizer's state, as a user asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState, RankShard
from anyckpt.config.hub_names import EMBEDDING
from anyckpt.config.hybrid import PATTERN
from anyckpt.errors import MappingError, UsageError
from anyckpt.layout import Geometry, Parallelism, cut
from anyckpt.layout.division import Padding
from anyckpt.layout.from_run import args_from_parallelism, expert_spelling_from_args, letters_in_parts
from anyckpt.layout.pipeline import chunks
from anyckpt.models import partitions
from anyckpt.operations.steps.aim import Aim, sizes_of
from anyckpt.operations.steps.extra_states import with_states
from anyckpt.operations.steps.joining import geometry_of, run_words
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.tensor import LazyTensor

_ROWS = ("override_vocab_size", "padded_vocab_size")  # NeMo's and Megatron's words for the padded vocabulary
_FILLED: Mapping[Padding, str] = {"zeros": "zeros", "repeat-last-row": "copies of the last row"}


def cut_for_ranks(
    checkpoint: Checkpoint,
    parallelism: Parallelism,
    *,
    rules: Mapping[str, str] | None = None,
    family: str | None = None,
    padding: Padding = "zeros",
) -> Checkpoint:
    """The checkpoint with the ranks' shards beside its tensors, ready for a format that keeps a file per rank.

    Args:
        checkpoint: global tensors under the hub's names, and Megatron's or NeMo's configuration.
        parallelism: the layout wanted.
        rules: pattern -> partition kind, for names that the built-in table does not have.
        family: the model family, where the configuration does not tell; its rules may say how a tensor is divided.
        padding: what fills new padding rows of the vocabulary; padding of optimizer state is zero.

    Raises:
        MappingError: a name that no rule covers, or a tensor that cannot be divided.
        UsageError: the layout is impossible for the model.
    """
    geometry = _target_geometry(checkpoint, parallelism)
    if parallelism.expert_parallel > 1 and geometry.num_experts is None:
        raise UsageError(
            "the model has no experts to spread",
            path=checkpoint.path,
            expected="expert parallel size 1",
            found=parallelism.expert_parallel,
            remedy="leave --ep out",
        )
    spelling = expert_spelling_from_args(run_words(checkpoint))
    divide = partial(
        cut,
        parallelism=parallelism,
        geometry=geometry,
        rules=rules,
        family=partitions(checkpoint, family=family),
        spelling=spelling,
    )
    shards: Sequence[RankShard] = divide(checkpoint.tensors, padding=padding, complete=checkpoint.adapter is None)
    optimizer = checkpoint.optimizer
    arguments = args_from_parallelism(parallelism) if checkpoint.config_kind == "megatron-args" else {}
    arguments |= _in_parts(checkpoint.config, parallelism, geometry)
    if checkpoint.extra_states is not None:
        shards = with_states(shards, checkpoint.extra_states(), parallelism, geometry, spelling)
    rows = _embedding_rows(shards)
    for key in _ROWS:
        if rows and checkpoint.config.get(key) is not None:
            arguments[key] = rows
    return replace(
        checkpoint,
        ranks=tuple(shards),
        layout=sizes_of(parallelism),
        config={**checkpoint.config, **arguments},
        optimizer=None if optimizer is None else partial(_cut_optimizer, optimizer, divide),
    )


def _in_parts(config: Mapping[str, Any], parallelism: Parallelism, geometry: Geometry) -> dict[str, Any]:
    """Arguments of a HybridModel, whose letters say which layers each stage has; nothing for any other model."""
    letters, layers = config.get(PATTERN), geometry.num_layers
    if not isinstance(letters, str) or layers is None:
        return {}
    found = chunks(parallelism, {"decoder": layers})
    counts = [len(chunk.layers["decoder"]) for chunk in found]
    unsaid = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout")
    return {**dict.fromkeys(unsaid), PATTERN: letters_in_parts(letters, counts)}


def cut_as_asked(whole: Checkpoint, aim: Aim, request: LayoutRequest, family: str | None) -> Stepped:
    """The checkpoint cut for the target's ranks; as it is where tensors stay whole."""
    if aim.cut is None:
        return Stepped(whole)
    done = cut_for_ranks(whole, aim.cut, rules=request.rules, family=family, padding=request.padding)
    return Stepped(done, notes=_padding_notes(whole, done, request.padding))


def _padding_notes(whole: Checkpoint, done: Checkpoint, padding: Padding) -> tuple[str, ...]:
    """What became of the vocabulary's padding rows when a model was cut; nothing if there are none."""
    embedding, true = whole.tensors.get(EMBEDDING), whole.config.get("vocab_size")
    rows = _embedding_rows(done.ranks)
    if embedding is None or not rows:
        return ()
    stored = embedding.shape[0]
    said = []
    if type(true) is int and true < min(stored, rows):
        said.append(f"{min(stored, rows) - true} padding rows are kept as stored")
    if rows > stored:
        said.append(f"{rows - stored} new padding rows are filled with {_FILLED[padding]}")
    if rows < stored:
        said.append(f"{stored - rows} padding rows are left out")
    tokens = f"{true} tokens" if type(true) is int else "tokens of unknown number"
    return (f"the vocabulary of {tokens} has {rows} rows: {', '.join(said)}",) if said else ()


def _embedding_rows(shards: Sequence[RankShard]) -> int:
    """Of the whole embedding: one part for each tensor-parallel rank, which expert ranks and stages repeat."""
    rows = {shard.tensor_rank: shard.tensors[EMBEDDING].shape[0] for shard in shards if EMBEDDING in shard.tensors}
    return sum(rows.values())


def _cut_optimizer(
    find: Callable[[], OptimizerState], divide: Callable[[Mapping[str, LazyTensor]], list[RankShard]]
) -> OptimizerState:
    state = find()
    ranks = {slot: tuple(divide(tensors)) for slot, tensors in state.slots.items()}
    return replace(state, ranks=ranks, slots={})


def _target_geometry(checkpoint: Checkpoint, parallelism: Parallelism) -> Geometry:
    """The model's, with as many rows of vocabulary as Megatron computes for that many tensor-parallel ranks.

    Rows stay as they are for the same number of ranks, and where the true vocabulary is unknown and they divide.
    """
    geometry = geometry_of(checkpoint)
    embedding = checkpoint.tensors.get(EMBEDDING)
    rows = None if embedding is None else embedding.shape[0]
    true = checkpoint.config.get("vocab_size")
    if type(true) is int and rows is not None and true > rows:
        raise MappingError(
            "the vocabulary is larger than what is stored",
            path=checkpoint.path,
            tensor=EMBEDDING,
            expected=f"at least {true} rows",
            found=f"{rows} rows",
            remedy="give the true --vocab-size",
        )
    known = type(true) is int and rows is not None and true > 0
    same = checkpoint.layout.tensor_parallel == parallelism.tensor_parallel
    if rows is None or (same and geometry.padded_vocab_size):
        return replace(geometry, vocab_size=true) if known else geometry
    if known:
        return replace(geometry, vocab_size=true, padded_vocab_size=None)
    return replace(geometry, padded_vocab_size=None if rows % parallelism.tensor_parallel else rows)
