"""The tokenizer of a NeMo 2 checkpoint: a call in ``io.json`` whose arguments name files of the context directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Tokenizer
from anyckpt.storage.source import ByteSource

SENTENCEPIECE = "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer"
AUTO = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
TIKTOKEN = "nemo.collections.common.tokenizers.tiktoken_tokenizer.TiktokenTokenizer"
_ARTIFACT = "nemo.lightning.io.artifact.file.DirOrStringArtifact"
_HF_FOLDER = "nemo_tokenizer"
_LIBRARIES = {
    "SentencePieceTokenizer": "sentencepiece",
    "AutoTokenizer": "huggingface",
    "TiktokenTokenizer": "tiktoken",
}
_AUTO_SETTINGS = tuple(
    """
    vocab_file merges_file mask_token bos_token eos_token pad_token sep_token cls_token unk_token
    additional_special_tokens use_fast trust_remote_code include_special_tokens chat_template
    """.split()
)


def read_tokenizer(call: object, context: Mapping[str, ByteSource]) -> Tokenizer | None:
    """The tokenizer that ``<root>.model.tokenizer`` describes, or None if there is none.

    Args:
        call: the call as plain data.
        context: files of the context directory, by relative path.
    """
    if not isinstance(call, dict) or not isinstance(call.get("_target_"), str):
        return None
    name = call["_target_"].rpartition(".")[2]
    library = _LIBRARIES.get(name, name)
    files: dict[str, ByteSource] = {}
    model_file = hub_name = None
    settings: dict[str, Any] = {}
    for key, value in call.items():
        text = _text(value)
        found = {} if text is None else _files(text, context)
        if found:
            files.update(found)
            if library == "sentencepiece" and key == "model_path":
                model_file = next(iter(found))
        elif key == "pretrained_model_name":
            hub_name = text
        elif key != "_target_" and value is not None:
            settings[key] = value
    return Tokenizer(library, files, model_file, settings, hub_name)


def _text(value: object) -> str | None:
    """A text, or the text that an artifact stands for which is no file (``attr``)."""
    if isinstance(value, dict) and isinstance(value.get("attr"), str):
        return str(value["attr"])
    return value if isinstance(value, str) and value else None


def _files(path: str, context: Mapping[str, ByteSource]) -> dict[str, ByteSource]:
    """The file at a path of the context, or the files of the folder there, under their base names."""
    path = path.removeprefix("./").rstrip("/")
    if path in context:
        return {path.rpartition("/")[2]: context[path]}
    prefix = f"{path}/"
    return {name[len(prefix) :]: source for name, source in context.items() if name.startswith(prefix)}


def write_tokenizer(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, ByteSource]]:
    """A tokenizer as NeMo 2 holds it.

    Returns:
        The call as plain data, and the files by path relative to the context directory.
    """
    if tokenizer.library == "sentencepiece" and tokenizer.model_file is not None:
        settings = {"special_tokens": None, "legacy": False, "chat_template": None}
        settings |= {key: value for key, value in tokenizer.settings.items() if key in settings}
        call = {"_target_": SENTENCEPIECE, "model_path": tokenizer.model_file, **settings}
        return call, dict(tokenizer.files)
    if tokenizer.library == "tiktoken" and len(tokenizer.files) == 1:
        vocabulary = next(iter(tokenizer.files))
        return {"_target_": TIKTOKEN, **tokenizer.settings, "vocab_file": vocabulary}, dict(tokenizer.files)
    folder: object = _HF_FOLDER
    if not tokenizer.files and tokenizer.hub_name is not None:
        folder = {"_target_": _ARTIFACT, "attr": tokenizer.hub_name, "skip": True}
    settings = {key: tokenizer.settings[key] for key in _AUTO_SETTINGS if tokenizer.settings.get(key) is not None}
    files = {f"{_HF_FOLDER}/{name}": source for name, source in tokenizer.files.items()}
    return {"_target_": AUTO, "pretrained_model_name": folder, **settings}, files
