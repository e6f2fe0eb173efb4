"""The tokenizer beside a TensorRT-LLM checkpoint, as NeMo 1 and NeMo 2 put it there.

NeMo 1 writes ``tokenizer_config.yaml``, the section ``tokenizer`` of its configuration, whose files are called by the
section's keys: ``tokenizer.model``, ``tokenizer.vocab_file``, ``tokenizer.merge_file``.  NeMo 2 copies its folder
``context`` as ``nemo_context``, or a Hugging Face tokenizer as ``huggingface_tokenizer``.  NeMo looks for the yaml,
then for ``nemo_context``, then for Hugging Face's files at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Tokenizer
from anyckpt.engine.plan import OutputFile, SourceData, small_file
from anyckpt.formats.shared.hub_folder import check_plain_name, other_files, read_tokenizer, tokenizer_of
from anyckpt.formats.trtllm.container import CONFIG, TOKENIZER
from anyckpt.plain_yaml import dump_yaml, load_yaml
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource

NEMO2 = "nemo_context"
_FOLDERS = (NEMO2, "huggingface_tokenizer")
_WITHIN = "nemo_tokenizer"
_KEYS = ("model", "vocab_file", "merge_file")
_SPELLED = {"sentencepiece_legacy": "legacy"}
_LIMIT = 1 << 20


def read(location: Location) -> tuple[Tokenizer | None, dict[str, ByteSource]]:
    """The tokenizer, and the other files at the top that hold no weights."""
    files, others = other_files(location, CONFIG)
    stated = others.pop(TOKENIZER, None) or files.pop(TOKENIZER, None)
    if stated is not None:
        section = load_yaml(stated.read_all(_LIMIT), stated.name)
        found = _of_section(section, files) if isinstance(section, dict) else None
        if found is not None:
            return found, others
    for folder in _FOLDERS:
        if location.is_folder(folder):
            inside = (folder, _WITHIN) if location.is_folder(folder, _WITHIN) else (folder,)
            found = read_tokenizer(location.at(*inside))
            if found is not None:
                return found, others
    return tokenizer_of(files), others


def _of_section(section: dict[str, Any], files: dict[str, ByteSource]) -> Tokenizer | None:
    library = section.get("library")
    if not isinstance(library, str):
        return None
    named = {key: value for key in _KEYS if isinstance(value := section.get(key), str) and value in files}
    settings = {
        _SPELLED.get(str(key), str(key)): value
        for key, value in section.items()
        if key not in ("library", "type", *_KEYS) and value is not None
    }
    kind = section.get("type")
    hub_name = kind if library == "huggingface" and isinstance(kind, str) else None
    if not files and hub_name is None:
        return None
    model = named.get("model") if library == "sentencepiece" else None
    return Tokenizer(library, dict(files), model, settings, hub_name)


def written(tokenizer: Tokenizer, notes: list[str]) -> dict[str, OutputFile]:
    """A tokenizer's files at the top, and NeMo 1's yaml where NeMo needs it.

    Of Hugging Face's files there is no yaml: with one NeMo would get the tokenizer by name from the hub.
    """
    files: dict[str, OutputFile] = {}
    names: dict[str, str] = {}
    for name, source in tokenizer.files.items():
        plain = name.rpartition("/")[2]
        if name == tokenizer.model_file and tokenizer.library == "sentencepiece":
            plain = "tokenizer.model"
        check_plain_name(plain, source.name)
        names[name] = plain
        files[plain] = OutputFile(plain, (SourceData(source),), 1)
    if tokenizer.library == "sentencepiece" and tokenizer.model_file is not None:
        model = names[tokenizer.model_file]
        legacy = bool(tokenizer.settings.get("legacy", False))
        files[TOKENIZER] = _yaml({"library": "sentencepiece", "type": None, "model": model, **_others(files)}, legacy)
    elif not files and tokenizer.hub_name is not None:
        files[TOKENIZER] = _yaml({"library": tokenizer.library, "type": tokenizer.hub_name, "use_fast": True})
        notes.append(f"the checkpoint only names its tokenizer, {tokenizer.hub_name}, which NeMo gets from the hub")
    return files


def _others(files: Mapping[str, OutputFile]) -> dict[str, str | None]:
    return {key: name if (name := f"tokenizer.{key}") in files else None for key in _KEYS[1:]}


def _yaml(section: dict[str, Any], legacy: bool | None = None) -> OutputFile:
    more = {} if legacy is None else {"delimiter": None, "sentencepiece_legacy": legacy}
    return small_file(TOKENIZER, dump_yaml({**section, **more}))
