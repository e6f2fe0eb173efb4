"""One rank of Megatron-Core's BertModel, T5Model or CLIPViTModel, with our weights and arguments.

    python -m tests.models.megatron_encoders RANK WORLD STORE CASES

CASES is a JSON file: a list of dictionaries with ``name``, ``expected`` (inputs and outputs, as a fixture has them),
``ranks`` (our ``megatron-lm`` output, cut for WORLD tensor parallel ranks, local layers) and, where there is one rank,
``whole`` (our ``megatron-core`` output).  Both are loaded strictly.  Rank 0 prints, as JSON, how far each model's
outputs are from those expected.

A program of its own, because Megatron-Core keeps process-wide state.  What is replaced is what needs a GPU only to ask
which one it is or to seed dropout that is off, and the attention of T5, whose bias Megatron-Core's local one refuses.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
torch.Tensor.cuda = lambda self, *args, **options: self  # type: ignore[method-assign, assignment]

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec  # noqa: E402
from megatron.core.models.bert.bert_model import BertModel  # noqa: E402
from megatron.core.models.T5 import t5_spec  # noqa: E402
from megatron.core.models.T5.t5_model import T5Model  # noqa: E402
from megatron.core.models.vision.clip_vit_model import CLIPViTModel  # noqa: E402
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

import anyckpt  # noqa: E402

CudaRNGStatesTracker.fork = lambda self, *names: contextlib.nullcontext()

FUNCTIONS = {
    "relu": torch.nn.functional.relu,
    "quick_gelu": lambda value: value * torch.sigmoid(1.702 * value),
    "gelu_tanh": lambda value: torch.nn.functional.gelu(value, approximate="tanh"),
}
OFF = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "persist_layer_norm")
SAME = (
    "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "normalization",
    "add_bias_linear", "add_qkv_bias", "hidden_dropout", "attention_dropout", "gated_linear_unit",
)  # fmt: skip
OUTSIDE = ("post_layernorm.", "layernorm.", "visual_projection.")
"""What CLIPViTModel has no place for."""


class BiasedAttention(torch.nn.Module):
    """Attention as Transformer Engine's: scores are scaled, then the bias is added, then what is masked is left out."""

    def __init__(self, config: Any, attn_mask_type: Any, softmax_scale: float | None = None, **options: Any) -> None:
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.causal = attn_mask_type.name == "causal"

    def forward(
        self, query: Any, key: Any, value: Any, attention_mask: Any, attention_bias: Any = None, **options: Any
    ) -> Any:
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self.scale
        if attention_bias is not None:
            scores = scores + attention_bias
        if self.causal:
            scores = scores.masked_fill(torch.triu(torch.ones(scores.shape[-2:]), 1).bool(), -1e9)
        mixed = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value)
        return mixed.reshape(*mixed.shape[:2], -1)


