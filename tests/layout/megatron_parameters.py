"""Prints, as JSON, how Megatron-Core divides every parameter of small models; a process of its own, for its globals."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec, get_t5_encoder_with_local_block_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

SIZES = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24}
COMMON = {**SIZES, "use_cpu_initialization": True}
VOCABULARY = {"vocab_size": 64, "max_sequence_length": 8}


class NoCore(torch.nn.Module):
    """A core attention, which has no parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__()


def gpt(**options: Any) -> torch.nn.Module:
    config = TransformerConfig(**COMMON, **options)
    spec = get_gpt_layer_local_spec(
        num_experts=options.get("num_moe_experts"),
        moe_grouped_gemm=False,
        qk_layernorm=options.get("qk_layernorm", False),
    )
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if options.get("mtp_num_layers") else None
    return GPTModel(config, spec, share_embeddings_and_output_weights=False, mtp_block_spec=mtp, **VOCABULARY)


def mla() -> torch.nn.Module:
    config = MLATransformerConfig(
        **COMMON, q_lora_rank=8, kv_lora_rank=8, qk_head_dim=4, qk_pos_emb_head_dim=4, v_head_dim=4, rope_type="rope",
        multi_latent_attention=True,
    )  # fmt: skip
    multi_latent_attention.TELinear = type("TELinear", (), {})  # None without Transformer Engine, yet asked for
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, qk_layernorm=True)
    spec.submodules.self_attention.submodules.core_attention = NoCore  # the local one does not take its arguments
    return GPTModel(config, spec, **VOCABULARY)


def bert() -> torch.nn.Module:
    return BertModel(TransformerConfig(**COMMON), 2, bert_layer_local_spec, **VOCABULARY)


def t5() -> torch.nn.Module:
    config = TransformerConfig(**COMMON)
    return T5Model(
        config=config,
        encoder_config=config,
        transformer_encoder_layer_spec=get_t5_encoder_with_local_block_spec(1),
        transformer_decoder_layer_spec=get_t5_decoder_with_local_block_spec(1),
        position_embedding_type="relative",
        share_embeddings_and_output_weights=True,
        **VOCABULARY,
    )


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "gated": lambda: gpt(
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, num_query_groups=2, qk_layernorm=True
    ),
    "experts": lambda: gpt(
        num_moe_experts=2, moe_shared_expert_intermediate_size=8, moe_shared_expert_gate=True, add_bias_linear=False,
        moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
    ),
    "multi-token prediction": lambda: gpt(mtp_num_layers=1, add_bias_linear=False),
    "latent attention": mla,
    "bert": bert,
    "t5": t5,
}  # fmt: skip


def main() -> None:
    with tempfile.NamedTemporaryFile() as meeting:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel(1, 1)
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
        found: dict[str, dict[str, Any]] = {}
        for title, build in MODELS.items():
            model = build()
            facts: dict[str, Any] = {
                name: [getattr(p, key, None) for key in ("tensor_model_parallel", "partition_dim", "partition_stride")]
                for name, p in model.named_parameters()
            }
            buffers = [name for name in model.state_dict() if name not in facts and "_extra_state" not in name]
            found[title] = {"parameters": facts, "buffers": buffers}
        print(json.dumps(found))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
