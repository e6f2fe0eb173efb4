"""Several sentencepiece models behind one range of ids, as NeMo's aggregate tokenizers are, in one ``tokenizer.json``.

NeMo gives each language the ids behind those of the languages before it, so that a piece may have several ids;
transformers knows tokens by their text.  There the pieces of one language have their own text, with which texts are
cut, and those of the others have their language's name behind them, which is taken off where ids become text again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.models.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, read_model
from anyckpt.models.speech.tokenizer_json import Special, from_sentencepiece, is_control
from anyckpt.storage.source import ByteSource

_LARGEST = 256 << 20
_SPECIAL = "spl_tokens"
_LANGUAGE = re.compile(r"[\w+@-][\w.+@-]{0,99}", re.ASCII)
_FILE = re.compile(rf"tokenizer\.(\d{{1,3}})\.({_LANGUAGE.pattern})\.model", re.ASCII)
_OF_NEMO = "nemo:"


@dataclass(frozen=True)
class Part:
    """One of the models.

    Attributes:
        language: whose it is, or ``spl_tokens``.
        model: a ``tokenizer.model``.
        vocabulary: its pieces.
        offset: the id of its first piece.
    """

    language: str
    model: ByteSource
    vocabulary: Vocabulary
    offset: int

    def file(self, number: int, kind: str = "tokenizer.{}.model") -> str:
        """What the file is called beside the others."""
        return kind.format(f"{number}.{self.language}")


def is_aggregate(config: Mapping[str, Any]) -> bool:
    """Whether a ``model_config.yaml`` has an aggregate tokenizer."""
    section = config.get("tokenizer")
    return isinstance(section, Mapping) and section.get("type") == "agg"


def parts_of(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """The models of a checkpoint's aggregate tokenizer; none if it has no such tokenizer, or not all of its files.

    Raises:
        FormatError: a model is damaged.
        MappingError: a language has a name that no file can have.
    """
    files = {**checkpoint.artifacts, **(checkpoint.tokenizer.files if checkpoint.tokenizer is not None else {})}
    found: list[tuple[str, ByteSource]] = []
    if is_aggregate(checkpoint.config):
        listed = checkpoint.config["tokenizer"].get("langs")
        for language, section in listed.items() if isinstance(listed, Mapping) else ():
            named = section.get("model_path") if isinstance(section, Mapping) else None
            source = files.get(named.removeprefix(_OF_NEMO)) if isinstance(named, str) else None
            if source is None:
                return ()
            if _LANGUAGE.fullmatch(str(language)) is None:
                raise MappingError(
                    "model_config.yaml's tokenizer has a language whose name is none for a file",
                    path=checkpoint.path,
                    expected="letters, digits and signs such as - and _",
                    found=repr(language)[:80],
                )
            found.append((str(language), source))
    else:
        named_so = {int(match[1]): (match[2], files[name]) for name in files if (match := _FILE.fullmatch(name))}
        if sorted(named_so) != list(range(len(named_so))):
            return ()
        found = [named_so[number] for number in sorted(named_so)]
    parts: list[Part] = []
    offset = 0
    for language, source in found:
        vocabulary = read_model(source.read_all(_LARGEST), source.name)
        parts.append(Part(language, source, vocabulary, offset))
        offset += len(vocabulary.tokens)
    return tuple(parts)


def tokens_of(parts: Iterable[Part]) -> tuple[str, ...]:
    """The pieces by their ids."""
    return tuple(token for part in parts for token in part.vocabulary.tokens)


def leading(parts: Sequence[Part]) -> Part:
    """The model by which texts are cut: the first one of a language."""
    return next((part for part in parts if part.language != _SPECIAL), parts[0])


def from_parts(
    parts: Sequence[Part], more: Sequence[str], marked: Iterable[str], special: Special = is_control
) -> dict[str, Any]:
    """A ``tokenizer.json``.

    Args:
        parts: the models, in the order of their ids.
        more: tokens behind their pieces, unless they are among them.
        marked: tokens that are special, whatever type they have.
        special: which others are.

    Raises:
        FormatError: a model is damaged.
        MappingError: it is neither of byte pairs nor of unigrams, or a piece has a language's name behind it.
    """
    first = leading(parts)
    content = from_sentencepiece(first.model, (), marked, special)
    texts, added = _texts(parts, first, special)
    numbers = {text: number for number, text in enumerate(texts)}
    if len(numbers) != len(texts):
        twice = next(text for number, text in enumerate(texts) if numbers[text] != number)
        raise MappingError(
            "has a piece two times, which transformers cannot tell apart",
            path=parts[0].model.name,
            found=repr(twice)[:80],
            remedy="convert to safetensors, torch or dcp, which keep names",
        )
    added |= {first.offset + entry["id"]: entry["special"] for entry in content["added_tokens"]}
    for token in more:
        added.setdefault(numbers.setdefault(token, len(numbers)), True)
    added |= {numbers[token]: True for token in marked if token in numbers}
    behind = {number: text for text, number in numbers.items()}
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    marks = [_mark(part.language) for part in parts if part is not first]
    replaced = [{"type": "Replace", "pattern": {"String": mark}, "content": ""} for mark in marks]
    return {
        **content,
        "added_tokens": [
            {"id": number, "content": behind[number], **sides, "special": is_special}
            for number, is_special in sorted(added.items())
        ],
        "decoder": {"type": "Sequence", "decoders": [*replaced, content["decoder"]]},
        "model": _model(content["model"], parts, texts, first),
    }


def _texts(parts: Sequence[Part], first: Part, special: Special) -> tuple[list[str], dict[int, bool]]:
    """What each id's token is called, and which of the special tokens' model are cut out of texts, special or not."""
    own = set(first.vocabulary.tokens)
    texts: list[str] = []
    added: dict[int, bool] = {}
    for part in parts:
        mark = _mark(part.language)
        for token, kind in zip(part.vocabulary.tokens, part.vocabulary.types, strict=True):
            keeps = part is first or (
                part.language == _SPECIAL and kind in (CONTROL, USER_DEFINED) and token not in own
            )
            if keeps and part is not first:
                added[len(texts)] = special(token, kind)
            texts.append(token if keeps else token + mark)
    return texts, added


def _mark(language: str) -> str:
    """What is behind the pieces of a language."""
    return f"\N{MATHEMATICAL LEFT ANGLE BRACKET}{language}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"


def _model(content: Mapping[str, Any], parts: Sequence[Part], texts: Sequence[str], first: Part) -> dict[str, Any]:
    """The leading model with the pieces of all, of which it makes its own alone."""
    if content["type"] == "BPE":
        return {**content, "vocab": {text: number for number, text in enumerate(texts)}}
    scores = [score for part in parts for score in part.vocabulary.scores]
    unknown = next((number for number, kind in enumerate(first.vocabulary.types) if kind == UNKNOWN), None)
    return {
        **content,
        "unk_id": None if unknown is None else first.offset + unknown,
        "vocab": [[text, score] for text, score in zip(texts, scores, strict=True)],
    }


def is_marked(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is one of several models, as ``from_parts`` makes it."""
    decoder = content.get("decoder")
    listed = decoder.get("decoders") if isinstance(decoder, Mapping) else None
    mark = "\N{MATHEMATICAL LEFT ANGLE BRACKET}"
    return isinstance(listed, list) and any(
        isinstance(each, Mapping)
        and isinstance(each.get("pattern"), Mapping)
        and str(each["pattern"].get("String", "")).startswith(mark)
        for each in listed
    )
