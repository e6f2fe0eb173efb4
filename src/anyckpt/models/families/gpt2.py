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
from anyckpt.models.families.parts.modules import linear, norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import (
    CONCATENATED_QKV,
    IDENTITY,
    TRANSPOSED,
    TRANSPOSED_CONCATENATED_QKV,
    Operation,
)
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
        *norm(f"{_LAYER}.ln_1", f"{attention}.linear_qkv.layer_norm_"),
        *norm(f"{_LAYER}.ln_2", f"{mlp}.linear_fc1.layer_norm_"),
        *linear(f"{_LAYER}.attn.c_attn", f"{attention}.linear_qkv", ("qkv", "hidden"), query_key_value, of_bias=bias),
        *linear(f"{_LAYER}.attn.c_proj", f"{attention}.linear_proj", ("hidden", "attention"), matrix, of_bias=IDENTITY),
        *linear(f"{_LAYER}.mlp.c_fc", f"{mlp}.linear_fc1", ("fc1", "hidden"), matrix, of_bias=IDENTITY),
        *linear(f"{_LAYER}.mlp.c_proj", f"{mlp}.linear_fc2", ("hidden", "ffn"), matrix, of_bias=IDENTITY),
        *norm("transformer.ln_f", "decoder.final_layernorm."),
        Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
    )  # fmt: skip


RULES = rules(TRANSPOSED, TRANSPOSED_CONCATENATED_QKV, CONCATENATED_QKV)

IGNORABLE = tuple(
    (f"{prefix}h.*.attn.{name}", decoder.MASK) for prefix in ("", "transformer.") for name in ("bias", "masked_bias")
)

TRAITS = decoder.LEARNED_TRAITS

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
