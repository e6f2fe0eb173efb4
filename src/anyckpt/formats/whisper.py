"""The format ``whisper``: a file of OpenAI's Whisper, ``{"dims": ..., "model_state_dict": ...}``, in names of its own.

Facts: openai-whisper 20250625 (``whisper.load_model``, ``whisper.model``).  Its class has layers of four times the
width, the same width in encoder and decoder, and the embedding as its output layer.  The ids of special tokens are
those of its tokenizers, which the number of tokens tells: 51864 for English, more for many languages.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint, Tokenizer
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, MappingError, UsageError
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.formats.shared.loose_tensors import weights_only
from anyckpt.storage.location import Location
from anyckpt.storage.source import MemorySource
from anyckpt.storage.zip import read_zip
from anyckpt.tensor import LazyTensor

_DIMS, _STATE = "dims", "model_state_dict"
_HEAD = 4096
_DIMENSIONS = {
    "n_mels": ("num_mel_bins",),
    "n_audio_ctx": ("max_source_positions",),
    "n_audio_state": ("d_model",),
    "n_audio_head": ("encoder_attention_heads",),
    "n_audio_layer": ("encoder_layers",),
    "n_vocab": ("vocab_size",),
    "n_text_ctx": ("max_target_positions",),
    "n_text_state": ("d_model",),
    "n_text_head": ("decoder_attention_heads",),
    "n_text_layer": ("decoder_layers",),
}
"""OpenAI's word -> where transformers' configuration has it."""
_FFN = 4
_MANY_LANGUAGES = 51865
_END_OF_TEXT = 50256
"""Of English; of the tokenizer of many languages one more."""
_PUBLISHED = {
    (80, 384, 4): "tiny", (80, 512, 6): "base", (80, 768, 12): "small", (80, 1024, 24): "medium",
    (80, 1280, 32): "large-v2", (128, 1280, 32): "large-v3", (128, 1280, 4): "large-v3-turbo",
}  # fmt: skip
"""Mels, width and layers of the decoder -> the model at the hub, which ends in ``.en`` if it knows English alone."""

_OUTER = {
    "encoder.positional_embedding": "model.encoder.embed_positions.weight",
    "decoder.positional_embedding": "model.decoder.embed_positions.weight",
    "decoder.token_embedding.weight": "model.decoder.embed_tokens.weight",
    **{f"encoder.{name}.{part}": f"model.encoder.{own}.{part}"
       for name, own in (("conv1", "conv1"), ("conv2", "conv2"), ("ln_post", "layer_norm"))
       for part in ("weight", "bias")},
    **{f"decoder.ln.{part}": f"model.decoder.layer_norm.{part}" for part in ("weight", "bias")},
}  # fmt: skip
_MODULES = {
    **{f"{stem}.{name}": f"{own}.{inner}"
       for stem, own in (("attn", "self_attn"), ("cross_attn", "encoder_attn"))
       for name, inner in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj"))},
    "attn_ln": "self_attn_layer_norm",
    "cross_attn_ln": "encoder_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}  # fmt: skip
_THERE = {own: name for name, own in _OUTER.items()}
_MODULES_THERE = {own: name for name, own in _MODULES.items()}
_OWN_LAYER = re.compile(r"(encoder|decoder)\.blocks\.(\d+)\.(.+)\.(weight|bias)", re.ASCII)
_HUB_LAYER = re.compile(r"model\.(encoder|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)", re.ASCII)


# -- reading -------------------------------------------------------------------------------------------------


def _detect(location: Location) -> bool:
    if location.is_directory or not location.head.startswith(b"PK\x03\x04"):
        return False
    records = read_zip(location.open())
    pickles = [record.source for name, record in records.items() if name.endswith("/data.pkl")]
    return len(pickles) == 1 and _is_whispers(pickles[0].read(0, min(pickles[0].size, _HEAD)))


def _is_whispers(head: bytes) -> bool:
    """Whether a pickle begins with Whisper's dimensions: two of them, lest a model beside has one of the name."""
    return b"n_audio_ctx" in head and b"n_text_ctx" in head


def _read(location: Location) -> Checkpoint:
    from anyckpt.containers.torch_file import read_torch, stored_checksums
    from anyckpt.containers.torch_file.flatten import flatten

    contents = read_torch(location.open())
    root = contents.root
    if not isinstance(root, Mapping) or not isinstance(root.get(_DIMS), Mapping):
        raise FormatError("has no dimensions of a Whisper model at its top", path=location.path, expected=_DIMS)
    state = root.get(_STATE)
    if not isinstance(state, Mapping) or not state:
        raise FormatError("is a file of Whisper without weights", path=location.path, expected=_STATE)
    flat = flatten(state, location.path)
    config = _configuration(root[_DIMS], flat.tensors, location.path)
    others = {str(key): value for key, value in root.items() if key not in (_DIMS, _STATE)}
    beside = flatten(others, location.path)
    return Checkpoint(
        location.path,
        FORMAT.name,
        {**_named(flat.tensors, location.path), **{f"{_BESIDE}{name}": t for name, t in beside.tensors.items()}},
        format_version=contents.generation if contents.version is None else f"{contents.generation} {contents.version}",
        dialect="hf",
        state_prefixes=(_BESIDE,) if beside.tensors else (),
        objects={**flat.objects, **{f"{_BESIDE}{name}": value for name, value in beside.objects.items()}},
        config=config,
        config_kind="hf",
        tokenizer=_tokenizer(config),
        artifacts={"preprocessor_config.json": _features(config)},
        warnings=list(contents.warnings),
        checksums=lambda: stored_checksums(contents),
    )


