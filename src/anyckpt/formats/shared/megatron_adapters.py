"""What NeMo 2 and Megatron-Bridge record of an adapter: the class that made it, with its arguments.

Both have ``LoRA``, ``DoRA`` and ``CanonicalLoRA`` with the same arguments: NeMo 2 as ``model_transform`` of the model
in its context, Megatron-Bridge as section ``peft`` of ``run_config.yaml``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from anyckpt.checkpoint import AdapterSettings
from anyckpt.errors import FormatError

ADAPTER = "peft"
"""Key of the call in the common state of a plain Megatron-Core checkpoint, where nobody else records it: ours."""

_CLASSES = {"LoRA": "lora", "VLMLoRA": "lora", "CanonicalLoRA": "lora", "DoRA": "dora"}
_MODULES = {"LoRA": "lora", "CanonicalLoRA": "canonical_lora", "DoRA": "dora"}
_ALPHA = {"LoRA": 32, "VLMLoRA": 32, "CanonicalLoRA": 32, "DoRA": 64}
_DIM = 32
_FUSED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_CANONICAL = (
    "linear_q",
    "linear_k",
    "linear_v",
    "linear_proj",
    "linear_fc1_up",
    "linear_fc1_gate",
    "linear_fc2",
)
_LARGEST = 1 << 31

CANONICAL_ROWS = (
    "NeMo 2.5 adds canonical updates of queries, keys and values to other rows than these have in linear_qkv, which "
    "alternate by query group: use the fused form there (--adapter-form fused), or Megatron-Bridge"
)
"""``LoRALinearSplitQKV.forward`` of NeMo 2.5 puts all queries before all keys before all values.  NeMo's own exporter
takes the adapters to be the projections', as Megatron-Bridge computes them, and so do we."""


def settings_from(call: Mapping[str, Any], path: str, base: str | None = None) -> AdapterSettings:
    """The settings that a recorded call has, with the class's defaults for what it leaves out.

    Args:
        call: ``_target_`` and arguments.
        path: of the file, for messages.
        base: the model that it was trained on.

    Raises:
        FormatError: a number is not possible.
    """
    name = str(call.get("_target_", "")).rpartition(".")[2]
    targets = call.get("target_modules")
    default = _CANONICAL if name == "CanonicalLoRA" else _FUSED
    known = name in _CLASSES
    return AdapterSettings(
        kind=_CLASSES.get(name, name or "unknown"),
        rank=int(_number(call, "dim", path, _DIM)) if known else None,
        alpha=_number(call, "alpha", path, _ALPHA[name]) if known else None,
        dropout=float(_number(call, "dropout", path, 0.0)),
        targets=tuple(map(str, targets)) if isinstance(targets, list) else default if known else (),
        base=base or None,
    )


def _number(call: Mapping[str, Any], key: str, path: str, default: float) -> float:
    value = call.get(key, default)
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) >= _LARGEST or value < 0:
        raise FormatError(
            f"the adapter's {key} is not possible", path=path, expected="a number", found=repr(value)[:80]
        )
    if key == "dim" and (value < 1 or value != int(value)):
        raise FormatError(f"the adapter's {key} is not possible", path=path, expected="a rank", found=repr(value)[:80])
    return value  # type: ignore[no-any-return]


def call_of(settings: AdapterSettings, package: str) -> dict[str, Any]:
    """The call that makes an adapter with these settings.

    Args:
        settings: with Megatron's names of modules in ``targets``.
        package: Python package of the classes.
    """
    canonical = is_canonical(settings.targets)
    name = "DoRA" if settings.kind == "dora" else "CanonicalLoRA" if canonical else "LoRA"
    return {
        "_target_": f"{package}.{_MODULES[name]}.{name}",
        "target_modules": list(settings.targets),
        "dim": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "dropout_position": "pre",
    }


def is_canonical(targets: Iterable[str]) -> bool:
    """Whether modules are adapted that are parts of Megatron's."""
    return any(target in _CANONICAL and target not in _FUSED for target in targets)
