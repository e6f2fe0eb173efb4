"""What ``torch.distributed.checkpoint.save`` writes with: an ordinary DCP directory, through the engine's files."""

from __future__ import annotations

import os
import pickle
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from anyckpt.data_classes import dataclass
from anyckpt.engine.execute import DEFAULT_MEMORY
from anyckpt.engine.manifest import ManifestEntry
from anyckpt.errors import FormatError, UsageError
from anyckpt.operations.steps.live import Live
from anyckpt.torch.rank_files import RankFiles, write_files
from anyckpt.torch.shared_folder import SharedFolder, discard_here

_VERSION = "1.0.0"  # torch 2.13 torch/distributed/checkpoint/filesystem.py CURRENT_DCP_VERSION


@dataclass(frozen=True)
class _Number:
    """What the coordinator tells each rank: which files are its own."""

    number: int


@dataclass(frozen=True)
class _Written(WriteResult):
    """An item that was written; a rank's first one brings what the manifest says of its files."""

    entries: tuple[ManifestEntry, ...] = ()


class Writer(StorageWriter):
    """Writes what ``torch.distributed.checkpoint.save`` plans, as an ordinary DCP directory.

    >>> dcp.save(state, storage_writer=anyckpt.torch.dcp.Writer("run/step_100"))            # doctest: +SKIP
    >>> dcp.async_save(state, storage_writer=anyckpt.torch.dcp.Writer("run/step_100"))      # doctest: +SKIP

    It differs from torch's own in how it writes: past the page cache, by several threads, with a digest of everything
    for ``anyckpt verify``, and durably into a hidden directory beside the path, which gets its name when every rank is
    done.  A directory that is there keeps what else it holds, and a checkpoint in it is replaced when the new one is
    whole.  What a save that failed had written is removed when its writer is, or by the next save to the same path.

    Args:
        path: of the checkpoint; ``checkpoint_id`` of torch's functions takes its place.  Every rank must reach it.
        overwrite: replace a checkpoint that is there.
        workers: threads of each rank; as many as processors, up to 8, if None.
        memory: bytes that each rank uses for blocks in flight.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = True,
        workers: int | None = None,
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        self._path = os.fspath(path)
        self._overwrite = overwrite
        self._workers = workers
        self._memory = memory
        self._save_id = str(uuid.uuid4())
        self._shared: SharedFolder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process that saves (``async_save`` in one) begins for itself."""
        return {**self.__dict__, "_shared": None}

    @property
    def checkpoint_id(self) -> str:
        """The path that is written."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self._path = os.fspath(checkpoint_id)
        self._save_id = str(uuid.uuid4())
        self._shared = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a save.

        Raises:
            OutputError: a checkpoint is there that must stay.
            UsageError: ranks are to save without one that finishes for all.
        """
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "is written by ranks of which none learns when all are done, and would look whole before it is",
                path=self._path,
                remedy="leave use_collectives as it is, or write with torch's FileSystemWriter",
            )
        self._shared = SharedFolder(self._path)
        if is_coordinator:
            self._shared.check_may_replace(self._overwrite)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self._path, save_id=self._save_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        shared = self._begun()
        shared.begin()
        weakref.finalize(self, discard_here, shared, os.getpid())
        return [replace(plan, storage_data=_Number(number)) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write a rank's items into files of its own, durably.

        Raises:
            OutputError: the disk is full, or the system refuses.
            UsageError: a tensor has no elements in memory that can be written.
        """
        number: _Number = plan.storage_data
        files, live, found = RankFiles(number.number), Live(), []
        for item in plan.items:
            found.append((item, _add(files, live, item, planner.resolve_data(item))))
        laid_out = files.plan()
        entries = tuple(write_files(laid_out, self._begun().folder, workers=self._workers, memory=self._memory))
        written: list[WriteResult] = [
            _Written(
                item.index, place.length, _StorageInfo(place.file, place.offset, place.length), () if row else entries
            )
            for row, (item, place) in enumerate(found)
        ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Give the checkpoint its index and its name.

        Raises:
            OutputError: a rank's file is not there, or the system refuses.
        """
        written = [one for of_rank in results for one in of_rank]
        entries = [entry for one in written if isinstance(one, _Written) for entry in one.entries]
        files = dict.fromkeys(one.storage_data.relative_path for one in written)

        def index(names: Mapping[str, str]) -> bytes:
            metadata.storage_data = {
                one.index: replace(one.storage_data, relative_path=names[one.storage_data.relative_path])
                for one in written
            }
            return pickle.dumps(metadata)

        if hasattr(metadata, "version"):
            metadata.version = _VERSION
        metadata.storage_meta = StorageMeta(save_id=self._save_id)
        self._begun().publish(files, index, entries)
        self._shared = None

    def _begun(self) -> SharedFolder:
        if self._shared is None:
            raise UsageError("no save was begun", path=self._path, remedy="give the writer to dcp.save")
        return self._shared


def _add(files: RankFiles, live: Live, item: WriteItem, data: Any) -> Any:
    name = item.index.fqn
    if item.type == WriteItemType.BYTE_IO:
        return files.add_bytes(data.getvalue())
    try:
        tensor = live.tensor(data)
    except (FormatError, UsageError) as error:
        raise UsageError(
            error.problem, tensor=name, expected=error.expected, found=error.found, remedy=error.remedy
        ) from None
    if tensor is None:
        raise UsageError("is planned as a tensor and is none", tensor=name, found=f"a {type(data).__name__}")
    planned = item.tensor_data
    whole = planned is None or tuple(planned.chunk.sizes) == tuple(planned.size)
    return files.add_tensor(name, tensor, "" if whole or planned is None else f"chunk at {list(planned.chunk.offsets)}")
