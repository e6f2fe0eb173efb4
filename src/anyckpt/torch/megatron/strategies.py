"""Strategies for ``megatron.core.dist_checkpointing``, given as its own torch_dist strategy is; the only ones here that
import Megatron-Core.

>>> strategy = anyckpt.torch.megatron.SaveStrategy()                                        # doctest: +SKIP
>>> dist_checkpointing.save(state, path, sharded_strategy=strategy)                         # doctest: +SKIP
>>> dist_checkpointing.load(state, path, sharded_strategy=anyckpt.torch.megatron.LoadStrategy())   # doctest: +SKIP

What is saved is an ordinary ``torch_dist`` checkpoint, and any is loaded.  The two go into Megatron-Core's
``FullyParallelSaveStrategyWrapper`` and ``FullyParallelLoadStrategyWrapper`` as well.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy, LoadShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from anyckpt.containers.dcp import read_dcp
from anyckpt.data_classes import dataclass
from anyckpt.engine.execute import DEFAULT_MEMORY
from anyckpt.storage.local_file import close_open_files
from anyckpt.storage.location import look_at
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.integrity import ObjectRecord, PieceRecord, RankRecord, survey
from anyckpt.torch.live import LiveState
from anyckpt.torch.megatron.loading import Found, found_in_folder, values
from anyckpt.torch.megatron.rank_writing import Layout, files_of, laid_out, write_rank, written
from anyckpt.torch.megatron.state import live_state, parts_of
from anyckpt.torch.objects import Frozen, Thawing
from anyckpt.torch.rank_files import ItemPlace
from anyckpt.torch.reading import torch_dtype
from anyckpt.torch.shared_folder import SharedFolder, discard_here

log = logging.getLogger("anyckpt.torch")

_VERSION = "1.0.0"  # torch 2.13 torch/distributed/checkpoint/filesystem.py CURRENT_DCP_VERSION


@dataclass(frozen=True)
class _Placed:
    """What a rank tells of what it will write: of each item where, for the index."""

    record: RankRecord
    types: dict[str, torch.dtype]
    chunks: tuple[tuple[Any, ItemPlace], ...]
    objects: tuple[tuple[str, ItemPlace], ...]


@dataclass(frozen=True)
class _Save:
    """A save whose ranks know what they write and where."""

    ranks: Ranks
    shared: SharedFolder
    layout: Layout
    tensors: list[torch.Tensor]
    placed: list[_Placed]


@dataclass(frozen=True)
class _Before:
    """An earlier save, whose places do for the next one of the same structure.

    Attributes:
        structure: what this rank had, but for contents.
        placed: of all ranks.
    """

    structure: Any
    placed: list[_Placed]


class SaveStrategy(AsyncSaveShardedStrategy):  # type: ignore[misc]
    """Writes what is sharded as ``torch_dist``: each rank its own, past the page cache, into a hidden directory beside.

    All of it goes into the checkpoint's directory when every rank has written, the index last.  Every rank must reach
    the directory.  Ranks whose shards overlap, leave holes, or are of other shapes are refused, by name.

    Args:
        workers: threads of each rank; as many as processors, up to 8, if None.
        memory: bytes that each rank uses for blocks in flight.
        use_cached_ckpt_structure: plan the first save only; later ones in which every rank has the same shards, and
            objects of the same size, take its plan, and ranks are not compared.  Others are planned again.  An
            attribute, too, as Megatron-Core's own strategy has it.
    """

    def __init__(
        self, *, workers: int | None = None, memory: int = DEFAULT_MEMORY, use_cached_ckpt_structure: bool = False
    ) -> None:
        super().__init__("torch_dist", 1)
        self._workers = workers
        self._memory = memory
        self._before: _Before | None = None
        self.use_cached_ckpt_structure = use_cached_ckpt_structure

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str | os.PathLike[str]) -> None:
        """Write, and return when everything is durable; collective.

        Raises:
            AnyckptError: on every rank, whichever rank it happened on.
        """
        save = self._prepared(sharded_state_dict, checkpoint_dir)
        try:
            save.ranks.together(
                lambda: write_rank(save.layout, save.tensors, save.shared.folder, self._workers, self._memory),
                "to the end of writing",
            )
            _finish(save)
        except BaseException:
            save.shared.discard()
            raise

    def async_save(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str | os.PathLike[str]) -> AsyncRequest:
        """Plan a save, which the request carries out: Megatron-Core's queues take it; collective.

        ``preload_fn`` copies the tensors to the host's memory, and training may go on; ``async_fn`` writes the copies,
        in a process of its own; what finalizes is collective and tells what went wrong on any rank.

        Raises:
            AnyckptError: on every rank, whichever rank it happened on.
        """
        save = self._prepared(sharded_state_dict, checkpoint_dir)
        write = partial(_write_staged, workers=self._workers, memory=self._memory)
        return AsyncRequest(
            write,
            (save.layout, save.tensors, save.shared.folder),
            [partial(_finish, save)],
            preload_fn=partial(_staged, save.tensors),
        )

    def _prepared(self, state: Mapping[str, Any], folder: str | os.PathLike[str]) -> _Save:
        ranks = Ranks()
        shared = SharedFolder(folder)
        before = self._before if self.use_cached_ckpt_structure else None
        kept: list[tuple[LiveState, Layout, list[torch.Tensor], Any]] = []

        def look() -> bool:
            if ranks.rank == 0:
                shared.begin()
            live = live_state(state)
            live.objects = [one for one in live.objects if one.cell is not None]
            layout, tensors = laid_out(live, ranks.rank)
            structure = _structure(live, layout)
            kept.append((live, layout, tensors, structure))
            return before is not None and before.structure == structure

        try:
            known = all(ranks.gather(look, "to plan a save"))
            live, layout, tensors, structure = kept[0]
            if known and before is not None:
                placed = before.placed
            else:
                placed = ranks.gather(lambda: _placed(live, layout, tensors), "to plan a save")
                ranks.broadcast(lambda: _check([one.record for one in placed]), what="to check what is saved")
                self._before = _Before(structure, placed) if self.use_cached_ckpt_structure else None
        except BaseException:
            shared.discard()
            raise
        save = _Save(ranks, shared, layout, tensors, placed)
        weakref.finalize(save, discard_here, shared, os.getpid())
        return save


def _structure(live: LiveState, layout: Layout) -> Any:
    """All that a plan depends on."""
    return (
        _rows(live),
        tuple((one.name, one.replica) for one in live.objects),
        [len(data) for _, data in layout.objects],
    )


def _placed(live: LiveState, layout: Layout, tensors: list[torch.Tensor]) -> _Placed:
    _, objects, chunks = files_of(layout, tensors)
    return _Placed(
        _record(live),
        {chunk.name: tensor.dtype for chunk, tensor in zip(layout.chunks, tensors, strict=True)},
        tuple(zip(layout.chunks, chunks, strict=True)),
        tuple(zip((name for name, _ in layout.objects), objects, strict=True)),
    )


def _staged(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in the host's memory."""
    copies = [tensor.detach().to("cpu", copy=True, non_blocking=True) for tensor in tensors]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _write_staged(
    layout: Layout, tensors: list[torch.Tensor], folder: str, *, workers: int | None, memory: int
) -> None:
    """Write; what goes wrong is in the record, which those that finalize read.

    It is not raised: Megatron-Core's persistent process would end, and its trainers wait for it for ever.
    """
    try:
        write_rank(layout, tensors, folder, workers, memory)
    except Exception:
        log.exception("rank %d could not write its part of a checkpoint", layout.rank)


