"""What ``torch.distributed.checkpoint.load`` reads from: DCP directories, and whatever else is a checkpoint."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from anyckpt.containers.dcp import METADATA, read_dcp
from anyckpt.containers.dcp.items import Unread
from anyckpt.containers.torch_file import read_torch
from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, UsageError
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.storage.local_file import close_open_files
from anyckpt.storage.location import look_at
from anyckpt.tensor import LazyTensor
from anyckpt.torch.objects import Thawing
from anyckpt.torch.reading import Target, fill, torch_dtype


@dataclass(frozen=True)
class _Opened:
    """A checkpoint as torch's planner sees it."""

    tensors: Mapping[str, LazyTensor]
    objects: Mapping[str, Callable[[], Any]]
    paths: Mapping[str, tuple[str | int, ...]]


class Reader(StorageReader):
    """Reads what ``torch.distributed.checkpoint.load`` plans, from any checkpoint that anyckpt opens.

    >>> dcp.load(state, storage_reader=anyckpt.torch.dcp.Reader("run/step_100"))             # doctest: +SKIP
    >>> dcp.load(model.state_dict(), storage_reader=anyckpt.torch.dcp.Reader("m.nemo"))      # doctest: +SKIP

    Each rank reads the slices that it needs into its tensors, whatever the layout that was saved.  Of a DCP directory
    the names are torch's; of any other checkpoint those under which it is stored, so that the state that is loaded must
    have the same ones.

    No pickle of the checkpoint is executed: objects are built of plain data, a few well-known classes and those that
    ``classes`` names, and torch gets these.

    Args:
        path: of the checkpoint; ``checkpoint_id`` of torch's functions takes its place.
        classes: of objects that the checkpoint may hold besides, where you trust it with whatever arguments it has.
        workers: threads of each rank; as many as processors, up to 8, if None.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, classes: Iterable[Any] = (), workers: int | None = None
    ) -> None:
        self._path = os.fspath(path)
        self._classes = tuple(classes)
        self._workers = workers
        self._opened: _Opened | None = None

    @property
    def checkpoint_id(self) -> str:
        """The path that is read."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self._path = os.fspath(checkpoint_id)
        self._opened = None

    # Without torch's keywords, with which it would look a second time, for an index of this rank's own.
    def read_metadata(self) -> Metadata:
        """What the checkpoint holds; each tensor is one chunk, of which any slice can be read.

        Raises:
            FormatError: it is no checkpoint, or a damaged one.
            UsageError: torch has no such element type as a tensor has.
        """
        opened = self._opened = _open(self._path)
        state: dict[str, Any] = {name: BytesStorageMetadata() for name in opened.objects}
        for name, tensor in opened.tensors.items():
            shape = torch.Size(tensor.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * tensor.ndim), shape)
            state[name] = TensorStorageMetadata(TensorProperties(torch_dtype(name, tensor.dtype)), shape, [chunk])
        paths = {name: tuple(path) for name, path in opened.paths.items() if name in state}
        return Metadata(state, planner_data=paths or None, storage_data={}, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._opened is None:
            self._opened = _open(self._path)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a rank needs into its tensors, and hand its objects to the planner.

        Raises:
            FormatError: bytes are missing or damaged.
            UnsafeError: an object asks for what is not allowed.
        """
        opened = self._opened
        if opened is None:
            raise UsageError("no load was begun", path=self._path, remedy="give the reader to dcp.load")
        targets: list[Target] = []
        read: list[tuple[Any, torch.Tensor]] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._saved(name, opened.objects[name]))
                continue
            box = opened.tensors[name].box(tuple(item.storage_offsets), tuple(item.lengths))
            target = planner.resolve_tensor(item).detach()
            targets.append(Target(name, box, target))
            read.append((item, target))
        try:
            fill(targets, workers=self._workers)
        finally:
            close_open_files()  # training goes on for long, and the checkpoint may be deleted meanwhile
        for item, target in read:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _saved(self, name: str, read: Callable[[], Any]) -> io.BytesIO:
        """An object as torch saves it, so that the planner can load it."""
        try:
            value = Thawing(self._classes).object(read())
        except AnyckptError as error:
            error.path, error.tensor = error.path or self._path, error.tensor or name
            raise
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        return buffer


def _open(path: str) -> _Opened:
    location = look_at(path)
    names = location.names if location.is_directory else ()
    if METADATA in names or any(name.startswith("__") and name.endswith(METADATA) for name in names):
        contents = read_dcp(location.folder())
        stored = {name: partial(_stored, value) for name, value in contents.objects.unread().items()}
        return _Opened(contents.tensors, stored, contents.paths or {})
    checkpoint = open_checkpoint(path)
    objects = checkpoint.objects
    return _Opened(
        checkpoint.tensors, {name: partial(objects.__getitem__, name) for name in objects}, checkpoint.key_paths
    )


def _stored(value: Any) -> Any:
    """An object as it is stored, one of Megatron-Core's with the list that is round it."""
    return read_torch(value.archive()).root if isinstance(value, Unread) else value
