"""Rope scaling between transformers' spelling, which is the hub's, and what Megatron-Core and NeMo can express.

Megatron-Core 0.16 has Llama 3.1's scaling with a free factor and all else fixed, and linear interpolation.  NeMo 2
has all of Llama 3.1's numbers as fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.errors import MappingError

_LLAMA3 = {
    "scale_factor": ("factor", 8.0),
    "low_freq_factor": ("low_freq_factor", 1.0),
    "high_freq_factor": ("high_freq_factor", 4.0),
    "old_context_len": ("original_max_position_embeddings", 8192),
}
"""NeMo's name -> transformers' name and the value that Megatron-Core and NeMo 1 fix or default to."""


def from_factors(factors: Mapping[str, Any], interpolation: float | None) -> dict[str, Any] | None:
    """transformers' ``rope_scaling``, or None for plain rope.

    Args:
        factors: NeMo's names of Llama 3.1's numbers; empty if rope is not scaled so.
        interpolation: factor of linear interpolation, or None.
    """
    if factors:
        numbers = {theirs: factors.get(ours, fixed) for ours, (theirs, fixed) in _LLAMA3.items()}
        numbers["original_max_position_embeddings"] = int(numbers["original_max_position_embeddings"])
        return {"rope_type": "llama3", **{k: v if isinstance(v, int) else float(v) for k, v in numbers.items()}}
    if interpolation is not None and interpolation != 1.0:
        return {"rope_type": "linear", "factor": interpolation}
    return None


def to_factors(scaling: Mapping[str, Any] | None, target: str, *, fixed: bool) -> tuple[dict[str, float], float | None]:
    """NeMo's names of Llama 3.1's numbers (empty if not scaled so), and the factor of linear interpolation or None.

    Args:
        scaling: transformers' ``rope_scaling``.
        target: what cannot express it, for the message.
        fixed: whether the target has all numbers but the factor fixed.

    Raises:
        MappingError: the target cannot express it.
    """
    if scaling is None:
        return {}, None
    kind = scaling.get("rope_type")
    if kind == "linear" and _is_number(scaling.get("factor")):
        return {}, float(scaling["factor"])
    if kind == "llama3":
        numbers = {ours: scaling.get(theirs) for ours, (theirs, _) in _LLAMA3.items()}
        possible = all(map(_is_number, numbers.values()))
        if possible and not (fixed and any(numbers[n] != v for n, (_, v) in _LLAMA3.items() if n != "scale_factor")):
            return {name: float(value) for name, value in numbers.items() if value is not None}, None
    raise MappingError(
        f"{target} cannot express this rope scaling",
        expected="linear, or llama3" + (" with low 1, high 4, original length 8192" if fixed else ""),
        found=dict(scaling),
        remedy="set up the scaling in the target yourself, and convert with --config of a configuration without it",
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number that can be a factor or a length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30
