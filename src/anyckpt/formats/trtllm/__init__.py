"""TensorRT-LLM's checkpoints, and NeMo's ``.qnemo``, which is one: ``config.json`` and a safetensors file per rank."""

from __future__ import annotations

from anyckpt.formats.format import Format, deferred
from anyckpt.formats.trtllm.container import detect

__all__ = ["FORMAT"]

FORMAT = Format(
    name="trtllm",
    title="TensorRT-LLM checkpoint, NeMo .qnemo",
    detect=detect,
    read=deferred("anyckpt.formats.trtllm.read", "read"),
    plan=deferred("anyckpt.formats.trtllm.write", "plan"),
    dialect=lambda options: "trtllm",
    config_kind="trtllm",
    divides=("tensor_parallel", "pipeline_parallel"),
    archives=True,
    archive_suffixes=(".qnemo",),
    quantizes=("trtllm",),
    in_fp32=("*.mlp.router.weight",),
)
