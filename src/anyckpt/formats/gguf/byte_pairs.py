"""Tokenizers of byte pairs: ``tokenizer.json`` from and into tokens, merges and llama.cpp's word for how texts are cut.

llama.cpp's converter finds that word by what the tokenizer makes of a text; here the expressions themselves tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.models.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary

_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_EXPRESSIONS = {
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Word -> the expression that cuts a text before its bytes are paired."""
_PLAIN = "gpt-2"
_NORMALIZED = {"qwen2": {"type": "NFC"}}


@dataclass(frozen=True)
class BytePairs:
    """A tokenizer.

    Attributes:
        kind: llama.cpp's word for how it cuts texts.
        vocabulary: its tokens.
        merges: two tokens with a space between, in their order.
    """

    kind: str
    vocabulary: Vocabulary
    merges: tuple[str, ...]


def read_byte_pairs(content: Mapping[str, Any], size: Any, name: str) -> BytePairs | str:
    """What a ``tokenizer.json`` says, or why llama.cpp has no such tokenizer.

    Args:
        content: of the file.
        size: rows of the embedding.
        name: what to call the file.

    Raises:
        FormatError: it is damaged.
    """
    model = content.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else None
        return f"it is of kind {kind}, and llama.cpp has those of byte pairs and sentencepiece models"
    kind = _kind(content.get("pre_tokenizer"))
    if kind is None:
        return "how it cuts texts is none of the ways of llama.cpp's that are known here"
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, Mapping) or not isinstance(merges, list):
        raise FormatError("is a damaged tokenizer.json", path=name, expected="a model with vocab and merges")
    found = _vocabulary(content, vocabulary, size)
    return found if isinstance(found, str) else BytePairs(kind, found, tuple(_merge(one, name) for one in merges))


def _kind(cutting: Any) -> str | None:
    steps = cutting.get("pretokenizers", [cutting]) if isinstance(cutting, Mapping) else []
    if len(steps) == 1 and isinstance(steps[0], Mapping) and steps[0].get("type") == "ByteLevel":
        return _PLAIN if steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space") else None
    if [isinstance(step, Mapping) and step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    pattern = steps[0].get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    bytewise = not steps[1].get("use_regex", True) and not steps[1].get("add_prefix_space")
    if not bytewise or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        return None
    return next((kind for kind, known in _EXPRESSIONS.items() if known == expression), None)


def _merge(merge: Any, name: str) -> str:
    if isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
        return " ".join(part.replace(" ", "Ġ") for part in merge)
    if not isinstance(merge, str):
        raise FormatError("has a merge that is none", path=name, found=str(merge)[:40])
    return merge


def _vocabulary(content: Mapping[str, Any], vocabulary: Mapping[str, Any], size: Any) -> Vocabulary | str:
    texts: dict[int, tuple[str, int]] = {}
    for text, number in vocabulary.items():
        if type(number) is int and number >= 0:
            texts[number] = (text, NORMAL)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, Mapping) and type(token.get("id")) is int and isinstance(token.get("content"), str):
            texts[token["id"]] = (token["content"], CONTROL if token.get("special") else USER_DEFINED)
    count = size if isinstance(size, int) else 1 + max(texts, default=-1)
    if 1 + max(texts, default=-1) > count:
        return f"it has {1 + max(texts):,} tokens and the embedding {count:,} rows"
    listed = [texts.get(number, (f"[PAD{number}]", UNUSED)) for number in range(count)]
    return Vocabulary(tuple(text for text, _ in listed), (), tuple(kind for _, kind in listed))


def json_of_byte_pairs(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], kind: str, first: str | None
) -> bytes | None:
    """A ``tokenizer.json``; None where how texts are cut is not known.

    Args:
        tokens, types, merges: as the file has them.
        kind: llama.cpp's word for how texts are cut.
        first: a token that goes before every text, or None.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if kind == _PLAIN:
        cutting: dict[str, Any] = {**level, "use_regex": True}
    elif kind in _EXPRESSIONS:
        split = {"type": "Split", "pattern": {"Regex": _EXPRESSIONS[kind]}, "behavior": "Isolated", "invert": False}
        cutting = {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]}
    else:
        return None
    added = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind_of_token == CONTROL,
        }
        for number, (text, kind_of_token) in enumerate(zip(tokens, types, strict=True))
        if kind_of_token in (CONTROL, USER_DEFINED)
    ]
    after: dict[str, Any] = {**level, "use_regex": True}
    if first is not None and first in tokens:
        begin = {"SpecialToken": {"id": first, "type_id": 0}}
        after = {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                begin,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": first, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {first: {"id": first, "ids": [tokens.index(first)], "tokens": [first]}},
        }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _NORMALIZED.get(kind),
        "pre_tokenizer": cutting,
        "post_processor": after,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind == "llama-bpe",
            "vocab": {text: at for at, (text, one) in enumerate(zip(tokens, types, strict=True)) if one != UNUSED},
            "merges": list(merges),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode(errors="replace")
