"""How files divide a model over ranks, and what each rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class ParallelLayout:
    """How the files divide the model over ranks; 1 everywhere means whole tensors."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    expert_parallel: int = 1


@dataclass(frozen=True)
class RankShard:
    """What one rank, and one virtual pipeline chunk of it, holds.

    Attributes:
        tensor_rank: tensor-parallel rank.
        pipeline_rank: pipeline stage.
        virtual_rank: chunk of the stage, 0 without virtual pipeline.
        expert_rank: expert-parallel rank.
        tensors: by the hub's spelling of the name, layers numbered as the rank does, from 0.
        source: the file, for messages.
        extra_states: of modules that have a state beside their weights, by the module's name and ``_extra_state``.
    """

    tensor_rank: int
    pipeline_rank: int
    virtual_rank: int
    expert_rank: int
    tensors: dict[str, LazyTensor]
    source: str
    extra_states: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """What tells it from the other shards: tensor, pipeline, virtual and expert rank."""
        return self.tensor_rank, self.pipeline_rank, self.virtual_rank, self.expert_rank
