"""Reading Megatron-LM's checkpoints of one file per rank, of all ``checkpoint_version``s."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState, ParallelLayout, RankShard, StoredChecksum, TrainingState
from anyckpt.config import of_ranks
from anyckpt.containers.torch_file import TorchContents, read_torch_files
from anyckpt.containers.torch_file.values import brief
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.formats.megatron_lm.location import (
    OPTIMIZER_PART,
    Iteration,
    RankFolder,
    find_iteration,
    rank_folders,
)
from anyckpt.formats.megatron_lm.ranks import Place, RankFile, agreed_sizes, open_ranks, place_ranks
from anyckpt.formats.shared.megatron_arguments import plain_arguments
from anyckpt.formats.shared.no_weights import FREQUENCIES_REASON, note_extra_state
from anyckpt.models.dialects.projections import GROUPED_SINCE, grouped
from anyckpt.models.dialects.rank_names import flattened, hub_names, strip_wrappers
from anyckpt.optimizer.by_rank import RankState, read_optimizer
from anyckpt.optimizer.original_groups import ORIGINAL_GROUPS, with_original_groups
from anyckpt.optimizer.state import unproved
from anyckpt.pickling.plain import to_plain
from anyckpt.pickling.walk import find_leaves
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor

_OPTIMIZER = "optimizer"
_DISTRIBUTED = "distrib_optim"
_RNG_KEYS = ("rng_state", "random_rng_state")
_SCHEDULER_KEYS = ("opt_param_scheduler", "lr_scheduler")
_PER_RANK_STATE = (
    "rng_state",
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
)


@dataclass(frozen=True)
class _Chunk:
    """One chunk of one rank's model, under its stored names without wrappers."""

    place: Place
    number: int
    rank: RankFile
    tensors: dict[str, LazyTensor]
    states: dict[str, Any]


def read(location: Location) -> Checkpoint:
    """Open an iteration, or the one that a training root's tracker file names.

    ``tensors`` lists what is stored, by rank folder: ``mp_rank_00_001/model.decoder.layers.0...``.  ``ranks`` has
    the weights under the hub's names, with the rows of fused projections in today's order.  ``objects`` has what
    rank 0's file holds besides, and each rank's optimizer and random states by its folder.  A ``release`` is of no
    training step, whatever its files say: Megatron-LM starts counting anew.

    Raises:
        FormatError: a rank is missing, damaged, of another iteration, or contradicts the arguments.
    """
    iteration = find_iteration(location)
    folders = rank_folders(iteration.location)
    opened, states = open_ranks(folders)
    files = [rank for rank in opened if rank is not None]
    sizes = agreed_sizes(files, iteration.path)
    ranks = place_ranks(files, sizes, iteration.path)
    first = next(iter(ranks.values()))
    config = plain_arguments(first.arguments)
    if config:
        config["tensor_model_parallel_size"] = sizes.tensor
    ignored: dict[str, str] = {}
    chunks = [
        _Chunk(place, number, rank, *_weights(rank, key, ignored))
        for place, rank in ranks.items()
        for number, key in sorted({**dict.fromkeys(range(sizes.virtual or 1), ""), **rank.chunks}.items())
    ]
    distributed = {name: states[name] for rank in ranks.values() if (name := rank.folder.name) in states}
    parts = [folder for folder, rank in zip(folders, opened, strict=True) if rank is None]
    has_optimizer = bool(distributed or parts) or any(_OPTIMIZER in rank.root for rank in ranks.values())
    training = TrainingState(
        step=None if iteration.is_release else first.iteration,
        consumed_samples=_count(config.get("consumed_train_samples")),
        has_optimizer=has_optimizer,
        has_scheduler=any(key in first.root for key in _SCHEDULER_KEYS),
        has_rng=any(key in first.root for key in _RNG_KEYS),
    )
    layout = ParallelLayout(sizes.tensor or 1, sizes.pipeline or 1, sizes.virtual or 1, sizes.expert or 1)
    shards, heads = _shards(chunks), _heads_on_a_rank(config, layout.tensor_parallel, first)
    return Checkpoint(
        path=location.path,
        format="megatron-lm",
        format_version=f"checkpoint_version {first.version:g}",
        tensors=_stored(ranks, distributed),
        state_prefixes=tuple(
            f"{rank.folder.name}/{state}" for rank in ranks.values() for state in (f"{_OPTIMIZER}.", f"{_DISTRIBUTED}.")
        ),
        objects=_objects(first, ranks, distributed),
        config=config,
        config_kind="megatron-args" if config else None,
        layout=layout,
        training=training,
        warnings=_warnings(iteration, first, opened, [rank.contents for rank in ranks.values()]),
        ignored=ignored,
        details={
            "iteration_folder": iteration.path,
            "tracker": iteration.tracker,
            "checkpoint_version": first.version,
            "rank_folders": len(ranks),
            "transformer_impl": config.get("transformer_impl"),
            "distributed_optimizer": bool(distributed) or any(rank is None for rank in opened),
        },
        ranks=tuple(grouped(shard, first.version, heads) for shard in shards),
        optimizer=partial(_optimizer, shards, ranks, distributed, parts, config, layout, heads)
        if has_optimizer
        else None,
        checksums=lambda: _checksums([*(rank.contents for rank in ranks.values()), *distributed.values()]),
    )


