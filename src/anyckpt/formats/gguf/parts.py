"""A model in several files, as ``llama-gguf-split`` and llama.cpp's converter write them: ``NAME-00001-of-00003.gguf``.

Each is a GGUF file of some of the tensors and says which part it is; the first one has the model's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, few
from anyckpt.formats.gguf.container import INT32, MAGIC, UINT16, Header, TensorInfo, Typed, read_header
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource

COUNT, NUMBER, TENSORS = "split.count", "split.no", "split.tensors.count"
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII)


@dataclass(frozen=True)
class Part:
    """One file and what its header says."""

    source: ByteSource
    header: Header


def detect(location: Location) -> bool:
    """A GGUF file, or a folder with the parts of a model."""
    if location.is_directory:
        return any(map(_NAME.fullmatch, location.names))
    return location.head.startswith(MAGIC)


def name_of(stem: str, number: int, count: int) -> str:
    """What the part with this number, from 0 on, is called."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def said_of_part(number: int, count: int, tensors: int) -> dict[str, Any]:
    """What the header of a part says of it; ``tensors`` are those of all parts."""
    return {NUMBER: Typed(UINT16, number), COUNT: Typed(UINT16, count), TENSORS: Typed(INT32, tensors)}


def read_parts(location: Location) -> list[Part]:
    """All files of the model that is at a location, in their order.

    Raises:
        FormatError: one is damaged or missing, or they are not of one model.
    """
    if location.is_directory:
        sets = {(match[1], match[3]) for name in location.names if (match := _NAME.fullmatch(name))}
        if len(sets) > 1:
            raise FormatError(
                "holds the parts of several models",
                path=location.path,
                found=few(sorted(f"{stem}-*-of-{count}.gguf" for stem, count in sets), 4),
                remedy="open the first part of one",
            )
        stem, count = sets.pop()
        return _together(location, stem, int(count), location.names)
    source = location.open()
    header = read_header(source)
    stated = header.metadata.get(COUNT, 0)
    if type(stated) is not int or stated <= 1:
        return [Part(source, header)]
    match, parent = _NAME.fullmatch(location.name), location.parent
    number = header.metadata.get(NUMBER)
    if match is None or parent is None or int(match[3]) != stated:
        raise FormatError(
            f"is one of {stated} parts of a model, and its name does not tell those of the others",
            path=location.path,
            expected=f"a name such as {name_of('model', number if type(number) is int else 0, stated)}",
            found=f"part {number + 1 if type(number) is int else number}",
            remedy="give the files the names that they had",
        )
    names: tuple[str, ...] = ()
    with suppress(FormatError):
        names = location.place.names(parent)
    folder = Location(parent, True, names=names, place=location.place)
    return _together(folder, match[1], stated, names)


def _together(folder: Location, stem: str, count: int, names: Sequence[str]) -> list[Part]:
    wanted = [name_of(stem, number, count) for number in range(min(count, 99_999))]
    missing = [name for name in wanted if name not in set(names)]
    if missing or not wanted:
        raise FormatError(
            f"{len(missing)} of {count} parts of the model are missing: {few(missing, 4)}",
            path=folder.path,
            remedy="copy the missing files here too",
        )
    parts = []
    for number, name in enumerate(wanted):
        source = folder.open(name)
        parts.append(Part(source, read_header(source)))
        said = parts[-1].header.metadata
        if count > 1 and (said.get(COUNT), said.get(NUMBER)) != (count, number):
            raise FormatError(
                "is not the part that its name says",
                path=folder.join(name),
                expected=f"part {number + 1} of {count}",
                found=f"{NUMBER} {said.get(NUMBER)}, {COUNT} {said.get(COUNT)}",
                remedy="copy the parts again, from one model",
            )
    _check(parts, folder.path)
    return parts


def _check(parts: Sequence[Part], path: str) -> None:
    names = [info.name for info, _ in tensors_of(parts)]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    stated = parts[0].header.metadata.get(TENSORS)
    if twice is not None or (type(stated) is int and stated != len(names)):
        raise FormatError(
            "the parts are not of one model" if twice is None else "is in two parts of the model",
            path=path,
            tensor=twice,
            expected=None if twice is not None else f"{stated} tensors",
            found=None if twice is not None else len(names),
            remedy="copy the parts again, from one model",
        )


def tensors_of(parts: Sequence[Part]) -> Iterator[tuple[TensorInfo, ByteSource]]:
    """What the headers tell of every tensor, each with the file that has it."""
    return ((info, part.source) for part in parts for info in part.header.tensors)


def metadata_of(parts: Sequence[Part]) -> Mapping[str, Any]:
    """The model's metadata."""
    own = parts[0].header.metadata
    return {key: value for key, value in own.items() if key not in (COUNT, NUMBER, TENSORS)}
