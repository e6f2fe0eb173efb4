"""What the newest Megatron-Core saves, and what it makes of checkpoints of ours; one process, or one of two ranks.

    python -m tests.formats.current_megatron_worker RANK WORLD STORE JOBS OUT

JOBS is a JSON file with a list of jobs, OUT gets a list of what came of each.  A job has ``model``, arguments of
Megatron-LM, which say which model is built: a GPTModel of the local layers, or with ``hybrid_layer_pattern`` a
HybridModel of the same layers.  ``load`` names a checkpoint that is loaded into it, strictly both ways, ``load_fsdp``
one of Megatron-FSDP, and ``load_rank`` a file of the only rank; then its parameters are told, and its logits for
``tokens``.  ``save`` names the folder that the model is saved to; what the library itself finds there is told.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402
from tests import current_megatron  # noqa: E402

current_megatron.install()

import megatron.core  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_submodules,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.models.hybrid import hybrid_block  # noqa: E402
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules  # noqa: E402
from megatron.core.ssm.gated_delta_net import common as gated_delta_net  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.fsdp_dtensor_checkpoint import handle_experts_in_state_dict  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

hybrid_block.TENorm = WrappedTorchNorm
gated_delta_net.HAVE_FLA = True  # whose kernels are for GPUs, and are not run here
torch.serialization.add_safe_globals([argparse.Namespace])

SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "hidden_dropout",
    "attention_dropout",
    "qk_layernorm",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_pre_softmax",
    "moe_layer_freq",
    "is_hybrid_model",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "window_size",
    "window_attn_skip_freq",
    "attention_output_gate",
    "experimental_attention_variant",
    "linear_attention_freq",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
OFF = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "persist_layer_norm",
    "gradient_accumulation_fusion",
)


def activation(arguments: dict[str, Any]) -> Any:
    gelu = partial(torch.nn.functional.gelu, approximate="tanh" if arguments.get("openai_gelu") else "none")
    return torch.nn.functional.silu if arguments.get("swiglu") else gelu


def config_of(arguments: dict[str, Any], world: int) -> TransformerConfig:
    values = {name: arguments[name] for name in SAME if arguments.get(name) is not None}
    dtype = getattr(torch, str(arguments.get("params_dtype") or "torch.float32").rpartition(".")[2])
    return TransformerConfig(
        **values,
        **dict.fromkeys(OFF, False),
        num_moe_experts=arguments.get("num_experts"),
        layernorm_epsilon=arguments.get("norm_epsilon", 1e-5),
        gated_linear_unit=bool(arguments.get("swiglu")),
        activation_func=activation(arguments),
        use_cpu_initialization=True,
        tensor_model_parallel_size=world,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode="experimental_attention_variant" in values,  # whose delta rule is written in torch
    )


def hybrid_layers(config: TransformerConfig) -> ModuleSpec:
    """The stack that Megatron-Core has of Transformer Engine's layers, of its own layers."""
    common = {"qk_layernorm": config.qk_layernorm, "normalization": config.normalization}
    dense = get_gpt_layer_local_submodules(**common)
    sparse = get_gpt_layer_local_submodules(num_experts=config.num_moe_experts, **common)
    fused = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }

    def part(kind: Any, submodules: Any, names: tuple[str, ...], fused: dict[str, str]) -> ModuleSpec:
        own = {name: getattr(submodules, name) for name in names}
        return ModuleSpec(kind, submodules=TransformerLayerSubmodules(**own, sharded_state_dict_keys_map=fused))

    net = GatedDeltaNetSubmodules(ColumnParallelLinear, WrappedTorchNorm, RowParallelLinear)
    of_net = TransformerLayerSubmodules(
        input_layernorm=dense.input_layernorm,
        self_attention=ModuleSpec(GatedDeltaNet, submodules=net),
        self_attn_bda=dense.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    )
    mlp = ("pre_mlp_layernorm", "mlp", "mlp_bda")
    return ModuleSpec(
        HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=part(
                TransformerLayer, dense, ("input_layernorm", "self_attention", "self_attn_bda"), fused
            ),
            gdn_layer=ModuleSpec(TransformerLayer, submodules=of_net),
            mlp_layer=part(MLPLayer, dense, mlp, fused),
            moe_layer=part(MoETransformerLayer, sparse, mlp, fused),
        ),
    )


