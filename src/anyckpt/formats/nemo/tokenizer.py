"""The tokenizer of a ``.nemo``: the section ``tokenizer`` of its configuration and the members that it refers to.

NeMo 1 keeps a sentencepiece model as a member of the archive, but only the name of a Hugging Face tokenizer.  So
that its files travel too, we put them into the archive as well and list them under ``tokenizer.hf_files``, a key
that NeMo does not look at.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Tokenizer
from anyckpt.config.nemo_speech import is_speech
from anyckpt.formats.nemo.config import ARTIFACT_SCHEME
from anyckpt.storage.source import ByteSource

HF_FILES = "hf_files"

_PREFIXED = re.compile(r"[0-9a-f]{32}_.")
_MODEL_KEYS = ("model", "model_path", "tokenizer_model")
_OF_LANGUAGE = re.compile(
    r"(?P<what>tokenizer|vocab)\.(?P<number>\d{1,3})\.(?P<language>.+)\.(?P<kind>model|txt|vocab)"
)
_KEYS_OF_LANGUAGE = {
    "tokenizer.model": "model_path",
    "vocab.txt": "vocab_path",
    "tokenizer.vocab": "spe_tokenizer_vocab",
}
_SENTENCEPIECE_TYPES = ("bpe", "sentencepiece", "spe")
_SETTINGS_SPELLED = {"sentencepiece_legacy": "legacy"}
"""NeMo 1's configuration spells these otherwise than the tokenizer classes, whose spelling is ours."""
_SETTINGS_LEFT_OUT = ("library", "type", "dir", HF_FILES, *_MODEL_KEYS)


def read_tokenizer(config: dict[str, Any], members: Mapping[str, ByteSource]) -> Tokenizer | None:
    """The tokenizer that a configuration describes, or None if it has none that we know how to carry."""
    section = config.get("tokenizer")
    if not isinstance(section, dict):
        return None
    library, kind = section.get("library"), section.get("type")
    settings = {
        _SETTINGS_SPELLED.get(key, str(key)): value
        for key, value in section.items()
        if key not in _SETTINGS_LEFT_OUT and value is not None and not _member(value, members)
    }
    listed = section.get(HF_FILES)
    if isinstance(listed, dict):
        files = {
            name: members[member]
            for name, uri in listed.items()
            if isinstance(name, str) and isinstance(uri, str) and "/" not in name
            if (member := uri.removeprefix(ARTIFACT_SCHEME)) in members
        }
        if files:
            model = "tokenizer.model" if "tokenizer.model" in files else None
            hub_name = kind if library == "huggingface" and isinstance(kind, str) else None
            return Tokenizer("huggingface", files, model, settings, hub_name)
    model_file = next((found for key in _MODEL_KEYS if (found := _member(section.get(key), members))), None)
    if library is None:
        library = "sentencepiece" if kind in _SENTENCEPIECE_TYPES and model_file else None
    if not isinstance(library, str):
        return None
    files = {} if model_file is None else {model_file: members[model_file]}
    for value in section.values():
        found = _member(value, members)
        if found is not None:
            files[found] = members[found]
    hub_name = kind if library == "huggingface" and isinstance(kind, str) else None
    if not files and hub_name is None:
        return None
    return Tokenizer(library, files, model_file if library == "sentencepiece" else None, settings, hub_name)


def _member(value: object, members: Mapping[str, ByteSource]) -> str | None:
    """The member that a configuration's value refers to."""
    if not isinstance(value, str):
        return None
    name = value.removeprefix(ARTIFACT_SCHEME)
    if not value.startswith(ARTIFACT_SCHEME):
        name = name.rpartition("/")[2]
    return name if name in members else None


def artifact_name(name: str, source: ByteSource) -> str:
    """The member name of an artifact: 32 hexadecimal digits, ``_``, base name.

    NeMo draws the digits at random; ours are the first of the SHA-256 of base name and contents, so that the same
    input gives the same archive.  A name that has digits already keeps it, as NeMo keeps it on saving again.
    """
    base = name.rpartition("/")[2]
    if _PREFIXED.match(base):
        return base
    digest = hashlib.sha256(base.encode() + b"\0")
    for start in range(0, source.size, 1 << 20):
        digest.update(source.read(start, min(1 << 20, source.size - start)))
    return f"{digest.hexdigest()[:32]}_{base}"


