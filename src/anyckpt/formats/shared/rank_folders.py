"""Folders of one rank each, as NeMo 1 names them (``inject_model_parallel_rank`` of NeMo 1.0 to 2.5)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError

_FOLDER = re.compile(
    r"(?:mp_rank_(?P<rank>\d{2,5})|tp_rank_(?P<tensor>\d{2,5})_pp_rank_(?P<pipeline>\d{3,5}))", re.ASCII
)
_SHARD_OF_FSDP = re.compile(r"(?:.*_)?fsdp_shard_\d+", re.ASCII)


@dataclass(frozen=True, order=True)
class Place:
    """Which rank a file is of.

    Attributes:
        tensor: tensor-parallel rank.
        pipeline: pipeline stage.
    """

    tensor: int
    pipeline: int


def parse_folder(name: str) -> Place | None:
    """The rank whose folder it is, None if it is not one.

    Raises:
        FormatError: it is of torch's fully sharded data parallelism, whose shards cut across tensors.
    """
    found = _FOLDER.fullmatch(name)
    if found is not None:
        return Place(int(found["tensor"] or found["rank"]), int(found["pipeline"] or 0))
    if _SHARD_OF_FSDP.fullmatch(name):
        raise FormatError(
            "is a shard of torch's fully sharded data parallelism, which only the writer's world can join",
            path=name,
            remedy="load it in the NeMo that wrote it and save it with a full state dict",
        )
    return None


def folder_name(place: Place, pipeline_parallel: int) -> str:
    """The folder of a rank."""
    if pipeline_parallel > 1:
        return f"tp_rank_{place.tensor:02d}_pp_rank_{place.pipeline:03d}"
    return f"mp_rank_{place.tensor:02d}"


def by_place(folders: Iterable[str]) -> dict[Place, str]:
    """Rank -> its folder, sorted by rank; names that are no rank's folder are left out.

    Raises:
        FormatError: two folders are of one rank, or one is of fully sharded data parallelism.
    """
    found: dict[Place, str] = {}
    for folder in folders:
        place = parse_folder(folder)
        if place is None:
            continue
        if place in found:
            raise FormatError(
                "two folders are of the same rank",
                path=folder,
                found=f"{found[place]} and {folder}",
                remedy="remove the one that is of another save",
            )
        found[place] = folder
    return dict(sorted(found.items()))
