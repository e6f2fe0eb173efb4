"""What an adapter of Hugging Face PEFT stores, by its own names.

A saved adapter has ``base_model.model.<module>.lora_A.weight`` (rank, in) and ``lora_B.weight`` (out, rank), an
embedding ``lora_embedding_A`` (rank, rows) and ``lora_embedding_B`` (width, rank); a live model's state dict has the
adapter's name in between (``lora_A.default.weight``).  Source: peft 0.21, ``tuners/lora`` and ``utils/save_and_load``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, UsageError
from anyckpt.models.adapters.adapter import LowRank, Rows, all_equal, check_factors
from anyckpt.models.adapters.rows import PREFIX
from anyckpt.tensor import LazyTensor

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<what>lora_[AB])(?:\.(?P<live>[^.]+))?\.(?P<kind>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.(?P<live_embedding>[^.]+))?"
    r"|lora_magnitude_vector(?:\.(?P<live_magnitude>[^.]+)(?:\.weight)?)?)"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<live>[^.]+))?\.(?P<kind>weight|bias)")
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<live>[^.]+))?")
_OF_BASE = re.compile(r"\.base_layer(\.(?:weight|bias))$")
_COPY = re.compile(r".+\.(?:original_module|trainable_tokens_original)\..+")


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are a PEFT adapter's names."""
    return any(name.startswith(PREFIX) and (_FACTOR.fullmatch(name) or _TOKENS.fullmatch(name)) for name in names)


@dataclass
class StoredModule:
    """What an adapter stores for one module, with the stored names."""

    down: tuple[str, LazyTensor] | None = None
    up: tuple[str, LazyTensor] | None = None
    magnitude: tuple[str, LazyTensor] | None = None
    bias: tuple[str, LazyTensor] | None = None
    is_embedding: bool = False
    names: list[str] = field(default_factory=list)


@dataclass
class StoredAdapter:
    """What an adapter stores.

    Attributes:
        modules: its factors by the module's name.
        saved: whole tensors: the base model's name -> the stored one.
        tokens: trained rows: the module's name -> the stored one.
    """

    modules: dict[str, StoredModule] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


def check_pairs(tensors: Mapping[str, LazyTensor], *, blocks: bool = False) -> list[str]:
    """Check what needs no base model: that every module has both factors, of one rank.

    Args:
        tensors: by stored name.
        blocks: a second factor may be blocks of a block-diagonal matrix, one over the other, as peft's BD-LoRA has
            it; nothing but the adapter's settings tells whether it is.

    Returns:
        Modules of which it must be.

    Raises:
        MappingError: they do not.
    """
    diagonal: list[str] = []
    for module, own in by_module(tensors).modules.items():
        down, up = _factors(own)
        ranks = (down.shape[:1], up.shape[1:2])
        if blocks and down.ndim == up.ndim == 2 and ranks[0] > ranks[1] > (0,) and down.shape[0] % up.shape[1] == 0:
            diagonal.append(module)
            continue
        if ranks[0] != ranks[1]:  # a convolution's have more axes
            raise MappingError(
                "the two factors of an update are of different ranks",
                tensor=own.names[0],
                expected="(rank, ...) and (out, rank, ...)",
                found=f"{down.shape} and {up.shape}",
                remedy="copy the whole adapter",
            )
    return diagonal


