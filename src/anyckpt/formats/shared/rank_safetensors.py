"""Safetensors files of one rank each: what torch's ``HuggingFaceStorageWriter`` writes with ``save_distributed``.

``shard-00001-model-00001-of-00002.safetensors`` has what rank 0 writes to the first of two files; the header's
``DCP_SHARDING_INFO`` says where each tensor of it begins in the whole one.  Nothing says how many ranks there were.
NeMo Automodel and NeMo-RL keep the configuration and the tokenizer in ``.hf_metadata`` beside them.

Facts: ``checkpoint/hf_storage.py``, ``filesystem.py`` and ``_hf_utils.py`` of torch 2.8 to 2.13.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import Part
from anyckpt.containers.safetensors import read_safetensors_files, safetensors_parts
from anyckpt.engine.plan import OutputFile, small_file
from anyckpt.errors import FormatError, LastingError, UsageError
from anyckpt.formats.shared.hub_folder import json_text, read_json
from anyckpt.formats.shared.hub_weights import split_by_size
from anyckpt.indexing import Shape
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor, mosaic

SHARDING = "DCP_SHARDING_INFO"
HUB_FOLDER = ".hf_metadata"
FILES_OF_NAMES = "fqn_to_file_index_mapping.json"
"""Every tensor's name, and into which of a rank's files it goes."""

_OF_DCP = (SHARDING, "DCP_VERSION")
_NAME = re.compile(r"shard-(?P<rank>\d{5})-model-(?P<file>\d{5})-of-(?P<files>\d{5})\.safetensors", re.ASCII)
_GATHER = "copy the files of all ranks of one save here"
_FOLDER = "open the folder that holds the files of all ranks"


def is_rank_file(name: str) -> bool:
    """Whether a file of this name is one rank's."""
    return _NAME.fullmatch(name) is not None


def part_of(path: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Part | None:
    """Which part of a model a safetensors file is, None if nothing says that it is one.

    Args:
        path: the file.
        tensors: what it holds.
        metadata: of its header.

    Raises:
        FormatError: what the header says of the parts is damaged.
    """
    if SHARDING not in metadata:
        return None
    starts = _starts(path, tensors, metadata)
    inside = next((name for name, start in starts.items() if any(start)), None)
    found = _NAME.fullmatch(re.split(r"[/:]", path)[-1])
    if inside is None and found is None:
        return None
    rank = "one rank's part" if found is None else f"the part of rank {int(found['rank']) - 1}"
    told = "" if inside is None else f": {inside}, for one, begins at {starts[inside]} of the whole tensor"
    return Part(f"is {rank} and no whole model ({SHARDING}){told}", _FOLDER)


def read_rank_files(location: Location, names: Sequence[str], details: dict[str, Any]) -> dict[str, LazyTensor]:
    """The whole tensors that the files of all ranks make up.

    Args:
        location: the folder that they are in.
        names: every name of the folder that ``is_rank_file``.
        details: gets how many ranks and files there are.

    Raises:
        FormatError: a rank is missing between others, the files are of several saves, or parts overlap or leave gaps.
    """
    ranks = _check_names(location.path, names)
    parts: dict[str, list[tuple[Shape, LazyTensor]]] = {}
    for name, (tensors, metadata) in zip(names, read_safetensors_files(map(location.open, names)), strict=True):
        path = location.join(name)
        for tensor, start in _starts(path, tensors, metadata or {}).items():
            parts.setdefault(tensor, []).append((start, tensors[tensor]))
        if metadata and "metadata" not in details:
            details["metadata"] = {key: value for key, value in metadata.items() if key not in _OF_DCP}
    joined = {name: _whole(location.path, name, own) for name, own in parts.items()}
    _check_listed(location, joined)
    details.update({"world_size": ranks, "rank_files": len(names)})
    return joined


def rank_files(tensors: Mapping[str, LazyTensor], limit: int | None) -> list[OutputFile]:
    """Files as a world of one rank writes them, and the list of names; a world of any size reads them.

    Args:
        tensors: by the names that they have in the files.
        limit: bytes of weights per file; None for one file.

    Raises:
        UsageError: the limit is not positive.
    """
    if limit is not None and limit <= 0:
        raise UsageError("the shard size must be positive", found=limit)
    shares = [dict(tensors)] if limit is None else split_by_size(tensors, limit)
    files, places = [], {}
    for number, share in enumerate(shares, 1):
        starts = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in share.items()}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", SHARDING: json.dumps(starts)}
        name = f"shard-00001-model-{number:05d}-of-{len(shares):05d}.safetensors"
        files.append(OutputFile(name, safetensors_parts(share, metadata)))
        places.update(dict.fromkeys(share, number))
    return [*files, small_file(f"{HUB_FOLDER}/{FILES_OF_NAMES}", json_text(places))]


