"""Sentencepiece models that only ``tokenizer.json`` has left, as transformers saves Llama 2's, Mistral's and Gemma's.

They are byte pairs of characters, with bytes for what no token has, and merges in the order of the pieces' scores.
llama.cpp merges by scores, so each token gets that of its first merge: texts are cut as before.  (Its own converter
gives all tokens one score, with which llama.cpp cuts otherwise: seen in the release that llama-cpp-python 0.3.36 has.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyckpt.errors import FormatError
from anyckpt.models.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>", re.ASCII)
_ADDED_SCORE = -1000.0
_UNMERGED_SCORE = -1e6
"""Of tokens that no merge makes: single characters, which nothing is merged into."""


def are_pieces(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is of byte pairs of characters."""
    model = content.get("model")
    return isinstance(model, Mapping) and model.get("type") == "BPE" and model.get("byte_fallback") is True


def read_pieces(content: Mapping[str, Any], size: Any, name: str) -> tuple[Vocabulary, bool] | str:
    """The pieces, and whether a text is taken to begin with a space; or why llama.cpp cuts texts otherwise.

    Args:
        content: of a ``tokenizer.json`` of which ``are_pieces`` is true.
        size: rows of the embedding.
        name: what to call the file.

    Raises:
        FormatError: it is damaged.
    """
    model = content["model"]
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, Mapping) or not isinstance(merges, list):
        raise FormatError("is a damaged tokenizer.json", path=name, expected="a model with vocab and merges")
    begins = _begins_with_space(content)
    if begins is None:
        return "what it does to texts before it cuts them is not what sentencepiece models do"
    scores = _scores(list(_pairs(merges, name)))
    if scores is None:
        return "its merges are not in the order of scores, as those of sentencepiece models are"
    unknown = model.get("unk_token")
    found: dict[int, tuple[str, float, int]] = {}
    for text, number in vocabulary.items():
        if type(number) is int and number >= 0:
            kind = UNKNOWN if text == unknown else BYTE if _BYTE.fullmatch(text) else NORMAL
            found[number] = (text, scores.get(text, _UNMERGED_SCORE if kind == NORMAL else 0.0), kind)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, Mapping) and type(token.get("id")) is int and isinstance(token.get("content"), str):
            number, text, special = token["id"], token["content"], bool(token.get("special"))
            if number >= 0 and found.get(number, ("", 0.0, NORMAL))[2] != UNKNOWN:
                found[number] = (text, _ADDED_SCORE, CONTROL if special else USER_DEFINED)
    count = size if isinstance(size, int) else 1 + max(found, default=-1)
    if 1 + max(found, default=-1) > count:
        return f"it has {1 + max(found):,} tokens and the embedding {count:,} rows"
    texts, values, kinds = zip(
        *(found.get(number, (f"[PAD{number}]", _ADDED_SCORE, UNUSED)) for number in range(count)), strict=True
    )
    return Vocabulary(texts, values, kinds), begins


def _begins_with_space(content: Mapping[str, Any]) -> bool | None:
    """Whether a space is put in front of a text; None if something else is done to it than to write spaces as ▁."""
    steps = list(_steps(content.get("normalizer"), "normalizers"))
    cutting = list(_steps(content.get("pre_tokenizer"), "pretokenizers"))
    begins = False
    replaced = False
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            begins = True
        elif step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == _SPACE:
            replaced = True
        else:
            return None
    for step in cutting:
        if step.get("type") == "Metaspace" and step.get("replacement") == _SPACE and not step.get("split", True):
            replaced, begins = True, begins or step.get("prepend_scheme", "always") != "never"
        elif not (step.get("type") == "Split" and step.get("pattern") == {"String": " "} and replaced):
            return None  # a cut at spaces that are not there any more does nothing
    return begins if replaced else None


def _steps(said: Any, several: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(said, Mapping):
        inner = said.get(several) if said.get("type") == "Sequence" else [said]
        yield from (step for step in inner or [] if isinstance(step, Mapping))


def _pairs(merges: Sequence[Any], name: str) -> Iterator[tuple[str, str]]:
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise FormatError("has a merge that is none", path=name, found=str(merge)[:40])
        yield parts[0], parts[1]


def _scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float] | None:
    """The score of every token that merges make; None if those that make one token are not together."""
    scores: dict[str, float] = {}
    last = ""
    for one, other in pairs:
        made = one + other
        if made != last and made in scores:
            return None
        if made not in scores:
            scores[made] = -float(len(scores))
        last = made
    return scores
