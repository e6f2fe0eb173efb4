"""Prints how far a Megatron-Core GPTModel with our weights and arguments is from the fixture's logits.

A program of its own, because Megatron-Core keeps process-wide state.  What is replaced is what needs a GPU only to
ask which one it is, or to seed dropout that is off.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import torch

torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from tests.models.cases import open_case  # noqa: E402
from tests.support import fixture_path  # noqa: E402

from anyckpt import models  # noqa: E402

CudaRNGStatesTracker.fork = lambda self, *names: contextlib.nullcontext()

LOCAL = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
FUNCTIONS = {
    "squared_relu": lambda value: torch.nn.functional.relu(value) ** 2,
    "openai_gelu": lambda value: torch.nn.functional.gelu(value, approximate="tanh"),
    "swiglu": torch.nn.functional.silu,
}
"""What an argument makes Megatron-LM use in place of the erf GELU."""
OFF = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "persist_layer_norm",
)
SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "add_bias_linear", "add_qkv_bias", "hidden_dropout", "attention_dropout",
)  # fmt: skip


def build(arguments: dict[str, Any]) -> Any:
    """As Megatron-LM's ``pretrain_gpt.py`` builds it from its arguments."""
    config = TransformerConfig(
        **{name: arguments[name] for name in SAME},
        **dict.fromkeys(OFF, False),
        layernorm_epsilon=arguments["norm_epsilon"],
        gated_linear_unit=arguments["swiglu"],
        activation_func=next((FUNCTIONS[name] for name in FUNCTIONS if arguments[name]), torch.nn.functional.gelu),
        qk_layernorm=arguments["qk_layernorm"],
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=arguments["normalization"], qk_layernorm=arguments["qk_layernorm"]),
        vocab_size=arguments["padded_vocab_size"],
        max_sequence_length=arguments["max_position_embeddings"],
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_base=arguments["rotary_base"],
        rotary_percent=arguments["rotary_percent"],
        rope_scaling=arguments["use_rope_scaling"],
        rope_scaling_factor=arguments["rope_scaling_factor"],
    ).eval()


def difference(name: str) -> float:
    case = open_case(name)
    model = build(models.render_config(case.padded(), "megatron-args"))
    state = {}
    for key, tensor in models.from_hub(replace(case.hub(), model=case.padded()), "hub").tensors.items():
        for fused, module in LOCAL.items():
            key = key.replace(fused, module)
        state[key] = torch.from_numpy(tensor.cast("float32").numpy())
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys, report
    assert all(key.endswith("_extra_state") for key in report.missing_keys), report
    expected = np.load(fixture_path(f"families/{name}/expected.npz"))
    tokens = torch.as_tensor(expected["input_ids"])
    length = tokens.shape[1]
    positions = torch.arange(length)[None].expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, torch.triu(torch.ones(1, 1, length, length), 1).bool())
    return float(np.abs(logits[..., : case.meta["vocab_size"]].numpy() - expected["logits"]).max())


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        print(json.dumps({name: difference(name) for name in sys.argv[1:]}))
