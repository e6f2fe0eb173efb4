"""Small models whose classes transformers never had: names, shapes and configurations as their own code has them.

Written down from the modeling files that the released models carry, not from our rules.
"""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[int, ...]]

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


# -- DeciLM --------------------------------------------------------------------------------------------------


def block(heads_in_group: int | None = None, ffn_mult: float | None = None, linear: str = "") -> dict[str, Any]:
    """An entry of ``block_configs`` with every key that released models have; ``linear`` names what is replaced."""
    return {
        "attention": {
            "n_heads_in_group": heads_in_group, "no_op": heads_in_group is None and "attention" not in linear,
            "num_sink_tokens": None, "replace_with_linear": "attention" in linear, "sparsify": None,
            "unshifted_sink": False, "use_prefill_window_in_sink_attention": False, "window_length": None,
        },
        "ffn": {
            "ffn_mult": ffn_mult, "no_op": ffn_mult is None and "ffn" not in linear,
            "replace_with_linear": "ffn" in linear, "sparsify": None,
        },
    }  # fmt: skip


DECILM_SOURCE = (
    "config.json of nvidia/Llama-3_3-Nemotron-Super-49B-v1 as NVIDIA NeMo 2.5 has it, names and shapes of NeMo "
    "AutoModel's DeciLM layers and TensorRT-LLM's nemotron_nas converter"
)
DECILM: dict[str, Any] = {
    "architectures": ["DeciLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    },
    "block_configs": [
        block(4, 5.25),
        block(None, 2.625),
        block(2, 13.0),
        block(linear="attention, ffn"),
        block(4, linear="ffn"),
        block(),
    ],
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "nemotron-nas",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 128,
}


def decilm_shapes(config: dict[str, Any]) -> Shapes:
    hidden, rows = config["hidden_size"], config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (rows, hidden)}
    for layer, parts in enumerate(config["block_configs"]):
        name = f"model.layers.{layer}"
        attention, ffn = parts["attention"], parts["ffn"]
        if not attention["no_op"]:
            found[f"{name}.input_layernorm.weight"] = (hidden,)
        if attention["replace_with_linear"]:
            found[f"{name}.self_attn.linear_attn.weight"] = (hidden, hidden)
        elif not attention["no_op"]:
            keys = hidden // attention["n_heads_in_group"]
            for projection, out in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys), ("o_proj", hidden)):
                found[f"{name}.self_attn.{projection}.weight"] = (out, hidden)
        if not ffn["no_op"]:
            found[f"{name}.post_attention_layernorm.weight"] = (hidden,)
        if ffn["replace_with_linear"]:
            found[f"{name}.mlp.linear_mlp.weight"] = (hidden, hidden)
        elif not ffn["no_op"]:
            width = int(2 * ffn["ffn_mult"] * hidden / 3)
            width = width if width % 256 == 0 else width + 256 - width % 256
            found[f"{name}.mlp.gate_proj.weight"] = found[f"{name}.mlp.up_proj.weight"] = (width, hidden)
            found[f"{name}.mlp.down_proj.weight"] = (hidden, width)
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}


# -- Baichuan 2 ----------------------------------------------------------------------------------------------

BAICHUAN_SOURCE = (
    "modeling_baichuan.py and configuration_baichuan.py of baichuan-inc/Baichuan2-7B and 13B as copies in public "
    "repositories have them; NVIDIA NeMo's and vLLM's converters"
)
BAICHUAN: dict[str, Any] = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "tokenizer_class": "BaichuanTokenizer",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "model_max_length": 64,
    "model_type": "baichuan",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 128,
}
BAICHUAN_13B = {key: value for key, value in BAICHUAN.items() if key != "max_position_embeddings"}


def baichuan_shapes(config: dict[str, Any]) -> Shapes:
    hidden, width, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (rows, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.self_attn.W_pack.weight": (3 * hidden, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, hidden),
            f"{name}.mlp.gate_proj.weight": (width, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, width),
            f"{name}.mlp.up_proj.weight": (width, hidden),
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}


# -- ChatGLM 2 and 3 -----------------------------------------------------------------------------------------

CHATGLM_SOURCE = (
    "modeling_chatglm.py and configuration_chatglm.py of THUDM/chatglm3-6b as copies in public repositories have them; "
    "NVIDIA NeMo's converter"
)
CHATGLM: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 96,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 128,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 64,
    "use_cache": True,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def chatglm_shapes(config: dict[str, Any]) -> Shapes:
    hidden, width, rows = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    heads, channels = config["num_attention_heads"], config["kv_channels"]
    packed = channels * (heads + 2 * config["multi_query_group_num"])
    found: Shapes = {"transformer.embedding.word_embeddings.weight": (rows, hidden)}
    for layer in range(config["num_layers"]):
        name = f"transformer.encoder.layers.{layer}"
        found |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attention.query_key_value.weight": (packed, hidden),
            f"{name}.self_attention.query_key_value.bias": (packed,),
            f"{name}.self_attention.dense.weight": (hidden, heads * channels),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.mlp.dense_h_to_4h.weight": (2 * width, hidden),
            f"{name}.mlp.dense_4h_to_h.weight": (hidden, width),
        }
    final = {"transformer.encoder.final_layernorm.weight": (hidden,)}
    return {**found, **final, "transformer.output_layer.weight": (rows, hidden)}


# -- InternLM 2 ----------------------------------------------------------------------------------------------

INTERNLM2_SOURCE = (
    "modeling_internlm2.py, configuration_internlm2.py and config.json of internlm/internlm2_5-7b; vLLM's and "
    "llama.cpp's converters"
)
INTERNLM2: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "model_type": "internlm2",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 128,
    "pretraining_tp": 1,
}


def internlm2_shapes(config: dict[str, Any]) -> Shapes:
    hidden, width, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    found: Shapes = {"model.tok_embeddings.weight": (rows, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.attention.wqkv.weight": ((heads + 2 * groups) * hidden // heads, hidden),
            f"{name}.attention.wo.weight": (hidden, hidden),
            f"{name}.feed_forward.w1.weight": (width, hidden),
            f"{name}.feed_forward.w3.weight": (width, hidden),
            f"{name}.feed_forward.w2.weight": (hidden, width),
            f"{name}.attention_norm.weight": (hidden,),
            f"{name}.ffn_norm.weight": (hidden,),
        }
    return {**found, "model.norm.weight": (hidden,), "output.weight": (rows, hidden)}
