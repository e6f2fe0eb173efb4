"""What a model is calibrated with, from a file: texts, or token ids."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UsageError
from anyckpt.indexing import Array
from anyckpt.storage.location import Location, look_at

FIELDS = ("text", "article")
"""Where a record has its text, if nobody says: as NeMo's own datasets have it."""

_HUB_DATASETS = ("cnn_dailymail", "wikitext", "c4", "pileval", "minipile")
_LIMIT = 4 << 30
_MOST = 1 << 30


@dataclass(frozen=True)
class Samples:
    """What was read.

    Attributes:
        path: of the file.
        texts: each a sample, or empty.
        ids: sequences of token ids, each a sample, or empty.
        stream: the file is one text, or one row of ids, which is cut into samples as long as they are asked for.
    """

    path: str
    texts: tuple[str, ...] = ()
    ids: tuple[Array, ...] = ()
    stream: bool = False


def read_samples(given: str | os.PathLike[str], field: str | None = None) -> Samples:
    """Samples from a text file, lines of JSON or a list in JSON (records with a text, or lists of ids), or ``.npy``.

    Args:
        given: the file.
        field: where a record has its text; the first of ``FIELDS`` that it has if None.

    Raises:
        UsageError: it is the name of a dataset on the hub, or nothing is in it.
        FormatError: it is missing, or is none of these.
    """
    path = os.fspath(given)
    if not os.path.exists(path) and (path in _HUB_DATASETS or path.split("/")[-1] in _HUB_DATASETS):
        raise UsageError(
            f"{path} is the name of a dataset on the hub, and nothing is fetched from there",
            expected="a text file, JSON lines or token ids",
            remedy="give a file with --calib-dataset, such as a few hundred articles in JSON lines with a field text",
        )
    location = look_at(path)
    ending = location.name.lower().rpartition(".")[2]
    if ending == "npy":
        samples = _array(location)
    elif ending in ("jsonl", "json", "ndjson"):
        samples = _records(location, field)
    else:
        text = _text(location)
        samples = Samples(location.path, (text,) if text.strip() else (), stream=True)
    if not samples.texts and not samples.ids:
        raise UsageError(
            "there is no text to calibrate with",
            path=location.path,
            expected="at least one sample that is not empty",
            found="nothing" if ending == "npy" else "no text",
        )
    return samples


def batches_of(sequences: Iterable[Sequence[int] | Array], length: int, size: int) -> list[Array]:
    """Batches of sequences of equal length, so that there is no padding: int64 ``[sequences, tokens]``.

    Args:
        sequences: token ids.
        length: tokens of a sequence at most; others are cut.
        size: sequences of a batch at most.
    """
    by_length: dict[int, list[Array]] = {}
    batches: list[Array] = []
    for sequence in sequences:
        ids = np.asarray(sequence[:length], np.int64)
        if not ids.size:
            continue
        waiting = by_length.setdefault(ids.size, [])
        waiting.append(ids)
        if len(waiting) == size:
            batches.append(np.stack(by_length.pop(ids.size)))
    return batches + [np.stack(waiting) for waiting in by_length.values()]


def check_positions(path: str, positions: object, length: int) -> None:
    """Raise UsageError if sequences are longer than a model's positions.

    Args:
        path: the model's, for messages.
        positions: as its configuration says; nothing is known unless it is a number.
        length: tokens of the longest sequence.
    """
    if isinstance(positions, int) and positions < length:
        raise UsageError(
            f"{path}: sequences are longer than the model's positions",
            expected=f"at most {positions} tokens",
            found=length,
            remedy=f"say --calib-sequence-length {positions}",
        )


def cut(ids: Sequence[int] | Array, length: int) -> Iterator[Sequence[int] | Array]:
    """A row of ids as samples; what is left over at the end is one if it is alone."""
    whole = len(ids) // length * length
    for start in range(0, whole or len(ids), length):
        yield ids[start : start + length]


def _array(location: Location) -> Samples:
    data = location.open().read_all(_LIMIT)
    try:
        found = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OverflowError, MemoryError) as error:  # the last two for a shape that is not there
        raise FormatError("is no array of numpy", path=location.path, found=str(error)[:80]) from error
    if found.ndim not in (1, 2) or found.dtype.kind not in "iu":
        raise FormatError(
            "is no array of token ids",
            path=location.path,
            expected="whole numbers, [sequences, tokens] or [tokens]",
            found=f"{found.dtype.name} {found.shape}",
        )
    if not found.size:
        return Samples(location.path)
    return Samples(location.path, ids=tuple(found) if found.ndim == 2 else (found,), stream=found.ndim == 1)


def _text(location: Location) -> str:
    data = location.open().read_all(_LIMIT)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(
            "is no text in UTF-8",
            path=location.path,
            found=f"byte {data[error.start]:#04x} at {error.start:,}",
            remedy="give a text file, JSON lines with a field text, or token ids as .npy",
        ) from error


def _records(location: Location, field: str | None) -> Samples:
    text = _text(location)
    records = _whole(text) if text.lstrip().startswith("[") else None
    numbered = enumerate(records, 1) if records is not None else _lines(text, location.path)
    texts: list[str] = []
    ids: list[Array] = []
    for number, record in numbered:
        if isinstance(record, dict):
            found = _field(record, field, number, location.path)
            if found.strip():
                texts.append(found)
        elif isinstance(record, list) and all(type(one) is int and 0 <= one < _MOST for one in record):
            if record:
                ids.append(np.array(record, np.int64))
        else:
            raise FormatError(
                f"record {number} is neither an object with a text nor a list of token ids",
                path=location.path,
                found=repr(record)[:80],
            )
    if texts and ids:
        raise FormatError("has texts and token ids", path=location.path, expected="one of them")
    return Samples(location.path, tuple(texts), tuple(ids))


def _whole(text: str) -> list[Any] | None:
    """A list in JSON; None for lines that are lists themselves."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, list) and found and all(type(one) is int for one in found):
        return [found]
    return found if isinstance(found, list) else None


def _lines(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"line {number} is not valid JSON", path=path, expected="one record in each line", found=line[:40]
            ) from error


def _field(record: dict[str, Any], field: str | None, number: int, path: str) -> str:
    names = FIELDS if field is None else (field,)
    found = next((record[name] for name in names if name in record), None)
    if not isinstance(found, str):
        raise FormatError(
            f"record {number} has no text",
            path=path,
            expected=f"a text as {' or '.join(names)}",
            found=", ".join(map(str, record))[:80] or "an empty object",
            remedy="say which field it is with --calib-field",
        )
    return found
