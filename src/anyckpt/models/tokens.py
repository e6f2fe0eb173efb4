"""What a tokenizer's files say about tokens, read without loading the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from anyckpt.checkpoint import Tokenizer
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.storage.source import ByteSource

_LIMIT = 256 << 20
_SPECIAL = ("bos_token", "eos_token", "pad_token")

_PIECES, _TRAINER = 1, 2  # fields of sentencepiece's ModelProto
_SENTENCEPIECE_IDS = {41: ("bos_token_id", 1), 42: ("eos_token_id", 2), 43: ("pad_token_id", -1)}
"""Fields of sentencepiece's TrainerSpec, the hub's name of each, and the default; negative means there is none."""


@dataclass(frozen=True)
class TokenFacts:
    """What is known of a tokenizer.

    Attributes:
        count: one more than the largest token id, or None.
        special: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as there are.
    """

    count: int | None = None
    special: Mapping[str, int] = field(default_factory=dict)


def token_facts(tokenizer: Tokenizer | None) -> TokenFacts:
    """The facts in ``tokenizer.json`` and its companions, or in a sentencepiece model; none if they cannot be read."""
    if tokenizer is None:
        return TokenFacts()
    files = {name.rpartition("/")[2]: source for name, source in tokenizer.files.items()}
    try:
        if "tokenizer.json" in files:
            return _huggingface(files)
        if tokenizer.model_file is not None and tokenizer.model_file in tokenizer.files:
            return _sentencepiece(tokenizer.files[tokenizer.model_file].read_all(_LIMIT))
    except (ValueError, RecursionError, FormatError):
        pass
    return TokenFacts()


def _huggingface(files: Mapping[str, ByteSource]) -> TokenFacts:
    content = _json(files, "tokenizer.json")
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, Any] = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    if isinstance(vocabulary, list):
        ids = {str(entry[0]): number for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            ids[token["content"]] = token.get("id")
    numbers = [number for number in ids.values() if type(number) is int and number >= 0]
    named = {**_json(files, "special_tokens_map.json"), **_json(files, "tokenizer_config.json")}
    special: dict[str, int] = {}
    for key in _SPECIAL:
        value = named.get(key)
        token_id = ids.get(str(value.get("content") if isinstance(value, dict) else value))
        if type(token_id) is int:
            special[f"{key}_id"] = token_id
    return TokenFacts(max(numbers) + 1 if numbers else None, special)


def _json(files: Mapping[str, ByteSource], name: str) -> dict[str, Any]:
    value = json.loads(files[name].read_all(_LIMIT).decode("utf-8")) if name in files else {}
    return value if isinstance(value, dict) else {}


def _sentencepiece(data: bytes) -> TokenFacts:
    pieces = 0
    ids = dict(_SENTENCEPIECE_IDS.values())
    for number, value in protobuf_fields(data):
        pieces += number == _PIECES
        if number == _TRAINER and isinstance(value, bytes):
            for inner, token_id in protobuf_fields(value):
                if inner in _SENTENCEPIECE_IDS and isinstance(token_id, int):
                    ids[_SENTENCEPIECE_IDS[inner][0]] = token_id - (1 << 64 if token_id >> 63 else 0)
    special = {name: token_id for name, token_id in ids.items() if 0 <= token_id < pieces}
    return TokenFacts(pieces or None, special)


def protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol buffer; bytes of what has a fixed width.

    Raises:
        ValueError: it is none, or is cut short.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
        elif kind == 2:
            length, position = _varint(data, position)
            yield key >> 3, data[position : position + length]
            position += length
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
            yield key >> 3, data[position : position + length]
            position += length
        else:
            raise ValueError("not a protocol buffer")
    if position > len(data):
        raise ValueError("a protocol buffer is cut short")


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