def _weights(rank: RankFile, key: str, ignored: dict[str, str]) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """A chunk's weights and its modules' states under dotted names without wrappers.

    What is no weight goes to ``ignored``; a state that is None says nothing.

    Raises:
        FormatError: something in the model is no dense tensor.
    """
    if not key:
        return {}, {}
    flat = flattened(rank.root[key], rank.path)
    cut = strip_wrappers(list(flat))
    weights: dict[str, LazyTensor] = {}
    states: dict[str, Any] = {}
    for stored, value in flat.items():
        name = stored[cut:]
        if name.endswith("_extra_state"):
            note_extra_state(ignored, name, value)
            if value is not None:
                states[name] = value
        elif name.endswith("rotary_pos_emb.inv_freq"):
            ignored[name] = FREQUENCIES_REASON
        elif isinstance(value, LazyTensor):
            weights[name] = value
        else:
            raise FormatError("is not a dense tensor", path=rank.path, tensor=f"{key}.{stored}", found=brief(value))
    return weights, states


def _shards(chunks: Sequence[_Chunk]) -> tuple[RankShard, ...]:
    """The chunks' weights under the hub's names, rows as stored."""
    paths = [chunk.rank.path for chunk in chunks]
    renamed = hub_names([chunk.tensors for chunk in chunks], paths)
    return tuple(
        RankShard(c.place.tensor, c.place.pipeline, c.number, c.place.expert, tensors, path, c.states)
        for c, tensors, path in zip(chunks, renamed, paths, strict=True)
    )


def _optimizer(
    shards: Sequence[RankShard],
    ranks: Mapping[Place, RankFile],
    distributed: Mapping[str, TorchContents],
    parts: Sequence[RankFolder],
    config: Mapping[str, Any],
    layout: ParallelLayout,
    heads: int,
) -> OptimizerState:
    """The optimizer's state, rows of projections in today's order."""
    first = next(iter(ranks.values()))
    own: dict[Place, list[RankShard]] = {}
    for shard in shards:
        own.setdefault(Place(shard.tensor_rank, shard.pipeline_rank, shard.expert_rank), []).append(shard)
    states = []
    for place, rank in ranks.items():
        flat = distributed.get(rank.folder.name)
        states.append(
            RankState(
                tuple(own[place]),
                rank.root.get(_OPTIMIZER),
                None if flat is None else flat.root,
                rank.path,
                _parts(rank, parts, config) if parts else (),
            )
        )
    found = read_optimizer(states, config, layout)
    slots = {slot: tuple(grouped(shard, first.version, heads) for shard in own) for slot, own in found.ranks.items()}
    return with_original_groups(replace(found, ranks=slots), first.root.get(ORIGINAL_GROUPS))


