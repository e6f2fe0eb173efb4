"""Joins what ranks hold into global tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from functools import partial

from anyckpt.checkpoint import RankShard
from anyckpt.config.hub_names import EMBEDDING, HEADS
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, UsageError
from anyckpt.layout import experts
from anyckpt.layout.division import join_parts, settled
from anyckpt.layout.geometry import Geometry, Parallelism
from anyckpt.layout.names import Name, Names, check_parallel, listed, stack_sizes
from anyckpt.layout.partition import Partition, Rules
from anyckpt.layout.pipeline import Chunk, chunks, parse_layout
from anyckpt.layout.replicas import SMALL, Replicas, compare, compared
from anyckpt.tensor import LazyTensor

Pair = tuple[int, int]  # (tensor rank, expert rank)
Copies = list[tuple[str, LazyTensor]]  # (file, what it holds)


@dataclass
class Joined:
    """A model, put together.

    Attributes:
        tensors: global tensors by the hub's name, in the order of the model.
        warnings: copies that differ.
        ignored: names without weights as the first rank that has them spells them, with the reason.
        replicas: every set of copies that should be equal, compared or not.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    replicas: list[Replicas] = field(default_factory=list)


def join(
    ranks: Iterable[RankShard],
    parallelism: Parallelism,
    geometry: Geometry,
    *,
    rules: Mapping[str, str] | None = None,
    family: Mapping[str, str | Partition] | None = None,
    verify_replicas: bool | None = None,
    complete: bool = True,
) -> Joined:
    """Global tensors of the ranks' shards: views; only copies are read, to compare them.

    Args:
        ranks: every rank's shard, in any order; layers and experts numbered as the rank does.
        parallelism: the layout.
        geometry: the model.
        rules: pattern -> kind, before the built-in table (see ``partition.TABLE``).
        family: what the model's family says, before the table and after ``rules``: hub name -> kind.
        verify_replicas: compare copies that should be equal: all (True), none (False), or those of at most 64 MB
            and the tied embedding (None).
        complete: every layer of a stack has a tensor; False for adapters and optimizer states of few parameters.

    Raises:
        MappingError: names that no rule covers; a rank, layer or expert that is missing or there twice; files that
            contradict the layout or the geometry.
        UsageError: the layout is impossible for the model.
        FormatError: bytes of copies are missing from a file.
    """
    parallelism.check()
    check_parallel(geometry, parallelism.tensor_parallel, parallelism.expert_parallel)
    joiner = _Joiner(parallelism, geometry, complete)
    joiner.take(ranks, Names(Rules(rules, family), geometry))
    joined = joiner.join()
    _untie(joined, geometry)
    _verify(joined, verify_replicas)
    return joined


@dataclass
class _Held:
    """What a rank and chunk holds, by understood names in the file's order."""

    source: str
    dense: dict[Name, LazyTensor] = field(default_factory=dict)
    experts: dict[Name, dict[int, LazyTensor]] = field(default_factory=dict)
    order: dict[Name, None] = field(default_factory=dict)


