"""Reading a GGUF file: its tensors in numbers under Hugging Face's names, and the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from anyckpt.checkpoint import Checkpoint
from anyckpt.dtypes import dtype
from anyckpt.errors import FormatError, MappingError
from anyckpt.formats.gguf.architectures import ARCHITECTURES, Architecture, architecture_of
from anyckpt.formats.gguf.blocks import check_decodes
from anyckpt.formats.gguf.config import llama3_scaling, to_config
from anyckpt.formats.gguf.container import TensorInfo
from anyckpt.formats.gguf.names import ROPE, to_hub
from anyckpt.formats.gguf.nodes import Decoded
from anyckpt.formats.gguf.parts import metadata_of, read_parts, tensors_of
from anyckpt.formats.gguf.tokenizer import read_tokenizer
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor, Stored

_SHOWN = ("general.name", "general.basename", "general.size_label", "general.quantized_by")


def read(location: Location) -> Checkpoint:
    """Open a file, or all files of a model in parts.

    Raises:
        FormatError: it is damaged, or a part of it is missing.
        MappingError: it holds a model of an architecture that is not known here.
        MissingLibraryError: its tensors are of a type that the package ``gguf`` decodes.
    """
    parts = read_parts(location)
    metadata, listed = metadata_of(parts), list(tensors_of(parts))
    known = _architecture(metadata, location.path)
    stored = {info.name: _tensor(info, source) for info, source in listed}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    config = to_config(metadata, known, shapes, location.path)
    warnings: list[str] = []
    ignored: dict[str, str] = {}
    if ROPE in stored:
        _take_divisors(stored.pop(ROPE), config, warnings)
        ignored[ROPE] = "divisors of rotary frequencies, which the configuration says"
    infos = [info for info, _ in listed]
    config["dtype"] = _usual_type(infos)
    tokenizer = read_tokenizer(metadata, location.path, warnings)
    kinds = Counter(info.type.name for info in infos)
    return Checkpoint(
        location.path,
        "gguf",
        to_hub(stored, known, config, location.path),
        format_version=f"GGUF {parts[0].header.version}",
        dialect="hf",
        config=config,
        config_kind="hf",
        tokenizer=tokenizer,
        warnings=warnings,
        ignored=ignored,
        details={
            "architecture": known.name,
            "stored_types": dict(kinds.most_common()),
            **({"parts": len(parts)} if len(parts) > 1 else {}),
            **{key: metadata[key] for key in _SHOWN if isinstance(metadata.get(key), str)},
        },
    )


def _architecture(metadata: Mapping[str, Any], path: str) -> Architecture:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FormatError("does not say of which architecture it is", path=path, expected="general.architecture")
    experts = metadata.get(f"{name}.expert_count", 0)
    known = architecture_of(name, experts=isinstance(experts, int) and experts > 0)
    if known is None:
        names = sorted({known.name for known in ARCHITECTURES})
        raise MappingError(
            "holds a model of an architecture that is not known here",
            path=path,
            expected=", ".join(names),
            found=f"{name} with experts" if experts and name in names else name,
            remedy="open the checkpoint that it was made of",
        )
    return known


def _tensor(info: TensorInfo, source: ByteSource) -> LazyTensor:
    kind = info.type
    if kind.dtype:
        return Stored(source, info.offset, dtype(kind.dtype), info.shape)
    check_decodes(kind.name)
    row = info.shape[-1] // kind.block * kind.nbytes
    return Decoded(Stored(source, info.offset, dtype("uint8"), (*info.shape[:-1], row)), kind)


def _take_divisors(divisors: LazyTensor, config: dict[str, Any], warnings: list[str]) -> None:
    found = None
    if divisors.dtype == "float32" and divisors.ndim == 1 and divisors.size <= 4096:
        found = llama3_scaling(divisors.numpy().view(np.float32), config)
    if found is None:
        warnings.append(
            f"what {ROPE} does to rotary frequencies is none of the ways that models have: the configuration does not "
            "say it"
        )
    else:
        config["rope_scaling"] = found


def _usual_type(infos: Sequence[TensorInfo]) -> str:
    """The type of most elements, float32 where they lie in blocks."""
    counts: Counter[str] = Counter()
    for info in infos:
        counts[info.type.dtype or "float32"] += prod(info.shape)
    return counts.most_common(1)[0][0] if counts else "float32"
