"""One rank's file, opened and checked against its folder's name and against the other ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyckpt.config.of_ranks import MOST_RANKS
from anyckpt.containers.torch_file import TorchContents, read_torch_files
from anyckpt.containers.torch_file.values import brief
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.formats.megatron_lm.location import MODEL_FILE, OPTIMIZER_FILE, OPTIMIZER_PART, RankFolder
from anyckpt.formats.shared.megatron_arguments import SAME_ON_EVERY_RANK, Sizes, read_sizes
from anyckpt.pickling import Record
from anyckpt.pickling.plain import to_plain

_CHUNK = re.compile(r"model(\d{1,4})", re.ASCII)
_VERSIONS = (0.0, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class RankFile:
    """What a rank's file says.

    Attributes:
        folder: where it is.
        contents: the file.
        root: the dictionary in it.
        arguments: fields of its ``args``; empty if it has none.
        version: its ``checkpoint_version``, 0 if it states none.
        iteration: steps taken, or None.
        chunks: virtual pipeline chunk -> key of its model.
    """

    folder: RankFolder
    contents: TorchContents
    root: Mapping[Any, Any]
    arguments: Mapping[str, Any]
    version: float
    iteration: int | None
    chunks: dict[int, str]

    @property
    def path(self) -> str:
        assert self.folder.model is not None
        return self.folder.model.name


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank."""

    tensor: int
    pipeline: int
    expert: int


def open_ranks(folders: Sequence[RankFolder]) -> tuple[list[RankFile | None], dict[str, TorchContents]]:
    """Each rank's file, and by folder what the distributed optimizer keeps beside it.

    A folder that only holds a data-parallel rank's optimizer (2022-12 to 2023-06) has None.

    Raises:
        FormatError: the file is missing, damaged, or not a Megatron-LM checkpoint.
    """
    models = [folder.model for folder in folders if _holds_model(folder) and folder.model is not None]
    states = {folder.name: folder for folder in folders if folder.model is not None and OPTIMIZER_FILE in folder.files}
    opened = read_torch_files([*models, *(folder.location.open(OPTIMIZER_FILE) for folder in states.values())])
    contents = iter(opened)
    ranks = [None if folder.model is None else _rank(folder, next(contents)) for folder in folders]
    return ranks, dict(zip(states, contents, strict=True))


def _holds_model(folder: RankFolder) -> bool:
    if folder.model is None:
        if OPTIMIZER_PART in folder.files:
            return False
        raise FormatError(
            "the rank folder holds no model",
            path=folder.path,
            expected=MODEL_FILE,
            found=", ".join(folder.files[:5]) or "nothing",
            remedy="the save was interrupted, or not all files were copied",
        )
    return True


def _rank(folder: RankFolder, contents: TorchContents) -> RankFile:
    assert folder.model is not None
    root, path = contents.root, folder.model.name
    chunks = _chunks(root) if isinstance(root, dict) else {}
    if not isinstance(root, dict) or (not chunks and "args" not in root):
        raise FormatError(
            "is not a Megatron-LM rank file",
            path=path,
            expected="a dictionary with 'model' and 'args'",
            found=", ".join(map(str, list(root)[:5])) if isinstance(root, dict) else type(root).__name__,
        )
    args = root.get("args")
    fields = args.fields() if isinstance(args, Record) else args if isinstance(args, dict) else {}
    return RankFile(folder, contents, root, fields, _version(root, path), _iteration(root, path), chunks)


def _chunks(root: Mapping[Any, Any]) -> dict[int, str]:
    if isinstance(root.get("model"), dict):
        return {0: "model"}
    numbered = {
        key: _CHUNK.fullmatch(key) for key, value in root.items() if isinstance(key, str) and isinstance(value, dict)
    }
    return {int(found[1]): key for key, found in sorted(numbered.items()) if found is not None}


def _version(root: Mapping[Any, Any], path: str) -> float:
    version = root.get("checkpoint_version", 0.0)
    if type(version) not in (int, float) or version not in _VERSIONS:
        raise FormatError("unknown checkpoint_version", path=path, expected="0, 1, 2 or 3", found=brief(version))
    return float(version)


def _iteration(root: Mapping[Any, Any], path: str) -> int | None:
    value = root.get("iteration", root.get("total_iters"))
    if value is None or (type(value) is int and 0 <= value < 1 << 62):
        return value
    raise FormatError("the iteration is not a count", path=path, found=brief(value))


def agreed_sizes(ranks: Sequence[RankFile], where: str) -> Sizes:
    """The sizes of the layout, which every rank's arguments must state alike.

    What the arguments leave out is told by the folders, whose second number is then the pipeline stage, and by the
    chunks in the files.

    Raises:
        FormatError: ranks disagree, or chunks in the files contradict the arguments.
    """
    first = ranks[0]
    stated = read_sizes(first.arguments, first.path)
    known = {key: to_plain(first.arguments.get(key)) for key in SAME_ON_EVERY_RANK}
    layout = to_plain(first.arguments.get("pipeline_model_parallel_layout"))
    for rank in ranks[1:]:
        _same("iteration", first, first.iteration, rank, rank.iteration)
        _same("checkpoint_version", first, first.version, rank, rank.version)
        _same("parallel sizes", first, stated, rank, read_sizes(rank.arguments, rank.path))
        for key, value in known.items():
            _same(f"args.{key}", first, value, rank, to_plain(rank.arguments.get(key)))
        other = to_plain(rank.arguments.get("pipeline_model_parallel_layout"))
        _same("args.pipeline_model_parallel_layout", first, layout, rank, other)
    tensor = stated.tensor or 1 + max(rank.folder.digits[0] for rank in ranks)
    pipeline, expert = stated.pipeline, stated.expert
    if pipeline is None and (expert or 1) == 1:
        second = 1 + max(rank.folder.digits[1] if len(rank.folder.digits) > 1 else 0 for rank in ranks)
        third = 1 + max(rank.folder.digits[2] if len(rank.folder.digits) > 2 else 0 for rank in ranks)
        pipeline, expert = second, expert or third
    return Sizes(tensor, pipeline or 1, _virtual(ranks, stated.virtual, where), expert or 1)


