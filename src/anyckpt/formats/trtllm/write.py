"""Writing a TensorRT-LLM checkpoint: whole tensors under its names, divided for ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from anyckpt.checkpoint import Checkpoint, ParallelLayout
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.errors import AnyckptError, LastingError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.shared.archive import ArchiveWriter
from anyckpt.formats.shared.hub_folder import check_plain_name
from anyckpt.formats.shared.loose_tensors import weights_only
from anyckpt.formats.trtllm import tokenizer
from anyckpt.formats.trtllm.container import CONFIG, LAYERS, RANK, rank_file
from anyckpt.formats.trtllm.division import cut, division, heads_of, is_first, layer_of, positive
from anyckpt.formats.trtllm.loading import refused
from anyckpt.formats.trtllm.vocabulary import with_padding
from anyckpt.tensor import LazyTensor

_ORDER = (
    "producer architecture dtype logits_dtype num_hidden_layers num_attention_heads num_key_value_heads hidden_size "
    "norm_epsilon vocab_size max_position_embeddings hidden_act use_parallel_embedding embedding_sharding_dim "
    "head_size intermediate_size position_embedding_type share_embedding_table residual_mlp bias rotary_pct rank "
    "decoder rmsnorm lm_head_bias rotary_base rotary_scaling mapping quantization moe"
).split()
"""Keys of ``config.json`` as ModelOpt 0.40 has them; others follow."""

_ANY_GROUP = ("W4A16", "W4A16_AWQ", "W4A8_AWQ")
"""Algorithms of which a user chooses how many columns share a scale."""
_OWN = ("quant_method", "quantized_layers")
"""Keys of our ``quantization`` that TensorRT-LLM's class has not, and which it refuses."""


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """``rank0.safetensors`` and so on, ``config.json``, the tokenizer's files; a tar of them if that is asked for.

    Raises:
        UsageError: the model cannot be divided by so many ranks, or there is no configuration.
        MappingError: how ranks divide a tensor is not known.
    """
    if not checkpoint.config:
        raise UsageError(
            "a TensorRT-LLM checkpoint needs a model configuration and the source has none",
            path=checkpoint.path,
            remedy="give the model's own with --config",
        )
    layout = options.layout or ParallelLayout()
    weights, ignored = weights_only(checkpoint)
    weights, config = with_padding(weights, checkpoint.config, checkpoint.quantization)
    checkpoint = replace(checkpoint, config=config)
    notes: list[str] = []
    files: dict[str, OutputFile] = {}
    for number, part in enumerate(_ranks(weights, layout, checkpoint)):
        files[rank_file(number)] = OutputFile(rank_file(number), safetensors_parts(part))
    files[CONFIG] = _json(CONFIG, _config(checkpoint, layout), stage=2)
    layers = _layers(checkpoint)
    if layers is not None:
        files[LAYERS] = _json(LAYERS, layers)
    if checkpoint.tokenizer is not None:
        files.update(tokenizer.written(checkpoint.tokenizer, notes))
    for name, source in checkpoint.artifacts.items():
        if "/" in name.strip("/"):
            ignored[name] = "a trtllm checkpoint has no folders"
            continue
        check_plain_name(name, checkpoint.path)
        if RANK.fullmatch(name):
            ignored[name] = "has the name of a rank's file"
            continue
        files.setdefault(name, OutputFile(name, (SourceData(source),), 1))
    if checkpoint.config.get("dtype") == "float32":
        notes.append("the weights are float32, of which engines are slow: choose --dtype fp16 or bf16 for one to serve")
    notes += refused(weights, checkpoint.quantization)
    outputs = (_archive(files),) if options.compress else tuple(files.values())
    return Plan("trtllm", outputs, ignored=ignored, notes=tuple(notes))


