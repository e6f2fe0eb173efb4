"""Models whose layers differ: the ``block_configs`` of Llama-Nemotron (DeciLM), which Megatron-Core reads, too.

Each layer has attention, one matrix in its place, or nothing; and so with the MLP.  Keys are those of NVIDIA's
``block_config.py`` beside the released models and of ``megatron.core.transformer.heterogeneous`` in Megatron-Core
0.16, which calls ``ffn`` also ``mlp`` and takes ``num_query_groups`` and ``ffn_hidden_size`` as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError

Part = Literal["whole", "linear", "none"]
"""The usual block, one matrix with a norm before it, or neither."""

_MOST = 1 << 40
_MULTIPLE = 256  # to which DeciLM rounds widths up
_ATTENTION = {"n_heads_in_group", "num_query_groups", "no_op", "replace_with_linear"}
_MLP = {"ffn_mult", "ffn_hidden_size", "intermediate_size", "no_op", "replace_with_linear"}
_USUAL = {"gated": True, "hidden_act": "silu"}


@dataclass(frozen=True)
class LayerBlock:
    """One layer.

    Attributes:
        attention: what stands for attention.
        mlp: what stands for the MLP.
        num_query_groups: key and value heads where attention is whole, else None.
        ffn_hidden_size: width of one of the two halves where the MLP is whole, else None.
        ffn_mult: how DeciLM says that width, where it was said so.
    """

    attention: Part
    mlp: Part
    num_query_groups: int | None = None
    ffn_hidden_size: int | None = None
    ffn_mult: float | None = None

    @property
    def empty(self) -> bool:
        """The layer has no parameters."""
        return self.attention == "none" and self.mlp == "none"


def decode(text: str, heads: int, hidden: int) -> tuple[LayerBlock, ...]:
    """The layers of Megatron-Core's ``heterogeneous_layers_config_encoded_json``.

    Args:
        text: JSON with ``block_configs``.
        heads: query heads.
        hidden: width of the model.

    Raises:
        MappingError: it is no such JSON, or says what a layer cannot be.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise MappingError("heterogeneous_layers_config_encoded_json is not JSON", found=repr(text)[:80]) from None
    return parse(values.get("block_configs") if isinstance(values, Mapping) else None, heads, hidden)


def parse(blocks: Any, heads: int, hidden: int) -> tuple[LayerBlock, ...]:
    """The layers of a list of ``block_configs``.

    Raises:
        MappingError: it is none, or says what a layer cannot be.
    """
    if not isinstance(blocks, list) or not blocks:
        raise MappingError(
            "the configuration has no block_configs", expected="what each layer is", found=repr(blocks)[:80]
        )
    return tuple(_parse(index, block, heads, hidden) for index, block in enumerate(blocks))


def width(multiplier: float, hidden: int) -> int:
    """DeciLM's width of an MLP, of one of the two halves."""
    return -(-int(2 * multiplier * hidden / 3) // _MULTIPLE) * _MULTIPLE


def render(block: LayerBlock, heads: int, hidden: int) -> dict[str, Any]:
    """A layer's ``block_configs`` as NVIDIA's models and Megatron-Core read it.

    A width that is no multiple of 256 is said as ``ffn_hidden_size``, which only Megatron-Core understands.
    """
    groups, size = block.num_query_groups, block.ffn_hidden_size
    mlp: dict[str, Any] = {
        "ffn_mult": None,
        "no_op": block.mlp == "none",
        "replace_with_linear": block.mlp == "linear",
    }
    if size is not None:
        mlp["ffn_mult"] = block.ffn_mult if block.ffn_mult is not None else _multiplier(size, hidden)
        if mlp["ffn_mult"] is None:
            mlp["ffn_hidden_size"] = size
    attention = {
        "n_heads_in_group": None if groups is None else heads // groups,
        "no_op": block.attention == "none",
        "replace_with_linear": block.attention == "linear",
    }
    return {"attention": attention, "ffn": mlp}


def _multiplier(size: int, hidden: int) -> float | None:
    """What ``width`` makes ``size`` of, None if nothing does."""
    exact = 3 * size / (2 * hidden)
    return next((value for value in (exact, math.nextafter(exact, 0)) if width(value, hidden) == size), None)


def _parse(index: int, block: Any, heads: int, hidden: int) -> LayerBlock:
    where = f"block_configs[{index}]"
    values = block if isinstance(block, Mapping) else {}
    attention = _section(values, ("attention",), _ATTENTION, where)
    mlp = _section(values, ("ffn", "mlp"), _MLP, where)
    one, other = _part(attention, f"{where}.attention"), _part(mlp, f"{where}.ffn")
    groups = _groups(attention, heads, where) if one == "whole" else None
    size, multiplier = _size(mlp, hidden, where) if other == "whole" else (None, None)
    return LayerBlock(one, other, groups, size, multiplier)


def _section(block: Mapping[str, Any], names: tuple[str, ...], known: set[str], where: str) -> Mapping[str, Any]:
    for name in names:
        section = block.get(name)
        if isinstance(section, Mapping):
            strange = [
                key
                for key, value in section.items()
                if key not in known and value not in (None, False) and _USUAL.get(key) != value
            ]
            if strange:
                raise MappingError(
                    f"{where}.{name}.{strange[0]} is something for which Megatron-Core has no heterogeneous layers",
                    expected="none",
                    found=repr(section[strange[0]])[:80],
                )
            return section
    raise MappingError(f"the configuration's {where} has no {names[0]}", found=repr(block)[:80])


def _part(section: Mapping[str, Any], where: str) -> Part:
    flags = []
    for key in ("no_op", "replace_with_linear"):
        value = section.get(key)
        if value is not None and not isinstance(value, bool):
            raise MappingError(f"{where}.{key} is of the wrong type", expected="true or false", found=repr(value)[:80])
        flags.append(bool(value))
    if all(flags):
        raise MappingError(f"{where} is both left out and replaced", expected="no_op or replace_with_linear")
    return "none" if flags[0] else "linear" if flags[1] else "whole"


def _groups(section: Mapping[str, Any], heads: int, where: str) -> int:
    groups, each = section.get("num_query_groups"), section.get("n_heads_in_group")
    if groups is None and type(each) is int and each > 0 and not heads % each:
        return heads // each
    if type(groups) is int and groups > 0 and not heads % groups:
        return groups
    raise MappingError(
        f"{where}.attention.n_heads_in_group is not possible",
        expected=f"a divisor of {heads} heads",
        found=repr(each if groups is None else groups)[:80],
    )


def _size(section: Mapping[str, Any], hidden: int, where: str) -> tuple[int, float | None]:
    multiplier: Any = section.get("ffn_mult")
    stated = next((section[key] for key in ("ffn_hidden_size", "intermediate_size") if section.get(key)), None)
    if type(stated) is int and 0 < stated < _MOST:
        return stated, None
    if stated is None and type(multiplier) in (int, float) and 0 < multiplier < _MOST:
        size = width(multiplier, hidden)
        if 0 < size < _MOST:
            return size, float(multiplier)
    raise MappingError(
        f"{where}.ffn.ffn_mult is not possible",
        expected="a positive number",
        found=repr(multiplier if stated is None else stated)[:80],
    )
