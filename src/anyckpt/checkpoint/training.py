"""Where training stood, and an optimizer's state whatever container it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from anyckpt.checkpoint.ranks import RankShard
from anyckpt.data_classes import dataclass
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class TrainingState:
    """Where training stood.

    Attributes:
        step: optimizer steps taken (Lightning's ``global_step``, Megatron's ``iteration``), or None.
        consumed_samples: samples seen, or None.
        epoch: as Lightning counts, or None.
        has_optimizer: optimizer state is present, in tensors or objects.
        has_scheduler: a learning-rate scheduler's state is present.
        has_rng: random-number-generator states are present.
    """

    step: int | None = None
    consumed_samples: int | None = None
    epoch: int | None = None
    has_optimizer: bool = False
    has_scheduler: bool = False
    has_rng: bool = False


GROUP = "group"
"""What is no state, but travels as a slot from ranks to the whole model: which group a parameter is in."""


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's state by parameter, whatever container it came from.

    A slot is ``master`` (the weights in float32) or what the optimizer calls it: Adam's ``exp_avg`` and
    ``exp_avg_sq``, ``momentum_buffer``, ``square_avg``, ``sum``.  Its tensors have the weights' names and shapes, and
    are joined, cut and renamed by the weights' rules.

    Attributes:
        slots: slot -> weight's name -> tensor, for a whole model.
        others: slot -> weight's name -> what has not the weight's shape: a number, Adafactor's row and column means,
            steps that differ.  No rule says what becomes of them, so that they travel only where the weight keeps its
            name and shape.
        ranks: slot -> the ranks' shards, for formats that keep a file per rank; then ``slots`` is empty.  The slot
            ``GROUP``, where there is one, has in every element the index of the parameter's group.
        step: optimizer steps taken, or None.
        groups: hyperparameters of the parameter groups as stored, without ``params``.
        group_of: weight's name -> index in ``groups``, where the container says or counts prove it; empty where only
            the weights' names and shapes tell.
        order: names of the parameters in the framework that numbers them, in its order; kept as they are whatever
            the weights are called meanwhile.  Empty where the state never was by number.
        grad_scaler: state of the loss scaler of fp16 training as stored, or None.
        warnings: copies on several ranks that differ.
    """

    slots: Mapping[str, dict[str, LazyTensor]] = field(default_factory=dict)
    others: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[RankShard, ...]] = field(default_factory=dict)
    step: int | None = None
    groups: tuple[dict[str, Any], ...] = ()
    group_of: Mapping[str, int] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    grad_scaler: Any = None
    warnings: tuple[str, ...] = ()
