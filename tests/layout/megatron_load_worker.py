"""One rank of real Megatron-Core models that load checkpoints with the strictest handling; run by a peer test.

    python -m tests.layout.megatron_load_worker RANK WORLD STORE CASES OUT

CASES is a JSON file, a list of dictionaries: ``world`` has the arguments of ``initialize_model_parallel``, ``model``
those of ``TransformerConfig`` that say how layers are dealt out, ``args`` what the arguments in the checkpoint leave
out.  For each, the GPT that these describe is built on the CPU, of Megatron-Core's local layers, and loaded with the
strictness that ``strict`` names.  OUT gets, per case, the rank's place, and each chunk's ``state_dict`` or the error.
With ``transformer_engine`` the model asks for the keys that one of Transformer Engine's layers asks for.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from argparse import Namespace
from datetime import timedelta
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
torch.Tensor.cuda = lambda self, *args, **options: self  # type: ignore[method-assign, assignment]

DEFAULTS: dict[str, Any] = {
    "add_qkv_bias": False, "qk_layernorm": False, "num_experts": None, "moe_shared_expert_intermediate_size": None,
    "kv_channels": None,
}  # fmt: skip


def with_state(norm: torch.nn.Module) -> None:
    """Let a norm ask for a state of its own, as Transformer Engine's does."""
    kind = type(norm)
    methods = {"get_extra_state": lambda self: None, "set_extra_state": lambda self, state: None}
    norm.__class__ = type(kind.__name__, (kind,), methods)


def like_transformer_engine(chunk: GPTModel) -> GPTModel:
    """With the keys that the same model of Transformer Engine's layers, which need a GPU, asks for."""
    for name, module in chunk.named_modules():
        last = name.rpartition(".")[2]
        layer = chunk.get_submodule(name.rpartition(".")[0])
        experts = last == "pre_mlp_layernorm" and hasattr(layer.mlp, "experts")
        if (last in ("final_layernorm", "q_layernorm", "k_layernorm") and hasattr(module, "weight")) or experts:
            with_state(module)
        if experts:
            layer.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return chunk


def build(args: Any, model: dict[str, Any], world: dict[str, Any]) -> list[GPTModel]:
    """The chunks of this rank's stage."""
    options = dict(model)
    if isinstance(args.params_dtype, str):  # of a test's facts: JSON has no types
        args.params_dtype = getattr(torch, args.params_dtype)
    if "pipeline_model_parallel_layout" in options:
        stages = world.get("pipeline_model_parallel_size", 1)
        options["pipeline_model_parallel_layout"] = PipelineParallelLayerLayout(
            options["pipeline_model_parallel_layout"], stages
        )
    virtual = world.get("virtual_pipeline_model_parallel_size")
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels, normalization=args.normalization, gated_linear_unit=args.swiglu,
        add_bias_linear=args.add_bias_linear, add_qkv_bias=args.add_qkv_bias, qk_layernorm=args.qk_layernorm,
        num_moe_experts=args.num_experts,
        moe_shared_expert_intermediate_size=args.moe_shared_expert_intermediate_size,
        activation_func=torch.nn.functional.silu, params_dtype=args.params_dtype, pipeline_dtype=args.params_dtype,
        use_cpu_initialization=True, perform_initialization=False,
        tensor_model_parallel_size=world.get("tensor_model_parallel_size", 1),
        pipeline_model_parallel_size=world.get("pipeline_model_parallel_size", 1),
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=world.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=world.get("expert_tensor_parallel_size"),

        **options,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )  # fmt: skip
    chunks = []
    for chunk in range(virtual or 1):
        stage = chunk if virtual else None
        chunks.append(
            GPTModel(
                config,
                spec,
                vocab_size=args.padded_vocab_size,
                max_sequence_length=args.max_position_embeddings,
                position_embedding_type=args.position_embedding_type,
                share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            ).to(args.params_dtype)
        )
    return chunks


def load(case: dict[str, Any]) -> Any:
    stored = dist_checkpointing.load_common_state_dict(case["checkpoint"])["args"]
    chunks = build(Namespace(**{**DEFAULTS, **vars(stored), **case["args"]}), case["model"], case["world"])
    if case["transformer_engine"]:
        chunks = [like_transformer_engine(chunk) for chunk in chunks]
    virtual = len(chunks) > 1
    wanted = {
        f"model{number}" if virtual else "model": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)
    }
    loaded = dist_checkpointing.load(wanted, case["checkpoint"], strict=StrictHandling(case["strict"]))
    states = {}
    for number, chunk in enumerate(chunks):
        key = f"model{number}" if virtual else "model"
        chunk.load_state_dict(loaded[key])
        states[key] = {name: value.clone() for name, value in chunk.state_dict().items() if value is not None}
    return states


def main(rank: int, world: int, store: str, cases: str, out: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results: list[Any] = []
    with open(cases, encoding="utf-8") as file:
        for case in json.load(file):
            parallel_state.initialize_model_parallel(**case["world"])
            place = (
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_expert_model_parallel_rank(),
            )
            try:
                results.append((place, load(case)))
            except BaseException as problem:  # CheckpointException is not an Exception
                print(f"{type(problem).__name__}: {problem}"[:600], file=sys.stderr)
                results.append((place, f"{type(problem).__name__}: {problem}\n{traceback.format_exc()}"))
            dist.barrier()
            parallel_state.destroy_model_parallel()
    torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
