"""What lies beside weights in a folder of Hugging Face's making: configuration, tokenizer, ``Trainer``'s state.

Trainers (DeepSpeed, FSDP, Meta's code, peft) keep the same files beside weights of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Tokenizer, TrainingState
from anyckpt.engine.plan import OutputFile, SourceData, small_file
from anyckpt.errors import FormatError, UnsafeError, UsageError
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource

_JSON_LIMIT = 1 << 30  # an index of a million tensors is some 100 MB


_WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|index\.json)")


_TOKENIZER_FILE = re.compile(
    r"tokenizer.*|.*\.(model|tiktoken)|tekken\.json|special_tokens_map\.json|added_tokens\.json"
    r"|(vocab|merges|normalizer)\.(json|txt)|chat_template\.(json|jinja)"
)


_STATES = {
    "optimizer": r"optimizer\.(pt|bin)|global_step\d+",  # the latter are DeepSpeed's folders
    "scheduler": r"scheduler\.pt",
    "rng": r"rng_state(_\d+)?\.pth",
}
"""Files of ``transformers.Trainer`` beside the weights."""


_SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")


def read_json(source: ByteSource) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FormatError: it is empty, not JSON, nested too deeply, or not an object.
    """
    return json_object(source.read_all(_JSON_LIMIT), source.name)


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from a file's bytes, as ``read_json`` gives it; messages call the file ``name``."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        brief = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise FormatError(f"is not valid JSON: {brief}", path=name, remedy="copy it again from its origin") from None
    if not isinstance(value, dict):
        raise FormatError("is not a JSON object", path=name, found=type(value).__name__)
    return value


def check_plain_name(name: str, path: str) -> None:
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise UnsafeError(
            "names a file outside its own folder",
            path=path,
            expected="a plain file name",
            found=repr(name)[:120],
        )


def other_files(location: Location, config_name: str) -> tuple[dict[str, ByteSource], dict[str, ByteSource]]:
    """Files of the folder that are not weights: those of the tokenizer, and the rest."""
    tokenizer: dict[str, ByteSource] = {}
    others: dict[str, ByteSource] = {}
    for name in location.names:
        if name == config_name or name.startswith(".") or not location.is_file(name):
            continue
        if _TOKENIZER_FILE.fullmatch(name):
            tokenizer[name] = location.open(name)
        elif not _WEIGHT_FILE.fullmatch(name):
            others[name] = location.open(name)
    return tokenizer, others


def tokenizer_of(files: dict[str, ByteSource]) -> Tokenizer | None:
    """A folder with anything but a bare sentencepiece model is one for ``AutoTokenizer``."""
    if not files:
        return None
    model = next((name for name in _SENTENCEPIECE_NAMES if name in files), None)
    if model is not None and not files.keys() & {"tokenizer.json", "tokenizer_config.json"}:
        return Tokenizer("sentencepiece", files, model)
    return Tokenizer("huggingface", files, model)


def read_tokenizer(location: Location) -> Tokenizer | None:
    """The tokenizer whose files lie in a folder, or None if there are none."""
    return tokenizer_of(other_files(location, "config.json")[0])


def training_state(location: Location, artifacts: Mapping[str, ByteSource], warnings: list[str]) -> TrainingState:
    """Where ``transformers.Trainer`` stood; its optimizer, scheduler and rng files are noticed, not read."""
    state = read_json(artifacts["trainer_state.json"]) if "trainer_state.json" in artifacts else {}
    step, epoch = state.get("global_step"), state.get("epoch")
    found = {
        kind: [name for name in location.names if re.fullmatch(pattern, name)] for kind, pattern in _STATES.items()
    }
    unread = [name for names in found.values() for name in names]
    if unread:
        warnings.append(f"training state that is not read: {', '.join(unread[:5])}")
    return TrainingState(
        step=step if type(step) is int else None,
        epoch=int(epoch) if isinstance(epoch, (int, float)) and abs(epoch) < 1 << 53 else None,
        has_optimizer=bool(found["optimizer"]),
        has_scheduler=bool(found["scheduler"]),
        has_rng=bool(found["rng"]),
    )


def tokenizer_files(tokenizer: Tokenizer, notes: list[str]) -> dict[str, OutputFile]:
    """The tokenizer's files under the names that ``AutoTokenizer.from_pretrained`` looks for."""
    files: dict[str, OutputFile] = {}
    for name, source in tokenizer.files.items():
        plain = name.rpartition("/")[2]
        if name == tokenizer.model_file and plain not in _SENTENCEPIECE_NAMES:
            plain = "tokenizer.model"
        check_plain_name(plain, source.name)
        files[plain] = OutputFile(plain, (SourceData(source),), 1)
    if tokenizer.library == "sentencepiece" and "tokenizer.model" in files and "tokenizer_config.json" not in files:
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": bool(tokenizer.settings.get("legacy", False))}
        files["tokenizer_config.json"] = small_file("tokenizer_config.json", json_text(settings))
    if not files and tokenizer.hub_name:
        notes.append(f"the checkpoint only names its tokenizer: get it from {tokenizer.hub_name}")
    return files


def json_text(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"the configuration cannot be written as JSON: {error}") from None