def _virtual(ranks: Sequence[RankFile], stated: int | None, where: str) -> int:
    found = 1 + max((chunk for rank in ranks for chunk in rank.chunks), default=0)
    if stated is None:
        return found
    single = next((rank for rank in ranks if rank.chunks == {0: "model"}), None)
    if found > stated or (stated > 1 and single is not None):
        raise FormatError(
            "chunks in the files and args.virtual_pipeline_model_parallel_size contradict each other",
            path=where,
            expected=f"{stated} chunks, as the args say",
            found="one chunk 'model'" if single is not None else f"model{found - 1}",
        )
    return stated


def _same(what: str, first: RankFile, expected: Any, other: RankFile, found: Any) -> None:
    if expected != found:
        raise FormatError(
            f"ranks are of different {what}" if what == "iteration" else f"ranks disagree on {what}",
            path=other.path,
            expected=f"{expected} as in {first.folder.name}",
            found=f"{found} in {other.folder.name}",
            remedy="gather the ranks of one save in one directory",
        )


def place_ranks(ranks: Sequence[RankFile], sizes: Sizes, where: str) -> dict[Place, RankFile]:
    """Which rank each file is of, complete and sorted by coordinates: tensor, pipeline, expert.

    Raises:
        FormatError: a rank is missing, is there twice, or lies outside the sizes that the arguments state.
    """
    tensor, pipeline, expert = sizes.tensor or 1, sizes.pipeline or 1, sizes.expert or 1
    says = f"tensor {tensor} x pipeline {pipeline} x expert {expert} by the args"
    found: dict[Place, RankFile] = {}
    for rank in ranks:
        place = _place(rank, pipeline, expert, says)
        if place.tensor >= tensor or place.pipeline >= pipeline or place.expert >= expert or place in found:
            raise FormatError(
                f"rank folder {rank.folder.name} and the args contradict each other",
                path=rank.path,
                expected=says,
                found=f"tensor {place.tensor}, pipeline {place.pipeline}, expert {place.expert}"
                + (" again" if place in found else ""),
                remedy="gather the ranks of one save in one directory",
            )
        found[place] = rank
    missing = next((place for place in _written(sizes, ranks[0]) if place not in found), None)
    if missing is not None:
        name = folder_name(
            missing.tensor, missing.pipeline if pipeline > 1 else None, missing.expert if expert > 1 else None
        )
        raise FormatError(
            "a rank folder is missing",
            path=where,
            expected=f"{name}: {says}",
            found=f"{len(found)} rank folders",
            remedy="copy the folders of all ranks here",
        )
    return dict(sorted(found.items(), key=lambda item: (item[0].tensor, item[0].pipeline, item[0].expert)))


def _place(rank: RankFile, pipeline: int, expert: int, says: str) -> Place:
    """What the numbers in the folder's name are: ``mp_rank_00_001`` is a pipeline or an expert rank."""
    first, *rest = rank.folder.digits
    wanted = (pipeline > 1) + (expert > 1)
    if len(rest) > wanted and not any(rest[wanted:]):
        rest = rest[:wanted]
    if len(rest) != wanted:
        raise FormatError(
            f"rank folder {rank.folder.name} and the args contradict each other",
            path=rank.path,
            expected=f"{wanted} numbers after the tensor-parallel rank: {says}",
            found=f"{len(rest)} numbers",
            remedy="gather the ranks of one save in one directory",
        )
    if pipeline > 1 and expert > 1:
        return Place(first, rest[0], rest[1])
    return Place(first, rest[0] if pipeline > 1 else 0, rest[0] if expert > 1 else 0)


def _written(sizes: Sizes, first: RankFile) -> Iterator[Place]:
    """The ranks that Megatron-LM writes: of each stage, those whose data rank or expert-data rank is 0.

    The world's ranks count tensor-parallel ranks and expert-tensor-parallel ranks fastest, so with fewer ranks per
    expert than per layer not every pair of tensor and expert rank exists.

    Raises:
        FormatError: the expert-tensor-parallel size is none, or one at which folders do not tell experts' parts apart.
    """
    tensor, expert = sizes.tensor or 1, sizes.expert or 1
    ways = first.arguments.get("expert_tensor_parallel_size") if expert > 1 else None
    ways = tensor if ways is None else ways
    if type(ways) is not int or not 0 < ways <= MOST_RANKS or math.gcd(tensor, ways * expert) < ways:
        raise FormatError(
            "args.expert_tensor_parallel_size is not possible",
            path=first.path,
            expected=f"a divisor of the tensor-parallel size {tensor}, or a size at which folders tell experts apart",
            found=brief(ways),
        )
    for pipeline in range(sizes.pipeline or 1):
        for rank in range(max(tensor, ways * expert)):
            yield Place(rank % tensor, pipeline, rank // ways % expert)


def folder_name(tensor: int, pipeline: int | None, expert: int | None) -> str:
    """A rank's folder; None for a dimension of one rank, which has no number in it."""
    name = f"mp_rank_{tensor:02d}"
    for number in (pipeline, expert):
        name += "" if number is None else f"_{number:03d}"
    return name
