"""Sentencepiece models as protocol buffers: pieces with scores and types, read and written without the library."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.models.tokens import protobuf_fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, which sentencepiece and llama.cpp number alike."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_PADDING_SCORE = -10_000.0
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in their order.

    Attributes:
        tokens: texts.
        scores: of each; larger ones are merged first.
        types: one of the numbers above for each.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]

    def padded(self, size: int) -> Vocabulary:
        """As many as rows of the embedding: rows without a token get one that is not used."""
        more = max(0, size - len(self.tokens))
        names = tuple(f"[PAD{number}]" for number in range(len(self.tokens), len(self.tokens) + more))
        return Vocabulary(self.tokens + names, self.scores + (_PADDING_SCORE,) * more, self.types + (UNUSED,) * more)


def read_model(data: bytes, name: str) -> Vocabulary:
    """The pieces of a ``tokenizer.model``.

    Raises:
        FormatError: it is damaged.
    """
    try:
        pieces = [_piece(value) for number, value in protobuf_fields(data) if number == _PIECES]
    except (ValueError, struct.error) as error:
        raise FormatError(f"is a damaged sentencepiece model: {error}", path=name) from error
    if not pieces:
        raise FormatError("is a sentencepiece model without pieces", path=name)
    tokens, scores, types = zip(*pieces, strict=True)
    return Vocabulary(tokens, scores, types)


@dataclass(frozen=True)
class Spec:
    """What a model says of how it cuts texts.

    Attributes:
        kind: ``BYTE_PAIRS``, ``UNIGRAMS`` or another number of sentencepiece's.
        unknown: the piece for what it does not know.
        characters: table by which characters are replaced before, compiled; empty for none.
    """

    kind: int
    unknown: str
    characters: bytes


UNIGRAMS, BYTE_PAIRS = 1, 2
_KIND, _UNKNOWN_PIECE, _CHARACTERS = 3, 45, 2


def read_spec(data: bytes, name: str) -> Spec:
    """What a ``tokenizer.model`` says besides its pieces.

    Raises:
        FormatError: it is damaged.
    """
    kind, unknown, characters = UNIGRAMS, "<unk>", b""
    try:
        for section, value in protobuf_fields(data):
            for number, inner in protobuf_fields(value) if isinstance(value, bytes) else ():
                if section == _TRAINER and number == _KIND and isinstance(inner, int):
                    kind = inner
                elif section == _TRAINER and number == _UNKNOWN_PIECE and isinstance(inner, bytes):
                    unknown = inner.decode(errors="replace")
                elif section == _NORMALIZER and number == _CHARACTERS and isinstance(inner, bytes):
                    characters = inner
    except ValueError as error:
        raise FormatError(f"is a damaged sentencepiece model: {error}", path=name) from error
    return Spec(kind, unknown, characters)


def _piece(data: int | bytes) -> tuple[str, float, int]:
    if not isinstance(data, bytes):
        raise ValueError("a piece is a number")
    text, score, kind = "", 0.0, NORMAL
    for number, value in protobuf_fields(data):
        if number == _TEXT and isinstance(value, bytes):
            text = value.decode(errors="replace")
        elif number == _SCORE and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == _TYPE and isinstance(value, int):
            kind = value
    return text, score, kind


def model_bytes(
    found: Vocabulary,
    ids: Mapping[str, Any],
    *,
    space: bool,
    characters: bytes = b"",
    kind: int = BYTE_PAIRS,
    trimmed: bool = False,
) -> bytes:
    """A ``tokenizer.model`` of a vocabulary.

    Args:
        found: its tokens, padding left out.
        ids: of the tokens ``unknown``, ``bos``, ``eos`` and ``padding``, as far as there are.
        space: a text is taken to begin with a space.
        characters: table by which characters are replaced before, compiled.
        kind: as ``Spec`` has it.
        trimmed: spaces around a text, and all but one of several, are left out.
    """
    last = max((at for at, kind in enumerate(found.types) if kind != UNUSED), default=-1)
    pieces = b"".join(
        _field(_PIECES, _piece_bytes(text.replace(" ", _SPACE) if kind == USER_DEFINED else text, score, kind))
        for text, score, kind in list(zip(found.tokens, found.scores, found.types, strict=True))[: last + 1]
    )
    unknown = next((at for at, kind in enumerate(found.types) if kind == UNKNOWN), 0)
    numbers = {40: ids.get("unknown"), 41: ids.get("bos"), 42: ids.get("eos"), 43: ids.get("padding")}
    numbers[40] = unknown if numbers[40] is None else numbers[40]
    numbers |= {_KIND: kind, 4: last + 1, 35: int(found.types.count(BYTE) == 256)}  # byte pairs; size; unknown in bytes
    trainer = b"".join(_number(field, value) for field, value in numbers.items() if type(value) is int)
    trainer += b"".join(_number(field, (1 << 64) - 1) for field, value in numbers.items() if type(value) is not int)
    table = _field(1, b"user_defined") + _field(_CHARACTERS, characters) if characters else _field(1, b"identity")
    normalizer = table + _number(3, int(space)) + _number(4, int(trimmed)) + _number(5, 1)
    return pieces + _field(_TRAINER, trainer) + _field(_NORMALIZER, normalizer)


def _piece_bytes(text: str, score: float, kind: int) -> bytes:
    data = _field(_TEXT, text.encode(errors="replace")) + bytes([_SCORE << 3 | 5]) + struct.pack("<f", score)
    return data if kind == NORMAL else data + _number(_TYPE, kind)


def _field(number: int, data: bytes) -> bytes:
    return b"".join((*_varint(number << 3 | 2), *_varint(len(data)), data))


def _number(number: int, value: int) -> bytes:
    return b"".join((*_varint(number << 3), *_varint(value)))


def _varint(value: int) -> Iterator[bytes]:
    while value > 0x7F:
        yield bytes([value & 0x7F | 0x80])
        value >>= 7
    yield bytes([value])
