"""GPT-NeoX-20B and Pythia: query, key and value stored head by head as Megatron's, rope on a part of each head.

All public models add attention and MLP of a layer to the same residual stream, for which Megatron-Core has no layer:
the weights map all the same.  Checked against transformers 5.23 and Megatron-Core 0.16 with the residuals one after
the other.
"""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.hugging_face import COMMON
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder, nemo2
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_LAYER = "gpt_neox.layers.*"
_HUB = "decoder.layers.*"
_REST = "which follows from the configuration"


FAMILY = Family(
    name="gpt_neox",
    title="GPT-NeoX, Pythia",
    rules=(
        Rule(("gpt_neox.embed_in.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
        *(
            Rule((f"{_LAYER}.{norm}.{part}",), f"{_HUB}.{home}.layer_norm_{part}", ("hidden",))
            for norm, home in (
                ("input_layernorm", "self_attention.linear_qkv"), ("post_attention_layernorm", "mlp.linear_fc1"),
            )
            for part in ("weight", "bias")
        ),
        Rule((f"{_LAYER}.attention.query_key_value.weight",), f"{_HUB}.self_attention.linear_qkv.weight",
             ("qkv", "hidden")),
        Rule((f"{_LAYER}.attention.query_key_value.bias",), f"{_HUB}.self_attention.linear_qkv.bias", ("qkv",)),
        Rule((f"{_LAYER}.attention.dense.weight",), f"{_HUB}.self_attention.linear_proj.weight",
             ("hidden", "attention")),
        Rule((f"{_LAYER}.attention.dense.bias",), f"{_HUB}.self_attention.linear_proj.bias", ("hidden",)),
        Rule((f"{_LAYER}.mlp.dense_h_to_4h.weight",), f"{_HUB}.mlp.linear_fc1.weight", ("fc1", "hidden")),
        Rule((f"{_LAYER}.mlp.dense_h_to_4h.bias",), f"{_HUB}.mlp.linear_fc1.bias", ("fc1",)),
        Rule((f"{_LAYER}.mlp.dense_4h_to_h.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
        Rule((f"{_LAYER}.mlp.dense_4h_to_h.bias",), f"{_HUB}.mlp.linear_fc2.bias", ("hidden",)),
        Rule(("gpt_neox.final_layer_norm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
        Rule(("gpt_neox.final_layer_norm.bias",), "decoder.final_layernorm.bias", ("hidden",)),
        Rule(("embed_out.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
    ),
    ignorable=(
        (f"{_LAYER}.attention.bias", f"a mask, {_REST}"),
        (f"{_LAYER}.attention.masked_bias", f"a mask, {_REST}"),
        (f"{_LAYER}.attention.rotary_emb.inv_freq", f"rope frequencies, {_REST}"),
    ),
    traits={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        "shared_layernorm": False,
    },
    recognise=lambda config: config.rotary_percent < 1.0 and config.num_query_groups == config.num_attention_heads,
    caveats=decoder.one_residual_after_the_other,
    hugging_face=HuggingFace(
        model_types=("gpt_neox",),
        architectures=("GPTNeoXForCausalLM",),
        fields=(
            *(entry for entry in COMMON if entry.key not in ("head_dim", "num_key_value_heads")),
            Field("layernorm_epsilon", "layer_norm_eps", "number"),
            Field("hidden_dropout", "hidden_dropout", "number", 0.0),
            Field("parallel_residual", "use_parallel_residual", "flag", True),
        ),
        rotary_base_key="rotary_emb_base",
        rotary_percent_key="rotary_pct",
        rotary_percent=0.25,
        attention_bias=True,
    ),
    nemo2=nemo2.general(),
)  # fmt: skip