_BESIDE = "beside."
"""What names of everything else in the file begin with."""


def _named(tensors: Mapping[str, LazyTensor], path: str) -> dict[str, LazyTensor]:
    """Tensors under transformers' names; what is of no Whisper model keeps its own.

    Raises:
        FormatError: two would have one name.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        own = _at_hub(name) or name
        if own in found:
            raise FormatError("two tensors are the same one of the model", path=path, tensor=name, found=own)
        found[own] = tensor
    return found


def _at_hub(name: str) -> str | None:
    match = _OWN_LAYER.fullmatch(name)
    if match is None:
        return _OUTER.get(name)
    module = _MODULES.get(match[3])
    return None if module is None else f"model.{match[1]}.layers.{match[2]}.{module}.{match[4]}"


def _in_file(name: str) -> str | None:
    match = _HUB_LAYER.fullmatch(name)
    if match is None:
        return _THERE.get(name)
    module = _MODULES_THERE.get(match[3])
    return None if module is None else f"{match[1]}.blocks.{match[2]}.{module}.{match[4]}"


def _configuration(dims: Mapping[str, Any], tensors: Mapping[str, LazyTensor], path: str) -> dict[str, Any]:
    """Transformers' configuration.

    Raises:
        FormatError: a dimension is missing, or two that are one here differ.
    """
    config: dict[str, Any] = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
    for word, keys in _DIMENSIONS.items():
        value = dims.get(word)
        if type(value) is not int or value < 1:
            raise FormatError(f"its dimension {word} is no size", path=path, expected="a whole number", found=value)
        for key in keys:
            if config.setdefault(key, value) != value:
                raise FormatError(f"its dimension {word} is not the encoder's", path=path, expected=config[key],
                                  found=value)  # fmt: skip
    first = tensors.get("encoder.blocks.0.mlp.0.weight")
    width = first.shape[0] if first is not None and first.ndim == 2 else _FFN * config["d_model"]
    end = _END_OF_TEXT + (config["vocab_size"] >= _MANY_LANGUAGES)
    known = config["vocab_size"] > end + 1  # else the tokens are not those of OpenAI's tokenizers
    kinds = Counter(tensor.dtype.name for tensor in tensors.values() if tensor.dtype.is_floating)
    return {
        **config,
        "encoder_ffn_dim": width,
        "decoder_ffn_dim": width,
        "activation_function": "gelu",
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "num_hidden_layers": config["encoder_layers"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end if known else None),
        **({"decoder_start_token_id": end + 1, "begin_suppress_tokens": [220, end]} if known else {}),
        **({"dtype": kinds.most_common(1)[0][0]} if kinds else {}),
    }


def _tokenizer(config: Mapping[str, Any]) -> Tokenizer | None:
    """Whose name the sizes of a published model tell; the file has none."""
    known = _PUBLISHED.get((config["num_mel_bins"], config["d_model"], config["decoder_layers"]))
    if known is None:
        return None
    end = "" if config["vocab_size"] >= _MANY_LANGUAGES else ".en"
    return Tokenizer("huggingface", hub_name=f"openai/whisper-{known}{end}")


def _features(config: Mapping[str, Any]) -> MemorySource:
    """What ``WhisperFeatureExtractor`` is told: OpenAI's code has all but the number of mels as constants."""
    frames = 2 * config["max_source_positions"]
    hop, rate = 160, 16_000
    settings = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": rate,
        "hop_length": hop,
        "chunk_length": max(1, frames * hop // rate),
        "n_fft": 400,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": False,
        "processor_class": "WhisperProcessor",
    }
    return MemorySource((json.dumps(settings, indent=2) + "\n").encode(), "preprocessor_config.json")


# -- writing -------------------------------------------------------------------------------------------------


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    from anyckpt.containers.torch_file.writer import dotted, zip_parts

    config = checkpoint.config
    if config.get("model_type") != "whisper":
        raise UsageError(
            "OpenAI's Whisper has no such models",
            path=checkpoint.path,
            expected="a model of family whisper",
            found=f"model_type {config.get('model_type')}" if config else "no configuration",
            remedy=None if config else "give the model's own with --config",
        )
    weights, ignored = weights_only(checkpoint)
    dims = dict(_dimensions(config, checkpoint.path))
    state: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        own = _in_file(name) or _in_file(f"model.{name}")  # the latter of WhisperModel alone
        if own is None or own in state:
            raise MappingError(
                "OpenAI's Whisper has no such tensor",
                path=checkpoint.path,
                tensor=name,
                remedy="leave it out with --exclude",
            )
        state[own] = tensor
    ignored.update(dict.fromkeys(checkpoint.artifacts, "OpenAI's file has no place for it"))
    parts = zip_parts({_DIMS: dims, _STATE: state}, tensor_name=lambda path: dotted(path[1:]))
    return Plan(FORMAT.name, (OutputFile("", parts),), ignored=ignored)


def _dimensions(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, int]]:
    """OpenAI's dimensions.

    Raises:
        MappingError: its class builds another model of them.
    """
    for key, value in {"encoder_ffn_dim": _FFN * config["d_model"], "activation_function": "gelu"}.items():
        if config.get(key, value) != value:
            raise MappingError(
                f"OpenAI's Whisper has another {key}", path=path, expected=value, found=str(config[key])[:80]
            )
    for word, keys in _DIMENSIONS.items():
        yield word, config[keys[0]]


FORMAT = Format(
    name="whisper",
    title="OpenAI's Whisper file",
    detect=_detect,
    read=_read,
    plan=_plan,
    dialect=lambda options: "hf",
    config_kind="hf",
)