def build(arguments: dict[str, Any], world: int) -> Any:
    torch.manual_seed(1)
    config = config_of(arguments, world)
    pattern = arguments.get("hybrid_layer_pattern")
    kind: Any
    if pattern is None:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        kind = partial(GPTModel, config, spec)
    else:
        kind = partial(HybridModel, config, hybrid_layers(config), hybrid_layer_pattern=pattern)
    model = kind(
        vocab_size=arguments["padded_vocab_size"],
        max_sequence_length=arguments["max_position_embeddings"],
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_base=int(arguments.get("rotary_base", 10000)),
    )
    return model.to(config.params_dtype).eval()


def logits(model: Any, tokens: list[list[int]]) -> list[Any]:
    ids = torch.tensor(tokens)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    mask = torch.triu(torch.ones(1, 1, ids.shape[1], ids.shape[1]), 1).bool()
    with torch.no_grad():
        found: list[Any] = model(ids, positions, mask).float().tolist()
    return found


def load_fsdp(model: Any, arguments: dict[str, Any], checkpoint: str) -> None:
    """As Megatron-FSDP's runs do, with the module's names and Megatron-Core's for experts; strictly."""
    own = {f"module.{name}": value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    state = handle_experts_in_state_dict(dict(own), arguments.get("num_experts"))
    assert state.keys() == own.keys(), "one rank has all experts"
    for name in [name for name in state if arguments.get("swiglu") and "linear_fc1.weight" in name]:
        state[f"{name}_w"], state[f"{name}_v"] = state.pop(name).chunk(2)  # views, which are loaded into
    held = {"model": state, "iteration": 0, "checkpoint_version": 0.0}
    torch.distributed.checkpoint.load(held, checkpoint_id=checkpoint)


def found_in(checkpoint: str) -> dict[str, Any]:
    """Whole tensors by dtype, shape and digest, and the keys of objects."""
    tensors = {}
    plain = dist_checkpointing.load_plain_tensors(checkpoint)
    keys = dist_checkpointing.serialization.load_sharded_metadata(checkpoint)
    for name in [name for name, value in plain.items() if isinstance(value, torch.Tensor)]:
        data = plain[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        facts = {"dtype": str(plain[name].dtype).rpartition(".")[2], "shape": list(plain[name].shape)}
        tensors[name] = {**facts, "sha256": hashlib.sha256(data).hexdigest()}
    return {"tensors": tensors, "objects": sorted(name for name in keys if "/shard_" in name)}


def done(job: dict[str, Any], world: int) -> dict[str, Any]:
    model = build(job["model"], world)
    result: dict[str, Any] = {"version": megatron.core.__version__}
    if "load" in job:
        for parameter in model.parameters():
            parameter.data.fill_(7)
        loaded, missing, unexpected = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, job["load"], strict=StrictHandling("return_all")
        )
        model.load_state_dict(loaded["model"])
        result["missing"], result["unexpected"] = sorted(missing), sorted(unexpected)
        result["common"] = {key: repr(value) for key, value in loaded.items() if key != "model"}
    if "load_fsdp" in job:
        for parameter in model.parameters():
            parameter.data.fill_(7)
        load_fsdp(model, job["model"], job["load_fsdp"])
    if "load_rank" in job:
        model.load_state_dict(torch.load(job["load_rank"], weights_only=True)["model"], strict=True)
    if "save" in job:
        state = {"args": argparse.Namespace(**job["model"]), "iteration": 10, "checkpoint_version": 3.0}
        Path(job["save"]).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        content = {"chained_optim_avoid_prefix": True}
        dist_checkpointing.save({**state, "model": model.sharded_state_dict()}, job["save"], content_metadata=content)
        result |= found_in(job["save"])
    result["parameters"] = {name: value.detach().float().tolist() for name, value in model.named_parameters()}
    if "tokens" in job:
        result["logits"] = logits(model, job["tokens"])
    return result


def main(rank: int, world: int, store: str, jobs: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    results = []
    for job in json.loads(Path(jobs).read_text()):
        try:
            results.append(done(job, world))
        except BaseException as problem:  # CheckpointException is not an Exception
            import traceback

            results.append({"error": "".join(traceback.format_exception(problem))[-3000:]})
    Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
