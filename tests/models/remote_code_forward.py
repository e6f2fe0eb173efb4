"""Prints how far Megatron-Core models with our files and arguments are from what the models' own code computes.

A program of its own, as ``megatron_forward``.  The references are transformers' classes of the same mathematics (Llama
for Baichuan 2, GLM for ChatGLM) or, for DeciLM, Llama's parts put together layer by layer; the tensors of the source
are split for them here, as the models' own code splits them, and not by our rules.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.models.megatron_forward as forward
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.models.proofs import samples
from tests.support import write_plan
from torch.nn import functional
from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import anyckpt
from anyckpt import models
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import WriteOptions

Weights = dict[str, Any]


def built(arguments: dict[str, Any]) -> Any:
    """As Megatron-LM builds it from its arguments, with layers of their own where these say so."""
    values = {
        **{name: arguments[name] for name in forward.SAME},
        **dict.fromkeys(forward.OFF, False),
        "layernorm_epsilon": arguments["norm_epsilon"],
        "gated_linear_unit": arguments["swiglu"],
        "activation_func": functional.silu,
        "rotary_interleaved": arguments["rotary_interleaved"],
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
    }
    encoded = arguments.get("heterogeneous_layers_config_encoded_json")
    if encoded:
        config = HeterogeneousTransformerConfig(**values, heterogeneous_layers_config_encoded_json=encoded)
        spec = get_gpt_heterogeneous_layer_spec(config, use_te=False)
    else:
        config = TransformerConfig(**values)
        spec = get_gpt_layer_local_spec(normalization=arguments["normalization"])
    return GPTModel(
        config,
        spec,
        vocab_size=arguments["padded_vocab_size"],
        max_sequence_length=arguments["max_position_embeddings"],
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_base=arguments["rotary_base"],
        rotary_percent=arguments["rotary_percent"],
        rope_scaling=arguments["use_rope_scaling"],
        rope_scaling_factor=arguments["rope_scaling_factor"],
    ).eval()


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


def _logits(model: Any, state: Weights, tokens: Any) -> Any:
    model.load_state_dict(state, strict=True)
    return model.eval()(tokens).logits


REFERENCES: dict[str, Callable[[Weights, dict[str, Any], Any], Any]] = {
    "llama-nemotron": decilm, "baichuan2": baichuan, "chatglm": chatglm,
}  # fmt: skip


def difference(name: str, folder: Path, head: float) -> dict[str, float]:
    """From the reference's logits: of our model, and of it with one matrix of attention rolled by a row.

    Args:
        name: of the sample.
        folder: for files.
        head: what the source's output layer is multiplied by.
    """
    checkpoint, _ = samples()[name].open()
    for key in [key for key in checkpoint.tensors if key in ("lm_head.weight",)]:
        checkpoint.tensors[key] = anyckpt.tensor.from_array(checkpoint.tensors[key].numpy() * head)
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder / "hf")
    anyckpt.convert(source, folder / "core", to="megatron-core")
    identified = models.identify(anyckpt.open(folder / "core"))
    assert identified is not None
    model = built(models.render_config(identified, "megatron-args"))
    files = next((folder / "core").rglob("metadata.json")).parent
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(files))
    model.load_state_dict({key: loaded[key] for key in model.sharded_state_dict()})
    tokens = torch.randint(4, 100, (2, 16), generator=torch.Generator().manual_seed(1))
    length = tokens.shape[1]
    inputs = (
        tokens,
        torch.arange(length)[None].expand_as(tokens),
        torch.triu(torch.ones(1, 1, length, length), 1).bool(),
    )
    weights = {key: torch.from_numpy(tensor.numpy()) for key, tensor in checkpoint.tensors.items()}
    with torch.no_grad():
        expected = REFERENCES[name](weights, checkpoint.config, tokens)
        found = model(*inputs)
        attention = next(p for key, p in model.named_parameters() if key.endswith("linear_qkv.weight"))
        attention.copy_(attention.roll(1, 0))
        changed = model(*inputs)
    scale = float(expected.abs().max())
    return {
        "ours": float((found - expected).abs().max()) / scale,
        "rolled": float((changed - expected).abs().max()) / scale,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        results = {}
        for sample in sys.argv[1:]:
            path = Path(directory) / sample
            path.mkdir()
            results[sample] = difference(sample, path, 3.0 if sample == "baichuan2" else 1.0)
        print(json.dumps(results))
