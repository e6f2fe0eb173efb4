"""Geometry and parallelism from Megatron-LM's arguments, and the arguments of a parallelism, as plain data.

Names are those of core 0.16 (``megatron/training/arguments.py``) and of the releases before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import ParallelLayout
from anyckpt.config.layer_blocks import LayerBlock, decode
from anyckpt.errors import MappingError
from anyckpt.layout.experts import Spelling
from anyckpt.layout.geometry import Geometry, Latent, Mamba, Parallelism

_LARGEST = 1 << 40
_MAMBA_DEFAULTS = {"head_dim": 64, "num_groups": 8, "state_dim": 128}
"""What Megatron-LM takes where an argument is missing; of heads, twice the width over ``head_dim``."""


def geometry_from_args(arguments: Mapping[str, Any]) -> Geometry:
    """What partition rules need of a model; sizes that the arguments leave out are None.

    The vocabulary is not trimmed (``vocab_size`` None), so that rows stay as stored.

    Raises:
        MappingError: an argument is of the wrong type.
    """
    heads = _size(arguments, "num_attention_heads")
    hidden = _size(arguments, "hidden_size")
    groups = _size(arguments, "num_query_groups") if arguments.get("group_query_attention") is not False else None
    if not arguments.get("group_query_attention") and groups == 1:
        groups = None  # the default without grouped queries
    decoder = _size(arguments, "decoder_num_layers")  # of an encoder-decoder, whose num_layers is the encoder's
    channels = _size(arguments, "kv_channels")
    if channels is None and heads and hidden:
        channels = hidden // heads
    return Geometry(
        num_layers=decoder or _size(arguments, "num_layers"),
        encoder_num_layers=_size(arguments, "encoder_num_layers") if decoder else None,
        mtp_num_layers=_size(arguments, "mtp_num_layers"),
        num_attention_heads=heads,
        num_query_groups=groups or heads,
        kv_channels=channels,
        attention_output_gate=bool(arguments.get("attention_output_gate")),
        gated_linear_unit=any(arguments.get(key) for key in ("swiglu", "quick_geglu", "gated_linear_unit", "geglu")),
        num_experts=_size(arguments, "num_experts"),
        share_embeddings_and_output_weights=not arguments.get("untie_embeddings_and_output_weights"),
        padded_vocab_size=_size(arguments, "padded_vocab_size"),
        make_vocab_size_divisible_by=_size(arguments, "make_vocab_size_divisible_by") or 128,
        mamba=_mamba(arguments, hidden),
        latent=_latent(arguments),
        blocks=_blocks(arguments, heads, hidden),
    )


def parallelism_from_args(arguments: Mapping[str, Any], layout: ParallelLayout) -> Parallelism:
    """How a model is spread.

    Args:
        arguments: what they say beyond the sizes.
        layout: the sizes, as the files were found to be laid out.

    Raises:
        MappingError: an argument is of the wrong type.
    """
    return Parallelism(
        tensor_parallel=layout.tensor_parallel,
        pipeline_parallel=layout.pipeline_parallel,
        virtual_pipeline=layout.virtual_pipeline,
        expert_parallel=layout.expert_parallel,
        expert_tensor_parallel=_size(arguments, "expert_tensor_parallel_size"),
        num_layers_in_first_pipeline_stage=_first_of(
            arguments, "decoder_first_pipeline_num_layers", "num_layers_in_first_pipeline_stage"
        ),
        num_layers_in_last_pipeline_stage=_first_of(
            arguments, "decoder_last_pipeline_num_layers", "num_layers_in_last_pipeline_stage"
        ),
        account_for_embedding=bool(arguments.get("account_for_embedding_in_pipeline_split")),
        account_for_loss=bool(arguments.get("account_for_loss_in_pipeline_split")),
        pipeline_layout=arguments.get("pipeline_model_parallel_layout"),
        pipeline_split_rank=_size(arguments, "pipeline_model_parallel_split_rank"),
    )


def args_from_parallelism(parallelism: Parallelism) -> dict[str, Any]:
    """The arguments that describe a layout, to put into a configuration whose model is cut so."""
    return {
        "tensor_model_parallel_size": parallelism.tensor_parallel,
        "pipeline_model_parallel_size": parallelism.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": (
            parallelism.virtual_pipeline if parallelism.virtual_pipeline > 1 else None
        ),
        "expert_model_parallel_size": parallelism.expert_parallel,
        "expert_tensor_parallel_size": parallelism.expert_ways,
        "decoder_first_pipeline_num_layers": parallelism.num_layers_in_first_pipeline_stage,
        "decoder_last_pipeline_num_layers": parallelism.num_layers_in_last_pipeline_stage,
        "account_for_embedding_in_pipeline_split": parallelism.account_for_embedding,
        "account_for_loss_in_pipeline_split": parallelism.account_for_loss,
        "pipeline_model_parallel_layout": parallelism.pipeline_layout,
    }


def expert_spelling_from_args(arguments: Mapping[str, Any]) -> Spelling:
    """How a rank of such a model names its experts: Megatron-Core's ``get_moe_module_spec`` of 0.16."""
    if not arguments.get("moe_grouped_gemm"):
        return "sequential"
    local = arguments.get("transformer_impl") == "local"
    return "legacy-grouped" if local or arguments.get("moe_use_legacy_grouped_gemm") else "grouped"


def _first_of(arguments: Mapping[str, Any], *keys: str) -> int | None:
    return next((value for key in keys if (value := _size(arguments, key)) is not None), None)


def _size(arguments: Mapping[str, Any], key: str) -> int | None:
    value = arguments.get(key)
    if value is None or (type(value) is int and 0 <= value < _LARGEST):
        return value
    raise MappingError(f"args.{key} is of the wrong type", expected="a size", found=repr(value)[:80])


def _mamba(arguments: Mapping[str, Any], hidden: int | None) -> Mamba | None:
    hybrid = any(arguments.get(key) for key in ("hybrid_override_pattern", "hybrid_layer_pattern", "is_hybrid_model"))
    if not hybrid:
        return None
    sizes = {name: _size(arguments, f"mamba_{name}") or default for name, default in _MAMBA_DEFAULTS.items()}
    heads = _size(arguments, "mamba_num_heads")
    if heads is None:
        if hidden is None:
            return None
        heads = 2 * hidden // sizes["head_dim"]
    return Mamba(heads, sizes["head_dim"], sizes["num_groups"], sizes["state_dim"])


def _blocks(arguments: Mapping[str, Any], heads: int | None, hidden: int | None) -> tuple[LayerBlock, ...] | None:
    text = arguments.get("heterogeneous_layers_config_encoded_json")
    return decode(text, heads, hidden) if isinstance(text, str) and text and heads and hidden else None


def _latent(arguments: Mapping[str, Any]) -> Latent | None:
    keys, positions = _size(arguments, "kv_lora_rank"), _size(arguments, "qk_pos_emb_head_dim")
    if not arguments.get("multi_latent_attention") or keys is None or positions is None:
        return None
    local = arguments.get("transformer_impl") == "local"
    return Latent(_size(arguments, "q_lora_rank"), keys, positions, down_parallel=local)
