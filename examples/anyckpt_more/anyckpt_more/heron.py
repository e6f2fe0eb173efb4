"""Heron, an invented model: Llama's, with query, key and value rows stored as Megatron-Core stores them.

Its code would take ``wqkv`` apart as "b q (h gs d) -> b q h gs d": by query group, its queries, its key, its value.
"""

from anyckpt.extend import DECODER_TRAITS, GATE_UP, HUGGING_FACE_FIELDS, Family, Field, HuggingFace, Rule, untied

LAYER, HUB = "model.layers.*", "decoder.layers.*"

RULES = (
    Rule(("model.tok_embeddings.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{LAYER}.attention_norm.weight",), f"{HUB}.self_attention.linear_qkv.layer_norm_weight", ("hidden",)),
    Rule((f"{LAYER}.attention.wqkv.weight",), f"{HUB}.self_attention.linear_qkv.weight", ("qkv", "hidden")),
    Rule((f"{LAYER}.attention.wo.weight",), f"{HUB}.self_attention.linear_proj.weight", ("hidden", "attention")),
    Rule((f"{LAYER}.ffn_norm.weight",), f"{HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    Rule(
        (f"{LAYER}.feed_forward.w1.weight", f"{LAYER}.feed_forward.w3.weight"),
        f"{HUB}.mlp.linear_fc1.weight",
        ("fc1", "hidden"),
        GATE_UP,
    ),
    Rule((f"{LAYER}.feed_forward.w2.weight",), f"{HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
    Rule(("model.norm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule(("output.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=untied),
)

FAMILY = Family(
    name="heron",
    title="Heron",
    rules=RULES,
    traits={**DECODER_TRAITS, "add_bias_linear": False},
    hugging_face=HuggingFace(
        model_types=("heron",),
        architectures=("HeronForCausalLM",),
        defaults={
            "vocab_size": 103168,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        fields=(*HUGGING_FACE_FIELDS, Field("layernorm_epsilon", "rms_norm_eps", "number")),
        constants={"bias": False},
        attention_bias=None,
    ),
    nemo1=False,
)
