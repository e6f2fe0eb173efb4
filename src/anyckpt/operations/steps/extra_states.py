"""Layers' own states beside their weights (``_extra_state``), taken from one layout to another.

Transformer Engine keeps FP8 scaling in them; they are opaque, and belong to a module of a layer.  Tensor-parallel
ranks have one each, of which Megatron-Core's distributed checkpoints keep that of rank 0; so does this.  Where a
module goes is found by joining and cutting tags in its place, by the weights' own rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, RankShard
from anyckpt.layout import Geometry, Parallelism, cut, join
from anyckpt.layout.experts import Spelling
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.optimizer.state import tag, tagged

STATE = "_extra_state"
OF_ALL_EXPERTS = re.compile(r"(?:.*\.)?mlp\.experts\.linear_fc[12]\._extra_state$")
"""Of a grouped layer: one state for all of a rank's experts, which only the same number of experts can take."""

_OF_AN_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<rest>.*\._extra_state)(?P<index>\d{1,7})")
_RULES = {
    "{decoder,encoder}.final_layernorm._extra_state": "replicated@norm",
    "output_layer._extra_state": "replicated@last",
    "**._extra_state": "replicated",
}


def choose_states(checkpoint: Checkpoint, *, keep: bool) -> Stepped:
    """The checkpoint with or without states, as the user asks."""
    if not keep:
        return Stepped(replace(checkpoint, extra_states=None))
    if checkpoint.extra_states is None or not checkpoint.extra_states():
        return Stepped(replace(checkpoint, extra_states=None), notes=("there is no extra state in the source to keep",))
    if checkpoint.layout.tensor_parallel == 1:
        return Stepped(checkpoint)
    note = "of the tensor-parallel ranks' extra states that of rank 0 is kept, as Megatron-Core does"
    return Stepped(checkpoint, notes=(note,))


def is_kept(name: str) -> bool:
    """Whether a stored name that carries no weights is that of a state which is kept when states are."""
    return name.endswith(STATE) and not OF_ALL_EXPERTS.match(name)


def joined_states(ranks: Iterable[RankShard], parallelism: Parallelism, geometry: Geometry) -> dict[str, Any]:
    """Every module's state by its global name, an expert's with the expert's index behind it.

    Raises:
        MappingError: ranks that should have the same modules do not.
    """
    found: list[Any] = []
    tags = []
    for shard in ranks:
        own = {}
        for name, state in shard.extra_states.items():
            if parallelism.expert_parallel == 1 or not OF_ALL_EXPERTS.match(name):
                own[name] = tag((1,), len(found))
                found.append(state)
        tags.append(replace(shard, tensors=own))
    joined = join(tags, parallelism, geometry, rules=_RULES, verify_replicas=False, complete=False)
    return {name: found[tagged(tensor)] for name, tensor in joined.tensors.items()}


def with_states(
    ranks: Sequence[RankShard],
    states: Mapping[str, Any],
    parallelism: Parallelism,
    geometry: Geometry,
    spelling: Spelling,
) -> tuple[RankShard, ...]:
    """The ranks' shards, each with the states of its modules.

    Experts have states of their own only where they are modules of their own.
    """
    values = list(states.values())
    tags = {}
    for number, name in enumerate(states):
        expert = _OF_AN_EXPERT.fullmatch(name)
        if expert is not None and spelling == "sequential":
            tags[f"{expert['module']}.local_experts.{expert['index']}.{expert['rest']}"] = tag((1,), number)
        elif expert is None and (parallelism.expert_parallel == 1 or not OF_ALL_EXPERTS.match(name)):
            tags[name] = tag((1,), number)
    shards = cut(tags, parallelism, geometry, rules=_RULES, spelling=spelling, complete=False)
    own = {shard.place: shard.tensors for shard in shards}
    return tuple(
        replace(shard, extra_states={name: values[tagged(t)] for name, t in own.get(shard.place, {}).items()})
        for shard in ranks
    )
