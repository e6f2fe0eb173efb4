"""The tokenizer that travels in a GGUF file's metadata, from and into the files that Hugging Face has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import Tokenizer
from anyckpt.errors import FormatError
from anyckpt.formats.gguf.architectures import Architecture
from anyckpt.formats.gguf.byte_pairs import json_of_byte_pairs, read_byte_pairs
from anyckpt.formats.gguf.container import FLOAT32, INT32, Typed
from anyckpt.formats.gguf.pieces import are_pieces, read_pieces
from anyckpt.formats.shared.hub_folder import json_object
from anyckpt.models.sentencepiece import CONTROL, USER_DEFINED, Vocabulary, model_bytes, read_model
from anyckpt.models.tokens import token_facts
from anyckpt.storage.source import ByteSource, MemorySource

_LIMIT = 256 << 20
_PREFIX = "tokenizer.ggml."
_SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_ADDED_SCORE = -1000.0
_WITHOUT_SPACE = ("gemma", "gemma2", "gemma3")
"""Architectures whose tokenizers put no space in front of a text."""


def written_tokenizer(
    tokenizer: Tokenizer | None, config: Mapping[str, Any], known: Architecture, notes: list[str]
) -> Iterator[tuple[str, Any]]:
    """The keys of a tokenizer; where there is none, or none that llama.cpp has, a note says so.

    Raises:
        FormatError: its files are damaged.
    """
    files = _files(tokenizer)
    settings = _settings(files)
    try:
        yield from _vocabulary(tokenizer, files, settings, config, known)
    except _NoVocabularyError as reason:
        notes.append(str(reason))
        yield f"{_PREFIX}model", "none"
    special = {**_ids(config), **token_facts(tokenizer).special}
    for own, key in _SPECIAL.items():
        if own in special:
            yield _PREFIX + key, special[own]
    for own in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(own), bool):
            yield _PREFIX + own, settings[own]
    template = settings.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].read_all(_LIMIT).decode(errors="replace")
    if isinstance(template, str):
        yield "tokenizer.chat_template", template


class _NoVocabularyError(Exception):
    """Why there is no vocabulary for llama.cpp."""


def _files(tokenizer: Tokenizer | None) -> dict[str, ByteSource]:
    return {} if tokenizer is None else {name.rpartition("/")[2]: source for name, source in tokenizer.files.items()}


def _vocabulary(
    tokenizer: Tokenizer | None,
    files: Mapping[str, ByteSource],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    known: Architecture,
) -> Iterator[tuple[str, Any]]:
    size = config.get("vocab_size")
    if tokenizer is not None and tokenizer.model_file is not None and tokenizer.model_file in tokenizer.files:
        model = tokenizer.files[tokenizer.model_file]
        pieces = read_model(model.read_all(_LIMIT), model.name)
        if isinstance(size, int) and len(pieces.tokens) > size:
            many = f"it has {len(pieces.tokens):,} tokens and the embedding {size:,} rows"
            raise _NoVocabularyError(f"the tokenizer is not written: {many}; llama.cpp's programs take token ids alone")
        yield from _pieces(_with_added(pieces, settings, size))
        if known.name in _WITHOUT_SPACE:
            yield f"{_PREFIX}add_space_prefix", False
        return
    if "tokenizer.json" not in files:
        raise _NoVocabularyError("there is no tokenizer to write: llama.cpp's programs take token ids alone")
    source = files["tokenizer.json"]
    content = json_object(source.read_all(_LIMIT), source.name)
    if are_pieces(content):
        of_json = read_pieces(content, size, source.name)
        if isinstance(of_json, str):
            raise _NoVocabularyError(
                f"the tokenizer is not written: {of_json}; llama.cpp's programs take token ids alone"
            )
        yield from _pieces(of_json[0])
        yield f"{_PREFIX}add_space_prefix", of_json[1]
        return
    pairs = read_byte_pairs(content, size, source.name)
    if isinstance(pairs, str):
        raise _NoVocabularyError(f"the tokenizer is not written: {pairs}; llama.cpp's programs take token ids alone")
    yield f"{_PREFIX}model", "gpt2"
    yield f"{_PREFIX}pre", pairs.kind
    yield f"{_PREFIX}tokens", list(pairs.vocabulary.tokens)
    yield f"{_PREFIX}token_type", Typed(INT32, list(pairs.vocabulary.types))
    yield f"{_PREFIX}merges", list(pairs.merges)


def _pieces(found: Vocabulary) -> Iterator[tuple[str, Any]]:
    yield f"{_PREFIX}model", "llama"
    yield f"{_PREFIX}pre", "default"
    yield f"{_PREFIX}tokens", list(found.tokens)
    yield f"{_PREFIX}scores", Typed(FLOAT32, list(found.scores))
    yield f"{_PREFIX}token_type", Typed(INT32, list(found.types))


def _settings(files: Mapping[str, ByteSource]) -> dict[str, Any]:
    source = files.get("tokenizer_config.json")
    return {} if source is None else json_object(source.read_all(_LIMIT), source.name)


def _ids(config: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens that the configuration names; of several the first."""
    found = {}
    for own in _SPECIAL:
        value = config.get(own)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value >= 0:
            found[own] = value
    return found


