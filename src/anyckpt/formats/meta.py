"""Meta's release folders: ``consolidated.NN.pth``, one per model-parallel rank, and ``params.json``.

Mistral's releases are alike, with ``consolidated.safetensors`` or numbered shards of it, which hold whole tensors.
Facts: Meta's llama, llama3 and llama-models, whose fairscale layers divide weights so: the projections into heads and
feed-forward and the output layer along their rows, those back along their columns, the token embedding along its
columns in Llama 1 and 2 and along its rows since 3, and norms not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from anyckpt.checkpoint import Checkpoint, ParallelLayout, StoredChecksum
from anyckpt.containers.safetensors import read_safetensors_files
from anyckpt.data_classes import dataclass
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.formats.shared.hub_folder import other_files, read_json, tokenizer_of
from anyckpt.formats.shared.loose_tensors import weights_only
from anyckpt.formats.shared.weight_files import put_together
from anyckpt.storage.location import Location
from anyckpt.storage.place import Place
from anyckpt.tensor import LazyTensor, concatenate

PARAMS = "params.json"

_PART = re.compile(r"consolidated\.(\d{2,4})\.(pth|pt)")
_SHARD = re.compile(r"consolidated(?:-(\d{5})-of-(\d{5}))?\.safetensors")
_INDEX = "consolidated.safetensors.index.json"

_ROWS = re.compile(r"layers\.\d+\.(?:attention\.w[qkv]|feed_forward\.w[13])\.(?:weight|bias)|output\.weight")
_COLUMNS = re.compile(r"layers\.\d+\.(?:attention\.wo|feed_forward\.w2)\.weight")
_WHOLE = re.compile(
    r"(?:layers\.\d+\.(?:attention_norm|ffn_norm|attention\.[qk]_norm)|norm)\.weight|rope\.freqs"
    r"|layers\.\d+\.(?:attention\.wo|feed_forward\.w2)\.bias|layers\.\d+\.feed_forward\.gate\.weight"
)
_EMBEDDING = "tok_embeddings.weight"
_NORM = "norm.weight"
_BLOCK = 1 << 20


# -- reading -------------------------------------------------------------------------------------------------


def detect(location: Location) -> bool:
    """A folder with ``params.json`` and consolidated weights that is not a Hugging Face folder with these beside.

    Raises:
        FormatError: it is one of several parts, which only together are a model.
    """
    if location.is_directory:
        files = set(location.names)
        return PARAMS in files and "config.json" not in files and any(map(_is_weights, files))
    if _PART.fullmatch(location.name) and location.parent is not None:
        beside = _beside(location.place, location.parent)
        parts = [name for name in beside if _PART.fullmatch(name)]
        if PARAMS in beside and len(parts) > 1:
            raise FormatError(
                f"is one of {len(parts)} model-parallel parts", path=location.path, remedy=f"open {location.parent}"
            )
    return False


def _beside(place: Place, folder: str) -> tuple[str, ...]:
    with suppress(FormatError):
        return place.names(folder)
    return ()


def _is_weights(name: str) -> bool:
    return bool(_PART.fullmatch(name) or _SHARD.fullmatch(name))


@dataclass(frozen=True)
class _File:
    """One file of weights with its tensors."""

    name: str
    tensors: dict[str, LazyTensor]


def read(location: Location) -> Checkpoint:
    """Open a release folder, its parts joined.

    Raises:
        FormatError: a part is missing or damaged, or parts do not fit together.
    """
    config = read_json(location.open(PARAMS))
    warnings: list[str] = []
    checksums: list[StoredChecksum] = []
    parts = sorted((name for name in location.names if _PART.fullmatch(name)), key=_number)
    details: dict[str, Any] = {}
    if parts:
        files = _read_parts(location, parts, warnings, checksums)
        _check_all_there(location.path, files, config)
        tensors = _joined(location, files)
        details["parts"] = len(files)
    else:
        tensors = _read_shards(location, details)
    tokenizer_files, artifacts = other_files(location, PARAMS)
    return Checkpoint(
        location.path,
        "meta",
        tensors,
        dialect="meta",
        config=config,
        config_kind="meta",
        tokenizer=tokenizer_of(tokenizer_files),
        artifacts={name: source for name, source in artifacts.items() if name != _INDEX},
        layout=ParallelLayout(tensor_parallel=len(parts) or 1),
        warnings=warnings,
        details=details,
        checksums=lambda: checksums,
    )


def _number(name: str) -> int:
    match = _PART.fullmatch(name)
    assert match is not None
    return int(match[1])


def _read_parts(
    location: Location, names: Sequence[str], warnings: list[str], checksums: list[StoredChecksum]
) -> list[_File]:
    from anyckpt.containers.torch_file import read_torch_files
    from anyckpt.containers.torch_file.checksums import stored_checksums

    files: list[_File] = []
    for name, contents in zip(names, read_torch_files(map(location.open, names)), strict=True):
        warnings.extend(contents.warnings)
        checksums.extend(stored_checksums(contents))
        root = contents.root
        if not isinstance(root, Mapping) or not all(isinstance(value, LazyTensor) for value in root.values()):
            raise FormatError(
                "does not hold a state dict", path=location.join(name), expected="a dict of tensors alone"
            )
        files.append(_File(name, {str(key): value for key, value in root.items()}))
    return files


def _check_all_there(path: str, files: Sequence[_File], config: Mapping[str, Any]) -> None:
    """Numbers without a gap, and as many as the heads of the configuration make."""
    numbers = [_number(file.name) for file in files]
    suffix = files[0].name.rpartition(".")[2]
    count = max(len(files), max(numbers) + 1, _stated_parts(files[0].tensors, config))
    missing = [f"consolidated.{number:02d}.{suffix}" for number in range(min(count, 10_000)) if number not in numbers]
    if missing or len(set(numbers)) != len(numbers):
        raise FormatError(
            f"{len(missing)} of {count} model-parallel parts are missing: {', '.join(missing[:8])}"
            if missing
            else "two parts have one number",
            path=path,
            found=", ".join(file.name for file in files[:8]),
            remedy="copy the missing files from the model's origin",
        )


def _stated_parts(first: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> int:
    """How many parts the configuration's width makes of the first part's queries; 0 if that is not clear."""
    inner = config.get("model")
    stated = inner if isinstance(inner, Mapping) else config
    query, norm = first.get("layers.0.attention.wq.weight"), first.get(_NORM)
    heads, width = stated.get("n_heads"), stated.get("head_dim")
    if query is None or query.ndim != 2 or norm is None or norm.ndim != 1 or not query.shape[0]:
        return 0
    if stated.get("dim") != norm.shape[0]:
        return 0  # another model's configuration, which the family's rules will tell
    rows = heads * width if type(heads) is int and type(width) is int and width > 0 else norm.shape[0]
    return rows // query.shape[0] if rows > 0 and rows % query.shape[0] == 0 else 0


def _joined(location: Location, files: Sequence[_File]) -> dict[str, LazyTensor]:
    """Whole tensors; itself if there is one part.

    Raises:
        FormatError: a tensor is not in all parts, does not fit its neighbours, or is divided in a way that is not
            known; or copies differ.
    """
    first = files[0]
    if len(files) == 1:
        return first.tensors
    for file in files[1:]:
        odd = sorted(first.tensors.keys() ^ file.tensors.keys())
        if odd:
            raise FormatError(
                f"{len(odd)} tensors are not in every part: {', '.join(odd[:8])}",
                path=location.join(file.name),
                tensor=odd[0],
                remedy="copy the parts again, from one model",
            )
    joined: dict[str, LazyTensor] = {}
    for name, tensor in first.tensors.items():
        copies = [file.tensors[name] for file in files]
        axis = _axis(location.path, name, copies, _width(first))
        if axis is None:
            _check_equal(location.path, name, files)
            joined[name] = tensor
            continue
        for file, other in zip(files, copies, strict=True):
            if other.dtype != tensor.dtype or other.shape != tensor.shape:
                raise FormatError(
                    "its parts do not fit one another",
                    path=location.join(file.name),
                    tensor=name,
                    expected=f"{tensor.dtype.name} {tensor.shape}",
                    found=f"{other.dtype.name} {other.shape}",
                )
        joined[name] = concatenate(copies, axis)
    return joined


def _width(first: _File) -> int | None:
    """Of the model: what its last norm, which every part has whole, is long."""
    norm = first.tensors.get(_NORM)
    return norm.shape[0] if norm is not None and norm.ndim == 1 else None


def _axis(path: str, name: str, copies: Sequence[LazyTensor], width: int | None) -> int | None:
    """Along which axis a tensor is divided, None if every part has it whole."""
    if _WHOLE.fullmatch(name):
        return None
    if _ROWS.fullmatch(name) and copies[0].ndim:
        return 0
    if _COLUMNS.fullmatch(name) and copies[0].ndim == 2:
        return 1
    if name == _EMBEDDING and copies[0].ndim == 2 and width is not None:
        columns = copies[0].shape[1]
        if columns == width:
            return 0
        if columns * len(copies) == width:
            return 1
    raise FormatError(
        "how model-parallel parts divide this tensor is not known",
        path=path,
        tensor=name,
        found=copies[0].shape,
        expected="a tensor of Meta's Llama",
        remedy="join the parts with the model's own code",
    )


def _check_equal(path: str, name: str, files: Sequence[_File]) -> None:
    """Raise FormatError where parts hold other copies of a tensor that is not divided; such are small, and read."""
    first = files[0].tensors[name]
    for file in files[1:]:
        other = file.tensors[name]
        same = other.shape == first.shape and other.dtype == first.dtype
        pairs = zip(first.chunks(_BLOCK), other.chunks(_BLOCK), strict=True) if same else ()
        if not same or any(a.tobytes() != b.tobytes() for a, b in pairs):
            raise FormatError(
                f"its copies in {files[0].name} and {file.name} differ",
                path=path,
                tensor=name,
                expected="equal copies in all parts",
                remedy="copy the parts again, from one model",
            )


def _read_shards(location: Location, details: dict[str, Any]) -> dict[str, LazyTensor]:
    """Mistral's safetensors: one file, or shards that the index or their names count."""
    names = [name for name in location.names if _SHARD.fullmatch(name)]
    matches = [match for name in names if (match := _SHARD.fullmatch(name)) and match[1] is not None]
    if matches:
        count = int(matches[0][2])
        present = {int(match[1]) for match in matches}
        missing = [number for number in range(1, min(count, 100_000) + 1) if number not in present]
        if missing or len(matches) != len(names):
            what = f"consolidated-{missing[0] if missing else 0:05d}-of-{count:05d}.safetensors"
            problem = f"{len(missing)} of {count} weight files are missing: {what}" if missing else "holds two sets"
            raise FormatError(
                problem,
                path=location.path,
                found=", ".join(names[:8]),
                remedy="copy the missing files from the model's origin",
            )
    opened = read_safetensors_files(map(location.open, names))
    for _, metadata in opened:
        if metadata:
            details.setdefault("metadata", {}).update(metadata)
    return put_together(location, names, (found for found, _ in opened))


