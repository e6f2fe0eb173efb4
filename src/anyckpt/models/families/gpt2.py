"""GPT-2: learned positions, biases everywhere, and projections that are stored transposed.

transformers' ``Conv1D`` holds (in, out) matrices, query, key and value side by side.  The first files on the hub have
no ``transformer.`` before the names, and masks among the weights.  The map was checked against transformers 5.23 and
Megatron-Core 0.16.
"""

from __future__ import annotations

from anyckpt.config.codecs import Written, same_as
from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace, TrtLlm
from anyckpt.models.families.parts import decoder, nemo2
from anyckpt.models.families.parts.fields import TIED_AND_TOKENS, VOCABULARY
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import CONCATENATED_QKV, TRANSPOSED, TRANSPOSED_CONCATENATED_QKV, Operation
from anyckpt.models.language.rules import Rule

_LAYER = "transformer.h.*"
_HUB = "decoder.layers.*"


def rules(matrix: Operation, query_key_value: Operation, bias: Operation) -> tuple[Rule, ...]:
    """The map of models that are named as GPT-2.

    Args:
        matrix: how matrices are stored.
        query_key_value: how that of query, key and value is.
        bias: how their bias is.
    """
    attention, mlp = f"{_HUB}.self_attention", f"{_HUB}.mlp"
    return (
        Rule(("transformer.wte.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
        Rule(("transformer.wpe.weight",), "embedding.position_embeddings.weight", ("positions", "hidden")),
        *(
            Rule((f"{_LAYER}.{norm}.{part}",), f"{_HUB}.{home}.layer_norm_{part}", ("hidden",))
            for norm, home in (("ln_1", "self_attention.linear_qkv"), ("ln_2", "mlp.linear_fc1"))
            for part in ("weight", "bias")
        ),
        Rule((f"{_LAYER}.attn.c_attn.weight",), f"{attention}.linear_qkv.weight", ("qkv", "hidden"), query_key_value),
        Rule((f"{_LAYER}.attn.c_attn.bias",), f"{attention}.linear_qkv.bias", ("qkv",), bias),
        Rule((f"{_LAYER}.attn.c_proj.weight",), f"{attention}.linear_proj.weight", ("hidden", "attention"), matrix),
        Rule((f"{_LAYER}.attn.c_proj.bias",), f"{attention}.linear_proj.bias", ("hidden",)),
        Rule((f"{_LAYER}.mlp.c_fc.weight",), f"{mlp}.linear_fc1.weight", ("fc1", "hidden"), matrix),
        Rule((f"{_LAYER}.mlp.c_fc.bias",), f"{mlp}.linear_fc1.bias", ("fc1",)),
        Rule((f"{_LAYER}.mlp.c_proj.weight",), f"{mlp}.linear_fc2.weight", ("hidden", "ffn"), matrix),
        Rule((f"{_LAYER}.mlp.c_proj.bias",), f"{mlp}.linear_fc2.bias", ("hidden",)),
        Rule(("transformer.ln_f.weight",), "decoder.final_layernorm.weight", ("hidden",)),
        Rule(("transformer.ln_f.bias",), "decoder.final_layernorm.bias", ("hidden",)),
        Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
    )  # fmt: skip


RULES = rules(TRANSPOSED, TRANSPOSED_CONCATENATED_QKV, CONCATENATED_QKV)

_MASK = "a mask, which follows from the configuration"
IGNORABLE = tuple(
    (f"{prefix}h.*.attn.{name}", _MASK) for prefix in ("", "transformer.") for name in ("bias", "masked_bias")
)

TRAITS = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "learned_absolute",
    "parallel_residual": False,
}

FIELDS = (
    Field("num_layers", "n_layer"),
    Field("hidden_size", "n_embd"),
    Field("num_attention_heads", "n_head"),
    Field("ffn_hidden_size", "n_inner", default=lambda found: 4 * found["hidden_size"]),
    VOCABULARY,
    Field("max_position_embeddings", "n_positions"),
    Field("layernorm_epsilon", "layer_norm_epsilon", "number"),
    Field("init_method_std", "initializer_range", "number", 0.02),
    Field("attention_dropout", "attn_pdrop", "number", 0.1),
    Field("hidden_dropout", "resid_pdrop", "number", 0.1),
    *TIED_AND_TOKENS,
)


CONSTANTS = {"scale_attn_weights": True, "add_cross_attention": False}
EXPECTED = {**CONSTANTS, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}
"""Switches of transformers' classes that Megatron-Core has no layers for, as they usually are."""


DROPOUT = Written({"embd_pdrop": same_as("hidden_dropout")}, kept=True)
"""Megatron has one rate for embeddings and residuals."""

FAMILY = Family(
    name="gpt2",
    title="GPT-2",
    rules=RULES,
    ignorable=IGNORABLE,
    traits=TRAITS,
    recognise=lambda config: config.num_query_groups == config.num_attention_heads,
    hugging_face=HuggingFace(
        model_types=("gpt2",),
        architectures=("GPT2LMHeadModel",),
        fields=FIELDS,
        constants=EXPECTED,
        expected=EXPECTED,
        activation_key="activation_function",
        activations={"gelu_tanh": "gelu_new"},
        attention_bias=None,
        codecs=(DROPOUT,),
    ),
    nemo2=nemo2.general(),
    trtllm=TrtLlm(
        ("GPTForCausalLM", "GPT2LMHeadModel"),
        "gpt",
        fits=lambda config: config.get("position_embedding_type", "learned_absolute") == "learned_absolute",
    ),
)
