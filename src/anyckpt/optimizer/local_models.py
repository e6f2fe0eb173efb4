"""The parameters of every rank of the run that wrote a distributed checkpoint, in the order modules register them.

The order within a layer depends on the layers' implementation (with Transformer Engine the norm before attention
is registered with the projection, without before it) and on that of experts (grouped: all first projections, then all
second ones).  Where the arguments do not say, both are candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from anyckpt.checkpoint import Checkpoint, RankShard
from anyckpt.config import of_ranks
from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.errors import MappingError, UsageError
from anyckpt.indexing import Shape
from anyckpt.layout import Geometry, Parallelism, cut, join
from anyckpt.layout.experts import Spelling
from anyckpt.layout.experts import parse as parse_expert
from anyckpt.layout.from_config import geometry_of
from anyckpt.layout.from_run import expert_spelling_from_args, is_local, parallelism_from_args
from anyckpt.models import partitions
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.rank_names import part_norms
from anyckpt.models.dialects.registration import registered_order
from anyckpt.optimizer.parameters import trained
from anyckpt.optimizer.state import DROP, tag, tagged, unproved
from anyckpt.tensor import LazyTensor, stack


class Rank(NamedTuple):
    """Coordinates of a rank."""

    tensor: int
    pipeline: int
    expert: int


class Order(NamedTuple):
    """What the order in which modules register parameters depends on."""

    local: bool
    spelling: Spelling


class LocalModels:
    """The model, cut as the run cut it.

    Args:
        checkpoint: with whole weights, and Megatron's arguments as configuration.
        expert_groups: how many groups of ranks train experts, None if these are trained with the rest.

    Raises:
        MappingError: the model is not Megatron's, or its layout is unknown.
    """

    def __init__(self, checkpoint: Checkpoint, *, expert_groups: int | None) -> None:
        self._path = checkpoint.path
        self._config = checkpoint.config
        self._stored = checkpoint.weights()
        hub, _ = spellings.to_hub_names(self._stored, in_blocks=False)
        self._experts = sum(1 for name in hub if parse_expert(name)) > 0
        self.parallelism = _parallelism(checkpoint, expert_groups)
        if self.parallelism != Parallelism() and checkpoint.config_kind != "megatron-args" and _divided(checkpoint):
            raise unproved(
                "the distributed optimizer's buffers can only be read with Megatron's arguments",
                path=checkpoint.path,
                found=checkpoint.config_kind or "none",
            )
        self.geometry = _geometry(checkpoint, hub)
        self.shared = self.geometry.share_embeddings_and_output_weights and self.parallelism.pipeline_parallel > 1
        self._cut: dict[Spelling, dict[Rank, list[RankShard]]] = {}
        self._hub = hub
        self._partitions = partitions(checkpoint)

    @property
    def ranks(self) -> list[Rank]:
        """Every rank of which the state differs."""
        return list(self._shards(self.orders()[0].spelling))

    def orders(self) -> list[Order]:
        """Orders that the run may have had."""
        stated = self._config.get("transformer_impl")
        impls = [stated == "local"] if isinstance(stated, str) else [True, False]
        spellings: list[Spelling] = ["sequential", "grouped"] if self._experts else ["grouped"]
        if "moe_grouped_gemm" in self._config:
            spellings = [expert_spelling_from_args(self._config)]
        return [Order(local, spelling) for local, spelling in product(impls, spellings)]

    def group(self, rank: Rank, *, of_experts: bool) -> int:
        """The number of the rank's group: Megatron-Core counts tensor ranks first, then expert ranks, then stages."""
        if not of_experts:
            return rank.pipeline * self.parallelism.tensor_parallel + rank.tensor
        ways = self.parallelism.expert_ways
        return (rank.pipeline * self.parallelism.expert_parallel + rank.expert) * ways + rank.tensor % ways

    def buffers(self, rank: Rank, order: Order, *, of_experts: bool | None) -> Iterator[tuple[str, dict[str, Shape]]]:
        """Element type and parameters of each of a rank's buffers: chunk by chunk, type by type.

        Parameters are called ``<chunk>/<name>``, experts as grouped ones whatever the order.

        Args:
            rank: which.
            order: in which modules register parameters.
            of_experts: parameters of experts only, of others only, or of both (None).
        """
        for chunk, shard in enumerate(self._shards(order.spelling)[rank]):
            by_type: dict[str, dict[str, Shape]] = {}
            known = trained(shard.tensors)
            spelled = {name: name for name in known}
            if order.local:
                spelled = part_norms(spelled)
            for name in registered_order(spelled):
                own = spelled[name]
                if of_experts is None or of_experts == (".experts." in own):
                    by_type.setdefault(known[own].dtype.name, {})[f"{chunk}/{_grouped(own)}"] = known[own].shape
            yield from by_type.items()

    def joined(self, found: Mapping[Rank, Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
        """One slot of the whole model under the stored names, from every rank's by ``<chunk>/<name>``.

        Raises:
            MappingError: it is not of the whole model, or weights are stored in parts of their own.
        """
        shards = []
        for rank, tensors in found.items():
            for chunk, shard in enumerate(self._shards(self.orders()[0].spelling)[rank]):
                own = {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{chunk}/")}
                shards.append(replace(shard, tensors=own))
        whole = join(
            shards, self.parallelism, self.geometry, family=self._partitions, verify_replicas=False, complete=False
        ).tensors
        return self._restacked(whole)

    def _shards(self, spelling: Spelling) -> dict[Rank, list[RankShard]]:
        """Every rank's chunks."""
        if spelling not in self._cut:
            found: dict[Rank, list[RankShard]] = {}
            try:
                shards = cut(self._hub, self.parallelism, self.geometry, family=self._partitions, spelling=spelling)
            except (MappingError, UsageError) as error:
                problem = f"the model cannot be cut as the run cut it: {error.problem}"
                raise error.told_as(MappingError, problem, path=self._path, remedy=DROP) from None
            for shard in shards:
                found.setdefault(Rank(shard.tensor_rank, shard.pipeline_rank, shard.expert_rank), []).append(shard)
            self._cut[spelling] = found
        return self._cut[spelling]

    def _restacked(self, whole: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Tensors of the hub's names as they are stored: layers and experts stacked where they are."""
        names = list(self._stored)
        tags = {name: tag(self._stored[name].shape, number) for number, name in enumerate(names)}
        parts: dict[str, list[LazyTensor]] = {}
        for name, tensor in spellings.to_hub_names(tags, in_blocks=False)[0].items():
            if name in whole:
                parts.setdefault(names[tagged(tensor)], []).append(whole[name])
        result: dict[str, LazyTensor] = {}
        for name, own in parts.items():
            shape = self._stored[name].shape
            together = own[0] if len(own) == 1 else stack(own)
            if together.size != self._stored[name].size:
                raise unproved("is stored in parts that the optimizer's state is not", path=self._path, tensor=name)
            result[name] = together.reshape(shape)
        return {name: result[name] for name in names if name in result}


def _parallelism(checkpoint: Checkpoint, expert_groups: int | None) -> Parallelism:
    """The run's layout; its expert parallelism by the number of groups where the arguments do not say."""
    found = parallelism_from_args(checkpoint.config, checkpoint.layout)
    if expert_groups is None or "expert_model_parallel_size" in checkpoint.config:
        return found
    expert_parallel = max(1, expert_groups // (found.pipeline_parallel * found.expert_ways))
    return replace(found, expert_parallel=expert_parallel)


def _grouped(name: str) -> str:
    """An expert's name in the hub's spelling; any other as it is."""
    expert = parse_expert(name)
    return name if expert is None else f"{expert.base}{expert.number}"


def _divided(checkpoint: Checkpoint) -> bool:
    return checkpoint.layout.tensor_parallel > 1 or checkpoint.layout.pipeline_parallel > 1


def _geometry(checkpoint: Checkpoint, hub: Mapping[str, LazyTensor]) -> Geometry:
    """What partition rules need, with rows of vocabulary as stored, and the experts that there are."""
    arguments = checkpoint.config if checkpoint.config_kind == "megatron-args" else {}
    found = geometry_of(of_ranks.sizes(arguments, "megatron-args"), down_parallel=is_local(arguments))
    numbers = [expert.number for name in hub if (expert := parse_expert(name)) is not None]
    rows = hub[EMBEDDING].shape[0] if EMBEDDING in hub else None
    return replace(
        found,
        num_experts=found.num_experts or (max(numbers) + 1 if numbers else None),
        share_embeddings_and_output_weights=HEAD not in hub,
        padded_vocab_size=rows,
        vocab_size=None,
    )
