"""Which class of Megatron-Bridge describes a model, and the fields that only some models or classes have.

Facts: ``models/*_provider.py`` and the bridges of DeepSeek and GLM in Megatron-Bridge 0.3.1 and 0.6.2, and the fields
of the ``TransformerConfig`` of Megatron-Core 0.16, which all these classes have.  Megatron-Bridge 0.4 took the classes
of Llama 3.1 and GPT-OSS out: its class of every GPT has their fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.hybrid import PATTERN, letters_of
from anyckpt.errors import MappingError

_MODELS = "megatron.bridge.models"
GPT = f"{_MODELS}.gpt_provider.GPTModelProvider"
LLAMA31 = f"{_MODELS}.llama.llama_provider.Llama31ModelProvider"
HETEROGENEOUS = f"{_MODELS}.llama_nemotron.llama_nemotron_provider.LlamaNemotronHeterogeneousProvider"
LATENT = f"{_MODELS}.mla_provider.MLAModelProvider"
MAMBA = f"{_MODELS}.mamba.mamba_provider.MambaModelProvider"
HYBRID = f"{_MODELS}.hybrid.hybrid_provider.HybridModelProvider"
GPT_OSS = f"{_MODELS}.gpt_oss.gpt_oss_provider.GPTOSSProvider"
GEMMA = f"{_MODELS}.gemma.gemma_provider.GemmaModelProvider"
GEMMA2 = f"{_MODELS}.gemma.gemma2_provider.Gemma2ModelProvider"
GEMMA3 = f"{_MODELS}.gemma.gemma3_provider.Gemma3ModelProvider"

_LAYER_SPEC = "bridge_layer_spec"
"""The function that gives a family's layers, where it has layers of its own."""
ENCODED = "heterogeneous_layers_config_encoded_json"
CLASSES_OUT_SINCE = (0, 17)
"""The release of Megatron-Core with which Megatron-Bridge 0.4 goes."""
_BLOCKS = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"

_VARIANTS = (
    "megatron.core.models.gpt.experimental_attention_variant_module_specs."
    "get_transformer_block_with_experimental_attention_variant_spec"
)

_ANYWHERE = (
    "window_attn_skip_freq",
    "softmax_scale",
    "softmax_type",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "no_rope_freq",
    "qk_l2_norm",
    "mtp_num_layers",
    "is_hybrid_model",
    "attention_output_gate",
    "experimental_attention_variant",
    "linear_attention_freq",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "dsa_indexer_n_heads",
    "dsa_indexer_head_dim",
    "dsa_indexer_topk",
    "dsa_indexer_rope_interleaved",
    PATTERN,
    ENCODED,
)
_EXPERTS = tuple(
    """
    moe_router_topk moe_ffn_hidden_size moe_router_pre_softmax moe_router_score_function
    moe_router_enable_expert_bias moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor
    moe_aux_loss_coeff moe_shared_expert_intermediate_size moe_shared_expert_gate moe_layer_freq moe_grouped_gemm
    moe_latent_size
    moe_token_dispatcher_type moe_router_load_balancing_type moe_apply_probs_on_input
    """.split()
)
_LATENT = tuple(
    """
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type
    rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
    """.split()
)
_MAMBA = (
    "hybrid_override_pattern",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_state_dim",
)
_YARN = "yarn_"
_CAPS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")


def provider_of(arguments: Mapping[str, Any], release: tuple[int, int] | None = None) -> str:
    """The class that builds what Megatron-LM's arguments, or ours beside them, describe.

    Args:
        arguments: of the model.
        release: of Megatron-Core that will load it; None for the newest.

    Raises:
        MappingError: there is none.
    """
    if arguments.get("parallel_residual") or arguments.get("shared_layernorm"):
        raise MappingError(
            "Megatron-Bridge has no layers whose attention and MLP run side by side",
            expected="parallel_residual False",
            found=True,
            remedy="convert to megatron-core or megatron-lm",
        )
    scaled = bool(arguments.get("use_rope_scaling"))
    if arguments.get(ENCODED):
        if not scaled:
            raise MappingError(
                "Megatron-Bridge's models whose layers differ always scale rope as Llama 3.1",
                expected="use_rope_scaling",
                found="none",
                remedy="convert to megatron-core",
            )
        return HETEROGENEOUS
    if letters_of(arguments) is not None:
        return _hybrid(arguments)
    if arguments.get("multi_latent_attention"):
        return LATENT
    if arguments.get("hybrid_override_pattern"):
        return MAMBA
    if arguments.get("rotary_base_local"):
        return GEMMA3
    if arguments.get("attn_logit_softcapping"):
        return GEMMA2
    if _is_gemma(arguments):
        return GEMMA  # its class multiplies embeddings by the root of the width
    if release is None or release >= CLASSES_OUT_SINCE:
        return GPT
    if arguments.get("softmax_type") == "learnable":
        return GPT_OSS
    return LLAMA31 if scaled else GPT


