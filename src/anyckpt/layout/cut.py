"""Cuts global tensors into what ranks hold: the inverse of ``join``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from anyckpt.checkpoint import RankShard
from anyckpt.config.hub_names import EMBEDDING, HEADS
from anyckpt.errors import MappingError, UsageError
from anyckpt.layout import experts
from anyckpt.layout.division import Padding, cut_parts
from anyckpt.layout.experts import Spelling
from anyckpt.layout.geometry import Geometry, Parallelism
from anyckpt.layout.names import Name, Names, check_parallel, listed, stack_sizes
from anyckpt.layout.partition import Partition, Rules
from anyckpt.layout.pipeline import Chunk, chunks
from anyckpt.tensor import LazyTensor


def cut(
    tensors: Mapping[str, LazyTensor],
    parallelism: Parallelism,
    geometry: Geometry,
    *,
    rules: Mapping[str, str] | None = None,
    family: Mapping[str, str | Partition] | None = None,
    padding: Padding = "zeros",
    spelling: Spelling = "grouped",
    complete: bool = True,
) -> list[RankShard]:
    """The shards of every rank: views, nothing is read.

    Ranks are those that Megatron-LM's loader may ask for (``Parallelism.read_pairs``), sorted by pipeline, virtual,
    tensor and expert rank.  Layers and experts are numbered from 0 on every rank; with shared embeddings and a
    pipeline the last stage gets its copy; an empty chunk gives a shard without tensors.

    Args:
        tensors: global tensors by the hub's name.
        parallelism: the layout.
        geometry: the model.
        rules: pattern -> kind, before the built-in table (see ``partition.TABLE``).
        family: what the model's family says, before the table and after ``rules``: hub name -> kind.
        padding: what fills the vocabulary's new padding rows; those that the tensor has are kept.
        spelling: of experts' names.
        complete: every layer of a stack has a tensor, and every expert; False for adapters and the like.

    Raises:
        MappingError: names that no rule covers; a layer or expert is missing; a tensor cannot be divided.
        UsageError: the layout is impossible for the model.
    """
    parallelism.check()
    check_parallel(geometry, parallelism.tensor_parallel, parallelism.expert_parallel)
    names = Names(Rules(rules, family), geometry)
    held: dict[Name, dict[int, LazyTensor]] = {}
    for (name, index), (text, tensor) in zip(names.all(tensors), tensors.items(), strict=True):
        own = held.setdefault(name, {})
        if (index or 0) in own:
            raise MappingError("is there under two spellings", tensor=text)
        if name.division is not None:
            own[index or 0] = tensor
    held = {name: own for name, own in held.items() if own}
    stages = chunks(parallelism, stack_sizes(held, geometry))
    _check(held, stages, geometry, complete)
    tied = _tied(held, names, parallelism) if geometry.share_embeddings_and_output_weights else {}
    cutter = _Cutter(parallelism, geometry, padding, spelling)
    shards: list[RankShard] = []
    for chunk in sorted(stages, key=lambda chunk: (chunk.pipeline_rank, chunk.virtual_rank)):
        present = {name: own for name, own in held.items() if _is_in(chunk, stages, name)}
        shards += cutter.shards(chunk, {**present, **tied} if chunk.output else present)
    return shards


class _Cutter:
    """Cuts one chunk after another."""

    def __init__(self, parallelism: Parallelism, geometry: Geometry, padding: Padding, spelling: Spelling) -> None:
        self.parallelism = parallelism
        self.geometry = geometry
        self.padding = padding
        self.spelling = spelling

    def shards(self, chunk: Chunk, present: Mapping[Name, Mapping[int, LazyTensor]]) -> Iterator[RankShard]:
        """The shards of a chunk's ranks."""
        each = (self.geometry.num_experts or 0) // self.parallelism.expert_parallel
        parts = {
            name: {index: self._parts(name, tensor) for index, tensor in own.items()} for name, own in present.items()
        }
        all_modules = _modules(parts)
        for tensor_rank, expert_rank in self.parallelism.read_pairs:
            rank: dict[str, LazyTensor] = {}
            modules = dict(all_modules)
            for name, own in parts.items():
                layer = 0 if name.stack is None else name.layer - chunk.layers[name.stack].start
                if not name.of_expert:
                    rank[name.at(layer)] = own[0][tensor_rank]
                    continue
                groups: dict[str, list[LazyTensor]] = {}
                for member in modules.pop(_module(name), ()):  # all at once, where the first one is
                    mine = range(expert_rank * each, (expert_rank + 1) * each)
                    share = self.parallelism.expert_share(tensor_rank, expert_rank)
                    groups[member.at(layer)] = [parts[member][expert][share] for expert in mine]
                if groups:
                    rank.update(experts.spelled(groups, self.spelling))
            source = f"{chunk}, tensor rank {tensor_rank}, expert rank {expert_rank}"
            yield RankShard(tensor_rank, chunk.pipeline_rank, chunk.virtual_rank, expert_rank, rank, source)

    def _parts(self, name: Name, tensor: LazyTensor) -> list[LazyTensor]:
        assert name.division is not None
        ways = self.parallelism.expert_ways if name.of_expert else self.parallelism.tensor_parallel
        how = name.division.at(name.layer, self.geometry)
        return cut_parts(name.text, tensor, how, ways, self.geometry, self.padding)


