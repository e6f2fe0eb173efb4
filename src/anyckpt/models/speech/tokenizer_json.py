"""``tokenizer.json`` of speech models from a sentencepiece model, as transformers' converters of ``.nemo`` make it.

``ParakeetConverter`` and ``CanaryConverter`` take every model to be one of byte pairs; one of unigrams is written as
such here, for its pieces have no merges.  The way back makes a sentencepiece model of the same pieces.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from anyckpt.errors import FormatError, MappingError
from anyckpt.models.sentencepiece import (
    BYTE,
    BYTE_PAIRS,
    CONTROL,
    NORMAL,
    UNIGRAMS,
    UNKNOWN,
    USER_DEFINED,
    Spec,
    Vocabulary,
    model_bytes,
    read_model,
    read_spec,
)
from anyckpt.storage.source import ByteSource

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_LARGEST = 256 << 20
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}

_SECOND = {"Sequence": {"id": "B", "type_id": 1}}
_FIRST = {"Sequence": {"id": "A", "type_id": 0}}
_AS_IT_IS = {"type": "TemplateProcessing", "single": [_FIRST], "pair": [_FIRST, _SECOND], "special_tokens": {}}

Special = Callable[[str, int], bool]
"""Whether a piece that texts are cut at first, with its type, is one that is no text."""


def is_control(piece: str, kind: int) -> bool:
    """Sentencepiece's own pieces that are no text."""
    return kind == CONTROL


def from_sentencepiece(
    model: ByteSource, more: Sequence[str], marked: Iterable[str], special: Special = is_control
) -> dict[str, Any]:
    """A ``tokenizer.json``.

    Args:
        model: a ``tokenizer.model``.
        more: tokens behind its pieces, unless they are among them.
        marked: tokens that are special, whatever type they have.
        special: which others are.

    Raises:
        FormatError: the model is damaged.
        MappingError: it is neither of byte pairs nor of unigrams.
    """
    data = model.read_all(_LARGEST)
    found, spec = read_model(data, model.name), read_spec(data, model.name)
    ids = {token: number for number, token in enumerate(found.tokens)}
    added = {
        number: special(token, kind)
        for number, (token, kind) in enumerate(zip(found.tokens, found.types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    }
    numbers = dict(ids)
    for token in more:
        added.setdefault(numbers.setdefault(token, len(numbers)), True)
    added |= {numbers[token]: True for token in marked if token in numbers}
    texts = {number: token for token, number in numbers.items()}
    replaced = [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.characters).decode()}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, texts[number], is_special) for number, is_special in sorted(added.items())],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *(replaced if spec.characters else []),
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": _METASPACE,
        "post_processor": _AS_IT_IS,
        "decoder": _METASPACE,
        "model": _model(found, ids, spec, model.name),
    }


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **sides, "special": special}


def _model(found: Vocabulary, ids: Mapping[str, int], spec: Spec, name: str) -> dict[str, Any]:
    if spec.kind == UNIGRAMS:
        unknown = next((number for number, kind in enumerate(found.types) if kind == UNKNOWN), None)
        pieces = [[token, score] for token, score in zip(found.tokens, found.scores, strict=True)]
        return {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": True}
    if spec.kind != BYTE_PAIRS:
        raise MappingError(
            "is a sentencepiece model that transformers has no tokenizer for",
            path=name,
            expected="one of byte pairs or unigrams",
            found=f"model_type {spec.kind}",
        )
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": spec.unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": dict(ids),
        "merges": [list(pair) for pair in _merges(found, ids)],
    }


def _merges(found: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best pieces first, as transformers orders them."""
    scores = dict(zip(found.tokens, found.scores, strict=True))
    pairs: list[tuple[str, str, float]] = []
    for token, score in scores.items():
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        halves = [(left, right) for left, right in cuts if left in ids and right in ids]
        pairs += [(*pair, score) for pair in sorted(halves, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    pairs.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [(left, right) for left, right, _ in pairs]


def to_sentencepiece(
    content: Mapping[str, Any], count: int, name: str, control: Callable[[str], bool] = lambda token: True
) -> bytes:
    """A ``tokenizer.model`` of the first tokens of a ``tokenizer.json``.

    Args:
        content: of the file.
        count: how many there are; what is behind them (the blank) is no piece.
        name: of the file, for messages.
        control: whether a special token is sentencepiece's own piece, which no text has; else texts are cut at it.

    Raises:
        FormatError: the file is damaged.
        MappingError: it is of another kind, or lacks a token.
    """
    model = content.get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or kind not in ("BPE", "Unigram"):
        raise MappingError("is of a kind that sentencepiece has not", path=name, expected="BPE or Unigram", found=kind)
    listed = model.get("vocab")
    try:
        if kind == "BPE":
            assert isinstance(listed, Mapping)
            texts = {number: token for token, number in listed.items()}
            scores = {number: -float(number) for number in texts}
        else:
            assert isinstance(listed, list)
            texts = {number: str(piece[0]) for number, piece in enumerate(listed)}
            scores = {number: float(piece[1]) for number, piece in enumerate(listed)}
        special = {entry["id"]: bool(entry["special"]) for entry in content.get("added_tokens") or []}
        texts |= {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}
        unknown = model.get("unk_token") if kind == "BPE" else texts.get(model.get("unk_id") or 0)
        characters = _characters(content)
    except (AssertionError, KeyError, TypeError, ValueError, IndexError, AttributeError, binascii.Error) as error:
        raise FormatError("is a damaged tokenizer.json", path=name, found=f"{error!r:.80}") from error
    missing = next((number for number in range(count) if not isinstance(texts.get(number), str)), None)
    if missing is not None:
        raise MappingError(f"has no token {missing}", path=name, expected=f"{count} tokens", found=len(texts))
    tokens = tuple(texts[number] for number in range(count))
    types = tuple(
        UNKNOWN
        if token == unknown
        else BYTE
        if len(token) == 6 and token.startswith("<0x")
        else (CONTROL if special[number] and control(token) else USER_DEFINED)
        if number in special
        else NORMAL
        for number, token in enumerate(tokens)
    )
    vocabulary = Vocabulary(tokens, tuple(scores.get(number, 0.0) for number in range(count)), types)
    spelled = BYTE_PAIRS if kind == "BPE" else UNIGRAMS
    return model_bytes(vocabulary, {}, space=True, characters=characters, kind=spelled, trimmed=True)


def _characters(content: Mapping[str, Any]) -> bytes:
    """The compiled table of a normalizer, empty for none."""
    normalizer = content.get("normalizer") or {}
    for each in normalizer.get("normalizers", [normalizer]):
        if each.get("type") == "Precompiled":
            return base64.b64decode(each["precompiled_charsmap"], validate=True)
    return b""


def as_bytes(content: Mapping[str, Any]) -> bytes:
    """A file as tokenizers writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode()
