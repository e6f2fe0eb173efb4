"""Names of Megatron-LM's GPT before Megatron-Core, in one flat state dict: forks of 2022 still load them.

Facts: ``megatron/model/{language_model,transformer}.py`` of Megatron-LM 3.0.
"""

from anyckpt.extend import Dialect

_LAYER, _HUB = "language_model.encoder.layers.*", "decoder.layers.*"

_MODULES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.linear_qkv.", "self_attention.query_key_value."),
    ("self_attention.linear_proj.", "self_attention.dense."),
    ("mlp.linear_fc1.layer_norm_", "post_attention_layernorm."),
    ("mlp.linear_fc1.", "mlp.dense_h_to_4h."),
    ("mlp.linear_fc2.", "mlp.dense_4h_to_h."),
)

DIALECT = Dialect(
    name="megatron-2022",
    names=(
        ("embedding.word_embeddings.weight", "language_model.embedding.word_embeddings.weight"),
        ("embedding.position_embeddings.weight", "language_model.embedding.position_embeddings.weight"),
        *((f"{_HUB}.{hub}{part}", f"{_LAYER}.{own}{part}") for hub, own in _MODULES for part in ("weight", "bias")),
        ("decoder.final_layernorm.weight", "language_model.encoder.final_layernorm.weight"),
        ("decoder.final_layernorm.bias", "language_model.encoder.final_layernorm.bias"),
        ("output_layer.weight", "language_model.output_layer.weight"),
    ),
    evidence=("language_model.encoder.layers.*.self_attention.query_key_value.weight",),
)
