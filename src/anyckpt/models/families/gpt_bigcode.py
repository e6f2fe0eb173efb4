"""StarCoder 1 and SantaCoder (GPTBigCode): GPT-2's names on ordinary linear layers, one key head for all queries.

With one key head the stored query, key and value are Megatron's as they are; without (``multi_query`` false) they are
stored head by head, as Megatron's are too.  The map was checked against transformers 5.23 and Megatron-Core 0.16.
NeMo's classes have the erf GELU and untie the embeddings; the released models have the tanh GELU and are tied.
"""

from __future__ import annotations

from anyckpt.config.codecs import Words
from anyckpt.config.fields import as_many_as_heads
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.models.families import gpt2
from anyckpt.models.families.parts import caveats
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import IDENTITY

FAMILY = Family(
    name="gpt_bigcode",
    title="StarCoder, SantaCoder",
    rules=gpt2.rules(IDENTITY, IDENTITY, IDENTITY),
    ignorable=gpt2.IGNORABLE,
    traits=gpt2.TRAITS,
    recognise=lambda config: config.num_query_groups == 1 < config.num_attention_heads,
    caveats=caveats.erf_gelu("StarCoder", "activation_function"),
    hugging_face=HuggingFace(
        model_types=("gpt_bigcode",),
        architectures=("GPTBigCodeForCausalLM",),
        fields=gpt2.FIELDS,
        constants=gpt2.CONSTANTS,
        expected=gpt2.EXPECTED,
        activation_key="activation_function",
        attention_bias=None,
        codecs=(
            gpt2.DROPOUT,
            Words(
                "num_query_groups",
                "multi_query",
                {True: 1, False: as_many_as_heads},
                True,
                "flag",
                "GPTBigCode has one key head, or one for each query head",
            ),
        ),
        keys=frozenset({"num_key_value_heads"}),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.starcoder",
        model="StarcoderModel",
        configs=("StarcoderConfig*",),
    ),
)