def _ranks(
    weights: Mapping[str, LazyTensor], layout: ParallelLayout, checkpoint: Checkpoint
) -> list[dict[str, LazyTensor]]:
    """Every rank's tensors, the ranks of one stage after the other."""
    config = checkpoint.config
    heads = heads_of(config, layout.tensor_parallel)
    layers = 1 + max((found[0] for name in weights if (found := layer_of(name)) is not None), default=-1)
    stages = layout.pipeline_parallel
    if layers % stages:
        raise UsageError(
            f"its layers cannot be divided among {stages} pipeline stages",
            path=checkpoint.path,
            expected=f"a size that divides {layers} layers",
            found=stages,
            remedy="choose another --pp",
        )
    ranks: list[dict[str, LazyTensor]] = [{} for _ in range(stages * layout.tensor_parallel)]
    for name, tensor in weights.items():
        found = layer_of(name)
        each = layers // stages
        stage = found[0] // each if found is not None else 0 if is_first(name) else stages - 1
        own = name if found is None else f"transformer.layers.{found[0] % each}.{found[1]}"
        try:
            how = None if layout.tensor_parallel == 1 else division(name, weights, config)
            for rank in range(layout.tensor_parallel):
                part = tensor if how is None else cut(tensor, how, rank, heads)
                ranks[stage * layout.tensor_parallel + rank][own] = part
        except AnyckptError as error:
            error.tensor, error.path = error.tensor or name, error.path or checkpoint.path
            if own.endswith(".weights_scaling_factor"):
                error.remedy = _another_division(tensor, layout.tensor_parallel, checkpoint)
            if type(error) is LastingError:
                raise error.told_as(UsageError) from None
            raise
    return ranks


def _another_division(scales: LazyTensor, ranks: int, checkpoint: Checkpoint) -> str:
    """What helps where a rank would have a part of a group of columns that share a scale."""
    facts = checkpoint.quantization or {}
    size = positive(facts, "group_size") or 0
    columns = scales.shape[-1] * size if scales.ndim else 0
    if facts.get("quant_algo") not in _ANY_GROUP or columns % ranks or not columns:
        return "choose another --tp, or leave the module as it is with --quantize-exclude"
    return f"choose another --tp, or quantize with --group-size {gcd(size, columns // ranks)}"


def _config(checkpoint: Checkpoint, layout: ParallelLayout) -> dict[str, Any]:
    from anyckpt import __version__

    facts = checkpoint.quantization
    world = layout.tensor_parallel * layout.pipeline_parallel
    sparse = "moe" in checkpoint.config or "moe_num_experts" in checkpoint.config
    said = {
        "producer": {"name": "anyckpt", "version": __version__},
        **checkpoint.config,
        "rank": world - 1,
        "mapping": {
            "world_size": world,
            "tp_size": layout.tensor_parallel,
            "pp_size": layout.pipeline_parallel,
            **({"moe_tp_size": layout.tensor_parallel, "moe_ep_size": 1} if sparse else {}),
        },
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None}
        if facts is None
        else {key: value for key, value in facts.items() if key not in _OWN},
    }
    place = {key: number for number, key in enumerate(_ORDER)}
    return {key: said[key] for key in sorted(said, key=lambda key: place.get(key, len(place)))}


def _layers(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What ``quant_cfg.json`` says; None if ModelOpt writes none."""
    facts = checkpoint.quantization
    if facts is None:
        return {"quant_algo": None, "kv_cache_quant_algo": None, "quantized_layers": {}}
    if facts.get("quantized_layers") is None:
        return None
    keys = ("quant_algo", "kv_cache_quant_algo", "quantized_layers")
    return {key: facts.get(key) for key in keys}


def _json(name: str, value: Mapping[str, Any], stage: int = 1) -> OutputFile:
    return small_file(name, json.dumps(value, indent=4), stage)


def _archive(files: Mapping[str, OutputFile]) -> OutputFile:
    """As NeMo 2.2 and later pack it: the folder itself, then its files by name."""
    archive = ArchiveWriter()
    archive.add_directory("./")
    for name in sorted(files):
        archive.add_parts(f"./{name}", files[name].parts)
    return archive.file()
