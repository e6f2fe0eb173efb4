"""The keys that NeMo 1 and NeMo 2 spell alike."""

from __future__ import annotations

from anyckpt.config.fields import Field, as_many_as_heads, four_widths, share_of_a_head

SIZES = (
    Field("num_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("ffn_hidden_size", "ffn_hidden_size", default=four_widths),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_query_groups", "num_query_groups", default=as_many_as_heads),
    Field("kv_channels", "kv_channels", default=share_of_a_head),
    Field("share_embeddings_and_output_weights", "share_embeddings_and_output_weights", "flag", True),
    Field("make_vocab_size_divisible_by", "make_vocab_size_divisible_by", default=128),
)
SHARED = (
    Field("layernorm_epsilon", "layernorm_epsilon", "number", 1e-5),
    Field("init_method_std", "init_method_std", "number", 0.02),
    Field("hidden_dropout", "hidden_dropout", "number", 0.1),
    Field("attention_dropout", "attention_dropout", "number", 0.1),
    Field("position_embedding_type", "position_embedding_type", "text", "learned_absolute"),
    Field("rotary_base", "rotary_base", "number", 10000.0),
    Field("rotary_interleaved", "rotary_interleaved", "flag", False),
    Field("qk_layernorm", "qk_layernorm", "flag", False),
)
