"""Reading a GGUF file: its tensors in numbers under Hugging Face's names, and the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from anyckpt.checkpoint import Checkpoint
from anyckpt.dtypes import dtype
from anyckpt.errors import FormatError, MappingError
from anyckpt.formats.gguf.architectures import ARCHITECTURES, Architecture, architecture_of
from anyckpt.formats.gguf.blocks import check_decodes
from anyckpt.formats.gguf.config import llama3_scaling, to_config
from anyckpt.formats.gguf.container import Header, read_header
from anyckpt.formats.gguf.names import ROPE, to_hub
from anyckpt.formats.gguf.nodes import Decoded
from anyckpt.formats.gguf.tokenizer import read_tokenizer
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor, Stored

_SHOWN = ("general.name", "general.basename", "general.size_label", "general.quantized_by")


def read(location: Location) -> Checkpoint:
    """Open a file.

    Raises:
        FormatError: it is damaged, or one part of several.
        MappingError: it holds a model of an architecture that is not known here.
        MissingLibraryError: its tensors are of a type that the package ``gguf`` decodes.
    """
    source = location.open()
    header = read_header(source)
    metadata = header.metadata
    _check_whole(metadata, location.path)
    known = _architecture(metadata, location.path)
    stored = {info.name: _tensor(info, source) for info in header.tensors}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    config = to_config(metadata, known, shapes, location.path)
    warnings: list[str] = []
    ignored: dict[str, str] = {}
    if ROPE in stored:
        _take_divisors(stored.pop(ROPE), config, warnings)
        ignored[ROPE] = "divisors of rotary frequencies, which the configuration says"
    config["dtype"] = _usual_type(header)
    tokenizer = read_tokenizer(metadata, location.path, warnings)
    kinds = Counter(info.type.name for info in header.tensors)
    return Checkpoint(
        location.path,
        "gguf",
        to_hub(stored, known, config, location.path),
        format_version=f"GGUF {header.version}",
        dialect="hf",
        config=config,
        config_kind="hf",
        tokenizer=tokenizer,
        warnings=warnings,
        ignored=ignored,
        details={
            "architecture": known.name,
            "stored_types": dict(kinds.most_common()),
            **{key: metadata[key] for key in _SHOWN if isinstance(metadata.get(key), str)},
        },
    )


def _check_whole(metadata: Mapping[str, Any], path: str) -> None:
    count = metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise FormatError(
            f"is one of {count} parts of a model",
            path=path,
            found=f"part {metadata.get('split.no', 0) + 1}",
            remedy="join them with llama.cpp's own llama-gguf-split --merge",
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


def _tensor(info: Any, source: ByteSource) -> LazyTensor:
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


def _usual_type(header: Header) -> str:
    """The type of most elements, float32 where they lie in blocks."""
    counts: Counter[str] = Counter()
    for info in header.tensors:
        counts[info.type.dtype or "float32"] += prod(info.shape)
    return counts.most_common(1)[0][0] if counts else "float32"
