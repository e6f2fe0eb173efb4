"""Rank files of torch's fully sharded data parallelism, one ``torch.save`` per rank, as verl and SkyRL keep them.

A folder of ``model_world_size_N_rank_R.pt``, each a state dict of ``DTensor`` (FSDP2, and FSDP1 with a mesh) or
``ShardedTensor`` (FSDP1 without), beside ``optim_world_size_N_rank_R.pt``, ``extra_state_world_size_N_rank_R.pt`` and a
folder ``huggingface`` with configuration and tokenizer.

Facts: ``fsdp_checkpoint_manager.py`` and ``fsdp_model_merger.py`` of verl 0.2 to 0.6; SkyRL's trainer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from anyckpt.checkpoint import Checkpoint, TrainingState
from anyckpt.containers.torch_file import TorchContents, read_torch_files
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.containers.torch_file.distributed import Piece, is_sharded_tensor, mesh_of, piece_of, sharded_pieces
from anyckpt.containers.torch_file.values import DistributedTensor, brief
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, LastingError
from anyckpt.formats.format import Format
from anyckpt.formats.shared.hub_folder import other_files, read_json, tokenizer_of
from anyckpt.formats.shared.one_save import GATHER, apart
from anyckpt.indexing import Shape
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor, mosaic

_FILE = re.compile(
    r"(?P<kind>model|optim|extra_state)_world_size_(?P<world>\d{1,6})_rank_(?P<rank>\d{1,6})\.pt", re.ASCII
)
_SETTINGS = "fsdp_config.json"
_HUB_FOLDER = "huggingface"
_OPTIMIZER = "optimizer_states.0"
_COMPARED = 1 << 20


def _detect(location: Location) -> bool:
    return any((found := _FILE.fullmatch(name)) is not None and found["kind"] == "model" for name in location.names)


def read(location: Location) -> Checkpoint:
    """Open the files of all ranks as one model.

    The optimizer's state, if there is any, is joined too, under the names that PyTorch's own numbering gives it.

    Raises:
        FormatError: a rank is missing or of another save, or its parts do not make up whole tensors.
    """
    files = _rank_files(location, "model")
    settings = read_json(location.open(_SETTINGS)) if _SETTINGS in location.names else {}
    if type(settings.get("world_size")) is int and settings["world_size"] != len(files):
        raise apart(
            "the rank files are of another number of ranks than their settings",
            path=location.join(_SETTINGS),
            expected=f"world_size {len(files)}, as the files' names say",
            found=settings["world_size"],
        )
    opened = read_torch_files(map(location.place.open, files))
    joined = _Joined(location.path, len(files))
    states = [_state_dict(contents.root, file) for contents, file in zip(opened, files, strict=True)]
    tensors, objects = joined.join(states, files)
    warnings = list(dict.fromkeys(text for contents in opened for text in contents.warnings))
    warnings += joined.warnings
    optimizer, groups, checked = _optimizer(location, len(files), warnings)
    extra = sorted(name for name in location.names if (m := _FILE.fullmatch(name)) and m["kind"] == "extra_state")
    if extra:
        warnings.append(f"learning-rate scheduler and random states are not read: {extra[0]} and those of other ranks")
    hub = _hub_folder(location)
    config = read_json(hub.open("config.json")) if "config.json" in hub.names else {}
    tokenizer, artifacts = other_files(hub, "config.json")
    if hub.path == location.path:
        artifacts = {name: source for name, source in artifacts.items() if name != _SETTINGS and name not in extra}
    version = settings.get("FSDP_version")
    return Checkpoint(
        location.path,
        FORMAT.name,
        {**tensors, **optimizer},
        format_version=f"version {version}" if type(version) is int else None,
        dialect="hf" if config else None,
        state_prefixes=(f"{_OPTIMIZER}.",) if optimizer else (),
        objects={**objects, **groups},
        config=config,
        config_kind="hf" if config else None,
        tokenizer=tokenizer_of(tokenizer),
        artifacts=artifacts,
        training=TrainingState(has_optimizer=bool(optimizer), has_scheduler=bool(extra), has_rng=bool(extra)),
        warnings=warnings,
        details={"world_size": len(files), "sharding": joined.sharding},
        checksums=lambda: chain.from_iterable(map(stored_checksums, [*opened, *checked])),
    )


def _hub_folder(location: Location) -> Location:
    return location.at(_HUB_FOLDER) if location.is_folder(_HUB_FOLDER) else location


def _rank_files(location: Location, kind: str) -> list[str]:
    """The files of a kind in the order of ranks, every one of which is there.

    Raises:
        FormatError: one is missing, or there are those of several worlds.
    """
    found: dict[int, dict[int, str]] = {}
    for name in location.names:
        match = _FILE.fullmatch(name)
        if match is not None and match["kind"] == kind:
            found.setdefault(int(match["world"]), {})[int(match["rank"])] = location.join(name)
    if not found:
        return []
    if len(found) > 1:
        raise apart(
            "holds rank files of saves by different numbers of ranks",
            path=location.path,
            expected="one world size",
            found=", ".join(map(str, sorted(found))),
        )
    ((world, files),) = found.items()
    missing = [rank for rank in range(min(world, 1 << 16)) if rank not in files]
    if missing or len(files) != world:
        first = f"{kind}_world_size_{world}_rank_{missing[0]}.pt" if missing else "none"
        raise apart(
            f"{len(missing)} of {world} rank files are missing, such as {first}"
            if missing
            else "holds files of ranks that its world does not have",
            path=location.path,
            expected=f"ranks 0 to {world - 1}",
            found=f"{len(files)} files",
        )
    return [files[rank] for rank in range(world)]


def _state_dict(root: Any, file: str) -> Mapping[Any, Any]:
    if not isinstance(root, dict):
        raise FormatError("does not hold a state dict", path=file, expected="a dictionary", found=type(root).__name__)
    return root


@dataclass
class _Whole:
    """A tensor as the ranks so far describe it."""

    shape: Shape
    pieces: list[Piece]
    placements: tuple[str, ...]
    first: LazyTensor | None = None


class _Joined:
    """Joins the state dicts of all ranks; says how they were sharded, and what is odd."""

    def __init__(self, path: str, world: int) -> None:
        self._path = path
        self._world = world
        self._kinds: dict[str, int] = {}
        self.warnings: list[str] = []

    @property
    def sharding(self) -> str:
        kinds = sorted(self._kinds, key=lambda kind: -self._kinds[kind])
        return "; ".join(f"{self._kinds[kind]} tensors {kind}" for kind in kinds[:4]) or "none"

    def join(
        self, states: Sequence[Mapping[Any, Any]], files: Sequence[str]
    ) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
        """Whole tensors, and what else the first rank's file holds.

        Raises:
            FormatError: ranks hold different names, or parts that do not make up a tensor.
        """
        wholes: dict[str, _Whole] = {}
        for rank, (state, file) in enumerate(zip(states, files, strict=True)):
            self._check_names(states[0], state, files[0], file)
            for key, value in state.items():
                name = str(key)
                if isinstance(value, DistributedTensor):
                    self._add(wholes, name, self._dtensor(value, file, name), file)
                elif is_sharded_tensor(value):
                    shape, pieces = sharded_pieces(value, file, name)
                    self._add(wholes, name, _Whole(shape, pieces, ("ShardedTensor",)), file)
                elif isinstance(value, LazyTensor):
                    self._same(wholes, name, value, rank, file)
        tensors = {name: self._whole(name, whole) for name, whole in wholes.items()}
        return tensors, {str(key): value for key, value in states[0].items() if str(key) not in tensors}

    def _check_names(self, first: Mapping[Any, Any], state: Mapping[Any, Any], path: str, file: str) -> None:
        if state.keys() == first.keys():
            return
        strange = [*(key for key in state if key not in first), *(key for key in first if key not in state)]
        where = file if strange[0] in state else path
        raise apart(
            "the ranks' files hold tensors of different names, as those of different models do",
            path=file,
            tensor=brief(strange[0]),
            expected=f"the names of {path.rpartition('/')[2]}",
            found=f"{len(strange)} names in one of the two only, this one in {where.rpartition('/')[2]}",
        )

    def _dtensor(self, value: DistributedTensor, file: str, name: str) -> _Whole:
        mesh = mesh_of(value, file, name)
        if mesh.ranks != self._world:
            raise FormatError(
                "is spread over a part of the ranks only, and nothing tells what the others hold",
                path=file,
                tensor=name,
                expected=f"a mesh of all {self._world} ranks",
                found=f"a mesh of {mesh}",
                remedy="load it in the software that wrote it and save a full state dict",
            )
        piece = piece_of(value, file, name)
        kind = f"DTensor {', '.join(value.placements)} over {mesh}"
        return _Whole(value.shape, [] if piece is None else [piece], (kind,), value.local)

    def _add(self, wholes: dict[str, _Whole], name: str, one: _Whole, file: str) -> None:
        known = wholes.setdefault(name, replace(one, pieces=[]))
        if (known.shape, known.placements) != (one.shape, one.placements):
            raise apart(
                "the ranks' files hold it differently, as those of different models do",
                path=file,
                tensor=name,
                expected=f"{known.shape} {', '.join(known.placements)}",
                found=f"{one.shape} {', '.join(one.placements)}",
            )
        known.pieces.extend(one.pieces)

    def _same(self, wholes: dict[str, _Whole], name: str, tensor: LazyTensor, rank: int, file: str) -> None:
        """A tensor that every rank has whole; the first rank's is taken, as torch's full state dict does."""
        self._add(wholes, name, _Whole(tensor.shape, [], ("whole on every rank",), tensor), file)
        first = wholes[name].first
        assert first is not None
        if rank == 0:
            wholes[name].pieces.append(Piece((0,) * tensor.ndim, tensor))
        elif first.dtype != tensor.dtype or _beginning(first) != _beginning(tensor):
            told = f"{name} is whole on every rank and differs between them; rank 0's is taken"
            if told not in self.warnings:
                self.warnings.append(told)

    def _whole(self, name: str, whole: _Whole) -> LazyTensor:
        kind = whole.placements[0]
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        own = [piece for piece in whole.pieces if not piece.copy]
        if not own and whole.first is not None and 0 in whole.shape:
            return whole.first.reshape(whole.shape)
        try:
            if not own:
                raise FormatError("no rank holds anything of it", expected=whole.shape)
            pieces = [piece.tensor for piece in own]
            return mosaic(pieces[0].dtype, whole.shape, [piece.start for piece in own], pieces)
        except LastingError as error:
            problem = f"the ranks' parts do not make up the tensor: {error.problem}"
            raise error.told_as(FormatError, problem, path=self._path, tensor=name, remedy=GATHER) from error


def _beginning(tensor: LazyTensor) -> bytes:
    for chunk in tensor.chunks(_COMPARED):
        return chunk.tobytes()
    return b""


def _optimizer(
    location: Location, world: int, warnings: list[str]
) -> tuple[dict[str, LazyTensor], dict[str, Any], list[TorchContents]]:
    """The optimizer's state by number, as ``torch.optim`` keeps it; none, with a warning, where it is of another form.

    Raises:
        FormatError: a rank's file is missing, or parts do not make up a tensor.
    """
    files = _rank_files(location, "optim")
    if not files:
        return {}, {}, []
    if len(files) != world:
        raise apart(
            "the optimizer's rank files are of another save than the model's",
            path=location.path,
            expected=f"{world} ranks",
            found=f"{len(files)} ranks",
        )
    opened = read_torch_files(map(location.place.open, files))
    roots = [contents.root for contents in opened]
    if not all(isinstance(root, dict) and isinstance(root.get("state"), dict) for root in roots):
        warnings.append(f"the optimizer's state is of another form than torch.optim's and not read: {files[0]}")
        return {}, {}, []
    flat = [
        {f"{number}.{slot}": value for number, own in root["state"].items() for slot, value in _slots(own)}
        for root in roots
    ]
    tensors, objects = _Joined(location.path, world).join(flat, files)
    groups = {f"{_OPTIMIZER}.param_groups": roots[0].get("param_groups")}
    groups.update((f"{_OPTIMIZER}.state.{name}", value) for name, value in objects.items())
    return {f"{_OPTIMIZER}.state.{name}": tensor for name, tensor in tensors.items()}, groups, opened


def _slots(own: Any) -> Iterable[tuple[Any, Any]]:
    return own.items() if isinstance(own, dict) else ()


FORMAT = Format(
    name="fsdp",
    title="rank files of FSDP",
    detect=_detect,
    read=read,
    dialect=lambda options: None,
)