# -- writing -------------------------------------------------------------------------------------------------


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """``consolidated.00.pth`` and so on, as many as tensor-parallel ranks are asked for, and ``params.json``.

    Raises:
        UsageError: a tensor cannot be divided by that many.
    """
    from anyckpt.containers.torch_file.writer import zip_parts

    weights, ignored = weights_only(checkpoint)
    count = 1 if options.layout is None else options.layout.tensor_parallel
    files = []
    for number, part in enumerate(_divided(weights, count)):
        stem = f"consolidated.{number:02d}"
        parts = zip_parts(part, archive_name=stem, tensor_name=lambda path: str(path[-1]))
        files.append(OutputFile(f"{stem}.pth", parts))
    files.append(small_file(PARAMS, json.dumps(checkpoint.config) + "\n", stage=2))
    notes: list[str] = []
    if checkpoint.tokenizer is not None:
        sources = checkpoint.tokenizer.files
        named = {name.rpartition("/")[2]: source for name, source in sources.items()}
        files += [OutputFile(name, (SourceData(source),), 1) for name, source in named.items()]
        if "tokenizer.model" not in named:
            notes.append("Meta's code reads tokenizer.model, which the source has not")
    return Plan("meta", tuple(files), ignored=ignored, notes=tuple(notes))


