"""StarCoder2: LayerNorm and biases everywhere, a plain tanh GELU MLP, rope.

The map was checked against transformers 5.23 and Megatron-Core 0.16.  NeMo's classes have the erf GELU and untie the
embeddings; the released models have the tanh GELU, and 3B and 7B are tied.
"""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.hugging_face import COMMON
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.config.windows import Window
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

FAMILY = Family(
    name="starcoder2",
    title="StarCoder2",
    rules=(*decoder.WITHOUT_MLP, *decoder.NORM_BIASES, *decoder.plain_mlp("c_fc", "c_proj")),
    ignorable=decoder.IGNORABLE,
    traits={**decoder.ROTARY_TRAITS, "parallel_residual": False},
    recognise=lambda config: config.activation == "gelu_tanh" and config.rotary_percent == 1.0,
    caveats=caveats.erf_gelu("StarCoder2", "hidden_act"),
    hugging_face=HuggingFace(
        model_types=("starcoder2",),
        architectures=("Starcoder2ForCausalLM",),
        codecs=(Window(),),
        registered=DECODER,
        fields=(
            *(entry for entry in COMMON if entry.key != "head_dim"),
            Field("layernorm_epsilon", "norm_epsilon", "number"),
            Field("hidden_dropout", "residual_dropout", "number", 0.0),
            Field("add_bias_linear", "use_bias", "flag", True),
        ),
        attention_bias=None,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.starcoder2",
        model="Starcoder2Model",
        configs=("Starcoder2Config*",),
    ),
    trtllm=TrtLlm(
        ("GPTForCausalLM", "Starcoder2ForCausalLM"),
        "gpt",
        fits=lambda config: (
            config.get("position_embedding_type") == "rope_gpt_neox"
            and str(config.get("hidden_act", "gelu")).startswith("gelu")
        ),
    ),
)  # fmt: skip