def _record(live: LiveState) -> RankRecord:
    """What a rank tells of its state, without what its objects are; whether grids of them are whole is Megatron's."""
    objects = {one.name: ObjectRecord(None if one.replica else Frozen(b""), None, one.replica) for one in live.objects}
    return RankRecord(_rows(live), objects, {})


def _rows(live: LiveState) -> tuple[PieceRecord, ...]:
    return tuple((one.name, one.dtype, one.shape, one.offset, one.sizes, one.replica) for one in live.pieces)


def _check(records: Sequence[RankRecord]) -> None:
    survey(records)


def _finish(save: _Save) -> None:
    """Make what all ranks have written a checkpoint; collective.

    Raises:
        AnyckptError: on every rank, if one could not write; the directory is left as it was.
    """
    ranks, shared = save.ranks, save.shared
    try:
        found = ranks.gather(lambda: written(shared.folder, ranks.rank), "to the end of writing")
        entries = [entry for of_rank in found for entry in of_rank]
        places = [place for one in save.placed for _, place in (*one.chunks, *one.objects)]
        files = dict.fromkeys(place.file for place in places)
        ranks.broadcast(
            lambda: shared.publish(files, partial(_index, save.placed), entries, beside=("common.pt",)),
            what="to the end of a save",
        )
    except BaseException:
        shared.discard()
        raise