def check_last_ranks(
    folder: str, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], ranks: int, warnings: list[str]
) -> Part | None:
    """Whether the last ranks' files may be missing, which no file tells but the model's vocabulary may.

    Gives what the folder is where one rank's files are all there is and nothing proves that one rank wrote the model.

    Raises:
        FormatError: the embedding has fewer rows than the configuration has tokens.
    """
    text = config.get("text_config")
    tokens = next((c["vocab_size"] for c in (config, text) if isinstance(c, Mapping) and "vocab_size" in c), None)
    rows = {n: t.shape[0] for n, t in tensors.items() if t.ndim == 2 and re.search(r"embed|wte", n)}
    if type(tokens) is int and rows:
        name = max(rows, key=lambda name: rows[name])
        if rows[name] < tokens:
            raise _incomplete(
                f"the files of the last ranks are missing: those of {ranks} are here",
                path=folder,
                tensor=name,
                expected=f"at least {tokens} rows, as vocab_size says",
                found=rows[name],
            )
        return None
    if ranks == 1:
        return Part(
            "holds the files of one rank, and nothing proves that no other wrote a part of the model",
            "copy the files of all ranks here, or the config.json of the model to prove that one wrote it all",
        )
    warnings.append("nothing says how many ranks wrote the files: whether the last are here too is not known")
    return None


def _check_names(folder: str, names: Sequence[str]) -> int:
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    counts = sorted({match["files"] for match in found})
    if len(counts) > 1:
        raise _incomplete(
            "holds rank files of several saves",
            path=folder,
            expected="one number of files per rank",
            found=", ".join(f"of-{count}" for count in counts),
        )
    present = {int(match["rank"]) for match in found}
    missing = [rank for rank in range(1, max(present)) if rank not in present]
    beyond = [match[0] for match in found if not 1 <= int(match["file"]) <= int(match["files"])]
    if missing or beyond or 0 in present:
        first = f"shard-{missing[0]:05d}-model-*-of-{counts[0]}.safetensors" if missing else ""
        raise _incomplete(
            f"the files of {len(missing)} of {max(present)} ranks are missing, such as {first}"
            if missing
            else "holds rank files of an impossible number",
            path=folder,
            found=", ".join(beyond[:3]) or f"{len(present)} ranks",
        )
    return len(present)


def _starts(path: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> dict[str, Shape]:
    """Where each tensor of a file begins in the whole one."""
    try:
        stated = json.loads(metadata.get(SHARDING, "null"))
    except (ValueError, RecursionError):
        stated = None
    if not isinstance(stated, dict):
        raise _incomplete(
            "its header does not say where its tensors lie in the whole ones",
            path=path,
            expected=SHARDING,
        )
    starts: dict[str, Shape] = {}
    for name, tensor in tensors.items():
        entry = stated.get(name)
        start = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not isinstance(start, list) or len(start) != tensor.ndim or not all(map(_is_count, start)):
            raise _incomplete(
                "its header does not say where it lies in the whole tensor",
                path=path,
                tensor=name,
                expected=f"{tensor.ndim} saved_offsets in {SHARDING}",
                found=str(start)[:80],
            )
        starts[name] = tuple(start)
    return starts


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _whole(folder: str, name: str, parts: Sequence[tuple[Shape, LazyTensor]]) -> LazyTensor:
    if len({tensor.ndim for _, tensor in parts}) > 1:
        raise _incomplete("its parts have different numbers of axes", path=folder, tensor=name)
    ends = [tuple(at + length for at, length in zip(start, tensor.shape, strict=True)) for start, tensor in parts]
    shape = tuple(map(max, zip(*ends, strict=True)))
    try:
        return mosaic(parts[0][1].dtype, shape, [start for start, _ in parts], [tensor for _, tensor in parts])
    except LastingError as error:
        problem = f"the ranks' parts do not make up the tensor: {error.problem}"
        raise error.told_as(FormatError, problem, path=folder, tensor=name, remedy=_GATHER) from error


def _check_listed(location: Location, tensors: Mapping[str, LazyTensor]) -> None:
    """Every tensor is there that the model's own list of names has, if there is one."""
    if not location.is_file(HUB_FOLDER, FILES_OF_NAMES):
        return
    path = location.join(HUB_FOLDER, FILES_OF_NAMES)
    lost = [name for name in read_json(location.open(HUB_FOLDER, FILES_OF_NAMES)) if name not in tensors]
    if lost:
        raise _incomplete(f"{len(lost)} tensors of the model's list are in no rank's file", path=path, tensor=lost[0])


def _incomplete(problem: str, **facts: Any) -> FormatError:
    return FormatError(problem, remedy=_GATHER, **facts)
