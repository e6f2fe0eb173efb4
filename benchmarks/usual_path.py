"""The usual path from Hugging Face to a Megatron-Core checkpoint, for comparison.

    python benchmarks/usual_path.py --source HF_FOLDER --target FOLDER

Builds the Megatron-Core model on the CPU, reads every tensor with safetensors, fills the model, and saves it with
``megatron.core.dist_checkpointing``: what a conversion script does that has no GPU.  Prints seconds and peak memory,
imports counted apart.  Needs the ``test`` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

import torch
import torch.distributed as distributed
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from safetensors import safe_open

IMPORTED = time.monotonic()


def build(config: dict[str, Any]) -> GPTModel:
    transformer = TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        bf16=True,
        perform_initialization=False,
    )
    return GPTModel(
        transformer,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def fill(model: GPTModel, folder: Path, config: dict[str, Any]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(folder / name, "pt") for name in set(index.values())}
    groups = config["num_key_value_heads"]
    ratio = config["num_attention_heads"] // groups
    head = config["head_dim"]

    def read(name: str) -> torch.Tensor:
        return files[index[name]].get_tensor(name)

    with torch.no_grad():
        parameters = dict(model.named_parameters())
        parameters["embedding.word_embeddings.weight"].copy_(read("model.embed_tokens.weight"))
        parameters["decoder.final_layernorm.weight"].copy_(read("model.norm.weight"))
        parameters["output_layer.weight"].copy_(read("lm_head.weight"))
        for layer in range(config["num_hidden_layers"]):
            hf, core = f"model.layers.{layer}.", f"decoder.layers.{layer}."
            q, k, v = (read(f"{hf}self_attn.{part}_proj.weight") for part in "qkv")
            width = q.shape[1]
            pieces = (
                q.view(groups, ratio, head, width),
                k.view(groups, 1, head, width),
                v.view(groups, 1, head, width),
            )
            parameters[core + "self_attention.linear_qkv.weight"].copy_(torch.cat(pieces, 1).reshape(-1, width))
            parameters[core + "self_attention.linear_proj.weight"].copy_(read(hf + "self_attn.o_proj.weight"))
            gate, up = read(hf + "mlp.gate_proj.weight"), read(hf + "mlp.up_proj.weight")
            parameters[core + "mlp.linear_fc1.weight"].copy_(torch.cat([gate, up]))
            parameters[core + "mlp.linear_fc2.weight"].copy_(read(hf + "mlp.down_proj.weight"))
            parameters[core + "input_layernorm.weight"].copy_(read(hf + "input_layernorm.weight"))
            parameters[core + "pre_mlp_layernorm.weight"].copy_(read(hf + "post_attention_layernorm.weight"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29511")
    distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    config = json.loads((options.source / "config.json").read_text())
    model = build(config)
    fill(model, options.source, config)
    options.target.mkdir()
    # Megatron-Core 0.16 asks for a GPU while saving, and makes no use of it.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    dist_checkpointing.save(model.sharded_state_dict(), str(options.target))
    subprocess.run(["sync"], check=True)
    finished = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    report = {
        "seconds": finished - IMPORTED,
        "import_seconds": IMPORTED - STARTED,
        "peak_rss_bytes": max(peak, children),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
