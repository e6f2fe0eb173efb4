"""Mixtral 8x7B and 8x22B: Mistral's attention, and experts in every layer.

transformers normalises over the experts that a token goes to, which is Megatron-Core's softmax after the choice;
NeMo's importer sets ``moe_router_pre_softmax``, which does not normalise.  The map and the fields were checked by equal
logits in Megatron-Core 0.16 with tensor parallel sizes 1 and 2.
"""

from __future__ import annotations

from anyckpt.config.codecs import Implied, Noted, same_as
from anyckpt.config.meta_names import ATTENTION, EXPERTS, MetaNames
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm, Variant
from anyckpt.config.windows import Window
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family

_EXPERT = f"{sparse.LAYER}.block_sparse_moe.experts.*"


FAMILY = Family(
    name="mixtral",
    title="Mixtral",
    rules=(
        *sparse.LEADING,
        *sparse.ATTENTION,
        *sparse.experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
        *sparse.TRAILING,
    ),
    ignorable=decoder.IGNORABLE,
    traits={
        **decoder.TRAITS,
        "add_bias_linear": False,
        "moe_router_score_function": "softmax",
        "moe_shared_expert_intermediate_size": None,
        "moe_layer_freq": None,
    },
    features=frozenset({"num_moe_experts", "num_experts"}),
    recognise=lambda config: config.num_moe_experts is not None,
    hugging_face=HuggingFace(
        model_types=("mixtral",),
        architectures=("MixtralForCausalLM",),
        fields=(
            *LLAMA_FIELDS,
            *sparse.fields("num_local_experts"),
        ),
        rotary_base=1_000_000.0,
        codecs=(
            Window(),
            Implied({"moe_ffn_hidden_size": same_as("ffn_hidden_size")}),
            Noted(
                lambda config: config.moe_router_pre_softmax,
                "moe_router_pre_softmax is set, and transformers' Mixtral always normalises over the chosen experts: "
                "right for weights that NeMo's importer made of a Mixtral, not for a model that was trained so",
            ),
        ),
        variants=(
            Variant(f"{sparse.LAYER}.mlp.experts.gate_up_proj", (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight")),
            Variant(f"{sparse.LAYER}.mlp.experts.down_proj", (f"{_EXPERT}.w2.weight",)),
            *sparse.of_mlx("block_sparse_moe", "w1", "w3", "w2"),
            Variant(
                f"{sparse.LAYER}.mlp.gate.weight", (f"{sparse.LAYER}.block_sparse_moe.gate.weight",), in_memory=True
            ),
        ),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.mixtral",
        model="MixtralModel",
        configs=("MixtralConfig*",),
        choose=lambda config: "MixtralConfig8x7B",
    ),
    meta=MetaNames((*ATTENTION, *EXPERTS), params=("moe",)),
    trtllm=TrtLlm(("MixtralForCausalLM",), "llama", activation="swiglu"),
)