def _with_added(found: Vocabulary, settings: Mapping[str, Any], size: Any) -> Vocabulary:
    """A sentencepiece vocabulary, as long as the embedding, with the tokens that Hugging Face's settings add."""
    found = found.padded(size if isinstance(size, int) else len(found.tokens))
    tokens, scores, types = list(found.tokens), list(found.scores), list(found.types)
    added = settings.get("added_tokens_decoder")
    for number, token in added.items() if isinstance(added, Mapping) else ():
        at = int(number) if str(number).isdecimal() else -1
        text = token.get("content") if isinstance(token, Mapping) else None
        if not 0 <= at < len(tokens) or not isinstance(text, str) or types[at] in (2, CONTROL):
            continue
        special = bool(token.get("special"))
        tokens[at] = text if special else text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        scores[at], types[at] = _ADDED_SCORE, CONTROL if special else USER_DEFINED
    return Vocabulary(tuple(tokens), tuple(scores), tuple(types))


def read_tokenizer(metadata: Mapping[str, Any], path: str, warnings: list[str]) -> Tokenizer | None:
    """The tokenizer's files as Hugging Face has them; None, with a warning, where there is none that is known.

    Raises:
        FormatError: its lists are damaged.
    """
    model = metadata.get(f"{_PREFIX}model")
    if model in (None, "none", "no_vocab"):
        return None
    tokens = _list(metadata, "tokens", str, path)
    types = _list(metadata, "token_type", int, path) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise FormatError("its tokens and their types differ in number", path=path, found=f"{len(types)} types")
    settings = _settings_of(metadata, tokens)
    text = json.dumps(settings, indent=2, ensure_ascii=False).encode(errors="replace")
    files = {"tokenizer_config.json": _file(text, path, "tokenizer_config.json")}
    if model == "llama":
        scores = [float(score) for score in _list(metadata, "scores", (int, float), path)] or [0.0] * len(tokens)
        if len(scores) != len(tokens):
            raise FormatError("its tokens and their scores differ in number", path=path, found=f"{len(scores)} scores")
        found = Vocabulary(tuple(tokens), tuple(scores), tuple(types))
        ids = {key: metadata.get(f"{_PREFIX}{key}_token_id") for key in ("unknown", "bos", "eos", "padding")}
        space = metadata.get(f"{_PREFIX}add_space_prefix") is not False
        files["tokenizer.model"] = _file(model_bytes(found, ids, space=space), path, "tokenizer.model")
        return Tokenizer("huggingface", files, "tokenizer.model")
    pre = metadata.get(f"{_PREFIX}pre")
    merges = _list(metadata, "merges", str, path)
    bos = settings.get("bos_token") if metadata.get(f"{_PREFIX}add_bos_token") is True else None
    content = json_of_byte_pairs(tokens, types, merges, str(pre), bos) if model == "gpt2" else None
    if content is None:
        what = f"{model}, of kind {pre}" if model == "gpt2" else str(model)
        warnings.append(f"its tokenizer ({what}) is none that is known here: take the files of the original model")
        return None
    files["tokenizer.json"] = _file(content, path, "tokenizer.json")
    return Tokenizer("huggingface", files)


def _file(data: bytes, path: str, name: str) -> ByteSource:
    return MemorySource(data, f"{path} » {name}")


def _list(metadata: Mapping[str, Any], key: str, kind: Any, path: str) -> Sequence[Any]:
    value = metadata.get(_PREFIX + key, [])
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise FormatError(f"{_PREFIX}{key} is no list of the right kind", path=path)
    return value


def _settings_of(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says."""
    found: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if metadata.get(f"{_PREFIX}model") == "llama" else "PreTrainedTokenizerFast"
    }
    for own, key in {**_SPECIAL, "unk_token_id": "unknown_token_id"}.items():
        number = metadata.get(_PREFIX + key)
        if type(number) is int and 0 <= number < len(tokens):
            found[own.removesuffix("_id")] = tokens[number]
    for own in ("add_bos_token", "add_eos_token"):
        if isinstance(metadata.get(_PREFIX + own), bool):
            found[own] = metadata[_PREFIX + own]
    template = metadata.get("tokenizer.chat_template")
    return {**found, "chat_template": template} if isinstance(template, str) else found
