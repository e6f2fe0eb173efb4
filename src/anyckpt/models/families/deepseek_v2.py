"""DeepSeek-V2 and V2-Lite: V3's map, softmax scores without a bias, and in Lite queries without a latent.

V2-Lite was checked by equal logits in Megatron-Core 0.16 (Megatron-Bridge 0.3.1 takes a null ``q_lora_rank`` for 512,
which breaks it); V2 itself was read from the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.models.families import deepseek_v3
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.language.family import Family


class _Method(Codec):
    """Groups of experts count where the method of choosing says so."""

    hubs = ("moe_router_num_groups", "moe_router_group_topk")
    keys = ("topk_method",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        greedy = (reader.text("topk_method") or "greedy") == "greedy" and (found["moe_router_num_groups"] or 1) > 1
        return dict.fromkeys(self.hubs) if greedy else {}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        grouped = (config.moe_router_num_groups or 1) > 1
        return {"topk_method": "group_limited_greedy" if grouped else "greedy"}


_EXPECTED = {"scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False}


FAMILY = Family(
    name="deepseek-v2",
    title="DeepSeek-V2, V2-Lite",
    rules=deepseek_v3.RULES,
    ignorable=decoder.IGNORABLE,
    traits={
        **deepseek_v3.TRAITS,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_pre_softmax": True,
    },
    features=deepseek_v3.FEATURES,
    recognise=lambda config: config.num_moe_experts is not None,
    caveats=caveats.best_of_each_group(1),
    nemo1=False,
    dimensions=deepseek_v3.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("deepseek_v2",),
        architectures=("DeepseekV2ForCausalLM",),
        fields=deepseek_v3.FIELDS,
        constants=_EXPECTED,
        expected=_EXPECTED,
        codecs=(*deepseek_v3.CODECS, _Method()),
        keys=deepseek_v3.KEYS,
        variants=sparse.STACKED,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.deepseek",
        model="DeepSeekModel",
        configs=("DeepSeekV2Config", "DeepSeekV2LiteConfig"),
        choose=lambda config: "DeepSeekV2Config" if config.q_lora_rank is not None else "DeepSeekV2LiteConfig",
    ),
)