def _index(placed: list[_Placed], names: Mapping[str, str]) -> bytes:
    """``.metadata``, as torch pickles it."""
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}

    def put(key: MetadataIndex, place: ItemPlace) -> None:
        storage[key] = _StorageInfo(names[place.file], place.offset, place.length)

    for one in placed:
        for chunk, place in one.chunks:
            entry = state.get(chunk.name)
            if entry is None:
                properties = TensorProperties(dtype=one.types[chunk.name])
                entry = state[chunk.name] = TensorStorageMetadata(properties, torch.Size(chunk.whole), [])
            entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.sizes)))
            put(MetadataIndex(chunk.name, torch.Size(chunk.offset)), place)
        for name, place in one.objects:
            state[name] = BytesStorageMetadata()
            put(MetadataIndex(name), place)
    metadata = Metadata(state, storage_data=storage, storage_meta=StorageMeta())
    if hasattr(metadata, "version"):
        metadata.version = _VERSION
    return pickle.dumps(metadata)


class LoadStrategy(LoadShardedStrategy):  # type: ignore[misc]
    """Loads what is sharded from any ``torch_dist`` checkpoint, also of older releases; no pickle in it is executed.

    Each rank reads the slices that it needs into its tensors' memory, whatever the layout that was saved.

    Args:
        classes: of objects that the checkpoint may hold beside plain ones.
        workers: threads of each rank; as many as processors, up to 8, if None.
    """

    cached_global_metadata: None = None

    def __init__(self, *, classes: Iterable[Any] = (), workers: int | None = None) -> None:
        super().__init__()
        self._classes = tuple(classes)
        self._workers = workers

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def load(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str | os.PathLike[str]) -> Any:
        """What is sharded, in the state's structure; collective only in that Megatron-Core calls it so.

        Raises:
            FormatError: it is no checkpoint, or a damaged one.
            MappingError: it has not what is asked for, or with another shape; all of it is named.
            UnsafeError: an object is of a class that nobody allowed.
        """
        parts = parts_of(sharded_state_dict)
        thawing = Thawing((io.BytesIO, *self._classes))
        try:
            return parts.loaded(values(parts, _opened(checkpoint_dir), thawing, workers=self._workers))
        finally:
            close_open_files()  # training goes on for long, and the checkpoint may be deleted meanwhile

    def load_tensors_metadata(self, checkpoint_dir: str | os.PathLike[str], metadata: Any = None) -> dict[str, Any]:
        """Every tensor as one that no rank divides, without elements."""
        return _tensors(_opened(checkpoint_dir))

    def load_sharded_metadata(self, checkpoint_dir: str | os.PathLike[str]) -> dict[str, Any]:
        """The same with the sharded objects, by unique key."""
        found = _opened(checkpoint_dir)
        return {**{name: ShardedObject.empty_from_unique_key(name) for name in found.objects}, **_tensors(found)}

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """Nothing: what cannot be read says so."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Nothing: what cannot be read says so."""


def _opened(path: str | os.PathLike[str]) -> Found:
    return found_in_folder(os.fspath(path), read_dcp(look_at(path).folder()))


def _tensors(found: Found) -> dict[str, Any]:
    return {
        name: ShardedTensor.from_rank_offsets(
            name, torch.empty(tensor.shape, dtype=torch_dtype(name, tensor.dtype), device="meta")
        ).without_data()
        for name, tensor in found.tensors.items()
    }