def _parts(rank: RankFile, folders: Sequence[RankFolder], config: Mapping[str, Any]) -> tuple[Any, ...]:
    """The optimizer's state of each data-parallel rank that trained this rank's model.

    Raises:
        MappingError: a data-parallel rank's folder is missing, or there are more than the run had.
    """
    own = {
        folder.name.rpartition("_")[2]: folder for folder in folders if folder.name.startswith(f"{rank.folder.name}_")
    }
    numbered = {int(digits): folder for digits, folder in own.items() if f"{rank.folder.name}_{digits}" == folder.name}
    ranks = _count(config.get("data_parallel_size")) or len(numbered)
    if sorted(numbered) != list(range(ranks)):
        raise unproved(
            "the folders of data-parallel ranks are not those of the run",
            path=rank.path,
            expected=f"{ranks} folders {rank.folder.name}_NNN with an {OPTIMIZER_PART}",
            found=", ".join(folder.name for folder in numbered.values()) or "none",
        )
    files = read_torch_files(numbered[number].location.open(OPTIMIZER_PART) for number in range(ranks))
    return tuple(file.root.get(_OPTIMIZER) if isinstance(file.root, dict) else None for file in files)


def _heads_on_a_rank(config: Mapping[str, Any], tensor: int, first: RankFile) -> int:
    """Attention heads of one tensor-parallel rank, which the order of rows before version 2 depends on; else 0.

    Raises:
        FormatError: they are needed and not known.
    """
    if first.version >= GROUPED_SINCE:
        return 0
    return of_ranks.heads_on_a_rank(config, "megatron-args", tensor, first.path, "before checkpoint_version 2")


def _stored(ranks: Mapping[Place, RankFile], distributed: Mapping[str, TorchContents]) -> dict[str, LazyTensor]:
    """Every tensor of models and optimizers, as stored."""
    tensors: dict[str, LazyTensor] = {}
    for rank in ranks.values():
        folder = rank.folder.name
        for key in (*rank.chunks.values(), _OPTIMIZER):
            tensors.update(_leaves(f"{folder}/{key}", rank.root.get(key)))
        if folder in distributed:
            tensors.update(_leaves(f"{folder}/{_DISTRIBUTED}", distributed[folder].root))
    return tensors


def _leaves(prefix: str, root: Any) -> Iterator[tuple[str, LazyTensor]]:
    for path, leaf in find_leaves(root, lambda value: isinstance(value, LazyTensor)):
        parts = [_key(part) for part in path]
        if parts[-1:] != ["_extra_state"] and not (parts and parts[-1].endswith("._extra_state")):
            yield ".".join([prefix, *parts]), leaf


def _key(part: Any) -> str:
    """A key as Python shows it: the distributed optimizer's are pairs of element types."""
    return f"({', '.join(str(to_plain(one)) for one in part)})" if isinstance(part, tuple) else str(part)


def _objects(
    first: RankFile, ranks: Mapping[Place, RankFile], distributed: Mapping[str, TorchContents]
) -> dict[str, Any]:
    taken = {*first.chunks.values(), _OPTIMIZER, *_PER_RANK_STATE}
    objects = {str(key): value for key, value in first.root.items() if key not in taken}
    for rank in ranks.values():
        for key in (_OPTIMIZER, *_PER_RANK_STATE):
            if key in rank.root:
                objects[f"{rank.folder.name}/{key}"] = rank.root[key]
        if rank.folder.name in distributed:
            objects[f"{rank.folder.name}/{_DISTRIBUTED}"] = distributed[rank.folder.name].root
    return objects


def _warnings(
    iteration: Iteration, first: RankFile, opened: Sequence[RankFile | None], contents: Iterable[TorchContents]
) -> list[str]:
    found = []
    if not first.arguments:
        found.append("the rank files hold no args: the parallel layout is taken from the folders' names")
    if iteration.number is not None and first.iteration not in (None, iteration.number):
        found.append(f"the folder is of iteration {iteration.number}, but the files in it are of {first.iteration}")
    if any(rank is None for rank in opened):
        found.append("the optimizer is stored per data-parallel rank (optim.pt of 2022-12 to 2023-06)")
    for file in contents:
        found.extend(warning for warning in file.warnings if warning not in found)
    return found


def _checksums(contents: Iterable[TorchContents]) -> Iterator[StoredChecksum]:
    for file in contents:
        for record in file.records:
            if record.crc or not record.source.size:
                yield StoredChecksum(record.name, record.source, record.crc)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
