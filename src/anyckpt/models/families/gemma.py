"""Gemma 1 and CodeGemma: Llama's map, gated tanh GELU, norms that store gamma - 1, embeddings scaled in the model.

transformers and Megatron store gamma - 1 alike, so norms are copied.  NeMo 1's own converter alone adds one and leaves
``layernorm_zero_centered_gamma`` out (``convert_gemma_hf_to_nemo.py``; that of Gemma 2 does neither): one is taken off
such a checkpoint, and written are gamma - 1 and the key, which NeMo's ``MegatronGPTModel`` obeys.  Embeddings are
multiplied by the square root of the width in the model, not in the weights.  The map was checked against transformers
5.23, Megatron-Core 0.16 and Megatron-Bridge 0.3.1.
"""

from __future__ import annotations

from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

TRAITS = {
    **decoder.TRAITS,
    "layernorm_zero_centered_gamma": True,
    "activation": "gelu_tanh",
    "add_bias_linear": False,
}

CAVEATS = caveats.of_kind(
    "megatron-args",
    "Gemma multiplies embeddings by the square root of hidden_size, for which Megatron-LM has no argument: do it in "
    "the model, as Megatron-Bridge's provider does",
)

FAMILY = Family(
    name="gemma",
    title="Gemma, CodeGemma",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits=TRAITS,
    recognise=lambda config: config.window_size is None and config.query_pre_attn_scalar is None,
    caveats=CAVEATS,
    whole_norms={"nemo1": "apply_embedding_scaling"},
    nemo1_keys=lambda config: {"apply_embedding_scaling": True},
    hugging_face=HuggingFace(
        model_types=("gemma",),
        architectures=("GemmaForCausalLM",),
        registered=DECODER,
        fields=LLAMA_FIELDS,
        misspelled={"gelu": "gelu_tanh"},
        expected=decoder.CAUSAL,
        keys=frozenset({"hidden_activation"}),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.gemma",
        model="GemmaModel",
        configs=("GemmaConfig*", "CodeGemmaConfig*"),
    ),
    trtllm=TrtLlm(("GemmaForCausalLM",), "gemma", shares_embedding=True),
)