class _Joiner:
    """Goes through the chunks in the order of the model."""

    def __init__(self, parallelism: Parallelism, geometry: Geometry, complete: bool) -> None:
        self.parallelism = parallelism
        self.geometry = geometry
        self.complete = complete
        self.experts_each = (geometry.num_experts or 0) // parallelism.expert_parallel
        self.chunks: dict[tuple[int, int], dict[Pair, _Held]] = {}
        self.joined = Joined()
        self.holders: dict[str, str] = {}

    def take(self, ranks: Iterable[RankShard], names: Names) -> None:
        """Sort the shards by chunk and rank, and understand their names."""
        sizes = self.parallelism
        for shard in ranks:
            numbers = shard.place
            limits = (sizes.tensor_parallel, sizes.pipeline_parallel, self._virtual(), sizes.expert_parallel)
            if any(not 0 <= number < limit for number, limit in zip(numbers, limits, strict=True)):
                raise MappingError(
                    "is of a rank outside the layout",
                    path=shard.source,
                    expected="tensor, pipeline, virtual and expert ranks below " + str(limits),
                    found=str(numbers),
                )
            chunk = self.chunks.setdefault((shard.pipeline_rank, shard.virtual_rank), {})
            pair = (shard.tensor_rank, shard.expert_rank)
            if pair in chunk:
                raise MappingError(
                    f"is of the same rank as {chunk[pair].source}",
                    path=shard.source,
                    found=f"tensor rank {pair[0]}, "
                    f"pipeline rank {shard.pipeline_rank}, chunk {shard.virtual_rank}, expert rank {pair[1]}",
                )
            chunk[pair] = self._held(shard, names)

    def _virtual(self) -> int:
        layout = self.parallelism.pipeline_layout
        if layout is None:
            return self.parallelism.virtual_pipeline
        return max(1, len(parse_layout(layout)) // self.parallelism.pipeline_parallel)

    def _held(self, shard: RankShard, names: Names) -> _Held:
        held = _Held(shard.source)
        tensors = experts.split_legacy(shard.tensors, self.experts_each, shard.source)
        for (name, index), (text, tensor) in zip(names.all(tensors, shard.source), tensors.items(), strict=True):
            if name.division is None:
                self.joined.ignored.setdefault(text, "carries no weights")
                continue
            held.order.setdefault(name)
            if index is None:
                held.dense[name] = tensor
            else:
                own = held.experts.setdefault(name, {})
                if index in own:
                    raise MappingError("is there under two spellings", path=shard.source, tensor=text)
                own[index] = tensor
        return held

    def join(self) -> Joined:
        """Every chunk's tensors."""
        names = [name for ranks in self.chunks.values() for held in ranks.values() for name in held.order]
        if self.geometry.num_layers is None and self.parallelism.pipeline_parallel > 1:
            raise UsageError(
                "pipeline stages cannot be joined without knowing how many layers the model has",
                remedy="give the model's configuration with --config",
            )
        for chunk in chunks(self.parallelism, stack_sizes(names, self.geometry)):
            ranks = self.chunks.get((chunk.pipeline_rank, chunk.virtual_rank), {})
            if ranks or not chunk.empty:
                self._check(chunk, ranks)
                for name in ranks[min(ranks)].order:
                    if name.of_expert:
                        self._join_experts(chunk, name, ranks)
                    else:
                        self._join_dense(chunk, name, ranks)
        return self.joined

    def _check(self, chunk: Chunk, ranks: Mapping[Pair, _Held]) -> None:
        """Every rank is there, with the same names and the layers that it should have."""
        wanted = self.parallelism.written_pairs
        missing = [pair for pair in wanted if pair not in ranks]
        if missing:
            raise MappingError(
                f"{chunk}: files of ranks are missing",
                expected=f"{len(wanted)} tensor and expert ranks",
                found=f"{len(ranks)}, without " + ", ".join(f"tensor {t} expert {e}" for t, e in missing[:8]),
                remedy="copy the folder of every rank of this iteration",
            )
        first = ranks[min(ranks)]
        for held in ranks.values():
            if held.dense.keys() != first.dense.keys() or held.experts.keys() != first.experts.keys():
                odd = next(iter(held.order.keys() ^ first.order.keys()))
                raise MappingError(
                    f"is in one rank's file but not in another's of {chunk}",
                    tensor=odd.text,
                    path=(first if odd in held.order else held).source,
                    expected="it, as in " + (held if odd in held.order else first).source,
                    found="no such tensor",
                )
        for stack in {"decoder", "encoder", *chunk.layers}:
            due = chunk.layers.get(stack, range(0))
            found = {name.layer for name in first.order if name.stack == stack}
            expected = self.geometry.filled(due) if stack == "decoder" else set(range(len(due)))
            if found != expected if self.complete else not found <= expected:
                span = f", global {due.start} to {due.stop - 1}" if due else ""
                raise MappingError(
                    f"the files and the layout disagree on the {stack} layers of {chunk}",
                    path=first.source,
                    expected=f"{len(due)} layers by the layout ({listed(expected)} as the rank counts{span})",
                    found=f"{len(found)} layers in the file ({listed(found)})",
                    remedy="check the layout, and that no file is of another model or iteration",
                )

    def _join_dense(self, chunk: Chunk, name: Name, ranks: Mapping[Pair, _Held]) -> None:
        shares: list[Copies] = [[] for _ in range(self.parallelism.tensor_parallel)]
        for pair in sorted(ranks):
            shares[pair[0]].append((ranks[pair].source, ranks[pair].dense[name]))
        self._add(name.at(_layer(chunk, name)), name, shares, _layer(chunk, name))

    def _join_experts(self, chunk: Chunk, name: Name, ranks: Mapping[Pair, _Held]) -> None:
        """The tensors that every expert has under one name."""
        base = name.at(_layer(chunk, name))
        shares: dict[int, list[Copies]] = {}
        for pair in sorted(ranks):
            held = ranks[pair]
            own = held.experts[name]
            if own.keys() != set(range(self.experts_each)):
                raise MappingError(
                    "the file and the layout disagree on the experts of a rank",
                    path=held.source,
                    tensor=base,
                    expected=f"{self.experts_each} experts ({listed(range(self.experts_each))} as the rank counts)",
                    found=f"{len(own)} ({listed(own)})",
                )
            for index, tensor in own.items():
                expert = pair[1] * self.experts_each + index
                parts = shares.setdefault(expert, [[] for _ in range(self.parallelism.expert_ways)])
                parts[self.parallelism.expert_share(*pair)].append((held.source, tensor))
        for expert in sorted(shares):
            self._add(f"{base}{expert}", name, shares[expert], _layer(chunk, name))

    def _add(self, text: str, name: Name, shares: Sequence[Copies], layer: int) -> None:
        """Join the first copy of every share, and note what should be equal to it."""
        assert name.division is not None
        how = settled(text, shares[0][0][1], len(shares), name.division.at(layer, self.geometry))
        if how.axis is None:
            self._note(text, [copy for share in shares for copy in share])
        else:
            for share in shares:
                self._note(text, share)
        holder, first = shares[0][0]
        try:
            whole = join_parts(text, [share[0][1] for share in shares], how, self.geometry)
        except MappingError as error:
            odd = (name for name, part in (share[0] for share in shares) if part.shape != first.shape)
            error.path = error.path or next(odd, holder)
            raise
        if text in self.joined.tensors:  # a stage's copy of the embedding
            self._note(text, [(self.holders[text], self.joined.tensors[text]), (holder, whole)])
        else:
            self.joined.tensors[text] = whole
            self.holders[text] = holder

    def _note(self, text: str, copies: Copies) -> None:
        if len(copies) < 2:
            return
        first = copies[0][1]
        for holder, other in copies[1:]:
            if other.shape != first.shape or other.dtype != first.dtype:
                raise MappingError(
                    "should be the same on every rank that has it",
                    path=holder,
                    tensor=text,
                    expected=f"{first.dtype.name} {first.shape} as in {copies[0][0]}",
                    found=f"{other.dtype.name} {other.shape}",
                )
        self.joined.replicas.append(Replicas(text, tuple(copies)))


def _layer(chunk: Chunk, name: Name) -> int:
    return 0 if name.stack is None else chunk.layers[name.stack].start + name.layer


def _untie(joined: Joined, geometry: Geometry) -> None:
    """Take out the copy of a shared embedding."""
    if not geometry.share_embeddings_and_output_weights or EMBEDDING not in joined.tensors:
        return
    original = joined.tensors[EMBEDDING]
    for name in HEADS:
        copy = joined.tensors.pop(name, None)
        if copy is None:
            continue
        if copy.shape != original.shape or copy.dtype != original.dtype:
            raise _not_tied(name, f"{original.dtype.name} {original.shape}", f"{copy.dtype.name} {copy.shape}")
        joined.replicas.append(Replicas(name, ((EMBEDDING, original), (name, copy)), tied=True))


def _verify(joined: Joined, everything: bool | None) -> None:
    if everything is False:
        return
    due = [one for one in joined.replicas if one.tied or everything or one.nbytes <= SMALL]
    compared(due, partial(_check, joined))


def _check(joined: Joined, replicas: Replicas) -> None:
    if not replicas.tied:
        joined.warnings += compare([replicas])
        return
    for _, count in replicas.differences():
        # Megatron-Core 0.16 allocates but never trains this copy where multi-token prediction has its own
        if any(name.startswith("mtp.") for name in joined.tensors):
            joined.warnings += compare([replicas])
        else:
            found = f"{count} of {replicas.copies[0][1].size} elements differ"
            raise _not_tied(replicas.name, "no difference", found)


def _not_tied(name: str, expected: str, found: str) -> MappingError:
    return MappingError(
        "the output layer is not the embedding, though the model's configuration says that they are shared",
        tensor=name,
        expected=expected,
        found=found,
        remedy="say in --config that they are not shared (untie_embeddings_and_output_weights) to keep both",
    )
