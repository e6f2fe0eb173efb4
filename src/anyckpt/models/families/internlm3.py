"""InternLM3: Llama's model and map, which transformers 5 runs with Llama's code.

Released files say ``qkv_bias`` and ``bias``, of which transformers' class knows equal ones.
"""

from __future__ import annotations

from anyckpt.config.codecs import Written, same_as
from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

FAMILY = Family(
    name="internlm3",
    title="InternLM3",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits=decoder.TRAITS,
    recognise=lambda config: False,  # nothing but its name tells it from Llama
    nemo1=False,
    like="llama",
    hugging_face=HuggingFace(
        model_types=("internlm3",),
        architectures=("InternLM3ForCausalLM",),
        registered=DECODER,
        fields=(*LLAMA_FIELDS, Field("add_bias_linear", "mlp_bias", "flag", False, ("bias", "qkv_bias"))),
        codecs=(Written({"bias": same_as("add_bias_linear"), "qkv_bias": same_as("add_bias_linear")}),),
    ),
)
