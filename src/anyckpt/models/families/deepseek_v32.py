"""DeepSeek-V3.2: DeepSeek-V3 whose attention sees the tokens that an indexer chooses.

The indexer is a module of Megatron-Core's sparse attention under the names that Megatron-Bridge 0.6.2 gives GLM-5's; it
has no bridge for this model.  Outputs were checked against transformers 5.24.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.codecs import Fixed
from anyckpt.config.fields import Field
from anyckpt.models.families import deepseek_v3
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.language.rules import Rule

_INDEXER, _HUB = f"{sparse.LAYER}.self_attn.indexer", f"{sparse.HUB}.self_attention.core_attention.indexer"
_OF = "what Megatron-Core's layers are"

RULES = (
    *deepseek_v3.RULES,
    Rule((f"{_INDEXER}.wq_b.weight",), f"{_HUB}.linear_wq_b.weight", ("indexer", "q-latent")),
    Rule((f"{_INDEXER}.wk.weight",), f"{_HUB}.linear_wk.weight", ("indexer-head", "hidden")),
    *(Rule((f"{_INDEXER}.k_norm.{part}",), f"{_HUB}.k_norm.{part}", ("indexer-head",)) for part in ("weight", "bias")),
    Rule((f"{_INDEXER}.weights_proj.weight",), f"{_HUB}.linear_weights_proj.weight", ("indexer-heads", "hidden")),
)
KNOWN = replace(
    deepseek_v3.FAMILY.hugging_face,
    model_types=("deepseek_v32",),
    defaults_of="deepseek_v32",
    architectures=("DeepseekV32ForCausalLM",),
    fields=(
        *deepseek_v3.FIELDS,
        Field("dsa_indexer_n_heads", "index_n_heads"),
        Field("dsa_indexer_head_dim", "index_head_dim"),
        Field("dsa_indexer_topk", "index_topk"),
    ),
    constants={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    codecs=(
        *deepseek_v3.FAMILY.hugging_face.codecs,
        Fixed(
            {
                "layer_types": lambda found: ["indexed_attention"] * found["num_layers"],
                "mlp_layer_types": lambda found: [
                    "sparse" if one else "dense" for one in found["moe_layer_freq"] or [1] * found["num_layers"]
                ],
            },
            _OF,
        ),
    ),
)

FAMILY = replace(
    deepseek_v3.FAMILY,
    name="deepseek-v3.2",
    title="DeepSeek-V3.2",
    rules=(*RULES, *deepseek_v3.multi_token(RULES)),
    features=deepseek_v3.FEATURES | {"mtp_num_layers", "experimental_attention_variant"},
    recognise=lambda config: config.dsa_indexer_n_heads is not None,
    dimensions={
        **deepseek_v3.DIMENSIONS,
        "indexer": lambda config: (config.dsa_indexer_n_heads or 0) * (config.dsa_indexer_head_dim or 0),
        "indexer-head": lambda config: config.dsa_indexer_head_dim or 0,
        "indexer-heads": lambda config: config.dsa_indexer_n_heads or 0,
    },
    hugging_face=KNOWN,
    nemo2=None,
)
