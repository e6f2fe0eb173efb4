"""Geometry and parallelism from a NeMo 1 configuration (``model_config.yaml``, ``hparams.yaml``).

Keys and defaults are those of ``MegatronBaseModel`` and ``MegatronGPTModel`` in NeMo 1.20 to 2.0; entries of
``mcore_customization_config`` are Megatron-Core's and go on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import ParallelLayout
from anyckpt.layout.from_megatron_args import geometry_from_args, parallelism_from_args
from anyckpt.layout.geometry import Geometry, Parallelism

_LAYOUT_KEYS = (
    "expert_tensor_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_split_rank",
)


def arguments_from_nemo(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration says how parameters are divided, in the words of Megatron-LM's arguments.

    Keys that are null are left out.
    """
    model = config.get("model", config.get("cfg", config))
    values = dict(model) if isinstance(model, Mapping) else dict(config)
    custom = values.get("mcore_customization_config")
    if isinstance(custom, Mapping):
        values.update(custom)
    encoder, decoder = values.get("encoder"), values.get("decoder")
    if isinstance(encoder, Mapping) and isinstance(decoder, Mapping) and "num_layers" in encoder:  # a T5
        values.update(encoder)
        values.update(encoder_num_layers=encoder["num_layers"], decoder_num_layers=decoder.get("num_layers"))
        values["share_embeddings_and_output_weights"] = values.get("share_decoder_tokens_head_embeddings", True)
    tied = values.get("share_embeddings_and_output_weights")
    same = {
        key: values.get(key)
        for key in (
            *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
            *("make_vocab_size_divisible_by", "hybrid_override_pattern", "mtp_num_layers"),
            *("encoder_num_layers", "decoder_num_layers"),
            *_LAYOUT_KEYS,
        )
    }
    found = {
        **same,
        "group_query_attention": True if values.get("num_query_groups") is not None else None,
        "swiglu": str(values.get("activation") or "").lower().endswith("glu") or bool(values.get("gated_linear_unit")),
        "num_experts": values.get("num_moe_experts"),
        "untie_embeddings_and_output_weights": tied is not None and not tied,
        "padded_vocab_size": values.get("override_vocab_size") or values.get("padded_vocab_size"),
        "mamba_num_groups": values.get("mamba_ssm_ngroups", values.get("mamba_num_groups")),
    }
    return {key: value for key, value in found.items() if value is not None}


def geometry_from_nemo(config: Mapping[str, Any]) -> Geometry:
    """What partition rules need of a model; the vocabulary is not trimmed, so that rows stay as stored.

    Raises:
        MappingError: a key is of the wrong type.
    """
    return geometry_from_args(arguments_from_nemo(config))


def parallelism_from_nemo(config: Mapping[str, Any], layout: ParallelLayout) -> Parallelism:
    """How a model is spread.

    Args:
        config: what it says beyond the sizes.
        layout: the sizes, as the files were found to be laid out.

    Raises:
        MappingError: a key is of the wrong type.
    """
    return parallelism_from_args(arguments_from_nemo(config), layout)
