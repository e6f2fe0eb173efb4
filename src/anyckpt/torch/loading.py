"""Loading into live state, on whatever layout: each rank reads its slices of a checkpoint's whole tensors in place.

``load(state, path)`` fills a nested state dict of any layout; ``load(path)`` gives the whole nested state of any
format, mapped from its files where these have tensors as they are in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, MappingError, UnsafeError, alike, few
from anyckpt.formats.shared import nesting
from anyckpt.indexing import Shape
from anyckpt.operations.steps.joining import check_whole, open_checkpoint
from anyckpt.operations.verify import verify
from anyckpt.storage.local_file import close_open_files
from anyckpt.storage.read_count import ReadCount, counting
from anyckpt.storage.requests import at_once
from anyckpt.tensor import LazyTensor
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.describing import to_be_filled
from anyckpt.torch.finding import Finder
from anyckpt.torch.live import LiveObject, LivePiece, LiveState, is_of_optimizer
from anyckpt.torch.objects import Thawing
from anyckpt.torch.options import Options, check_agreed
from anyckpt.torch.passing import pass_on, readers
from anyckpt.torch.reading import Target, check_fillable, filling, torch_dtype
from anyckpt.torch.reading import fill as fill_targets
from anyckpt.torch.saving import asked
from anyckpt.views import TorchFiles

log = logging.getLogger("anyckpt.torch")

_AGREED = ("verify", "parallel_load", "exchange", "strictness", "load_optimizer")


@dataclass(frozen=True)
class LoadReport:
    """What a load did, as one rank sees it.

    Attributes:
        path: the checkpoint.
        format: its format.
        bytes_read: from its files, by this rank.
        unexpected: names that the state of some rank has and the checkpoint lacks; they are as they were.
        missing: names that the checkpoint has and no rank's state.
    """

    path: str
    format: str
    bytes_read: int
    unexpected: tuple[str, ...]
    missing: tuple[str, ...]


@overload
def load(
    state: str | os.PathLike[str],
    path: None = None,
    options: Options | None = None,
    *,
    classes: Iterable[Any] = (),
    group: Any = None,
    **settings: Any,
) -> dict[str, Any]: ...
@overload
def load(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    options: Options | None = None,
    *,
    classes: Iterable[Any] = (),
    group: Any = None,
    **settings: Any,
) -> LoadReport: ...
def load(
    state: Any,
    path: Any = None,
    options: Options | None = None,
    *,
    classes: Iterable[Any] = (),
    group: Any = None,
    **settings: Any,
) -> Any:
    """Fill a state from a checkpoint; or, given a path alone, give all that it holds.

    With a state, every rank calls it, each with its own part of the model in whatever layout; tensors are filled in
    place and objects are exchanged in the dictionaries that hold them.  If it fails, the state is in part as it was.
    A state with sharded entities of Megatron-Core's becomes what its ``dist_checkpointing.load`` gives: tensors and
    objects in place of entities, and the checkpoint's common state.

    Args:
        state: a nested state dict, as for ``save``; or the path of a checkpoint of any format.
        path: the checkpoint.
        options: see ``Options``; its fields may be given as keywords instead.
        classes: classes and functions that objects of the checkpoint may be built of, besides plain data and the
            well-known (see ``Thawing``).
        group: the ranks that load together; all if None.

    Returns:
        LoadReport: of a load into a state.
        dict: of a path alone, tensors and objects as they were nested.

    Raises:
        FormatError: it is no checkpoint, or a damaged one.
        MappingError: names, shapes or element types do not fit; every rank raises it.
        RankError: another rank failed otherwise, or did not come.
        UnsafeError: an object that the state asks for is of a class that is not built unasked.
        UsageError: the state or an option is not possible.
    """
    chosen = asked(options, settings)
    if path is None:
        if chosen.verify:
            _check(state)
        return _whole(open_checkpoint(state), classes, chosen)
    try:
        return fill(
            lambda: to_be_filled(state, chosen, lambda: open_checkpoint(path)),
            path,
            chosen,
            Ranks(group, timeout=chosen.timeout),
            classes,
        )
    finally:
        close_open_files()  # training goes on for long, and the checkpoint may be deleted meanwhile


def fill(
    describe: Callable[[], LiveState],
    path: str | os.PathLike[str],
    options: Options,
    ranks: Ranks,
    classes: Iterable[Any] = (),
) -> LoadReport:
    """Load into what ``describe`` gives; otherwise as ``load``."""
    count = ReadCount()
    with counting(count):
        if ranks.size > 1:
            check_agreed(ranks.gather(lambda: options.to_agree_on(_AGREED, path), "to begin a load"))
        if options.verify:
            ranks.broadcast(lambda: _check(path), what="to the comparison of a checkpoint with its digests")
        ready = ranks.together(lambda: _Load(describe(), open_checkpoint(path), options), "to open a checkpoint")
        told = ranks.gather(ready.names, "to compare names")
        unexpected, missing = ready.settle(told)
        share = readers([one.held for one in told], ranks) if options.parallel_load else None
        ranks.together(lambda: ready.read(None if share is None else share.own), "to the end of reading")
        if share is not None:
            pass_on(share, ready.live.pieces, ranks, options.exchange)
        ranks.together(lambda: ready.put_objects(classes), "to the end of a load")
    checkpoint = ready.checkpoint
    return LoadReport(checkpoint.path, checkpoint.format, count.nbytes, unexpected, missing)


def _check(path: str | os.PathLike[str]) -> None:
    found = verify(path)
    if not found:
        raise MappingError(
            "the checkpoint is not what was written",
            path=os.fspath(path),
            found="; ".join(f"{one.where}: {one.problem}" for one in found.problems[:3]),
            remedy="load another checkpoint, or copy this one again",
        )


@dataclass(frozen=True)
class _Names:
    """What a rank tells the others of what it asks for.

    Attributes:
        wanted: names.
        unexpected: those that the checkpoint lacks.
        held: name, first index, lengths and bytes of each box of a tensor that is there.
    """

    wanted: frozenset[str]
    unexpected: tuple[str, ...]
    held: tuple[tuple[str, Shape, Shape, int], ...]


class _Load:
    """What a rank's state asks for, and where the checkpoint has it."""

    def __init__(self, live: LiveState, checkpoint: Checkpoint, options: Options) -> None:
        check_whole(checkpoint)
        if not options.load_optimizer:
            live.leave_out_optimizer()
        for piece in live.pieces:
            check_fillable(piece.name, piece.tensor)
        self.live = live
        self.checkpoint = checkpoint
        self._options = options
        self._find = Finder(checkpoint)
        self._tensors: list[tuple[LivePiece, LazyTensor, str]] = []
        self._objects: list[tuple[LiveObject, Any]] = []
        self._unexpected: list[str] = []
        self._used: set[str] = set()
        for piece in live.pieces:
            found = self._find.tensor(piece.name, live.paths.get(piece.name))
            if found is None:
                self._unexpected.append(piece.name)
            else:
                name, tensor = found
                self._used.add(name)
                self._tensors.append((piece, self._fitting(piece, tensor), name))
        for one in live.objects:
            known = self._find.object(one.name, live.paths.get(one.name, (one.name,)))
            if known is None:
                if not _is_empty(one.value):
                    self._unexpected.append(one.name)
            else:
                names, value = known
                self._used.update(names)
                self._objects.append((one, value))

    def names(self) -> _Names:
        held = tuple((piece.name, piece.offset, piece.sizes, piece.nbytes) for piece, _, _ in self._tensors)
        return _Names(frozenset(self._used), tuple(dict.fromkeys(self._unexpected)), held)

    def settle(self, told: Sequence[_Names]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names that only the state and only the checkpoint has, once it is clear that they are no error.

        Raises:
            MappingError: they are, by the strictness that was asked for.
        """
        mode = self._options.strictness
        unexpected = tuple(dict.fromkeys(name for one in told for name in one.unexpected))
        used = frozenset().union(*(one.wanted for one in told))
        taken = used if self.live.replace_all is None else {*used, *self._find.common()}
        missing = tuple(name for name in self._find.names() if name not in taken and not self._is_left(name))
        if mode == "ignore_all":
            return unexpected, missing
        if unexpected and mode in ("assume_ok_unexpected", "raise_unexpected", "raise_all"):
            raise self._refusal("the state asks for what the checkpoint does not have", unexpected, self._find.names())
        left = [name for name in missing if name.startswith(tuple(f"{key}." for key in self.live.owners) or ("\0",))]
        if left and mode not in ("log_all", "return_all"):
            raise self._refusal(
                "the checkpoint has what the object that is to take it does not have yet",
                left,
                (),
                "give get_state_dict(model, optimizer), which makes an optimizer's state, and set_state_dict it",
            )
        if missing and mode == "raise_all":
            raise self._refusal("the checkpoint has what no rank's state asks for", missing, unexpected)
        if unexpected and mode in ("log_unexpected", "log_all"):
            log.warning("%s lacks %s", self.checkpoint.path, few(unexpected))
        if missing and mode == "log_all":
            log.warning("%s has what no rank's state asks for: %s", self.checkpoint.path, few(missing))
        return unexpected, missing

    def _refusal(
        self,
        problem: str,
        names: Sequence[str],
        others: Iterable[str],
        remedy: str = "give the state of the model that was saved, or another strictness",
    ) -> MappingError:
        meant = alike(names[0], (name for name in others if name != names[0]))
        kinds = self._kinds(names[0])
        return MappingError(
            problem,
            path=self.checkpoint.path,
            tensor=names[0],
            found=few(names) + (kinds or (f"; {names[0]!r} resembles {meant}" if meant else "")),
            remedy=remedy,
        )

    def _kinds(self, name: str) -> str:
        """What is said of a name that both have, one as a tensor and the other as an object."""
        checkpoint, in_state = self.checkpoint, {piece.name for piece in self.live.pieces}
        if name in checkpoint.objects and name in in_state:
            return f"; {name!r} is an object there and a tensor in the state"
        if name in checkpoint.tensors and name not in in_state:
            return f"; {name!r} is a tensor there and none in the state"
        return ""

    def _fitting(self, piece: LivePiece, tensor: LazyTensor) -> LazyTensor:
        """The tensor of the piece's shape and type, if it can be had."""
        path, name = self.checkpoint.path, piece.name
        if tensor.shape != piece.shape and not (piece.resizable and tensor.ndim == len(piece.shape)):
            raise MappingError(
                "has another shape in the checkpoint",
                path=path,
                tensor=name,
                expected=list(piece.shape),
                found=list(tensor.shape),
                remedy="give the state of the model that was saved",
            )
        if tensor.dtype == piece.dtype:
            return tensor
        if self._options.cast and tensor.dtype.is_floating and piece.dtype.is_floating:
            return tensor.cast(piece.dtype)
        raise MappingError(
            "has another element type in the checkpoint",
            path=path,
            tensor=name,
            expected=piece.dtype.name,
            found=tensor.dtype.name,
            remedy="pass cast=True to round its values" if piece.dtype.is_floating else "give a tensor of that type",
        )

    def read(self, own: frozenset[tuple[str, Shape]] | None) -> None:
        """Fill the pieces; of those that several ranks have, only this rank's own if these are said."""
        tasks: list[Callable[[], None]] = []
        for piece, tensor, name in self._tensors:
            if own is None or (piece.name, piece.offset) in own:
                tasks += filling(piece, tensor, name)
        at_once(tasks, self._options.workers)

    def put_objects(self, classes: Iterable[Any]) -> None:
        """Exchange the objects, and give what is owed to modules and optimizers."""
        thawing = Thawing(classes)
        for one, value in self._objects:
            try:
                one.put(thawing.object(value))
            except AnyckptError as error:
                error.path, error.tensor = error.path or self.checkpoint.path, error.tensor or one.name
                raise
        for finish in self.live.finish:
            finish()
        if self.live.replace_all is not None:
            names = (name for name in self._find.common() if not self._is_left(name))
            common = {name: thawing.object(self.checkpoint.objects[name]) for name in names}
            self.live.replace_all(common, {*self._unexpected, *self.live.left_out})

    def _is_left(self, name: str) -> bool:
        """Whether it is of an optimizer whose state nobody wants."""
        if self._options.load_optimizer:
            return False
        return is_of_optimizer(name, self.checkpoint.key_paths, self.live.optimizers)


def _is_empty(value: Any) -> bool:
    """Whether it is a dictionary that holds nothing: other software saves nothing of it."""
    return isinstance(value, Mapping) and not value


# -- everything ----------------------------------------------------------------------------------------------


def _whole(checkpoint: Checkpoint, classes: Iterable[Any], options: Options) -> dict[str, Any]:
    """All that a checkpoint holds, nested as it was."""
    check_whole(checkpoint)
    files, thawing = TorchFiles(), Thawing(classes)
    values: dict[str, Any] = {}
    inert: list[str] = []
    targets: list[Target] = []
    for name, tensor in checkpoint.tensors.items():
        try:
            if options.device is None:
                values[name] = files.tensor(tensor)
                continue
            kind = torch_dtype(name, tensor.dtype)
            values[name] = torch.empty(tensor.shape, dtype=kind, device=options.device)
            targets.append(Target(name, tensor, values[name]))
        except AnyckptError as error:
            error.path, error.tensor = error.path or checkpoint.path, error.tensor or name
            raise
    fill_targets(targets, workers=options.workers)
    for name, value in checkpoint.objects.items():
        try:
            values[name] = thawing.object(value)
        except UnsafeError as error:
            values[name] = value
            inert.append(f"{name} ({error.found})")
    if inert:
        log.warning("objects of classes that are not built unasked stay records: %s", few(inert))
    tuples = () if checkpoint.forms is None else checkpoint.forms.tuples()
    return nesting.nested(values, checkpoint.key_paths, checkpoint.original_keys, tuples)
