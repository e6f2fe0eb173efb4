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
from megatron.core.activations import quick_gelu, squared_relu  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.fusions import fused_softmax  # noqa: E402
from megatron.core.models import backends  # noqa: E402
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
from megatron.core.transformer.multi_token_prediction import (  # noqa: E402
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)


class ZeroCentred(torch.nn.Module):
    """Transformer Engine's norm that stores its scale less one, which Megatron-Core's local layers have not."""

    def __init__(self, hidden_size: int, eps: float, centred: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size)) if centred else None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return torch.nn.functional.rms_norm(x, (x.shape[-1],), 1 + self.weight, self.eps)
        return torch.nn.functional.layer_norm(x, (x.shape[-1],), 1 + self.weight, self.bias, self.eps)


class Norm:
    """Of Transformer Engine's kind where the model has that, else PyTorch's."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        if not config.layernorm_zero_centered_gamma:
            return WrappedTorchNorm(config, hidden_size, eps)
        return ZeroCentred(hidden_size, eps, config.normalization == "LayerNorm")


class LatentAttention(torch.nn.Module):
    """Of keys wider than values, which Transformer Engine's kernel computes and Megatron-Core's own layer cannot."""

    def __init__(self, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return found.permute(2, 0, 1, 3).flatten(2)


def window_mask(query: int, key: int, window: tuple[int, int]) -> torch.Tensor:
    """As the library's, which makes it on a GPU."""
    before = torch.arange(key)[None] - torch.arange(query)[:, None] - (key - query)
    return ((before > 0) | (before < -window[0]) if window[0] >= 0 else before > 0)[None, None]


def unit(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """What the kernel computes that gated delta nets call."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


hybrid_block.TENorm = Norm
backends.LocalSpecProvider.layer_norm = lambda self, **_: Norm  # type: ignore[assignment, method-assign]
gated_delta_net.l2norm = unit
fused_softmax.get_sliding_window_causal_mask = window_mask
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
    "mtp_num_layers",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "softmax_scale",
    "softmax_type",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "no_rope_freq",
)
LATENT = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_base",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
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
    if arguments.get("squared_relu"):
        return squared_relu
    if arguments.get("quick_geglu"):
        return quick_gelu
    gelu = partial(torch.nn.functional.gelu, approximate="tanh" if arguments.get("openai_gelu") else "none")
    return torch.nn.functional.silu if arguments.get("swiglu") else gelu


def config_of(arguments: dict[str, Any], world: int) -> TransformerConfig:
    values = {name: arguments[name] for name in SAME if arguments.get(name) is not None}
    dtype = getattr(torch, str(arguments.get("params_dtype") or "torch.float32").rpartition(".")[2])
    latent = bool(arguments.get("multi_latent_attention"))
    if latent:
        values |= {"multi_latent_attention": True, "q_lora_rank": arguments.get("q_lora_rank")}
        values |= {name: arguments[name] for name in LATENT if arguments.get(name) is not None}
    return (MLATransformerConfig if latent else TransformerConfig)(
        **values,
        layernorm_zero_centered_gamma=bool(arguments.get("apply_layernorm_1p")),
        **dict.fromkeys(OFF, False),
        num_moe_experts=arguments.get("num_experts"),
        layernorm_epsilon=arguments.get("norm_epsilon", 1e-5),
        gated_linear_unit=bool(arguments.get("swiglu") or arguments.get("gated_linear_unit")),
        activation_func=activation(arguments),
        use_cpu_initialization=True,
        tensor_model_parallel_size=world,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode="experimental_attention_variant" in values,  # whose delta rule is written in torch
    )


def hybrid_layers(config: TransformerConfig) -> ModuleSpec:
    """The stack that Megatron-Core has of Transformer Engine's layers, of its own layers."""
    common: dict[str, Any] = {"qk_layernorm": config.qk_layernorm, "normalization": config.normalization}
    common["multi_latent_attention"] = config.multi_latent_attention
    dense = get_gpt_layer_local_submodules(**common)
    sparse = get_gpt_layer_local_submodules(num_experts=config.num_moe_experts, **common)
    fused = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    if config.multi_latent_attention:  # there is no linear map to fuse the norm of the layer into
        del fused["input_layernorm."]
        dense.self_attention.submodules.core_attention = LatentAttention
        for which in ("q", "kv"):
            key = f"self_attention.{which}_layernorm."
            fused[key] = f"self_attention.linear_{which}_up_proj.layer_norm_"

    def part(kind: Any, submodules: Any, names: tuple[str, ...], fused: dict[str, str]) -> ModuleSpec:
        own = {name: getattr(submodules, name) for name in names}
        return ModuleSpec(kind, submodules=TransformerLayerSubmodules(**own, sharded_state_dict_keys_map=fused))

    net = GatedDeltaNetSubmodules(ColumnParallelLinear, Norm, RowParallelLinear)
    of_net = TransformerLayerSubmodules(
        input_layernorm=dense.input_layernorm,
        self_attention=ModuleSpec(GatedDeltaNet, submodules=net),
        self_attn_bda=dense.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    )
    mlp = ("pre_mlp_layernorm", "mlp", "mlp_bda")
    step = MultiTokenPredictionLayerSubmodules(
        enorm=Norm, hnorm=Norm, eh_proj=ColumnParallelLinear, mtp_model_layer=None, layer_norm=Norm
    )
    further = ModuleSpec(MultiTokenPredictionLayer, submodules=step)
    return ModuleSpec(
        HybridStack,
        submodules=HybridStackSubmodules(
            **{
                kind: part(TransformerLayer, dense, ("input_layernorm", "self_attention", "self_attn_bda"), fused)
                for kind in ("attention_layer", "mla_layer")
            },
            gdn_layer=ModuleSpec(TransformerLayer, submodules=of_net),
            mlp_layer=part(MLPLayer, dense, mlp, fused),
            moe_layer=part(MoETransformerLayer, sparse, mlp, fused),
            mtp_block_spec=ModuleSpec(
                MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules([further])
            ),
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
        rotary_percent=arguments.get("rotary_percent") or 1.0,
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
