"""What NeMo's own converter writes around a model, from ``template.yaml``."""

from __future__ import annotations

import copy
import struct
from functools import cache
from pathlib import Path
from typing import Any

from anyckpt.dtypes import dtype
from anyckpt.formats.nemo2.fiddle import Call, Reference, from_plain
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.tensor import Constant

_RECORDED_BY_NEMO_RUN = ("nemo.lightning.pytorch.plugins.mixed_precision.MegatronMixedPrecision",)
"""Plain dataclasses, which NeMo turns into NeMo-Run's ``Config`` rather than Fiddle's when it writes io.json."""

_PRECISIONS = {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32"}


@cache
def _template() -> dict[str, Any]:
    path = Path(__file__).with_name("template.yaml")
    return load_yaml_mapping(path.read_bytes(), str(path))


def section(name: str) -> dict[str, Any]:
    """A copy of one of the template's sections."""
    found: dict[str, Any] = copy.deepcopy(_template()[name])
    return found


def as_calls(plain: dict[str, Any]) -> Any:
    """Calls from plain data, each in the kind of record that NeMo uses for it."""
    tree = from_plain(plain)
    _mark(tree)
    return tree


def _mark(value: Any) -> None:
    if isinstance(value, Call):
        if value.function.target in _RECORDED_BY_NEMO_RUN:
            value.node = Reference("nemo_run.config", value.node.name)
        value = value.arguments
    if isinstance(value, dict):
        for item in value.values():
            _mark(item)
    elif isinstance(value, list):
        for item in value:
            _mark(item)


def trainer_context(params_dtype: str) -> dict[str, Any]:
    """The context of a model with weights of a dtype: ``model`` with only its optimizer, ``trainer`` and ``extra``."""
    context = section("context")
    plugin = context["trainer"]["strategy"]["kwargs"]["plugins"]
    plugin["precision"] = _PRECISIONS.get(params_dtype, "32")
    for key in ("params_dtype", "pipeline_dtype"):
        plugin[key] = {"_target_": f"torch.{params_dtype}", "_call_": False}
    return context


def common_state(step: int = 0) -> dict[str, Any]:
    """``common.pt`` of a trainer that has done ``step`` optimizer steps, each of one batch, and nothing else.

    Lightning counts steps by what its loops say, not by ``global_step``.
    """
    state = section("common")
    for callback in state["callbacks"].values():
        callback["kth_value"] = Constant(dtype("float32"), (), struct.pack("<f", callback["kth_value"]))
    if step:
        loop = state["loops"]["fit_loop"]
        state["global_step"] = step
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step
        progress = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counters in (loop["epoch_loop.batch_progress"], *progress.values()):
            for counter in (counters["total"], counters["current"]):
                counter.update(dict.fromkeys(counter, step))
    return state
