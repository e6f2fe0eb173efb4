"""Granite 3 with experts in every layer, stacked in one tensor, and Granite's multipliers.

Checked against transformers 5.24, which stores the experts of a layer as one linear layer of all.
"""

from __future__ import annotations

from anyckpt.config.codecs import Implied, same_as
from anyckpt.config.spellings import HuggingFace, Variant
from anyckpt.models.families import granite
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family

_BLOCK = f"{sparse.LAYER}.block_sparse_moe"
_GATE_UP = tuple(f"{_BLOCK}.experts.*.{name}.weight" for name in ("gate_proj", "up_proj"))
_DOWN = (f"{_BLOCK}.experts.*.down_proj.weight",)

FAMILY = Family(
    name="granitemoe",
    title="Granite with experts",
    rules=(
        *sparse.LEADING,
        *sparse.ATTENTION,
        *sparse.experts("block_sparse_moe", router="router.layer"),
        *sparse.TRAILING,
    ),
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False, "moe_router_score_function": "softmax", "moe_layer_freq": None},
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    hugging_face=HuggingFace(
        model_types=("granitemoe",),
        architectures=("GraniteMoeForCausalLM",),
        fields=(*LLAMA_FIELDS, *sparse.fields("num_local_experts")),
        codecs=(Implied({"moe_ffn_hidden_size": same_as("ffn_hidden_size")}),),
        carried=granite.MULTIPLIERS,
        variants=(
            Variant(f"{_BLOCK}.input_linear.weight", _GATE_UP, written=True),
            Variant(f"{_BLOCK}.output_linear.weight", _DOWN, written=True),
            Variant(f"{_BLOCK}.experts.gate_up_proj", _GATE_UP),
            Variant(f"{_BLOCK}.experts.down_proj", _DOWN),
            Variant(f"{_BLOCK}.router.weight", (f"{_BLOCK}.router.layer.weight",), in_memory=True),
        ),
    ),
)
