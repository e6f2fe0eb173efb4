"""Which files a DeepSpeed checkpoint consists of.

``latest`` names the folder of the newest save (``global_step3``), in which each data-parallel rank has
``zero_pp_rank_R_mp_rank_00_optim_states.pt`` (``bf16_`` or ``fp16_`` before it), and rank 0 has
``mp_rank_00_model_states.pt``; under ZeRO-3 each rank has ``zero_pp_rank_R_mp_rank_00_model_states.pt``.  A universal
checkpoint has a folder ``zero`` with one per parameter.

Facts: ``runtime/engine.py`` and ``checkpoint/constants.py`` of DeepSpeed 0.5 to 0.19.
"""

from __future__ import annotations

import re

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.storage.folder import check_inside
from anyckpt.storage.location import Location, look_in

UNIVERSAL = "zero"

_LATEST = ("latest", "latest_universal")
_STATES = re.compile(
    r"(?:(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,6})_)?mp_rank_(?P<model>\d{2,6})(?:_(?P<stage>\d{3}))?"
    r"_(?P<kind>model|optim)_states\.pt",
    re.ASCII,
)
_OF_STAGES = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
_OF_EXPERTS = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_.*")
_REMEDY = "convert it with DeepSpeed's own zero_to_fp32.py or ds_to_universal.py first"


@dataclass(frozen=True)
class Files:
    """The files of one save.

    Attributes:
        root: the folder with ``latest``, or the save's own where there is none.
        folder: the save's.
        models: model states by rank; one, that of rank 0, up to ZeRO-2.
        optimizers: optimizer states by rank; empty without ZeRO and in universal checkpoints.
        universal: the folder of parameters of a universal checkpoint, or None.
    """

    root: Location
    folder: Location
    models: tuple[str, ...]
    optimizers: tuple[str, ...]
    universal: Location | None


def detect(location: Location) -> bool:
    """A folder of rank files, or one whose ``latest`` names such a folder."""
    return location.is_directory and (_holds_states(location) or _newest(location) is not None)


def _holds_states(location: Location) -> bool:
    return any(_STATES.fullmatch(name) or _OF_STAGES.fullmatch(name) for name in location.names)


def _newest(location: Location) -> Location | None:
    """The save that ``latest`` names, None if there is none or it is not DeepSpeed's."""
    for name in _LATEST:
        if name not in location.names or not location.is_file(name):
            continue
        try:
            tag = location.open(name).read_all(1024).decode("utf-8", "replace").strip()
            inner = location.at(check_inside(tag, location.path))
        except FormatError:
            continue
        if inner.is_directory and _holds_states(inner):
            return inner
    return None


def find(location: Location) -> Files:
    """The files of the save that is at a location, every rank of which is there.

    Raises:
        FormatError: ranks are missing, or the model is divided over ranks in a way that is not understood.
    """
    folder = location if _holds_states(location) else _newest(location) or location
    root = location
    if folder is location and "config.json" not in location.names:
        place, parent = location.place, location.parent
        if parent is not None and any(place.is_file(place.join(parent, name)) for name in _LATEST):
            root = look_in(place, parent)
    _refuse_divided(folder)
    found: dict[str, dict[int, str]] = {"model": {}, "optim": {}}
    for name in folder.names:
        match = _STATES.fullmatch(name)
        if match is not None:
            rank = int(match["rank"] or 0)
            if rank in found[match["kind"]]:
                raise FormatError(
                    "two files are of the same rank",
                    path=folder.path,
                    found=f"{_name(found[match['kind']][rank])} and {name}",
                    remedy="move the one of another save elsewhere",
                )
            found[match["kind"]][rank] = folder.join(name)
    universal = folder.at(UNIVERSAL) if UNIVERSAL in folder.names and folder.is_folder(UNIVERSAL) else None
    return Files(root, folder, _ordered(folder, found["model"]), _ordered(folder, found["optim"]), universal)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _ordered(folder: Location, files: dict[int, str]) -> tuple[str, ...]:
    missing = [rank for rank in range(max(files, default=-1)) if rank not in files]
    if missing:
        other = _name(files[max(files)])
        raise FormatError(
            f"the file of rank {missing[0]} is missing",
            path=folder.path,
            expected=f"ranks 0 to {max(files)}, as {other}",
            found=f"{len(files)} files",
            remedy="copy the files of all ranks here",
        )
    return tuple(files[rank] for rank in range(len(files)))


def _refuse_divided(folder: Location) -> None:
    """Raise FormatError where ranks hold different weights rather than partitions of the same."""
    for pattern, what in ((_OF_STAGES, "pipeline stages"), (_OF_EXPERTS, "ranks of different experts")):
        example = next((name for name in folder.names if pattern.fullmatch(name)), None)
        if example is not None:
            raise FormatError(
                f"is a DeepSpeed checkpoint of {what}, whose weights no file names as a whole",
                path=folder.path,
                found=example,
                remedy=_REMEDY,
            )
    models = sorted({match["model"] for name in folder.names if (match := _STATES.fullmatch(name)) and match["model"]})
    staged = next((name for name in folder.names if (match := _STATES.fullmatch(name)) and match["stage"]), None)
    if UNIVERSAL not in folder.names and (len(models) > 1 or models != ["00"] or staged):
        raise FormatError(
            "is a DeepSpeed checkpoint of model-parallel ranks, and nothing in it says how they cut weights",
            path=folder.path,
            expected="files of mp_rank_00 only",
            found=staged or f"mp_rank_{models[-1]}",
            remedy=_REMEDY,
        )