def config_of(arguments: Any, layers: int) -> Any:
    function = arguments.get("activation") or ("gelu_tanh" if arguments["openai_gelu"] else None)
    return TransformerConfig(
        **{name: arguments[name] for name in SAME},
        **dict.fromkeys(OFF, False),
        num_layers=layers,
        layernorm_epsilon=arguments["norm_epsilon"],
        activation_func=FUNCTIONS.get(function, torch.nn.functional.gelu),
        softmax_scale=arguments.get("softmax_scale"),
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


def t5_block(layer: Any, layers: int) -> Any:
    parts = layer.submodules
    for attention in (parts.self_attention, parts.cross_attention):
        if getattr(attention, "submodules", None) is not None:
            attention.submodules.core_attention = BiasedAttention
    return TransformerBlockSubmodules([layer] * layers, layer_norm=WrappedTorchNorm)


def build(arguments: Any) -> torch.nn.Module:
    """As Megatron-LM's scripts build it from the arguments, of local layers."""
    shared = {"share_embeddings_and_output_weights": not arguments["untie_embeddings_and_output_weights"]}
    if arguments.get("decoder_num_layers"):
        encoder, decoder = arguments["encoder_num_layers"], arguments["decoder_num_layers"]
        return T5Model(
            config_of(arguments, decoder),
            config_of(arguments, encoder),
            t5_block(t5_spec.encoder_model_with_local_spec(), encoder),
            t5_block(t5_spec.decoder_model_with_local_spec(), decoder),
            vocab_size=arguments["padded_vocab_size"],
            max_sequence_length=arguments["max_position_embeddings"],
            position_embedding_type=arguments["position_embedding_type"],
            relative_attention_num_buckets=arguments.get("relative_attention_num_buckets", 32),
            relative_attention_max_distance=arguments.get("relative_attention_max_distance", 128),
            parallel_output=False,
            **shared,
        ).eval()
    config = config_of(arguments, arguments["num_layers"])
    if arguments.get("vision_model_type"):
        spec = get_vit_layer_with_local_spec()
        spec.submodules.sharded_state_dict_keys_map = bert_layer_local_spec.submodules.sharded_state_dict_keys_map
        return (
            CLIPViTModel(  # Megatron-Core forgets to call these local layers' norms as Transformer Engine's layers do
                config,
                spec,
                ln_pre_impl=WrappedTorchNorm,
                patch_dim=arguments["patch_dim"],
                img_h=arguments["img_h"],
                img_w=arguments["img_w"],
                class_token_len=arguments["class_token_len"],
                model_subtype=arguments["vision_model_type"],
            ).eval()
        )
    return BertModel(
        config,
        arguments["num_tokentypes"],
        bert_layer_local_spec,
        vocab_size=arguments["padded_vocab_size"],
        max_sequence_length=arguments["max_position_embeddings"],
        add_binary_head=arguments["bert_binary_head"],
        parallel_output=False,
        **shared,
    ).eval()


def outputs(model: Any, data: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What the model computes, and what the fixture says."""
    with torch.no_grad():
        if isinstance(model, CLIPViTModel):
            tokens = data["hidden"].shape[1]
            # local layers of a vision transformer are causal unless they get a mask
            found = model(data["pixel_values"], torch.zeros(1, 1, tokens, tokens).bool())
            return [(found, data["hidden"])]
        tokens, vocabulary = data["input_ids"], data["logits"].shape[-1]
        if isinstance(model, BertModel):
            logits, binary = model(tokens, torch.ones_like(tokens), data["token_type_ids"])
            return [(logits[..., :vocabulary], data["logits"]), (binary, data["seq_relationship"])]
        logits = model(tokens, data["decoder_input_ids"], None, None, None)
        return [(logits[..., :vocabulary], data["logits"])]


def difference(model: Any, expected: str) -> float:
    with np.load(expected) as file:
        data = {key: torch.as_tensor(file[key]) for key in file.files}
    return max(float((found - expected).abs().max()) for found, expected in outputs(model, data))


def from_rank_file(ranks: str, arguments: Any, rank: int) -> torch.nn.Module:
    path = next(Path(ranks).glob(f"*/mp_rank_{rank:02d}/model_optim_rng.pt"))
    state = torch.load(path, weights_only=False)["model"]
    model = build(arguments)
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith(OUTSIDE)}, strict=True)
    return model


def from_distributed(whole: str, arguments: Any) -> torch.nn.Module:
    model: Any = build(arguments)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    sharded = model.sharded_state_dict()
    loaded = dist_checkpointing.load(dict(sharded), whole)
    model.load_state_dict({key: loaded[key] for key in sharded}, strict=True)
    return model


if __name__ == "__main__":
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    found = {}
    for case in json.loads(Path(sys.argv[4]).read_text()):
        arguments = anyckpt.open(case["ranks"]).config
        found[case["name"]] = [difference(from_rank_file(case["ranks"], arguments, rank), case["expected"])]
        if "whole" in case:
            found[case["name"]].append(difference(from_distributed(case["whole"], arguments), case["expected"]))
    if rank == 0:
        print(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
