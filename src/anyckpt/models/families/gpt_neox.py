"""GPT-NeoX-20B and Pythia: query, key and value stored head by head as Megatron's, rope on a part of each head.

All public models add attention and MLP of a layer to the same residual stream, for which Megatron-Core has no layer:
the weights map all the same.  Checked against transformers 5.23 and Megatron-Core 0.16 with the residuals one after
the other.
"""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.hugging_face import COMMON
from anyckpt.config.spellings import HuggingFace, Variant
from anyckpt.models.families.parts import caveats, decoder, nemo2
from anyckpt.models.families.parts.modules import linear, norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_LAYER = "gpt_neox.layers.*"
_HUB = "decoder.layers.*"


FAMILY = Family(
    name="gpt_neox",
    title="GPT-NeoX, Pythia",
    rules=(
        Rule(("gpt_neox.embed_in.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
        *norm(f"{_LAYER}.input_layernorm", f"{_HUB}.self_attention.linear_qkv.layer_norm_"),
        *norm(f"{_LAYER}.post_attention_layernorm", f"{_HUB}.mlp.linear_fc1.layer_norm_"),
        *linear(f"{_LAYER}.attention.query_key_value", f"{_HUB}.self_attention.linear_qkv", ("qkv", "hidden")),
        *linear(f"{_LAYER}.attention.dense", f"{_HUB}.self_attention.linear_proj", ("hidden", "attention")),
        *linear(f"{_LAYER}.mlp.dense_h_to_4h", f"{_HUB}.mlp.linear_fc1", ("fc1", "hidden")),
        *linear(f"{_LAYER}.mlp.dense_4h_to_h", f"{_HUB}.mlp.linear_fc2", ("hidden", "ffn")),
        *norm("gpt_neox.final_layer_norm", "decoder.final_layernorm."),
        Rule(("embed_out.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
    ),
    ignorable=(
        (f"{_LAYER}.attention.bias", decoder.MASK),
        (f"{_LAYER}.attention.masked_bias", decoder.MASK),
        (f"{_LAYER}.attention.rotary_emb.inv_freq", decoder.FREQUENCIES),
    ),
    traits={**decoder.ROTARY_TRAITS, "add_bias_linear": True, "shared_layernorm": False},
    recognise=lambda config: config.rotary_percent < 1.0 and config.num_query_groups == config.num_attention_heads,
    caveats=caveats.one_residual_after_the_other,
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
        variants=(Variant("lm_head.weight", ("embed_out.weight",), in_memory=True),),
    ),
    nemo2=nemo2.general(),
)  # fmt: skip
