"""What a user hands in beside a checkpoint: a configuration, a tokenizer, partition rules, scales of activations."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import Tokenizer
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.nemo.tokenizer import is_sentencepiece
from anyckpt.formats.shared import hub_folder
from anyckpt.storage.location import Location, look_at
from anyckpt.tensor import held

if TYPE_CHECKING:
    from anyckpt.quantization.statistics import Statistics

_CONFIG_LIMIT = 64 << 20
_SCALE = ".input_scale"  # of ModelOpt's and compressed-tensors' folders
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIG_FILES = ("config.json", "model_config.yaml", "model.yaml", "context/model.yaml", "hparams.yaml", "params.json")
"""Where frameworks keep a model's configuration in its folder."""


def read_config(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A configuration as plain data, from JSON or YAML, or that of the checkpoint whose folder it is.

    Raises:
        FormatError: the file is missing, not valid, or no mapping.
    """
    if config is None:
        return None
    if isinstance(config, Mapping):
        return dict(config)
    from anyckpt.plain_yaml import load_yaml_mapping

    location = look_at(config)
    if location.is_directory:
        return _config_of_folder(location)
    source = location.open()
    if source.read(0, min(64, source.size)).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return hub_folder.read_json(source)
    return load_yaml_mapping(source.read_all(_CONFIG_LIMIT), source.name)


def read_scales(given: str | os.PathLike[str] | Mapping[str, float] | None) -> dict[str, float] | None:
    """Scales of activations by module, from JSON, or those that a quantized model has stored.

    Raises:
        FormatError: the file is missing or not valid.
        UsageError: it has no scales, or some that are no numbers.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return _as_scales(given, "activation_scales")
    location = look_at(given)
    if location.is_directory or not location.path.endswith(".json"):
        weights = registry.read(location).weights()
        ends = {name: name.removesuffix(_SCALE) for name in weights if name.endswith(_SCALE)}
        with held(weights[name] for name in ends):
            stored = {module: weights[name].numpy().reshape(-1).tolist() for name, module in ends.items()}
        return _as_scales({module: found[0] for module, found in stored.items() if len(found) == 1}, location.path)
    return _as_scales(hub_folder.read_json(location.open()), location.path)


def read_statistics(given: str | os.PathLike[str] | Statistics | None) -> Statistics | None:
    """What calibration saw, from its file.

    Raises:
        FormatError: it is missing, damaged or another file.
    """
    if given is None or not isinstance(given, (str, os.PathLike)):
        return given
    from anyckpt.quantization.statistics import load

    return load(given)


def _as_scales(given: Mapping[str, Any], path: str) -> dict[str, float]:
    wrong = next((name for name, scale in given.items() if type(scale) not in (int, float)), None)
    if wrong is not None or not given:
        raise UsageError(
            f"{path}: has no scales of activations",
            expected=f"module names and numbers, or tensors that end in {_SCALE}",
            found="none" if wrong is None else f"{wrong}: {given[wrong]!r}"[:80],
        )
    return {str(name): float(scale) for name, scale in given.items()}


def _config_of_folder(location: Location) -> dict[str, Any]:
    """That of the checkpoint in a folder, or of the file in it where there is no checkpoint that can be read."""
    alone = next((name for name in _CONFIG_FILES if location.is_file(*name.split("/"))), None)
    try:
        found = registry.read(location).config
    except FormatError:
        if alone is None:
            raise
        found = {}
    if not found and alone is not None:
        found = read_config(location.join(alone)) or {}
    if not found:
        raise FormatError(
            "has no configuration",
            path=location.path,
            expected=f"a checkpoint's, or one of {', '.join(_CONFIG_FILES)}",
            remedy="give the configuration's file",
        )
    return found


def read_rules(path: str) -> dict[str, str]:
    """Partition rules: pattern of names -> kind, from YAML or JSON; kinds are checked where they are used.

    Raises:
        FormatError: the file is missing, not valid, or no mapping of names to names.
    """
    rules = read_config(path) or {}
    for pattern, kind in rules.items():
        if not isinstance(kind, str):
            raise FormatError(
                "a partition rule is not 'pattern: kind'", path=path, tensor=pattern, found=repr(kind)[:80]
            )
    return rules


TOKENIZER_LIBRARIES = ("sentencepiece", "huggingface", "tiktoken")


def read_tokenizer(path: str, library: str | None = None, notes: list[str] | None = None) -> Tokenizer:
    """A tokenizer from a folder for ``AutoTokenizer``, ``tokenizer.json``, a sentencepiece model or a tiktoken table.

    Args:
        path: where it is; with ``library`` "huggingface" also the name of one on the hub (see ``hub_tokenizer``).
        library: what reads it, where the file does not tell.
        notes: what a user should know is appended here.

    Raises:
        FormatError: the path is missing.
        UsageError: the folder holds no tokenizer, or the file is none, or none of this library.
    """
    if library not in (None, *TOKENIZER_LIBRARIES):
        raise UsageError("unknown tokenizer library", expected=", ".join(TOKENIZER_LIBRARIES), found=library)
    if library == "huggingface" and _HUB_NAME.fullmatch(path) and not os.path.exists(path):
        from anyckpt.operations.steps.hub_tokenizer import hub_tokenizer

        found, note = hub_tokenizer(path)
        if notes is not None and note is not None:
            notes.append(note)
        return found
    location = look_at(path)
    found = _in_folder(location) if location.is_directory else _in_file(location, library)
    if library is not None and found.library != library:
        raise UsageError("is a tokenizer of another library", path=path, expected=library, found=found.library)
    return found


def _in_folder(location: Location) -> Tokenizer:
    found = hub_folder.read_tokenizer(location)
    if found is None:
        raise UsageError(
            "holds no tokenizer",
            path=location.path,
            expected="tokenizer.json, tokenizer.model, vocab.json or the like",
            found=", ".join(location.names[:5]) or "nothing",
        )
    return found


def _in_file(location: Location, library: str | None) -> Tokenizer:
    source, name = location.open(), location.name
    if library == "tiktoken":
        if source.read(0, min(64, source.size)).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"[", b"{"):
            raise UsageError(
                "is no vocabulary of tiktoken", path=location.path, expected="vocab.json, a list of ranks and tokens"
            )
        return Tokenizer("tiktoken", {name: source})
    if name == "tokenizer.json":
        return Tokenizer("huggingface", {name: source})
    if not is_sentencepiece(source):
        raise UsageError(
            "is not a tokenizer",
            path=location.path,
            expected="a folder, tokenizer.json or a sentencepiece model",
            remedy="give the folder that AutoTokenizer loads, or say what reads it with --tokenizer-library",
        )
    return Tokenizer("sentencepiece", {name: source}, name)
