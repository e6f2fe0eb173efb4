"""BERT, T5 and vision transformers in Megatron-LM's arguments and NeMo 1's configurations.

Megatron-LM's arguments name both stacks' layers of a T5 and take ``num_layers`` for the encoder's; NeMo 1 has a
section for each stack, and takes what is outside from the encoder's (``MegatronLMEncoderDecoderModel`` of NeMo 2.5).
Neither says of a BERT which heads it has in a way that can be trusted: Megatron-LM has ``bert_binary_head`` of a GPT,
too, and NVIDIA's converter to NeMo 1 takes heads out of the model but not out of its configuration.  So what is read
is what we write, which ``num_tokentypes`` tells; else the tensors say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Power
from anyckpt.config.fields import Field, render_changed, render_fields
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader

RELATIVE = (
    Field("relative_attention_num_buckets", "relative_attention_num_buckets", default=32),
    Field("relative_attention_max_distance", "relative_attention_max_distance", default=128),
)
SOFTMAX_SCALE = Power("query_pre_attn_scalar", "softmax_scale", -0.5)
HEADS = (
    Field("num_tokentypes", "num_tokentypes", default=0),
    Field("add_pooler", "add_pooler", "flag", False),
    Field("add_lm_head", "add_lm_head", "flag", False),
    Field("bert_binary_head", "bert_binary_head", "flag", False),
)
VISION = (
    Field("vision_model_type", "vision_model_type", "text", None),
    Field("patch_dim", "patch_dim", default=None),
    Field("img_h", "img_h", default=None),
    Field("img_w", "img_w", default=None),
    Field("class_token_len", "class_token_len", default=None),
    Field("add_post_layernorm", "add_post_layernorm", "flag", False),
    Field("output_dim", "output_dim", default=None),
    Field("num_classes", "num_classes", default=None),
)
_BLOCKS = (
    Field("transformer_block_type", "transformer_block_type", "text", "pre_ln"),
    Field("scale_decoder_outputs", "scale_decoder_outputs", "flag", False),
)


def stack_sizes(reader: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of each stack of an encoder-decoder; nothing for other models.

    Args:
        reader: Megatron-LM's arguments, or NeMo 1's after ``with_encoder``.
        common: hub fields that have been parsed, of every model; None where they are not said.

    Raises:
        MappingError: a key is of the wrong type.
    """
    layers = reader.integer("decoder_num_layers")
    if layers is None:
        return {}
    return {
        "num_layers": layers,
        "encoder_num_layers": reader.integer("encoder_num_layers") or common["num_layers"],
    }


def parse_encoders(reader: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    """Hub fields beyond those of a decoder and those of ``stack_sizes``.

    Args:
        reader: Megatron-LM's arguments, or NeMo 1's after ``with_encoder``.
        common: hub fields that have been parsed, of every model.

    Raises:
        MappingError: a key is of the wrong type.
    """
    found = reader.fields(_BLOCKS, {})
    if common["position_embedding_type"] == "relative":
        found |= reader.fields(RELATIVE, {})
        if common["query_pre_attn_scalar"] is None:
            found |= SOFTMAX_SCALE.read(reader, {}, found)
    if reader.values.get("num_tokentypes") is not None:
        found |= reader.fields(HEADS, {})
    if reader.values.get("class_token_len") is not None:
        found |= reader.fields(VISION, {})
    return found


def render_encoders(config: ModelConfig) -> dict[str, Any]:
    """The same as Megatron-LM's arguments; nothing for a decoder."""
    table = [*_BLOCKS, *(RELATIVE if config.relative_attention_num_buckets is not None else ())]
    rendered = render_changed(table, config)
    if any(getattr(config, entry.hub) for entry in HEADS):
        rendered |= render_fields(HEADS, config)
    if config.vision_model_type is not None:
        rendered |= {key: value for key, value in render_fields(VISION, config).items() if value is not None}
    if config.encoder_num_layers is not None:
        rendered |= {
            "num_layers": config.encoder_num_layers,
            "encoder_num_layers": config.encoder_num_layers,
            "decoder_num_layers": config.num_layers,
        }
    return rendered


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a NeMo 1 configuration has a section for each stack of layers; speech models have other sections."""
    stacks = (config.get("encoder"), config.get("decoder"))
    return all(isinstance(stack, Mapping) and "num_layers" in stack for stack in stacks)


def with_encoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A NeMo 1 configuration in which an encoder-decoder's sections are spelled as Megatron-LM's arguments."""
    if not is_encoder_decoder(config):
        return config
    encoder, decoder = config["encoder"], config["decoder"]
    return {
        **config,
        **encoder,
        "encoder_num_layers": encoder.get("num_layers"),
        "decoder_num_layers": decoder.get("num_layers"),
        "share_embeddings_and_output_weights": config.get("share_decoder_tokens_head_embeddings", True),
        "encoder_seq_length": config.get("seq_length"),
    }


def sections(rendered: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """NeMo 1's sections of an encoder-decoder, from what is rendered at the top level."""
    shared = {key: rendered[key] for key in _OF_A_STACK if key in rendered}
    return {
        "encoder": {**shared, "arch": "transformer", "num_layers": config.encoder_num_layers},
        "decoder": {**shared, "arch": "transformer", "num_layers": config.num_layers},
        "share_token_embeddings": True,
        "share_decoder_tokens_head_embeddings": config.share_embeddings_and_output_weights,
        "tokens_head_bias": config.share_embeddings_and_output_weights,
    }


_OF_A_STACK = tuple(
    """
    hidden_size ffn_hidden_size num_attention_heads kv_channels init_method_std hidden_dropout attention_dropout
    ffn_dropout position_embedding_type relative_attention_num_buckets relative_attention_max_distance
    apply_query_key_layer_scaling layernorm_epsilon bias normalization activation openai_gelu transformer_block_type
    """.split()
)
"""Keys of ``megatron_model_base_config.yaml``."""