def _divided(weights: Mapping[str, LazyTensor], count: int) -> Iterator[dict[str, LazyTensor]]:
    """The parts' tensors; the embedding by rows, as since Llama 3."""
    for number in range(count):
        yield {name: _share(name, tensor, number, count) for name, tensor in weights.items()}


def _share(name: str, tensor: LazyTensor, number: int, count: int) -> LazyTensor:
    if count == 1 or _WHOLE.fullmatch(name):
        return tensor
    axis = 1 if _COLUMNS.fullmatch(name) else 0
    known = name == _EMBEDDING or _ROWS.fullmatch(name) or _COLUMNS.fullmatch(name)
    if not known or tensor.ndim <= axis or tensor.shape[axis] % count:
        raise UsageError(
            f"cannot be divided among {count} model-parallel parts",
            tensor=name,
            found=tensor.shape,
            expected=f"a tensor of Llama whose axis {axis} is a multiple of {count}",
            remedy="choose another --tp",
        )
    length = tensor.shape[axis] // count
    return tensor.narrow(axis, number * length, length)


FORMAT = Format(
    name="meta",
    title="Meta or Mistral release folder",
    detect=detect,
    read=read,
    plan=plan,
    dialect=lambda options: "meta",
    config_kind="meta",
    divides=("tensor_parallel",),
)
