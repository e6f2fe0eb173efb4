"""One rank of a real Megatron-Core model that loads a checkpoint; run by ``test_megatron_core_peer``.

    python megatron_core_worker.py RANK WORLD STORE CHECKPOINT OUT STRICTNESS...

Builds a small GPT of the local (no Transformer Engine) layers on the CPU with tensor parallelism over WORLD ranks,
loads the checkpoint into it once with each strictness, and saves its parameters and what the load said to OUT.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def model(world: int) -> Any:
    """The GPT that ``fixtures/mcore/gpt_dense_tp2pp2`` was saved from."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        tensor_model_parallel_size=world,
        params_dtype=torch.bfloat16,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=32,
        max_sequence_length=16,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    return gpt.bfloat16()


def main(rank: int, world: int, store: str, checkpoint: str, out: str, modes: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    gpt = model(world)
    results: dict[str, Any] = {}
    for mode in modes:
        for parameter in gpt.parameters():
            parameter.data.fill_(7)
        try:
            loaded = dist_checkpointing.load(
                {"model": gpt.sharded_state_dict()}, checkpoint, strict=StrictHandling(mode)
            )
        except BaseException as problem:  # CheckpointException is not an Exception
            results[mode] = f"{type(problem).__name__}: {problem}"
            continue
        missing: Any = ()
        unexpected: Any = ()
        if mode.startswith("return"):
            loaded, missing, unexpected = loaded
        gpt.load_state_dict(loaded["model"])
        parameters = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
        common = {key: repr(value) for key, value in loaded.items() if key != "model"}
        results[mode] = {
            "parameters": parameters,
            "common": common,
            "missing": sorted(missing),
            "unexpected": sorted(unexpected),
        }
    results["plain"] = dist_checkpointing.load_plain_tensors(checkpoint) if world == 1 else {}
    torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5], sys.argv[6:])