def by_module(tensors: Mapping[str, LazyTensor]) -> StoredAdapter:
    """What an adapter stores, by the base model's names of modules and tensors.

    peft 0.21 stores a module of ``modules_to_save`` that is an embedding or the output layer up to three times: by its
    own name and as ``modules_to_save``, which are the trained tensor, and as ``original_module``, which is not.

    Raises:
        MappingError: a name is there twice, or there are two adapters.
    """
    result = StoredAdapter()
    modules, saved = result.modules, result.saved
    adapters: dict[str, str] = {}

    def save(plain: str, name: str) -> None:
        other = saved.setdefault(plain, name)
        if other != name and not all_equal([tensors[other], tensors[name]]):
            raise MappingError(
                "two stored tensors are the same one of the adapter, and they differ",
                tensor=name,
                found=other,
                remedy="leave one of them out with --exclude",
            )

    for name, tensor in tensors.items():
        plain = _OF_BASE.sub(r"\1", name.removeprefix(PREFIX))
        whole, factor, tokens = _SAVED.fullmatch(plain), _FACTOR.fullmatch(plain), _TOKENS.fullmatch(plain)
        if _COPY.fullmatch(plain):
            continue
        if tokens is not None:
            if tokens["live"]:
                adapters.setdefault(tokens["live"], name)
            result.tokens[tokens["module"]] = name
            continue
        if whole is not None:
            if whole["live"]:
                adapters.setdefault(whole["live"], name)
            save(f"{whole['module']}.{whole['kind']}", name)
            continue
        if factor is None:
            save(plain, name)
            continue
        live = factor["live"] or factor["live_embedding"] or factor["live_magnitude"]
        if live:
            adapters.setdefault(live, name)
        own = modules.setdefault(factor["module"], StoredModule())
        slot = _slot(factor)
        if getattr(own, slot) is not None:
            _check_single(adapters)
            raise MappingError(
                "two stored tensors are the same one of the adapter", tensor=name, found=getattr(own, slot)[0]
            )
        setattr(own, slot, (name, tensor))
        own.is_embedding = own.is_embedding or factor["embedding"] is not None
        own.names.append(name)
    _check_single(adapters)
    return result


def _check_single(adapters: Mapping[str, str]) -> None:
    """Raise MappingError if names of adapters (-> a stored name) are several."""
    if len(adapters) > 1:
        raise MappingError(
            "holds more than one adapter",
            tensor=list(adapters.values())[1],
            expected="one",
            found=", ".join(list(adapters)[:5]),
            remedy="leave the others out with --exclude",
        )


def rows_of(module: str, name: str, values: LazyTensor, indices: Mapping[str, tuple[int, ...]]) -> Rows:
    """The rows of a module that an adapter trains.

    Args:
        module: its name.
        name: the stored name of the rows.
        values: these.
        indices: which rows, by pattern of module names, as the settings say.

    Raises:
        UsageError: the settings do not say it.
    """
    for pattern, own in indices.items():
        if pattern in ("", module) or module.endswith(f".{pattern}"):
            return Rows(own, values, name)
    raise UsageError(
        "the adapter does not say which tokens these rows are of",
        tensor=name,
        expected="trainable_token_indices in adapter_config.json",
        remedy="copy the whole adapter",
    )


def _slot(factor: re.Match[str]) -> str:
    letter = (factor["what"] or factor["embedding"] or "")[-1:]
    if not letter:
        return "magnitude"
    if factor["kind"] == "bias":
        if letter == "A":
            raise MappingError("is a bias of LoRA's first factor, which PEFT does not have", tensor=factor[0])
        return "bias"
    return "down" if letter == "A" else "up"


def _factors(own: StoredModule) -> tuple[LazyTensor, LazyTensor]:
    """A module's first factor and its second, or an error that says which is missing."""
    for slot, tail in (("down", "lora_A"), ("up", "lora_B")):
        if getattr(own, slot) is None:
            raise MappingError(
                f"the adapter of this module has no {tail}", tensor=own.names[0], remedy="copy the whole adapter"
            )
    assert own.down is not None and own.up is not None
    return own.down[1], own.up[1]


def update_of(module: str, own: StoredModule, scale: Callable[[str, int], float]) -> LowRank:
    """A module's update, (out, in); a convolution's is that of its kernel as a matrix of all that an output sees.

    Raises:
        MappingError: a factor is missing, or they do not fit together.
        UsageError: its scale is not known.
    """
    down, up = _factors(own)
    if down.ndim == up.ndim > 2 and down.size and set(up.shape[2:]) == {1}:
        down = down.reshape((down.shape[0], down.size // down.shape[0]))
        up = up.reshape(up.shape[:2])
    magnitude = None if own.magnitude is None else own.magnitude[1]
    bias = None if own.bias is None else own.bias[1]
    check_factors(LowRank(down, up, 1.0), own.names[0])
    factor = scale(module, down.shape[0])
    if own.is_embedding:  # its weight is (rows, width): the update is the transpose of a linear layer's
        if magnitude is not None:
            raise MappingError("DoRA on an embedding is not supported", tensor=own.names[0])
        down, up = up.transpose(), down.transpose()
    if magnitude is not None and magnitude.ndim > 1 and magnitude.size == max(magnitude.shape):
        magnitude = magnitude.reshape((magnitude.size,))
    return LowRank(down, up, factor, magnitude, bias, tuple(own.names))
