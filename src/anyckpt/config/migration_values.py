"""Values of NeMo 1's settings that are spelled otherwise in NeMo 2, by the word that the table has for the change.

Each change takes section and argument, the value and the whole file, and gives the arguments and what to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anyckpt.config.nemo1 import ACTIVATIONS, NORMS
from anyckpt.config.nemo2 import FUNCTIONS

_PRECISIONS = {"16": "16-mixed", "fp16": "16-mixed", "bf16": "bf16-mixed", "32": "32", "fp32": "32"}
_OPTIMIZERS = {
    "adam": ("adam", False),
    "adamw": ("adam", False),
    "fused_adam": ("adam", False),
    "megatron_fused_adam": ("adam", False),
    "distributed_fused_adam": ("adam", True),
    "mcore_distributed_optim": ("adam", True),
    "sgd": ("sgd", False),
}
_RESTORE = "nemo.lightning.pytorch.strategies.utils.RestoreConfig"
_Name = tuple[str, str]
_Changed = tuple[dict[_Name, Any], list[str]]


def _precision(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    spelled = str(value)
    known = _PRECISIONS.get(spelled.partition("-")[0])
    if known is None:
        return {}, [f"MegatronMixedPrecision has no precision {spelled}"]
    changed = [] if spelled.endswith("-mixed") or known == "32" else [f"{spelled} is spelled {known}"]
    return {name: known}, changed


def _checkpoint_format(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    if value == "zarr":
        return {name: value}, ["zarr is deprecated: say torch_dist; checkpoints in zarr are still read"]
    known = ("torch_dist", "fsdp_dtensor")
    return {name: value}, [] if value in known else [f"NeMo 2 has no checkpoint format {value}"]


def _number(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    try:
        return {name: float(value) if isinstance(value, str) else value}, []
    except ValueError:
        return {name: value}, [f"{value} is no number"]


def _normalization(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    known = NORMS.get(str(value).lower())
    if known is None:
        return {}, [f"Megatron-Core has no norm {value}"]
    centered = {("model", "layernorm_zero_centered_gamma"): True} if known[1] else {}
    return {name: known[0], **centered}, []


def _activation(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    known = ACTIVATIONS.get(str(value))
    if known is None:
        return {}, [f"NeMo 2 has no activation {value}"]
    gate = {("model", "gated_linear_unit"): True} if known[1] else {}
    return {name: _reference(FUNCTIONS[known[0]]), **gate}, []


def _openai_gelu(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    return ({name: _reference(FUNCTIONS["gelu_tanh"])} if value else {}), []


def _fp8(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    """One argument for three switches, said once however many of them are on."""
    model = config.get("model")
    asked: Mapping[str, Any] = model if isinstance(model, Mapping) else {}
    if not value or not asked.get("fp8"):
        return {}, []
    if asked.get("fp8_e4m3"):
        return {name: "e4m3"}, []
    return {name: "hybrid"}, []


def _fsdp(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    return ({name: "pytorch"} if value else {}), []


def _interval(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    """NeMo 1 has one interval for training and validation; NeMo 2 wants both."""
    return ({name: value, (name[0], "gc_interval_val"): value} if value else {}), []


def _betas(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    if not isinstance(value, list) or len(value) != 2:
        return {}, ["Adam has two rates"]
    return {name: value[0], ("optimizer", "adam_beta2"): value[1]}, []


def _optimizer(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    known = _OPTIMIZERS.get(str(value))
    if known is None:
        return {}, [f"Megatron-Core has no optimizer {value}: adam, sgd or muon"]
    shared = {("optimizer", "use_distributed_optimizer"): True} if known[1] else {}
    return {name: known[0], **shared}, []


def _restore(name: _Name, value: Any, config: Mapping[str, Any]) -> _Changed:
    return {name: {"_target_": _RESTORE, "path": value}}, []


def _reference(target: str) -> dict[str, Any]:
    return {"_target_": target, "_call_": False}


CHANGES: Mapping[str, Callable[[_Name, Any, Mapping[str, Any]], _Changed]] = {
    "precision": _precision,
    "checkpoint_format": _checkpoint_format,
    "number": _number,
    "normalization": _normalization,
    "activation": _activation,
    "openai_gelu": _openai_gelu,
    "fp8": _fp8,
    "fsdp": _fsdp,
    "interval": _interval,
    "betas": _betas,
    "optimizer": _optimizer,
    "restore": _restore,
}