def has_prefix(name: str) -> bool:
    """Whether a member's name has the 32 digits of an artifact."""
    return _PREFIXED.match(name) is not None


def is_sentencepiece(source: ByteSource) -> bool:
    """Whether a file is a sentencepiece model (a protobuf whose first field is a piece), not a tiktoken table."""
    return source.size > 2 and source.read(0, 1) == b"\x0a"


def write_tokenizer(
    tokenizer: Tokenizer, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, ByteSource], list[str]]:
    """A tokenizer as a ``.nemo`` holds it.

    Args:
        tokenizer: what travels.
        config: the configuration; its section ``tokenizer`` is what the result is based on.

    Returns:
        The new section, the members by name, and notes.
    """
    base = config.get("tokenizer")
    section: dict[str, Any] = dict(base) if isinstance(base, dict) else {}
    names = {name: artifact_name(name, source) for name, source in tokenizer.files.items()}
    members = {names[name]: source for name, source in tokenizer.files.items()}
    known = {text for text in section.values() if isinstance(text, str)}
    if members and all(f"{ARTIFACT_SCHEME}{name}" in known or name in known for name in members):
        return section, members, []
    if is_speech(config):
        return _speech_section(section, names), members, []
    model = tokenizer.model_file or next((n for n in tokenizer.files if n.endswith(".model")), None)
    fresh: dict[str, Any] = {"library": tokenizer.library, "type": None, "model": None}
    fresh.update({"vocab_file": None, "merge_file": None})
    spelled = {hub: nemo for nemo, hub in _SETTINGS_SPELLED.items()}
    fresh.update({spelled.get(key, key): value for key, value in tokenizer.settings.items() if value is not None})
    notes: list[str] = []
    if model is not None and is_sentencepiece(tokenizer.files[model]):
        fresh["library"] = "sentencepiece"
        fresh["model"] = ARTIFACT_SCHEME + names[model]
    elif tokenizer.library == "huggingface":
        fresh["type"] = tokenizer.hub_name
        fresh["use_fast"] = True
        notes.append(_note(tokenizer))
    if tokenizer.library == "huggingface" and tokenizer.files:
        fresh[HF_FILES] = {name: ARTIFACT_SCHEME + names[name] for name in tokenizer.files}
    return fresh, members, notes


def _speech_section(section: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What NeMo's speech classes look for, of a sentencepiece model and its list of pieces, or of several."""
    if section.get("type") == "agg":
        return {**section, "langs": _languages(names)}
    keys = {"tokenizer.model": "model_path", "vocab.txt": "vocab_path", "tokenizer.vocab": "spe_tokenizer_vocab"}
    found = {key: ARTIFACT_SCHEME + names[name] for name, key in keys.items() if name in names}
    return {"dir": "", "type": "bpe", **section, **found}


def _languages(names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The models of an aggregate tokenizer, whose files have numbers and languages in their names, in that order."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for name, member in names.items():
        match = _OF_LANGUAGE.fullmatch(name)
        if match is not None:
            section = found.setdefault((int(match["number"]), match["language"]), {"dir": "", "type": "bpe"})
            section[_KEYS_OF_LANGUAGE[f"{match['what']}.{match['kind']}"]] = ARTIFACT_SCHEME + member
    return {language: found[number, language] for number, language in sorted(found)}


def _note(tokenizer: Tokenizer) -> str:
    if tokenizer.hub_name is None:
        return (
            "NeMo 1 finds a Hugging Face tokenizer by name and this one has none: set tokenizer.type to a folder "
            "or hub name; its files are in the archive (anyckpt unpack), listed under tokenizer.hf_files"
        )
    return f"NeMo 1 gets a Hugging Face tokenizer by name: tokenizer.type is {tokenizer.hub_name}"
