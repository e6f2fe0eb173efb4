"""Training in 8 bits, as NeMo 1 and NeMo 2 spell it; no tensor depends on it.

NeMo 1 has a switch and two that choose the type (``MegatronBaseModel`` of NeMo 2.0: E4M3 alone comes before the hybrid
of E4M3 and E5M2); ``TransformerConfig``, and so NeMo 2, has one word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXTRA = "fp8"
"""Of ``ModelConfig.extra``: what is said of it."""
_SETTINGS = ("fp8_margin", "fp8_interval", "fp8_amax_history_len", "fp8_amax_compute_algo")


def from_nemo1(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``model_config.yaml`` says, in NeMo 2's words; nothing if 8 bits are off."""
    if values.get("fp8") is not True:
        return {}
    word = "e4m3" if values.get("fp8_e4m3") else "hybrid" if values.get("fp8_hybrid") else None
    return {} if word is None else {"fp8": word, **_settings(values)}


def from_nemo2(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a NeMo 2 configuration says; nothing if 8 bits are off."""
    word = values.get("fp8")
    return {"fp8": word, **_settings(values)} if word in ("e4m3", "hybrid") else {}


def to_nemo1(said: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a ``model_config.yaml``."""
    if not said:
        return {}
    word = said["fp8"]
    return {"fp8": True, "fp8_e4m3": word == "e4m3", "fp8_hybrid": word == "hybrid", **_settings(said)}


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in _SETTINGS if values.get(key) is not None}