def _hybrid(arguments: Mapping[str, Any]) -> str:
    """The class of every HybridModel.

    Raises:
        MappingError: it has no such models.
    """
    latent, caps = arguments.get("multi_latent_attention"), arguments.get("attn_logit_softcapping")
    gemma = _is_gemma(arguments) and "embeddings that are multiplied as Gemma's"
    yarn = arguments.get("position_embedding_type") == "yarn" and "fields for rope that YaRN scales"
    unsaid = "latent attention" if latent else "capped scores" if caps else yarn or gemma
    if unsaid:
        raise MappingError(
            f"Megatron-Bridge's class of HybridModel has no {unsaid}",
            remedy="leave --megatron-model out or say gpt, or convert to megatron-core or megatron-lm",
        )
    return HYBRID


def own_fields(arguments: Mapping[str, Any], provider: str) -> dict[str, Any]:
    """What a model's blocks, or its class, have fields for beyond those of every model."""
    names = list(_ANYWHERE)
    if arguments.get("num_experts"):
        names += _EXPERTS
    if provider == LATENT:
        names += _LATENT
    if provider == MAMBA:
        names += _MAMBA
    if provider == GEMMA2:
        names += _CAPS
    if provider in (GPT, GPT_OSS):
        names += [key for key in arguments if key.startswith(_YARN)]
    fields = {key: arguments[key] for key in names if arguments.get(key) is not None}
    if provider == LATENT:
        fields.setdefault("q_lora_rank", None)  # else the class's own
    frequency = arguments.get("moe_layer_freq")
    if "moe_layer_freq" in fields and frequency != 1:
        local = arguments.get("transformer_impl") == "local"
        fields["transformer_layer_spec"] = {
            "_target_": _BLOCKS,
            "_partial_": True,
            "_args_": [],
            "use_transformer_engine": not local,
        }
    if arguments.get(_LAYER_SPEC):
        fields["transformer_layer_spec"] = {"_target_": arguments[_LAYER_SPEC], "_call_": False}
    if "experimental_attention_variant" in fields and provider != HYBRID:  # whose stack goes by its letters
        fields["transformer_layer_spec"] = {"_target_": _VARIANTS, "_partial_": True, "_args_": []}
    if "linear_attention_freq" in fields:
        fields["hetereogenous_dist_checkpoint"] = True
    if provider == GEMMA3:
        fields |= _local_and_global(arguments, fields)
    return fields


def _local_and_global(arguments: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's class has a pattern of layers, one window and two thetas, and its own name for the scale of rope.

    Layers are counted from 1, and those whose number the pattern's sum does not divide have the window.
    """
    every, window = fields.pop("window_attn_skip_freq", None), arguments.get("window_size")
    if every is None:
        every = 1 if window is None else arguments["num_layers"] + 1
    if type(every) is not int:
        raise MappingError(
            "Megatron-Bridge's Gemma 3 cannot express which layers have the window",
            expected="all but every N-th",
            found=str(every)[:80],
            remedy="convert to megatron-core or megatron-lm",
        )
    return {
        "interleaved_attn_pattern": [every - 1, 1],
        "window_size": window[0] if isinstance(window, (list, tuple)) else window,
        "rotary_base": [arguments["rotary_base_local"], arguments.get("rotary_base")],
        "rope_scaling_factor": arguments.get("rotary_seq_len_interpolation_factor") or 1.0,
        "seq_len_interpolation_factor": None,
    }


def _is_gemma(arguments: Mapping[str, Any]) -> bool:
    """Norms of gamma - 1 without a bias, and a gated tanh GELU."""
    zero_centred = arguments.get("apply_layernorm_1p") and arguments.get("normalization") == "RMSNorm"
    return bool(zero_centred and arguments.get("gated_linear_unit") and arguments.get("openai_gelu"))


def arguments_of_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What ``own_fields`` writes in another form than arguments have, read again."""
    found: dict[str, Any] = {
        key: list(fields[key])
        for key in ("moe_layer_freq", "window_attn_skip_freq", "no_rope_freq", "linear_attention_freq")
        if isinstance(fields.get(key), (list, tuple))
    }
    base, pattern, window = (fields.get(key) for key in ("rotary_base", "interleaved_attn_pattern", "window_size"))
    if isinstance(base, (list, tuple)) and len(base) == 2:
        found |= {"rotary_base_local": base[0], "rotary_base": base[1]}
        factor = fields.get("rope_scaling_factor")
        found |= {"rotary_seq_len_interpolation_factor": None if factor == 1 else factor}
        found |= {"use_rope_scaling": False}
    if isinstance(pattern, (list, tuple)) and len(pattern) == 2 and pattern[1] == 1 and type(pattern[0]) is int:
        every, layers = pattern[0] + 1, fields.get("num_layers")
        found |= {"window_attn_skip_freq": None if type(layers) is int and every > layers else every}
        found |= {"window_size": [window, 0] if type(window) is int else window}
        scale = fields.get("softmax_scale")
        if isinstance(scale, float) and 1e-9 < scale < 1e9:
            width = scale**-2
            found |= {"query_pre_attn_scalar": round(width) if abs(width - round(width)) < 1e-6 * width else width}
    return found
