"""Prints how far a Megatron-Core GPTModel with our Llama 4 weights and arguments is from transformers' logits.

A program of its own, because Megatron-Core keeps process-wide state.  The layers without rotary embedding get none of
the norms of queries and keys, as the caveat says; there are fewer tokens than attention has in a chunk, and than from
which on queries are scaled.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.models.megatron_forward import LOCAL, OFF, SAME

from anyckpt import models
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT

# what megatron_forward replaces must be in place before these
from megatron.core import parallel_state  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # isort: skip
from megatron.core.models.gpt.gpt_model import GPTModel  # isort: skip
from megatron.core.transformer.identity_op import IdentityOp  # isort: skip
from megatron.core.transformer.moe import moe_utils  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from tests.models.proofs import samples  # isort: skip
from tests.models.rolled import differences  # isort: skip
from tests.support import write_plan  # isort: skip

moe_utils.te_general_gemm = None  # which Megatron-Core 0.16 defines only where Transformer Engine is

LENGTH = 7
MORE = (
    "rotary_interleaved", "qk_l2_norm", "no_rope_freq", "moe_router_topk", "moe_ffn_hidden_size",
    "moe_router_pre_softmax", "moe_router_score_function", "moe_shared_expert_intermediate_size", "moe_layer_freq",
    "moe_apply_probs_on_input",
)  # fmt: skip


def build(arguments: dict[str, Any]) -> Any:
    """As Megatron-LM builds it from its arguments, without Transformer Engine."""
    config = TransformerConfig(
        **{name: arguments[name] for name in (*SAME, *MORE) if name in arguments},
        **dict.fromkeys(OFF, False),
        num_moe_experts=arguments["num_experts"],
        layernorm_epsilon=arguments["norm_epsilon"],
        gated_linear_unit=arguments["swiglu"],
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    block = get_gpt_decoder_block_spec(config, False, arguments["normalization"], bool(arguments.get("qk_l2_norm")))
    block.layer_specs = [copy.deepcopy(layer) for layer in block.layer_specs]  # which are one where they are alike
    for layer, skipped in enumerate(config.no_rope_freq or ()):
        if skipped:
            attention = block.layer_specs[layer].submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = IdentityOp
    return GPTModel(
        config,
        block,
        vocab_size=arguments["padded_vocab_size"],
        max_sequence_length=arguments["max_position_embeddings"],
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_base=arguments["rotary_base"],
        rope_scaling=arguments["use_rope_scaling"],
        rope_scaling_factor=arguments["rope_scaling_factor"],
    ).eval()


def local(name: str) -> str:
    """The name that modules without Transformer Engine have."""
    for fused, module in LOCAL.items():
        name = name.replace(fused, module)
    head, grouped, last = name.partition(".mlp.experts.linear_fc")
    return f"{head}.mlp.experts.local_experts.{last[8:]}.linear_fc{last[:8]}" if grouped else name


def compared(name: str, folder: Path) -> dict[str, float]:
    checkpoint, model = samples()[name].open()
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder / name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    ours = build(models.render_config(model, "megatron-args"))
    hub = models.to_hub(checkpoint, model)
    state = {local(key): torch.from_numpy(t.numpy()) for key, t in models.from_hub(hub, "hub").tensors.items()}
    report = ours.load_state_dict(state, strict=False)
    assert not report.unexpected_keys, report
    assert all(key.endswith("_extra_state") for key in report.missing_keys), report
    tokens = torch.randint(3, 60, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH)[None].expand_as(tokens)
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool()

    with torch.no_grad():
        expected = theirs(tokens).logits
    return differences(ours, lambda: ours(tokens, positions, mask), expected)


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryDirectory() as folder:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        print(json.dumps({name: compared(name, Path(folder)) for name in sys.argv[1:]}))