def _module(name: Name) -> str:
    """The experts' module of an expert's name."""
    return name.text.rpartition(".experts.")[0]


def _modules(names: Mapping[Name, object]) -> dict[str, list[Name]]:
    """Each module of experts, with its parameters."""
    modules: dict[str, list[Name]] = {}
    for name in names:
        if name.of_expert:
            modules.setdefault(_module(name), []).append(name)
    return modules


def _check(
    held: Mapping[Name, Mapping[int, LazyTensor]], stages: Sequence[Chunk], geometry: Geometry, complete: bool
) -> None:
    """Every layer and expert is there exactly once."""
    for stack in {stack for chunk in stages for stack in chunk.layers}:
        due = {layer for chunk in stages for layer in chunk.layers.get(stack, range(0))}
        due = due if stack != "decoder" or not due else geometry.filled(range(max(due) + 1))
        found = {name.layer for name in held if name.stack == stack}
        if found != due if complete else not found <= due:
            raise MappingError(
                f"the tensors and the model's configuration disagree on the {stack} layers",
                expected=f"{listed(due)} by the configuration",
                found=f"{listed(found)} among the tensors",
            )
    for name, own in held.items():
        if name.of_expert and own.keys() != set(range(geometry.num_experts or 0)):
            raise MappingError(
                "experts are missing, or are more than the configuration says",
                tensor=name.text,
                expected=f"{listed(range(geometry.num_experts or 0))}",
                found=listed(own),
            )


def _is_in(chunk: Chunk, stages: Sequence[Chunk], name: Name) -> bool:
    """A chunk holds a tensor.

    Raises:
        UsageError: a user's rule does not say where in the pipeline the tensor is.
    """
    if name.stack is not None:
        return name.layer in chunk.layers.get(name.stack, range(0))
    if len(stages) == 1 or name.place == "all":
        return True
    if name.place == "first":
        return chunk.embedding if name.text.startswith("embedding.") else chunk is stages[0]
    if name.place == "last":
        return chunk.output
    if name.place == "norm":
        return name.text.partition(".")[0] in chunk.norms
    raise UsageError(
        "the rule for this tensor does not say which pipeline stage it is on",
        found=name.text,
        remedy="end the rule with @first, @last or @all",
    )


def _tied(
    held: Mapping[Name, dict[int, LazyTensor]], names: Names, parallelism: Parallelism
) -> dict[Name, dict[int, LazyTensor]]:
    """The last stage's copy of a shared embedding; nothing without a pipeline or for tensors without embedding."""
    given = next((name.text for name in held if name.text in HEADS), None)
    if given is not None:
        raise MappingError(
            "is there, though the model's configuration says that it is the embedding",
            tensor=given,
            remedy="say in --config that they are not shared (untie_embeddings_and_output_weights)",
        )
    own = next((tensors for name, tensors in held.items() if name.text == EMBEDDING), None)
    if own is None or parallelism.pipeline_parallel == 1:
        return {}
    copy = HEADS[{"encoder", "decoder"} <= {name.stack for name in held}]
    return {names.all([copy])[0][0]: own}
