"""What models compute whose classes transformers never had, from their own tensors.

By transformers' classes of the same mathematics (Llama for Baichuan 2 and InternLM 2, GLM for ChatGLM) or, for DeciLM,
by parts of Llama put together layer by layer; tensors are split here, as the models' own code splits them, and not by
our rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

Weights = dict[str, Any]


def inputs() -> tuple[Any, Any, Any]:
    """Tokens, positions and mask of Megatron-Core's models, always the same."""
    tokens = torch.randint(4, 100, (2, 16), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(16)[None].expand_as(tokens), torch.triu(torch.ones(1, 1, 16, 16), 1).bool()


def decilm(weights: Weights, config: dict[str, Any], tokens: Any) -> Any:
    """``modeling_decilm.py``: each block with its norm and residual, as ``block_configs`` says."""
    epsilon, hidden, heads = config["rms_norm_eps"], config["hidden_size"], config["num_attention_heads"]
    states = weights["model.embed_tokens.weight"][tokens]
    positions = torch.arange(tokens.shape[1])[None]
    rope = {"rope_theta": config["rope_theta"], **config["rope_scaling"]}
    like = LlamaConfig(hidden_size=hidden, num_attention_heads=heads, rope_parameters=rope)
    cosines, sines = LlamaRotaryEmbedding(like)(states, positions)

    def split(name: str, inputs: Any) -> Any:
        return functional.linear(inputs, weights[name]).unflatten(2, (-1, hidden // heads)).transpose(1, 2)

    for layer, block in enumerate(config["block_configs"]):
        name = f"model.layers.{layer}"
        if not block["attention"]["no_op"]:
            normed = functional.rms_norm(states, (hidden,), weights[f"{name}.input_layernorm.weight"], epsilon)
            if block["attention"]["replace_with_linear"]:
                states = states + functional.linear(normed, weights[f"{name}.self_attn.linear_attn.weight"])
            else:
                query, key, value = (split(f"{name}.self_attn.{part}_proj.weight", normed) for part in "qkv")
                query, key = apply_rotary_pos_emb(query, key, cosines, sines)
                each = block["attention"]["n_heads_in_group"]
                key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
                seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
                seen = seen.transpose(1, 2).flatten(2)
                states = states + functional.linear(seen, weights[f"{name}.self_attn.o_proj.weight"])
        if not block["ffn"]["no_op"]:
            norm = weights[f"{name}.post_attention_layernorm.weight"]
            normed = functional.rms_norm(states, (hidden,), norm, epsilon)
            if block["ffn"]["replace_with_linear"]:
                states = states + functional.linear(normed, weights[f"{name}.mlp.linear_mlp.weight"])
            else:
                gate, up = (
                    functional.linear(normed, weights[f"{name}.mlp.{part}_proj.weight"]) for part in ("gate", "up")
                )
                down = weights[f"{name}.mlp.down_proj.weight"]
                states = states + functional.linear(functional.silu(gate) * up, down)
    states = functional.rms_norm(states, (hidden,), weights["model.norm.weight"], epsilon)
    return functional.linear(states, weights["lm_head.weight"])


def baichuan(weights: Weights, config: dict[str, Any], tokens: Any) -> Any:
    """``modeling_baichuan.py`` of Baichuan 2 7B: ``W_pack`` in thirds, and a ``NormHead``."""
    state = {"lm_head.weight": functional.normalize(weights["lm_head.weight"])}
    for name, tensor in weights.items():
        if name.endswith("W_pack.weight"):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("W_pack", f"{part}_proj")] = third
        else:
            state.setdefault(name, tensor)
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "vocab_size",
        "max_position_embeddings",
    )  # fmt: skip
    return _logits(LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in keys})), state, tokens)


def chatglm(weights: Weights, config: dict[str, Any], tokens: Any) -> Any:
    """``modeling_chatglm.py``: ``query_key_value`` in queries, keys and values, ``dense_h_to_4h`` in gate and up."""
    heads, groups, width = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    renamed = {
        "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.encoder.layers": "model.layers",
        "transformer.encoder.final_layernorm": "model.norm", "transformer.output_layer": "lm_head",
        "self_attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj", "self_attention": "self_attn",
    }  # fmt: skip
    state: Weights = {}
    for name, tensor in weights.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        if "query_key_value" in name:
            for part, rows in zip("qkv", tensor.split([heads * width, groups * width, groups * width]), strict=True):
                state[name.replace("query_key_value", f"{part}_proj")] = rows
        else:
            state[name] = tensor
    same = GlmConfig(
        hidden_size=config["hidden_size"], intermediate_size=config["ffn_hidden_size"], head_dim=width,
        num_hidden_layers=config["num_layers"], num_attention_heads=heads, num_key_value_heads=groups,
        vocab_size=config["padded_vocab_size"], rms_norm_eps=config["layernorm_epsilon"], attention_bias=True,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return _logits(GlmForCausalLM(same), state, tokens)


def internlm2(weights: Weights, config: dict[str, Any], tokens: Any) -> Any:
    """``modeling_internlm2.py``: ``wqkv`` by query group, its queries, its key and its value."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    each, width = heads // groups, config["hidden_size"] // heads
    renamed = {
        "tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }  # fmt: skip
    state: Weights = {"lm_head.weight": weights["output.weight"]}
    for name, tensor in weights.items():
        if name.endswith("attention.wqkv.weight"):
            grouped = tensor.unflatten(0, (groups, each + 2, width))
            for part, rows in (("q", grouped[:, :each]), ("k", grouped[:, -2:-1]), ("v", grouped[:, -1:])):
                state[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = rows.flatten(0, 2)
        elif name != "output.weight":
            found = next((own for own in renamed if own in name), "")
            state[name.replace(found, renamed[found]) if found else name] = tensor
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "rms_norm_eps", "vocab_size", "max_position_embeddings", "rope_theta",
    )  # fmt: skip
    return _logits(LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in keys})), state, tokens)


def _logits(model: Any, state: Weights, tokens: Any) -> Any:
    model.load_state_dict(state, strict=True)
    return model.eval()(tokens).logits


REFERENCES: dict[str, Callable[[Weights, dict[str, Any], Any], Any]] = {
    "llama-nemotron": decilm, "baichuan2": baichuan, "chatglm": chatglm, "internlm2": internlm2,
}  # fmt: skip
