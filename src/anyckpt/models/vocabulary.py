"""How many tokens a tokenizer has, counted in its files without loading it."""

from __future__ import annotations

import json
from typing import Any

from anyckpt.checkpoint import Tokenizer
from anyckpt.errors import FormatError

_LIMIT = 256 << 20
_PIECE = 0x0A  # field 1, length-delimited: one ``pieces`` entry of sentencepiece's ModelProto


def count(tokenizer: Tokenizer | None) -> int | None:
    """One more than the largest token id, or None if the files do not say.

    Reads ``tokenizer.json`` (model vocabulary and added tokens) or counts the pieces of a sentencepiece model.
    """
    if tokenizer is None:
        return None
    by_name = {name.rpartition("/")[2]: source for name, source in tokenizer.files.items()}
    try:
        if "tokenizer.json" in by_name:
            return _huggingface(json.loads(by_name["tokenizer.json"].read_all(_LIMIT).decode("utf-8")))
        if tokenizer.model_file is not None and tokenizer.model_file in tokenizer.files:
            return _sentencepiece(tokenizer.files[tokenizer.model_file].read_all(_LIMIT))
    except (ValueError, RecursionError, FormatError):
        return None
    return None


def _huggingface(content: Any) -> int | None:
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return None
    vocabulary = content["model"].get("vocab")
    ids: list[Any] = []
    if isinstance(vocabulary, dict):
        ids = list(vocabulary.values())
    elif isinstance(vocabulary, list):
        ids = [len(vocabulary) - 1]
    added = content.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((number for number in ids if type(number) is int), default=-1) + 1 or None


def _sentencepiece(data: bytes) -> int | None:
    """Top-level fields of a protocol buffer: key, then a varint or a length and that many bytes."""
    position = pieces = 0
    while position < len(data):
        key, position = _varint(data, position)
        if key & 7 == 2:
            length, position = _varint(data, position)
            position += length
        elif key & 7 == 0:
            _, position = _varint(data, position)
        elif key & 7 in (1, 5):
            position += 8 if key & 7 == 1 else 4
        else:
            return None
        pieces += key == _PIECE
    return pieces or None if position == len(data) else None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number does not end")
