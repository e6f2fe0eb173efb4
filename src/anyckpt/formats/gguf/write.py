"""Writing a GGUF file as llama.cpp's own converter does: which tensors are of which type, metadata, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.plan import Literal, OutputFile, Part, Plan, TensorData
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.gguf.architectures import OF_MODEL_TYPE, Architecture
from anyckpt.formats.gguf.config import WITH_WINDOW, divisors_of, rope_of, to_metadata
from anyckpt.formats.gguf.container import aligned, header_bytes
from anyckpt.formats.gguf.general import general
from anyckpt.formats.gguf.names import ROPE, from_hub
from anyckpt.formats.gguf.nodes import Encoded
from anyckpt.formats.gguf.parts import name_of, said_of_part
from anyckpt.formats.gguf.tokenizer import written_tokenizer
from anyckpt.formats.gguf.types import OF_DTYPE, TYPES, ElementType
from anyckpt.formats.shared.loose_tensors import weights_only
from anyckpt.tensor import LazyTensor, from_array

_IN_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", ROPE)
"""Ends of names of what stays in float32; tensors of one axis do, too."""
_FALLBACK = "F16"
_QUANTIZATION_VERSION = 2
_STEM = "model"
_Listed = tuple[str, ElementType, tuple[int, ...]]


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """One file: metadata, tokenizer, tensors; or a folder of several, each with some of the tensors.

    Raises:
        UsageError: there is no configuration, or tensors are of a type that GGUF has not.
        MappingError: llama.cpp has no such architecture, or would run another model.
    """
    config = checkpoint.config
    known = OF_MODEL_TYPE.get(str(config.get("model_type")))
    if not config:
        raise UsageError(
            "a GGUF file needs a model configuration and the source has none",
            path=checkpoint.path,
            remedy="give the model's own with --config",
        )
    if known is None:
        raise MappingError(
            "how llama.cpp names the tensors of this model is not known here",
            path=checkpoint.path,
            expected=", ".join(OF_MODEL_TYPE),
            found=f"model_type {config.get('model_type')}",
        )
    weights, ignored = weights_only(checkpoint)
    notes: list[str] = []
    if config.get("tie_word_embeddings") and "model.embed_tokens.weight" in weights and "lm_head.weight" in weights:
        del weights["lm_head.weight"]
        ignored["lm_head.weight"] = "tied to the embedding, which llama.cpp takes in its place"
    tensors = dict(from_hub(weights, known, config, checkpoint.path))
    rope, _ = rope_of(config)
    if rope.get("rope_type") == "llama3":
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        tensors[ROPE] = from_array(divisors_of(rope, float(rope["rope_theta"]), size))
    asked = None if options.tensor_type is None else TYPES[options.tensor_type.upper()]
    kinds = {name: _kind(name, tensor, asked, checkpoint.path) for name, tensor in tensors.items()}
    notes += _cut_short(tensors, kinds, asked)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    metadata = dict(_metadata(checkpoint, known, kinds, shapes, asked, notes))
    listed = [(name, kinds[name], tensor.shape) for name, tensor in tensors.items()]
    stored = {name: _stored(tensor, kinds[name]) for name, tensor in tensors.items()}
    files = _files(stored, listed, metadata, options.max_shard_size)
    if len(files) > 1:
        notes.append(f"llama.cpp opens {files[0].path}, and finds the other parts beside it")
    has_tokens = "tokenizer.ggml.tokens" in metadata
    carried = frozenset(checkpoint.tokenizer.files) if has_tokens and checkpoint.tokenizer is not None else frozenset()
    window = config.get("sliding_window")
    if known.name not in WITH_WINDOW and window and config.get("use_sliding_window", True):
        notes.append(f"llama.cpp does not take sliding_window {window} from the file: longer texts come out otherwise")
    ignored.update(dict.fromkeys(checkpoint.artifacts, "of it a GGUF file keeps what it has keys for, if anything"))
    return Plan("gguf", files, ignored=ignored, notes=tuple(notes), carried=carried)


def _files(
    stored: Mapping[str, LazyTensor], listed: Sequence[_Listed], metadata: Mapping[str, Any], limit: int | None
) -> tuple[OutputFile, ...]:
    """The files, in each as many tensors in their order as there is room for; the first one has the metadata."""
    if limit is not None and limit <= 0:
        raise UsageError("the shard size must be positive", found=limit)
    shares: list[list[_Listed]] = [[]]
    size = 0
    for one in listed:
        nbytes = aligned(stored[one[0]].nbytes)
        if limit is not None and shares[-1] and size + nbytes > limit:
            shares.append([])
            size = 0
        shares[-1].append(one)
        size += nbytes
    if len(shares) == 1:
        return (OutputFile("", _contents(stored, listed, metadata)),)
    count = len(shares)
    return tuple(
        OutputFile(
            name_of(_STEM, number, count),
            _contents(stored, share, {**(metadata if not number else {}), **said_of_part(number, count, len(listed))}),
        )
        for number, share in enumerate(shares)
    )


def _contents(
    stored: Mapping[str, LazyTensor], listed: Sequence[_Listed], metadata: Mapping[str, Any]
) -> tuple[Part, ...]:
    parts: list[Part] = [Literal(header_bytes(metadata, listed))]
    for name, _, _ in listed:
        parts.append(TensorData(name, stored[name]))
        gap = aligned(stored[name].nbytes) - stored[name].nbytes
        if gap:
            parts.append(Literal(bytes(gap)))
    return tuple(parts)


def _kind(name: str, tensor: LazyTensor, asked: ElementType | None, path: str) -> ElementType:
    """The type of a tensor in the file."""
    own = OF_DTYPE.get(tensor.dtype.name)
    if own is None or tensor.dtype.kind != "float":
        raise UsageError(
            f"GGUF has no tensors of {tensor.dtype.name}",
            path=path,
            tensor=name,
            remedy="convert with --dtype bf16, fp16 or fp32",
        )
    if tensor.ndim < 2 or name.endswith(_IN_FLOAT32):
        return TYPES["F32"]
    if asked is None:
        return own if own.file_type is not None else TYPES["F32"]
    if tensor.shape[-1] % asked.block:
        return TYPES[_FALLBACK]
    return asked


def _cut_short(
    tensors: Mapping[str, LazyTensor], kinds: Mapping[str, ElementType], asked: ElementType | None
) -> Iterator[str]:
    """What to say of matrices that are not of the type that is asked for."""
    names = [name for name, kind in kinds.items() if kind.name == _FALLBACK and asked not in (None, kind)]
    if names and asked is not None:
        rows = tensors[names[0]].shape[-1]
        yield (
            f"{len(names)} matrices are in {_FALLBACK}, such as {names[0]}: rows of {rows} are no whole blocks of "
            f"{asked.name}"
        )


def _stored(tensor: LazyTensor, kind: ElementType) -> LazyTensor:
    return tensor.cast(kind.dtype) if kind.dtype else Encoded(tensor.cast("float32"), kind)


def _metadata(
    checkpoint: Checkpoint,
    known: Architecture,
    kinds: dict[str, ElementType],
    shapes: Mapping[str, tuple[int, ...]],
    asked: ElementType | None,
    notes: list[str],
) -> Iterator[tuple[str, Any]]:
    yield "general.architecture", known.name
    yield "general.type", "model"
    yield from general(checkpoint, shapes, notes)
    usual = asked or next((kind for name, kind in kinds.items() if name == "token_embd.weight"), TYPES["F32"])
    yield "general.file_type", usual.file_type
    yield "general.quantization_version", _QUANTIZATION_VERSION
    yield from to_metadata(checkpoint.config, known, checkpoint.path)
    yield from written_tokenizer(checkpoint.tokenizer, checkpoint.config, known, notes)
